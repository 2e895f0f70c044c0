"""Checkpoints on disk: the only file that names orbax.

Layout of a workdir (local or a bucket)::

    checkpoints/<step>/<item>/      one orbax item per tree ("params", "ema", ...), written asynchronously
    checkpoints/<step>/metadata/    JSON: the caller's metadata and the names of the items
    frozen/<name>/                  weights copied in once and never updated, with their own metadata
    imported.json                   where the weights came from, if they were not trained here

Trees are stored as nested dicts of numpy arrays whose keys are the names on the path to each leaf (the fields of a
named tuple or dataclass, the positions "0", "1", ... in a list), so that any tree can be written and read back into the
same structure, and a reader that only wants the weights needs no target. A checkpoint does not depend on the number of
devices or processes: every process calls `save` with the same host tree, and orbax lets process 0 write.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from latent_diffusion.errors import UserError

Tree = Any  # a pytree whose leaves are arrays, numpy arrays or scalars

CHECKPOINTS = "checkpoints"
FROZEN = "frozen"
METADATA = "metadata"
IMPORTED = "imported.json"  # in a workdir whose weights were not trained here: where they came from


class _QuietOrbax(logging.Filter):
    """Drops orbax's records below ERROR: a dozen lines per save, and warnings about what we do on purpose."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or "/orbax/" not in record.pathname.replace("\\", "/")


logging.getLogger("absl").addFilter(_QuietOrbax())  # orbax logs through absl's one logger


def open_manager(workdir: epath.PathLike, *, keep: int = 2, create: bool = True) -> ocp.CheckpointManager:
    """Opens the checkpoints of `workdir` for writing. Call it in every process.

    The manager writes asynchronously: call its `wait_until_finished()` or `close()` before the program ends. Leftovers
    of a save that was killed are removed before the first save. Only one run may have a workdir open for writing;
    readers use `load`.

    Args:
      workdir: directory or bucket path; the steps are in its `checkpoints` folder.
      keep: number of newest checkpoints that are kept.
      create: make the folder if it is missing.

    Raises:
      UserError: the folder is missing and `create` is False.
    """
    directory = _absolute(workdir) / CHECKPOINTS
    if not create and not directory.exists():
        raise UserError(f"{directory.parent} holds no checkpoints (there is no folder {directory})")
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=create, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(directory, options=options)


def save(
    manager: ocp.CheckpointManager,
    step: int,
    items: Mapping[str, Tree],
    metadata: Mapping[str, Any],
    *,
    force: bool = False,
) -> bool:
    """Starts writing a checkpoint and returns while it is being written. Call it in every process with equal trees.

    Args:
      manager: from `open_manager`.
      step: number of the checkpoint.
      items: host trees by item name; each can be read without the others.
      metadata: anything JSON can hold (tuples come back as lists).
      force: write also where the manager's policy would not (a step below the latest one).

    Returns:
      True if the checkpoint is being written; False if this step exists already or lies below the latest one.

    Raises:
      TypeError: the metadata cannot be written as JSON.
    """
    if step in manager.all_steps():
        return False
    return bool(manager.save(step, args=_save_args(items, metadata), force=force))


def restore(
    manager: ocp.CheckpointManager, targets: Mapping[str, Tree], step: int | None = None
) -> tuple[dict[str, Tree], dict[str, Any]]:
    """Reads the items named in `targets` into the structures given there.

    Args:
      manager: from `open_manager`. A save in progress is waited for.
      targets: by item name, a tree of arrays or `jax.ShapeDtypeStruct`; only structure, shapes and dtypes count.
      step: which checkpoint; the latest by default.

    Returns:
      (items, metadata): trees with the structure of `targets` and numpy leaves, and what was given to `save`.

    Raises:
      UserError: there is no such checkpoint or item, it is damaged, or a leaf is missing, superfluous or of another
        shape or dtype; the message names the first such leaf.
    """
    manager.wait_until_finished()
    directory = epath.Path(manager.directory)
    path = directory / str(_choose_step(directory, step))
    saved, metadata = _read(path, tuple(targets))
    return {name: _fit(saved[name], target, f"{path}, {name}") for name, target in targets.items()}, metadata


