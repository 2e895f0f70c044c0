"""The forward process, conversions and the loss against closed forms worked out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.diffusion import process
from latent_diffusion.diffusion.schedule import make_schedule
from latent_diffusion.errors import UserError

SCHEDULE = make_schedule("linear", 1000, linear_start=0.0015, linear_end=0.0195)
T = jnp.array([0, 20, 400, 999])
SHAPE = (4, 3, 5, 2)
Z_0 = jax.random.normal(jax.random.key(0), SHAPE)
EPS = jax.random.normal(jax.random.key(1), SHAPE)


def acp():
    return SCHEDULE.alphas_cumprod[np.asarray(T)].reshape(4, 1, 1, 1)


def test_q_sample():
    expected = np.sqrt(acp()) * np.asarray(Z_0, np.float64) + np.sqrt(1 - acp()) * np.asarray(EPS, np.float64)
    np.testing.assert_allclose(process.q_sample(SCHEDULE, Z_0, T, EPS), expected, atol=1e-6)


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_the_true_prediction_gives_back_data_and_noise(parameterization):
    z_t = process.q_sample(SCHEDULE, Z_0, T, EPS)
    prediction = process.target(SCHEDULE, parameterization, Z_0, EPS, T)
    # What float32 allows: data from noise divides by alpha (0.05 at the end), noise from data by sigma (0.04 at first).
    np.testing.assert_allclose(process.to_x0(SCHEDULE, parameterization, prediction, z_t, T), Z_0, atol=2e-5)
    np.testing.assert_allclose(process.to_eps(SCHEDULE, parameterization, prediction, z_t, T), EPS, atol=2e-5)


def test_targets():
    assert process.target(SCHEDULE, "eps", Z_0, EPS, T) is EPS
    assert process.target(SCHEDULE, "x0", Z_0, EPS, T) is Z_0
    expected = np.sqrt(acp()) * np.asarray(EPS) - np.sqrt(1 - acp()) * np.asarray(Z_0)
    np.testing.assert_allclose(process.target(SCHEDULE, "v", Z_0, EPS, T), expected, atol=1e-6)


def test_v_is_the_velocity_along_the_circle():
    # With alpha = cos(phi), sigma = sin(phi): v = d z / d phi (Salimans & Ho 2022, appendix D), by central differences.
    phi, h = np.arctan2(np.sqrt(1 - acp()), np.sqrt(acp())), 1e-4
    z_0, eps = np.asarray(Z_0, np.float64), np.asarray(EPS, np.float64)
    slope = (np.cos(phi + h) * z_0 + np.sin(phi + h) * eps - np.cos(phi - h) * z_0 - np.sin(phi - h) * eps) / (2 * h)
    np.testing.assert_allclose(process.target(SCHEDULE, "v", Z_0, EPS, T), slope, atol=1e-5)


def test_posterior_mean_of_the_first_step_is_the_data():
    z_t = process.q_sample(SCHEDULE, Z_0, T, EPS)
    mean = process.posterior_mean(SCHEDULE, Z_0, z_t, T)
    np.testing.assert_allclose(mean[0], Z_0[0], atol=1e-6)
    # Its average over z_t is alpha(t-1) z_0: the posterior mean is linear in z_t, whose mean is alpha(t) z_0.
    averaged = process.posterior_mean(SCHEDULE, Z_0, jnp.sqrt(acp()) * Z_0, T)
    expected = np.sqrt(SCHEDULE.alphas_cumprod[np.asarray(T)[1:] - 1]).reshape(3, 1, 1, 1) * np.asarray(Z_0)[1:]
    np.testing.assert_allclose(averaged[1:], expected, atol=1e-5)


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_loss_is_composed_as_in_the_reference(parameterization, loss):
    prediction, target = Z_0, EPS
    logvar = jnp.linspace(-0.5, 0.7, 1000)
    difference = np.asarray(Z_0, np.float64) - np.asarray(EPS)
    errors = (np.abs(difference) if loss == "l1" else difference**2).reshape(4, -1).mean(1)
    lv = np.linspace(-0.5, 0.7, 1000)[np.asarray(T)]
    lvlb = SCHEDULE.lvlb_weights(parameterization)[np.asarray(T)]
    expected = 0.9 * np.mean(errors / np.exp(lv) + lv) + 0.1 * np.mean(lvlb * errors)
    total, metrics = process.diffusion_loss(
        SCHEDULE,
        prediction.astype(jnp.float32),
        target,
        T,
        parameterization=parameterization,
        loss=loss,
        l_simple_weight=0.9,
        original_elbo_weight=0.1,
        logvar=logvar,
    )
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_simple"], errors.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_vlb"], np.mean(lvlb * errors), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_gamma"], np.mean(errors / np.exp(lv) + lv), rtol=1e-5)


def test_default_loss_is_the_mean_squared_error():
    total, metrics = process.diffusion_loss(SCHEDULE, Z_0, EPS, T, parameterization="eps")
    np.testing.assert_allclose(total, np.mean((np.asarray(Z_0) - np.asarray(EPS)) ** 2), rtol=1e-6)
    assert set(metrics) == {"loss", "loss_simple", "loss_vlb"}


def test_loss_is_float32_for_bfloat16_predictions():
    total, _ = process.diffusion_loss(SCHEDULE, Z_0.astype(jnp.bfloat16), EPS, T, parameterization="eps")
    assert total.dtype == jnp.float32


def test_learned_logvar_is_optimal_at_log_of_the_error():
    def loss(logvar):
        return process.diffusion_loss(SCHEDULE, Z_0, EPS, T, parameterization="eps", logvar=logvar)[0]

    errors = process.per_example_loss(Z_0, EPS)
    gradient = jax.grad(loss)(jnp.zeros(1000).at[T].set(jnp.log(errors)))
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_min_snr_weighs_the_error_in_the_data_whatever_is_predicted():
    gamma = 5.0
    guess = Z_0 + 0.1 * EPS  # a wrong z_0; the same mistake written in each parameterization
    z_t = process.q_sample(SCHEDULE, Z_0, T, EPS)
    guessed_eps = process.to_eps(SCHEDULE, "x0", guess, z_t, T)
    snr = (acp() / (1 - acp())).ravel()
    expected = np.mean(np.minimum(snr, gamma) * np.asarray(process.per_example_loss(guess, Z_0)))
    for parameterization in ("eps", "x0", "v"):
        total, metrics = process.diffusion_loss(
            SCHEDULE,
            process.target(SCHEDULE, parameterization, guess, guessed_eps, T),
            process.target(SCHEDULE, parameterization, Z_0, EPS, T),
            T,
            parameterization=parameterization,
            min_snr_gamma=gamma,
        )
        np.testing.assert_allclose(total, expected, rtol=1e-3)
    np.testing.assert_allclose(process.min_snr_weights(SCHEDULE, "eps", 1e9), 1, rtol=1e-12)


def test_unknown_names_list_the_choices():
    with pytest.raises(UserError, match="'huber'.*l1, l2"):
        process.diffusion_loss(SCHEDULE, Z_0, EPS, T, parameterization="eps", loss="huber")
    for call in (process.target, process.to_x0, process.to_eps):
        with pytest.raises(UserError, match="'flow'.*eps, x0, v"):
            call(SCHEDULE, "flow", Z_0, EPS, T)


@pytest.mark.parametrize("amount", [0.0, 0.25, 0.5, 1.0])
def test_slerp(amount):
    """In the plane of the two, at the fraction of their angle, and of their norm where that is the same."""
    one, other = np.asarray(Z_0, np.float64), np.asarray(EPS, np.float64)
    flat = one.reshape(4, -1), other.reshape(4, -1)
    norm = np.linalg.norm(flat[0], axis=1)
    other = other * (norm / np.linalg.norm(flat[1], axis=1)).reshape(4, 1, 1, 1)
    found = process.slerp(jnp.asarray(one, jnp.float32), jnp.asarray(other, jnp.float32), jnp.full(4, amount))
    found = np.asarray(found, np.float64)

    def angle(a, b):
        return np.arccos(np.clip((a * b).reshape(4, -1).sum(1) / norm**2, -1, 1))

    np.testing.assert_allclose(np.linalg.norm(found.reshape(4, -1), axis=1), norm, rtol=1e-5)
    np.testing.assert_allclose(angle(one, found), amount * angle(one, other), atol=2e-3)
    np.testing.assert_allclose(angle(found, other), (1 - amount) * angle(one, other), atol=2e-3)


def test_slerp_of_equal_arrays_and_amounts_by_example():
    np.testing.assert_allclose(process.slerp(Z_0, Z_0, jnp.full(4, 0.3)), Z_0, rtol=1e-6)
    found = process.slerp(Z_0, EPS, jnp.array([0.0, 1.0, 0.0, 1.0]))
    np.testing.assert_allclose(found, np.where(np.arange(4).reshape(4, 1, 1, 1) % 2, EPS, Z_0), atol=1e-5)
