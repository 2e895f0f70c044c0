"""A cache of stage-1 latents on disk: written once by running the encoder over a set, read as a source of examples.

Layout: `metadata.json` (written last: a cache without it is incomplete), and per shard NAME-mean.npy and, unless the
latents have no deviation (VQ), NAME-std.npy, float16 (n, flips, h, w, c), and NAME.json with positions, labels,
captions and the sizes of these files (written last of the shard).
"""

import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float
from tqdm import tqdm

from latent_diffusion import files
from latent_diffusion.data.transforms import View
from latent_diffusion.errors import UserError

METADATA, PLAN = "metadata.json", "plan.json"

Latents = Float[np.ndarray, "b i j k"]
Encode = Callable[[np.ndarray], tuple[Latents, Latents | None]]


def write_cache(
    path: epath.PathLike,
    batches: Any,
    encode_fn: Encode,
    metadata: Mapping[str, Any],
    *,
    flips: bool,
    process_index: int = 0,
    process_count: int = 1,
    barrier: Callable[[], Any] = lambda: None,
    batches_per_shard: int = 16,
) -> dict[str, Any]:
    """Encodes one pass over a set and writes the posteriors; what an interrupted run has written is kept and used.

    With several processes all call this, each with its own batches, and write their own shards.

    Args:
      path: the cache's folder, on a disk that all processes see.
      batches: `loader.batches(config, "train_once", ...)` with the field "image" and, if wanted, "label" and "caption".
      encode_fn: images (B, H, W, C), as `batches` has them -> posterior mean and standard deviation (B, h, w, c),
        unscaled latents; None for the deviation where the latents have none (VQ).
      metadata: JSON values that say what the cache is made of (digest of the first stage, the data's keys, ...), which
        a later `open_cache` may demand; label_names, if the set has labels.
      flips: also encodes mirrored images (a mirrored latent is not the latent of the mirrored image).
      barrier: waits for all processes.

    Returns:
      The metadata, to which this adds num_examples, flips, and latents_std, the standard deviation over all values of
      samples of the posteriors; and scale_factor = 1 / latents_std unless given.

    Raises UserError: a cache of something else is there; latents that are not finite in float16.
    """
    path = epath.Path(path)
    plan = {
        "metadata": json.loads(json.dumps(dict(metadata))),
        "flips": bool(flips),
        "process_count": process_count,
        "batches": len(batches),
        "batches_per_shard": batches_per_shard,
    }
    if (path / METADATA).exists():
        raise UserError(f"{path} is a complete cache already; remove it to write another")
    if process_index == 0:
        _start(path, plan)
    barrier()
    _write_shards(path, batches, encode_fn, flips, process_index, batches_per_shard)
    barrier()
    if process_index == 0:
        _write_json(path / METADATA, _summary(path, plan))
    barrier()
    return json.loads((path / METADATA).read_text())


def _start(path: epath.Path, plan: dict[str, Any]) -> None:
    """Keeps the shards of an interrupted run with the same plan; removes those of another."""
    path.mkdir(parents=True, exist_ok=True)
    old = json.loads((path / PLAN).read_text()) if (path / PLAN).exists() else None
    if old is None and any(path.iterdir()):
        raise UserError(f"first_stage.cache={path} is a folder with other files; choose a new one")
    if old != plan:
        for file in path.glob("shard-*"):
            file.unlink()
        _write_json(path / PLAN, plan)


def _write_shards(path, batches, encode_fn, flips: bool, process_index: int, batches_per_shard: int) -> None:
    """Writes the shards of one process that are not there whole."""
    total, prefix = len(batches), f"shard-{process_index:04d}-"
    whole, _ = _read_shards(path, prefix)
    shards = [(f"{prefix}{number:06d}", range(start, min(start + batches_per_shard, total)))
              for number, start in enumerate(range(0, total, batches_per_shard))]
    missing = [(name, steps) for name, steps in shards if name not in whole]
    done = total - sum(len(steps) for _, steps in missing)
    progress = tqdm(total=total, initial=done, desc="encoding the set", unit="batch", disable=process_index != 0)
    for name, steps in missing:
        if batches.get_state()["next_index"] != steps.start:
            batches.set_state({"next_index": steps.start})
        encoded = []
        for _ in steps:
            encoded.append(_encode(next(batches), encode_fn, flips))
            progress.update()
        _write_shard(path / name, encoded)
    progress.close()


