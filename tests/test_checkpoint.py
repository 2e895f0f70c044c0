"""Round trips are compared bit by bit; what must be refused is refused by name."""

import hashlib
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import struct

from latent_diffusion import checkpoint
from latent_diffusion.errors import UserError


@struct.dataclass
class State:
    step: np.ndarray
    params: dict
    name: str = struct.field(pytree_node=False, default="static")


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "unet": {"conv_in": {"kernel": rng.normal(size=(3, 3, 4, 8)).astype(np.float32), "bias": np.zeros(8, "f4")}},
        "half": rng.normal(size=(5,)).astype(ml_dtypes.bfloat16),
        "count": np.int32(7),
        "flag": np.asarray(True),
    }


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


@pytest.fixture
def manager(tmp_path):
    manager = checkpoint.open_manager(tmp_path / "run")
    yield manager
    manager.close()


def test_any_tree_comes_back_in_its_own_structure(manager):
    params = make_params()
    opt_state = jax.device_get(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params))
    items = {"state": State(np.asarray(3), params), "opt": opt_state, "stats": {}, "mixed": [1, (2.5, None)]}
    metadata = {"config": {"ch_mult": (1, 2), "lr": 1e-4, "name": None}, "data": {"next_index": 12}}
    assert checkpoint.save(manager, 3, items, metadata)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype), items)
    for targets in (items, abstract):
        restored, read_metadata = checkpoint.restore(manager, targets)
        assert_equal(restored, items)
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(restored))
    assert read_metadata == {"config": {"ch_mult": [1, 2], "lr": 1e-4, "name": None}, "data": {"next_index": 12}}


def test_load_needs_no_target(manager, tmp_path):
    params, adam = make_params(), jax.device_get(optax.adam(1e-3).init({"w": np.ones(2, np.float32)}))
    checkpoint.save(manager, 1, {"params": params, "opt": adam, "stats": {}}, {"a": 1})
    manager.wait_until_finished()
    items, metadata, step = checkpoint.load(tmp_path / "run", ("params", "stats"))
    assert_equal(items["params"], jax.tree.map(np.asarray, params))
    assert (items["stats"], metadata, step) == ({}, {"a": 1}, 1)
    opt = checkpoint.load(tmp_path / "run", ("opt",))[0]["opt"]
    np.testing.assert_array_equal(opt["0"]["mu"]["w"], np.zeros(2))


def test_jax_arrays_are_stored_as_numpy(manager):
    checkpoint.save(manager, 1, {"params": {"w": jax.numpy.arange(3.0)}}, {})
    restored, _ = checkpoint.restore(manager, {"params": {"w": np.zeros(3, np.float32)}})
    np.testing.assert_array_equal(restored["params"]["w"], [0.0, 1.0, 2.0])


def test_newest_are_kept_and_old_steps_are_not_saved(manager, tmp_path):
    def save(step, **kwargs):
        return checkpoint.save(manager, step, {"params": {"w": np.full(2, step)}}, {"step": step}, **kwargs)

    assert checkpoint.latest_step(tmp_path / "run") is None
    assert [save(10), save(10), save(20), save(15)] == [True, False, True, False]
    assert [save(20, force=True), save(30)] == [False, True]
    manager.wait_until_finished()
    assert checkpoint.latest_step(tmp_path / "run") == 30
    assert checkpoint.load(tmp_path / "run", ("params",), 20)[1] == {"step": 20}
    with pytest.raises(UserError, match="no checkpoint of step 10; there are 20, 30"):
        checkpoint.load(tmp_path / "run", ("params",), 10)
    restored, _ = checkpoint.restore(manager, {"params": {"w": np.zeros(2, int)}}, 20)
    np.testing.assert_array_equal(restored["params"]["w"], [20, 20])


def set_leaf(tree, path, value):
    *parents, last = path.split("/")
    node = tree
    for parent in parents:
        node = node[parent]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return tree


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("unet/conv_in/kernel", np.zeros((3, 9), "f4"), r"unet/.*l is float32\[3, 3, 4, 8\] but .* float32\[3, 9\]"),
        ("half", np.zeros(5, np.float32), r"half is bfloat16\[5\] but the model needs float32\[5\]"),
        ("unet/extra", np.zeros(1, np.float32), "unet/extra is missing"),
        ("unet/conv_in/bias", None, "unet/conv_in/bias is not in the model"),
    ],
)
def test_restore_names_the_leaf_that_does_not_fit(manager, path, value, message):
    checkpoint.save(manager, 1, {"params": make_params()}, {})
    with pytest.raises(UserError, match=rf"checkpoints/1, params: .*{message}"):
        checkpoint.restore(manager, {"params": set_leaf(make_params(), path, value)})


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        checkpoint.load(tmp_path / "nowhere", ("params",))
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        checkpoint.load(tmp_path, ("params",))
    with pytest.raises(UserError, match="holds no checkpoints"):
        checkpoint.open_manager(tmp_path / "nowhere", create=False)
    with checkpoint.open_manager(tmp_path) as manager:
        with pytest.raises(UserError, match="holds no complete checkpoint"):
            checkpoint.restore(manager, {"params": {}})
        checkpoint.save(manager, 1, {"params": {"w": np.zeros(1)}, "ema": {}}, {})
    with pytest.raises(UserError, match="no item 'unet'; it has ema, params"):
        checkpoint.load(tmp_path, ("unet",))


