"""One device and two give the same training: losses, parameters, running statistics; replicas stay equal."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_runs

from latent_diffusion import parallel


@pytest.fixture(scope="module")
def two_devices():
    assert jax.device_count() == 2
    return tiny_runs.run_both_stages()


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """The same steps in a process with one device."""
    file = tmp_path_factory.mktemp("one") / "run.npz"
    flags = os.environ["XLA_FLAGS"].replace("device_count=2", "device_count=1")
    subprocess.run([sys.executable, tiny_runs.__file__, str(file)], check=True, cwd=tiny_runs.ROOT,
                   env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": f"{tiny_runs.ROOT}",
                        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"})
    found = dict(np.load(file))
    assert found.pop("devices") == 1
    return found


@pytest.mark.parametrize("run", ["kl", "actnorm", "ldm"])
def test_one_device_equals_two(one_device, two_devices, run):
    found = tiny_runs.arrays(two_devices)
    names = [name for name in found if name.startswith(run)]
    assert len(names) > 20 and set(one_device) == set(found)
    for name in names:
        np.testing.assert_allclose(found[name], one_device[name], rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("run", ["kl", "ldm"])
def test_replicas_are_bitwise_equal_after_steps(two_devices, run):
    state, _ = two_devices[run]
    assert len(jax.tree.leaves(state)[0].addressable_shards) == 2
    parallel.assert_replicated(state)


def test_assert_replicated_finds_a_missing_mean():
    def forgetful(state, frozen, batch, rng):
        return state + batch["x"].sum(), {}
    step = parallel.pmap_step(forgetful)
    state, _ = step(parallel.replicate(np.float32(0)), {}, parallel.shard({"x": np.arange(4, dtype=np.float32)}),
                    jax.random.key(0))
    with pytest.raises(AssertionError, match="replicas"):
        parallel.assert_replicated({"x": state})
