"""The cells of the notebook, run on a tiny model."""

import json
from pathlib import Path

import pytest

from tests import tiny_models

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"


@pytest.mark.slow  # .ci/run has it
def test_every_cell_runs(tmp_path, monkeypatch):
    tiny_models.save(tiny_models.model("both"), tmp_path)
    monkeypatch.setenv("LDM_WORKDIR", str(tmp_path))
    monkeypatch.chdir(NOTEBOOK.parent)
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(sources) > 5
    names = {}
    for number, source in enumerate(sources):
        exec(compile(source, f"{NOTEBOOK.name}, code cell {number}", "exec"), names)
    assert names["samples"].images.shape == (4, 16, 16, 3) and names["frames"].shape == (1, 8, 16, 16, 3)
