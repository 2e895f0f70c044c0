"""The scripts in benchmarks/ run, what they print is for the documents; and the benchmark with two processes."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("command, said", [
    (["dispatch.py", "--arrays", "3"], "2 process(es), 3 arrays, pmap_step: "),
    (["toggles.py", "--config", "configs/ldm_unconditional.py:smoke", "--batch_size", "2", "--rounds", "1"],
     "without Winograd's convolutions: "),
])
def test_script_runs(command, said):
    done = subprocess.run(
        [sys.executable, f"benchmarks/{command[0]}", *command[1:]], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert said in done.stdout


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