def load(
    workdir: epath.PathLike, items: tuple[str, ...], step: int | None = None
) -> tuple[dict[str, Tree], dict[str, Any], int]:
    """Reads items of a checkpoint without knowing their structure. It changes nothing, also next to a running training.

    Args:
      workdir: the directory that was given to `open_manager`.
      items: names of the items to read; the others are not touched.
      step: which checkpoint; the latest complete one by default.

    Returns:
      (items, metadata, step): nested dicts with numpy leaves by item name, the metadata and the step read.

    Raises:
      UserError: the workdir, the checkpoint or an item is missing, or the checkpoint is damaged.
    """
    directory = _absolute(workdir) / CHECKPOINTS
    if not directory.parent.exists():
        raise UserError(f"workdir {directory.parent} does not exist")
    step = _choose_step(directory, step)
    trees, metadata = _read(directory / str(step), items)
    return trees, metadata, step


def absolute(path: epath.PathLike) -> str:
    """A path as it is recorded: a bucket's as it is, others independent of the folder a program was started in."""
    return str(_absolute(path))


def choose_step(workdir: epath.PathLike, step: int | None) -> int:
    """The step that `load` would read. Raises UserError if there is no such complete checkpoint."""
    return _choose_step(_absolute(workdir) / CHECKPOINTS, step)


def item_names(workdir: epath.PathLike, step: int | None = None) -> tuple[str, ...]:
    """What `load` can read. Raises UserError as it does."""
    directory = _absolute(workdir) / CHECKPOINTS
    path = directory / str(_choose_step(directory, step))
    return tuple(_read_items(path, {METADATA: ocp.args.JsonRestore()})[METADATA]["items"])


def latest_step(workdir: epath.PathLike) -> int | None:
    """Step of the newest complete checkpoint of `workdir`, or None. Saves in progress or killed do not count."""
    return max(ocp.utils.checkpoint_steps(_absolute(workdir) / CHECKPOINTS), default=None)


def save_frozen(
    workdir: epath.PathLike, tree: Tree, metadata: Mapping[str, Any], *, name: str = "first_stage"
) -> None:
    """Writes weights that will never change to `workdir/frozen/<name>`, all or nothing. Call it in every process.

    Raises:
      UserError: the workdir holds frozen weights of that name already.
    """
    path = _frozen_path(workdir, name)
    if has_frozen(workdir, name=name):
        raise UserError(f"{path} exists already; frozen weights are written once, use another --workdir")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=_save_args({"params": tree}, metadata), force=True)  # replaces an incomplete copy


def has_frozen(workdir: epath.PathLike, *, name: str = "first_stage") -> bool:
    """True if `load_frozen` would find complete weights."""
    path = _frozen_path(workdir, name)
    return path.exists() and ocp.utils.is_checkpoint_finalized(path)


def load_frozen(workdir: epath.PathLike, *, name: str = "first_stage") -> tuple[Tree, dict[str, Any]]:
    """Reads what `save_frozen` wrote: (nested dict with numpy leaves, metadata).

    Raises:
      UserError: there is nothing of that name, or it is damaged.
    """
    path = _frozen_path(workdir, name)
    if not has_frozen(workdir, name=name):
        raise UserError(f"{path} does not exist: {path.parent.parent} holds no frozen weights named {name!r}")
    trees, metadata = _read(path, ("params",))
    return trees["params"], metadata


def digest(tree: Tree) -> str:
    """SHA-256 (hex) of a tree's leaves: path, dtype, shape and bytes in the order of the paths."""
    sha = hashlib.sha256()
    for path, leaf in sorted(_flatten(tree).items()):
        sha.update(json.dumps([path, leaf.dtype.name, leaf.shape]).encode())
        sha.update(np.ascontiguousarray(leaf).tobytes())
    return sha.hexdigest()


# -- trees ------------------------------------------------------------------------------------------------------------


