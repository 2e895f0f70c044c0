"""One device, two, and two processes give the same training: losses, parameters, running statistics; replicas stay
equal; what a step's program sends between devices, and whose memory it uses."""

import os
import socket
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


def start(file, *runs, **environment):
    """The steps in a process with one device, which writes what it found."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=2", "device_count=1")
    return subprocess.Popen(
        [sys.executable, tiny_runs.__file__, str(file), *runs], cwd=tiny_runs.ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": f"{tiny_runs.ROOT}", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
             **environment})


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    file = tmp_path_factory.mktemp("one") / "run.npz"
    assert start(file).wait() == 0
    found = dict(np.load(file))
    assert found.pop("devices") == 1
    return found


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two processes, with one device each, found of stage 2."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    files = [tmp_path_factory.mktemp("two") / f"{i}.npz" for i in range(2)]
    both = [start(file, "ldm", JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(i))
            for i, file in enumerate(files)]
    assert [process.wait() for process in both] == [0, 0]
    return [dict(np.load(file)) for file in files]


@pytest.mark.parametrize("run", ["kl", "actnorm", "ldm"])
def test_one_device_equals_two(one_device, two_devices, run):
    found = tiny_runs.arrays(two_devices)
    names = [name for name in found if name.startswith(run)]
    assert len(names) > 20 and set(one_device) == set(found)
    for name in names:
        np.testing.assert_allclose(found[name], one_device[name], rtol=2e-5, atol=1e-6, err_msg=name)


def test_two_processes_equal_two_devices(two_processes, two_devices):
    expected = tiny_runs.arrays({"ldm": two_devices["ldm"]})
    expected |= {"devices": 2, "local": sum(
        x.mean() for x in jax.tree.leaves(parallel.to_host(two_devices["ldm"][0].params)))}
    for found in two_processes:
        assert set(found) == set(expected)
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("run", ["kl", "ldm"])
def test_replicas_are_bitwise_equal_after_steps(two_devices, run):
    state, _ = two_devices[run]
    assert len(jax.tree.leaves(state)[0].addressable_shards) == 2
    parallel.assert_replicated(state)


def class_run():
    """Stage 2 of classes alone, as context, with Adam."""
    return tiny_runs.diffusion_run(tiny_runs.diffusion_config(
        conditioning=dict(crossattn="class", label=False), model=dict(attention_resolutions=()),
        optimizer=dict(name="adamw")))


@pytest.fixture(scope="module", params=["kl", "ldm", "class"])
def compiled(request, two_devices):
    """(first state, compiled step): two of the runs of `two_devices`, where they were compiled, and another."""
    state, step = {"kl": lambda: tiny_runs.autoencoder_run(tiny_runs.autoencoder_config()),
                   "ldm": lambda: tiny_runs.diffusion_run(tiny_runs.diffusion_config()),
                   "class": class_run}[request.param]()
    batch, frozen = tiny_runs.latent_batch(), parallel.replicate({"null": tiny_runs.NULL})
    if request.param == "kl":
        batch, frozen = tiny_runs.image_batch(), {}
    return state, parallel.compile_ahead(step, state, frozen, parallel.shard(batch), jax.random.key(7))[1]


def size(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_gradients_are_sent_together(compiled):
    """Those of a network in one operation, with the metrics. Stage 1 sends a little before it has them: the moments of
    the latents and of the discriminator's norms, and the last layer's gradients for the adaptive weight."""
    state, program = compiled
    networks = [size(tree) for tree in (getattr(state, "disc_params", {}), state.params) if tree]
    sent = parallel.collectives(program.as_text())
    assert {kind for kind, _ in sent} == {"all-reduce"}
    sizes = sorted(number for _, number in sent)
    gradients, others = sizes[-len(networks):], sizes[:-len(networks)]
    # Of equal gradients (biases of two layers whose outputs are added) the compiler sends one.
    assert gradients == pytest.approx(networks, rel=0.01)
    assert sum(others) < 0.02 * sum(sizes) if len(networks) == 2 else not others


def test_the_new_state_is_where_the_old_one_was(compiled):
    state, program = compiled
    assert program.memory_analysis().alias_size_in_bytes == size(state)


def test_assert_replicated_finds_a_missing_mean():
    def forgetful(state, frozen, batch, rng):
        return state + batch["x"].sum(), {}
    step = parallel.pmap_step(forgetful)
    state, _ = step(parallel.replicate(np.float32(0)), {}, parallel.shard({"x": np.arange(4, dtype=np.float32)}),
                    jax.random.key(0))
    with pytest.raises(AssertionError, match="replicas"):
        parallel.assert_replicated({"x": state})
