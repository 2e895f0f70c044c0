"""The scripts in benchmarks/ run; what they print is for the documents."""

import os
import pathlib
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
