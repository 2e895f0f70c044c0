"""Settings of every test: two virtual CPU devices, a compile cache, and jaxtyping's annotations checked at run time."""

import logging
import os
import sys

os.environ.setdefault("NPROC", "16")  # XLA's thread pool; with fewer threads collectives of fake devices can deadlock
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_threefry_partitionable", True)

if not any(name.startswith("latent_diffusion.") for name in sys.modules):
    install_import_hook(["latent_diffusion.models", "latent_diffusion.diffusion", "latent_diffusion.keys",
                         "latent_diffusion.training.autoencoder", "latent_diffusion.training.diffusion"],
                        "beartype.beartype")


def pytest_collection_modifyitems(items):
    """The longest first, so that the processes which share the files of tests end at about the same time."""
    items.sort(key=lambda item: "training" not in item.path.parts)


@pytest.fixture
def compile_cache_of_the_tests(monkeypatch):
    """sample.py keeps one in the home directory otherwise."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")


@pytest.fixture(autouse=True)
def _flags_are_parsed():
    """grain's worker processes ask absl for flags, which only a program's main parses."""
    from absl import flags
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


@pytest.fixture(autouse=True)
def _no_handler_is_left():
    """Programs log to the standard error of their test, which is closed when other tests log."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    for handler in [handler for handler in root.handlers if type(handler) is logging.StreamHandler]:
        root.removeHandler(handler)
