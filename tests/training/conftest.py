"""Whole training steps are large programs, run a few times: compiled without optimization they are ready sooner, and
runs of one config share them."""

import functools
from unittest import mock

import jax
import pytest

from latent_diffusion import config as config_lib
from latent_diffusion import parallel


@pytest.fixture(scope="module", autouse=True)
def _compile_fast():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", autouse=True)
def _equal_programs_are_traced_once():
    """A program follows from its function, networks and config, in all but what says how long and where a run goes on;
    tracing it anew for each run takes seconds."""
    make, found = parallel._pmap, {}

    def remembered(function, static, in_axes, **options):
        if "config" not in static:
            return make(function, static, in_axes, **options)
        config = config_lib.from_json(config_lib.to_json(static["config"]))
        with config.unlocked():
            del config.checkpoint, config.evaluation, config.training.log_every, config.training.image_every
        given = {name: value for name, value in static.items() if name not in ("config", "tx")}  # tx is of the config
        key = function, in_axes, tuple(options.items()), tuple(given.items()), config_lib.to_json(config)
        if key not in found:
            found[key] = make(function, static, in_axes, **options)
        return found[key]

    with mock.patch.object(parallel, "_pmap", functools.wraps(make)(remembered)):
        yield
