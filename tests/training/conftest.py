"""Whole training steps are large programs, run a few times: compiled without optimization they are ready sooner."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def _compile_fast():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
