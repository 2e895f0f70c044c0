"""Masks: what is known stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.diffusion import samplers
from latent_diffusion.diffusion.schedule import make_schedule

SCHEDULE = make_schedule("linear", 12, linear_start=0.05, linear_end=0.3)
KEY = jax.random.key(7)
SHAPE = (2, 2, 2, 1)
Z_0 = jax.random.normal(jax.random.key(1), SHAPE)
KEEP = jnp.zeros(SHAPE).at[:, 0].set(1.0)


@pytest.mark.parametrize("method", ["ddim", "heun", "dpmpp_2s", "unipc"])
def test_what_is_kept_is_kept_exactly(method):
    @jax.jit
    def draw(keep):
        return samplers.sample(lambda z, t: 0.4 * jnp.sin(z), SCHEDULE, KEY, SHAPE, method=method, steps=4,
                               known=samplers.Known(Z_0, keep))

    z = draw(KEEP)
    assert np.all(np.isfinite(z))
    np.testing.assert_array_equal(z[:, 0], Z_0[:, 0])
    np.testing.assert_array_equal(draw(jnp.ones(SHAPE)), Z_0)