def _read_shards(path: epath.Path, prefix: str = "shard-") -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What NAME.json says, for each shard that is whole; and the files that are missing or cut off. (In a bucket files
    are never cut off, and asking for the size of each takes long.)"""
    there = {file.name for file in path.glob(f"{prefix}*")}
    local, whole, broken = _is_local(path), {}, []
    for file in sorted(name for name in there if name.endswith(".json")):
        name = file.removesuffix(".json")
        try:
            facts = json.loads((path / file).read_text())
            sizes = {f"{name}-{key}.npy": size for key, size in facts["bytes"].items()}
        except (json.JSONDecodeError, KeyError):  # cut off; of an older layout
            broken.append(file)
            continue
        lost = [x for x, size in sizes.items() if x not in there or local and (path / x).stat().length != size]
        broken += lost
        if not lost:
            whole[name] = facts
    return whole, broken


def _encode(batch: dict[str, np.ndarray], encode_fn, flips: bool) -> dict[str, Any]:
    """One batch: arrays (n, flips, h, w, c) of its real examples, without the padding."""
    real = batch["valid"] == 1
    means, stds = [], []
    for image in [batch["image"], batch["image"][:, :, ::-1]] if flips else [batch["image"]]:
        mean, std = encode_fn(image)
        means.append(np.asarray(mean, np.float32)[real])
        stds.append(np.zeros_like(means[-1]) if std is None else np.asarray(std, np.float32)[real])
    return {
        "mean": np.stack(means, axis=1),
        "std": np.stack(stds, axis=1),
        "index": batch["index"][real].tolist(),
        "label": batch["label"][real].tolist() if "label" in batch else None,
        "caption": batch["caption"][real].tolist() if "caption" in batch else None,
    }


def _write_shard(path: epath.Path, encoded: list[dict[str, Any]]) -> None:
    facts: dict[str, Any] = {"bytes": {}, "square": 0.0}
    for key in ("index", "label", "caption"):
        parts = [part[key] for part in encoded]
        facts[key] = None if parts[0] is None else sum(parts, [])
    for key in ("mean", "std"):
        exact = np.concatenate([part[key] for part in encoded])
        if key == "std" and not exact.any():  # VQ's: half of the cache would be zeros
            continue
        with np.errstate(over="ignore"):  # an overflow is reported below
            half = exact.astype(np.float16)
        if not np.isfinite(half).all():
            raise UserError(f"the first stage's latents are not finite in float16 (largest: {np.abs(exact).max()})")
        buffer = io.BytesIO()
        np.save(buffer, half)
        files.write_whole(path.parent / f"{path.name}-{key}.npy", buffer.getvalue())
        facts["bytes"][key] = len(buffer.getvalue())
        facts["square"] += float(np.sum(exact**2, dtype=np.float64))  # E z^2 = mean^2 + std^2
        if key == "mean":
            facts |= {"shape": exact.shape, "sum": float(np.sum(exact, dtype=np.float64))}
    _write_json(path.parent / f"{path.name}.json", facts)


def _summary(path: epath.Path, plan: dict[str, Any]) -> dict[str, Any]:
    shards = list(_read_shards(path)[0].values())
    indices = sorted(index for shard in shards for index in shard["index"])
    if indices != list(range(len(indices))):
        raise UserError(f"{path}: the shards do not hold every example once; remove the folder to write it anew")
    values = sum(math.prod(shard["shape"]) for shard in shards)
    mean = sum(shard["sum"] for shard in shards) / values
    std = math.sqrt(max(sum(shard["square"] for shard in shards) / values - mean**2, 0.0))
    found = {"num_examples": len(indices), "flips": plan["flips"], "latents_mean": mean, "latents_std": std}
    return {**found, "scale_factor": 1.0 / std if std > 0 else 1.0, **plan["metadata"]}


def _is_local(path: epath.Path) -> bool:
    return "://" not in str(path)


def _write_json(path: epath.Path, value: Any) -> None:
    files.write_whole(path, json.dumps(value, ensure_ascii=False).encode())


def is_complete(path: epath.PathLike) -> bool:
    """Whether there is a cache that was written to its end."""
    return (epath.Path(path) / METADATA).exists()


def open_cache(path: epath.PathLike, *, expected: Mapping[str, Any] | None = None):
    """Opens a cache as a `sources.Source` for `loader.batches(source=...)`; its metadata are `.source.metadata`.

    Args:
      expected: metadata that the cache must have, such as the digest of the first stage.

    Raises UserError: no complete cache, or one made of something else (naming the key).
    """
    from latent_diffusion.data.sources import Source

    path = epath.Path(path)
    if not is_complete(path):
        raise UserError(f"first_stage.cache={path}: no complete latents cache")
    metadata = json.loads((path / METADATA).read_text())
    for key, value in (expected or {}).items():
        if metadata.get(key) != json.loads(json.dumps(value)):
            made = "by another first stage" if key == "digest" else f"with {key}={metadata.get(key)}, not {value}"
            raise UserError(f"first_stage.cache={path} was made {made}; remove it or choose another folder")
    examples = CachedLatents(path, metadata)
    return Source(examples, tuple(metadata.get("label_names", ())), examples.captions, f"latents cache {path}")


class CachedLatents:
    """Examples of a cache: `image` is a dict of latent_mean and latent_std, float16 (flips, h, w, c).

    Files on a local disk are read example by example; those in a bucket are kept in memory whole. Raises UserError:
    files are missing or cut off.
    """

    def __init__(self, path: epath.Path, metadata: dict[str, Any]):
        self._path, self.metadata = path, metadata
        count = metadata["num_examples"]
        shards, broken = _read_shards(path)
        self._shards = [(name, facts["bytes"], tuple(facts["shape"])) for name, facts in shards.items()]
        self._place = np.full((count, 2), -1)  # shard, row
        labels, captions = np.zeros(count, np.int64), [""] * count
        has_labels = has_captions = False
        for number, facts in enumerate(shards.values()):
            index = np.array(facts["index"], np.int64)  # may be empty: of a process that got padding only
            self._place[index, 0], self._place[index, 1] = number, np.arange(len(index))
            if has_labels := facts["label"] is not None:
                labels[index] = facts["label"]
            if has_captions := facts["caption"] is not None:
                for i, caption in zip(facts["index"], facts["caption"], strict=True):
                    captions[i] = caption if isinstance(caption, str) else tuple(caption)
        if broken or (self._place < 0).any():
            lost = broken[0] if broken else "a shard"
            raise UserError(f"first_stage.cache={path} is not whole, {lost} is missing or cut off; copy all of it "
                            f"again, or remove its {METADATA} to have what is missing written again")
        self._labels = labels if has_labels else None
        self._captions = captions
        self.captions: list[str] | None = None  # the first of each image
        if has_captions:
            self.captions = [x if isinstance(x, str) else next(iter(x), "") for x in captions]
        self._loaded: dict[str, np.ndarray] = {}

    def __getstate__(self):  # worker processes load files themselves
        return {**self.__dict__, "_loaded": {}}

    def __len__(self) -> int:
        return len(self._place)

    def __getitem__(self, index: int) -> dict:
        shard, row = self._place[index]
        latents = {f"latent_{key}": self._read(*self._shards[shard], key, int(row)) for key in ("mean", "std")}
        example = {"image": latents, "name": str(index)}
        if self._labels is not None:
            example["label"] = int(self._labels[index])
        if self.captions is not None:
            example["caption"] = self._captions[index]
        return example

    def _read(self, name: str, sizes: dict[str, int], shape: tuple[int, ...], key: str, row: int) -> np.ndarray:
        file = self._path / f"{name}-{key}.npy"
        if key not in sizes:
            return np.zeros(shape[1:], np.float16)
        if not _is_local(file):
            if file.name not in self._loaded:
                self._loaded[file.name] = np.load(io.BytesIO(file.read_bytes()))
            return self._loaded[file.name][row].copy()
        # No maps of the files: each would keep one open, and a set of a million pictures has thousands.
        count, rows_behind = math.prod(shape[1:]), shape[0] - row
        offset = sizes[key] - rows_behind * count * np.dtype(np.float16).itemsize
        return np.fromfile(file, np.float16, count, offset=offset).reshape(shape[1:])


@dataclass(frozen=True)
class LatentTransform:
    """Chooses the latents of the image or of its mirror image."""

    flip: bool

    def draw(self, rng: np.random.Generator) -> View:
        return View(flip=bool(self.flip and rng.random() < 0.5))

    def apply(self, latents: dict[str, np.ndarray], view: View) -> dict[str, np.ndarray]:
        return {key: value[int(view.flip)] for key, value in latents.items()}


def make_transform(data, source) -> LatentTransform | None:
    """The transform of a cache's examples, None for other sources. Raises UserError where mirror images are missing."""
    if not isinstance(source.source, CachedLatents):
        return None
    if data.flip and not source.source.metadata["flips"]:
        raise UserError(f"data.flip=True, but the {source.where} holds no mirrored latents; remove it to write it anew")
    return LatentTransform(bool(data.flip))