def _key_name(key: Any) -> str:
    """Name of one step on a path: dict key, field of a named tuple or dataclass, position in a list."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"trees with {type(key).__name__} paths cannot be stored")


def _paths(tree: Tree) -> tuple[list[tuple[str, ...]], list[Any], Any]:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return [tuple(map(_key_name, path)) for path, _ in leaves], [leaf for _, leaf in leaves], treedef


def _flatten(tree: Tree) -> dict[tuple[str, ...], np.ndarray]:
    paths, leaves, _ = _paths(tree)
    return dict(zip(paths, map(np.asarray, leaves), strict=True))


def _nest(tree: Tree) -> dict[str, Any]:
    """Any tree as nested dicts with string keys; nodes without leaves (None, optax.EmptyState) vanish."""
    nested: dict[str, Any] = {}
    for path, leaf in _flatten(tree).items():
        *parents, last = path or ("value",)  # a bare leaf gets a name, too
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return nested


def _fit(saved: Tree, target: Tree, where: str) -> Tree:
    """Puts saved leaves into the structure of `target`. orbax would not check shapes of numpy leaves, so we do."""
    found = _flatten(saved)
    paths, leaves, treedef = _paths(target)
    paths = [path or ("value",) for path in paths]
    cure = "use the config that wrote the checkpoint, or another --workdir"
    for path, leaf in zip(paths, leaves, strict=True):
        name = "/".join(path)
        if path not in found:
            raise UserError(f"checkpoint {where}: {name} is missing; {cure}")
        want = leaf if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else np.asarray(leaf)
        have = found[path]
        if tuple(want.shape) != have.shape or np.dtype(want.dtype) != have.dtype:
            saved_as, wanted = f"{have.dtype}{list(have.shape)}", f"{np.dtype(want.dtype)}{list(want.shape)}"
            raise UserError(f"checkpoint {where}: {name} is {saved_as} but the model needs {wanted}; {cure}")
    for path in sorted(set(found) - set(paths)):
        raise UserError(f"checkpoint {where}: {'/'.join(path)} is not in the model; {cure}")
    return jax.tree_util.tree_unflatten(treedef, [found[path] for path in paths])


# -- disk -------------------------------------------------------------------------------------------------------------


def _absolute(path: epath.PathLike) -> epath.Path:
    path = epath.Path(path)
    return path if "://" in str(path) else path.expanduser().resolve()  # orbax refuses relative paths


def _frozen_path(workdir: epath.PathLike, name: str) -> epath.Path:
    return _absolute(workdir) / FROZEN / name


def _save_args(items: Mapping[str, Tree], metadata: Mapping[str, Any]) -> ocp.args.Composite:
    if METADATA in items:
        raise ValueError(f"an item may not be named {METADATA!r}")
    nested = {name: _nest(tree) for name, tree in items.items()}
    # orbax refuses an item without leaves; the record says that it is empty rather than lost
    empty = sorted(name for name, tree in nested.items() if not tree)
    record = {"items": sorted(nested), "empty": empty, METADATA: dict(metadata)}
    json.dumps(record)  # fails here, not in the background thread
    trees = {name: ocp.args.StandardSave(tree) for name, tree in nested.items() if tree}
    return ocp.args.Composite(**trees, **{METADATA: ocp.args.JsonSave(record)})


def _choose_step(directory: epath.Path, step: int | None) -> int:
    steps = sorted(ocp.utils.checkpoint_steps(directory))
    if not steps:
        raise UserError(f"{directory.parent} holds no complete checkpoint; train there first")
    if step is not None and step not in steps:
        available = ", ".join(map(str, steps))
        raise UserError(f"{directory.parent} holds no checkpoint of step {step}; there are {available}")
    return steps[-1] if step is None else step


def _read(path: epath.Path, names: tuple[str, ...]) -> tuple[dict[str, Tree], dict[str, Any]]:
    """Reads items of one checkpoint folder as nested dicts of numpy arrays, and its metadata."""
    try:
        record = _read_items(path, {METADATA: ocp.args.JsonRestore()})[METADATA]
        for name in names:
            if name not in record["items"]:
                raise UserError(f"checkpoint {path} has no item {name!r}; it has {', '.join(record['items'])}")
        stored = {name: ocp.args.StandardRestore() for name in names if name not in record["empty"]}
        trees = _read_items(path, stored) if stored else {}
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, OSError) as error:  # a truncated or missing file, by the kind of file
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # else each of orbax's failed reads is printed at exit
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        cure = "remove that folder to use the one before"
        raise UserError(f"checkpoint {path} is damaged ({reason}); {cure}") from error
    return {name: jax.tree.map(np.asarray, trees[name]) if name in stored else {} for name in names}, record[METADATA]


def _read_items(path: epath.Path, args: dict[str, Any]) -> Mapping[str, Any]:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(path, args=ocp.args.Composite(**args))