def test_metadata_that_is_not_json_fails_at_once(manager):
    with pytest.raises(TypeError):
        checkpoint.save(manager, 1, {"params": {"w": np.zeros(1)}}, {"config": object()})


def test_leftover_of_a_killed_save_does_not_count(tmp_path):
    with checkpoint.open_manager(tmp_path) as manager:
        checkpoint.save(manager, 1, {"params": {"w": np.ones(2)}}, {})
    leftover = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    (leftover / "params.orbax-checkpoint-tmp").mkdir(parents=True)
    assert checkpoint.latest_step(tmp_path) == 1
    assert checkpoint.load(tmp_path, ("params",))[2] == 1
    assert leftover.exists()  # a reader must not disturb a save in progress
    with checkpoint.open_manager(tmp_path) as manager:
        assert checkpoint.save(manager, 2, {"params": {"w": np.zeros(2)}}, {})
    assert not leftover.exists()
    assert checkpoint.load(tmp_path, ("params",))[2] == 2


def test_kill_during_a_save_keeps_the_previous_checkpoint(tmp_path):
    program = """
        import os, sys, numpy as np
        from latent_diffusion import checkpoint
        manager = checkpoint.open_manager(sys.argv[1])
        for step in (1, 2):
            manager.wait_until_finished()
            tree = {str(i): np.full(2_000_000, step, np.float32) for i in range(8)}
            checkpoint.save(manager, step, {"params": tree}, {"step": step})
        os.kill(os.getpid(), 9)  # the second save has only begun
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    repository = Path(checkpoint.__file__).parents[1]
    result = subprocess.run(command, cwd=repository, capture_output=True, timeout=120)
    assert result.returncode == -9, result.stderr.decode()
    items, metadata, step = checkpoint.load(tmp_path, ("params",))
    assert metadata == {"step": step}
    assert all((leaf == step).all() for leaf in items["params"].values())
    with checkpoint.open_manager(tmp_path) as manager:
        assert checkpoint.save(manager, 3, {"params": {"w": np.zeros(2)}}, {})


@pytest.mark.parametrize("file", ["params/_METADATA", "metadata/metadata", "params/d"])
def test_damaged_checkpoint_is_reported_with_its_folder(tmp_path, file):
    with checkpoint.open_manager(tmp_path) as manager:
        checkpoint.save(manager, 4, {"params": make_params()}, {})
    path = tmp_path / "checkpoints" / "4" / file
    for part in path.iterdir() if path.is_dir() else [path]:
        part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    with pytest.raises(UserError, match=r"checkpoints/4 is damaged .*remove that folder"):
        checkpoint.load(tmp_path, ("params",))


def test_frozen_weights_are_written_once(tmp_path):
    params, metadata = jax.tree.map(np.asarray, make_params()), {"source": "stage1", "step": 5}
    assert not checkpoint.has_frozen(tmp_path)
    with pytest.raises(UserError, match="holds no frozen weights named 'first_stage'"):
        checkpoint.load_frozen(tmp_path)
    (tmp_path / "frozen" / "first_stage.orbax-checkpoint-tmp").mkdir(parents=True)  # of a save that was killed
    assert not checkpoint.has_frozen(tmp_path)
    checkpoint.save_frozen(tmp_path, params, metadata)
    tree, read_metadata = checkpoint.load_frozen(tmp_path)
    assert_equal(tree, params)
    assert (read_metadata, checkpoint.has_frozen(tmp_path)) == (metadata, True)
    with pytest.raises(UserError, match="exists already"):
        checkpoint.save_frozen(tmp_path, params, metadata)


def test_digest_covers_names_types_shapes_and_bytes():
    tree = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": {"c": np.int32(1)}}
    expected = hashlib.sha256()
    expected.update(b'[["a", "c"], "int32", []]' + np.int32(1).tobytes())
    expected.update(b'[["b"], "float32", [2, 3]]' + tree["b"].tobytes())
    assert checkpoint.digest(tree) == expected.hexdigest()
    assert checkpoint.digest({"a": tree["a"], "b": np.asfortranarray(tree["b"])}) == expected.hexdigest()
    for other in ({**tree, "b": tree["b"].reshape(3, 2)}, {**tree, "b": tree["b"].astype(np.int32)}, {"b": tree["b"]}):
        assert checkpoint.digest(other) != expected.hexdigest()
