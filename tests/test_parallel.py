"""What a step does with the memory of its state, and where compiled programs are kept."""

import os
import pathlib
import site
import subprocess
import sys

import jax
import numpy as np
import pytest

from latent_diffusion import parallel

ROOT = pathlib.Path(__file__).parent.parent


def addresses(tree):
    return {shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_step_takes_the_memory_of_its_state_and_of_nothing_else(monkeypatch, processes):
    """Called by pmap, and as the compiled program that several processes call."""
    def add(state, frozen, batch, rng):  # returns arrays for which the memory of any argument would do
        mean = parallel.mean_over_devices(batch["x"])
        change = frozen["x"] * mean.sum(0)
        return {name: x + change for name, x in state.items()}, {"change": change, "mean": mean}

    with monkeypatch.context() as patched:
        patched.setattr(jax, "process_count", lambda: processes)
        step = parallel.pmap_step(add)
    x, key = np.arange(6, dtype=np.float32), jax.random.key(0)
    frozen, batch = parallel.replicate({"x": x}), parallel.shard({"x": np.ones((4, 6), np.float32)})
    state = parallel.replicate({"a": x, "b": 10 * x})
    for _ in range(3):
        before, memory = state, addresses(state)
        state, _ = step(state, frozen, batch, key)
        assert all(leaf.is_deleted() for leaf in before.values())
        assert not frozen["x"].is_deleted() and not batch["x"].is_deleted()
    assert addresses(state) == memory
    np.testing.assert_array_equal(parallel.to_host(state)["b"], 10 * x + 3 * 2 * x)


PROGRAM = """
import jax
from latent_diffusion import parallel
parallel.keep_compiled()
jax.jit(lambda x: x + 1)(1.0)
"""


def test_where_compiled_programs_are_kept(tmp_path):
    """In the home directory, where JAX_COMPILATION_CACHE_DIR says, or nowhere if that is empty."""
    given = {"default": {}, "chosen": {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "elsewhere")},
             "none": {"JAX_COMPILATION_CACHE_DIR": ""}}
    inherited = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    programs = []
    for home, chosen in given.items():
        (tmp_path / home).mkdir()
        programs.append(subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, env=inherited | {
            "HOME": str(tmp_path / home), "PYTHONUSERBASE": site.getuserbase(), "PYTHONPATH": str(ROOT),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **chosen}))
    assert [program.wait() for program in programs] == [0, 0, 0]
    kept = {path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("jit_*")}
    assert kept == {"default/.cache/latent_diffusion/jax", "elsewhere"}
