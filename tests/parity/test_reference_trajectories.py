"""The samplers of the reference, spacing "reference": where its own code arrives with the same network and noise."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_cases
from reference_cases import CASES, KEEP, KEY, KNOWN, SHAPE, name_of, network, noise

from latent_diffusion.diffusion import grids, samplers
from latent_diffusion.diffusion.schedule import make_schedule

EXPECTED = json.loads(reference_cases.PATH.read_text())


def ours(method, steps, strength=None, mask=False, quantized=False, v_posterior=0.0, spacing="reference", **options):
    timesteps = 100 if method == "ddpm" else 1000
    schedule = make_schedule("linear", timesteps, v_posterior=v_posterior, **reference_cases.BETAS)
    if strength is not None:
        options["first"] = grids.make(method, schedule, steps, spacing).steps - int(strength * steps)
        alpha, sigma = samplers.first_level(method, schedule, steps, spacing, options["first"])
        options["z_T"] = jnp.asarray(alpha * KNOWN + sigma * noise(0))
    if mask:
        options["known"] = samplers.Known(KNOWN, KEEP)
    if quantized:
        options["x0_fn"] = functools.partial(reference_cases.quantized, library=jnp)

    @jax.jit
    def draw():
        return samplers.sample(lambda z, t: network(z, t[0].astype(jnp.float32), jnp), schedule, KEY, SHAPE,
                               method=method, steps=steps, spacing=spacing, **options)

    return np.asarray(draw())


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_same_end(case):
    expected = np.reshape(EXPECTED[name_of(case)], SHAPE)
    np.testing.assert_allclose(ours(**case), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
