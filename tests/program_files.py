"""Programs and configs, which are no modules of a package, loaded from their files."""

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def load(path: str | Path) -> ModuleType:
    """A new module of the file, whose path is relative to the repository."""
    path = ROOT / path
    spec = importlib.util.spec_from_file_location(f"file_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
