"""The scripts in benchmarks/ run, what they print is for the documents; and the benchmark with two processes."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from latent_diffusion import images

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("command, said", [
    (["dispatch.py", "--arrays", "3"], ["2 process(es), 3 arrays, pmap_step: "]),
    (["toggles.py", "--config", "configs/ldm_unconditional.py:smoke", "--batch_size", "2", "--rounds", "1"],
     ["without Winograd's convolutions: ", "without bytes and float16 from the host: ", "without donating the state: ",
      "without running one step ahead: ", "without the cache of latents: "]),
    (["toggles.py", "--mode", "sample", "--config", "configs/ldm_class.py:smoke", "--batch_size", "2", "--rounds", "1",
      "--dtype", "bfloat16", "--steps", "2"],
     ["without keys and values before the loop: ", "without kernels in bfloat16 before the loop: "]),
    (["toggles.py", "--mode", "sample", "--config", "configs/ldm_unconditional.py:smoke", "--batch_size", "2",
      "--rounds", "1", "--steps", "2"], ["with everything: "]),
])
def test_script_runs(command, said):
    done = subprocess.run(
        [sys.executable, f"benchmarks/{command[0]}", *command[1:]], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(line in done.stdout for line in said)


@pytest.mark.slow
def test_a_loader_with_workers_is_timed(tmp_path):
    """In a process of its own, whose flags of absl nobody has parsed."""
    for i in range(4):
        images.save_png(tmp_path / f"{i}.png", np.full((16, 16, 3), i, np.uint8))
    done = subprocess.run(
        [sys.executable, "-m", "latent_diffusion.benchmark", "--mode=loader", "--batch_size=2", "--measured=1",
         f"--config=configs/ldm_unconditional.py:smoke,folder={tmp_path}", "--config.data.workers=1"], cwd=ROOT,
        capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "img/s" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "sample", "encode"])
def test_two_processes(mode, tmp_path):
    """Gradients go from one to the other, nothing else does, and the first process alone writes the table."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    both = [subprocess.Popen(
        [sys.executable, "-m", "latent_diffusion.benchmark", "--config", "configs/ldm_unconditional.py:smoke", "--mode",
         mode, "--batch_size=2", "--warmup=1", "--measured=2", f"--output={tmp_path / str(i)}"], cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_COORDINATOR_ADDRESS": address,
             "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i)}) for i in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    (row,) = json.loads((tmp_path / "0" / "benchmark.json").read_text())["rows"]
    assert row["collective_bytes"] == pytest.approx(4 * row["parameters"] * (mode == "train"), rel=0.01)
    assert row["devices"] == 2 and row["batch_size"] == 2 and not (tmp_path / "1" / "benchmark.json").exists()
