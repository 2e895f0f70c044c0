"""Guidance by other means, on Gaussian data, where the exact answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.diffusion import guidance
from latent_diffusion.diffusion.schedule import make_schedule

SCHEDULE = make_schedule("linear", 1000, linear_start=0.00085, linear_end=0.012)
MEAN, STD, Y, R = 0.3, 0.5, 0.9, 0.4
Z = jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
T = jnp.array([5, 400, 900])
ALPHA, SIGMA = (level.reshape(3, 1, 1, 1) for level in SCHEDULE.levels(T))


def optimal(parameterization, mean=MEAN, std=STD):
    def denoise(z, t):
        eps = SIGMA * (z - ALPHA * mean) / (ALPHA**2 * std**2 + SIGMA**2)
        x0 = mean + ALPHA * std**2 / (ALPHA**2 * std**2 + SIGMA**2) * (z - ALPHA * mean)
        return {"eps": eps, "x0": x0, "v": ALPHA * eps - SIGMA * x0}[parameterization]
    return denoise


def as_x0(parameterization, prediction):
    return {"eps": (Z - SIGMA * prediction) / ALPHA, "x0": prediction, "v": ALPHA * Z - SIGMA * prediction}[
        parameterization]


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_a_classifier_turns_the_prior_into_the_posterior(parameterization):
    def log_prob(z, t):  # y = x0 + R noise
        variance = STD**2 * SIGMA**2 / (ALPHA**2 * STD**2 + SIGMA**2) + R**2
        return (-((Y - optimal("x0")(z, t)) ** 2) / variance / 2).sum((1, 2, 3))

    correction = guidance.classifier(log_prob, 1.0, SCHEDULE)
    found = guidance.corrected(optimal(parameterization), correction, SCHEDULE, parameterization)(Z, T)
    precision = 1 / STD**2 + 1 / R**2
    exact = optimal(parameterization, (MEAN / STD**2 + Y / R**2) / precision, precision**-0.5)(Z, T)
    np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_toward(parameterization):
    """x0 is affine in z here, with slope `gain`: eps + scale sigma gain (x0 - Y)."""
    gain = ALPHA * STD**2 / (ALPHA**2 * STD**2 + SIGMA**2)
    eps = optimal("eps")(Z, T) + 0.7 * SIGMA * gain * (optimal("x0")(Z, T) - Y)
    found = guidance.toward(optimal(parameterization), lambda x0: ((x0 - Y) ** 2).sum((1, 2, 3)) / 2, 0.7, SCHEDULE,
                            parameterization)(Z, T)
    np.testing.assert_allclose(as_x0(parameterization, found), (Z - SIGMA * eps) / ALPHA, rtol=1e-3, atol=1e-3)


def test_autoguidance_and_rescale():
    def good(z, t):
        return jnp.sin(z)

    def weak(z, t):
        return jnp.cos(2 * z)

    scale = jnp.array([0.5, 1.0, 3.0])
    mixed = weak(Z, T) + scale.reshape(3, 1, 1, 1) * (good(Z, T) - weak(Z, T))
    np.testing.assert_allclose(guidance.autoguidance(good, weak, scale)(Z, T), mixed, rtol=1e-5, atol=1e-6)
    found = guidance.autoguidance(good, weak, scale, rescale=1.0)(Z, T)
    np.testing.assert_allclose(found.std((1, 2, 3)), good(Z, T).std((1, 2, 3)), rtol=1e-5)
    np.testing.assert_array_equal(found[1], good(Z, T)[1])  # scale 1


def test_interval():
    def good(z, t):
        return jnp.sin(z)

    guided = guidance.autoguidance(good, lambda z, t: z, 3.0, interval=(0.3, 3.0), schedule=SCHEDULE)
    levels = SIGMA.ravel() / ALPHA.ravel()
    assert levels[0] < 0.3 < levels[1] < 3.0 < levels[2]
    for t, inside in zip(T, (False, True, False), strict=True):
        expected = Z + 3 * (good(Z, t) - Z) if inside else good(Z, t)
        np.testing.assert_allclose(guided(Z, jnp.full(3, t)), expected, rtol=1e-5, atol=1e-6)
