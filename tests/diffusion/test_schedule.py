"""Schedules against published figures and against closed forms of Gaussian conditioning."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.diffusion import schedule as schedules
from latent_diffusion.errors import UserError

LDM = schedules.make_schedule("linear", 1000, linear_start=0.0015, linear_end=0.0195)


@pytest.mark.parametrize(
    ("name", "options", "snr", "alpha"),
    [
        # Lin et al. 2023 (arXiv 2305.08891), table 1: SNR(T) and sqrt(alphas_cumprod) at the last step.
        ("sqrt_linear", dict(linear_start=1e-4, linear_end=0.02), 4.035993e-05, 0.006353),
        ("cosine", dict(cosine_s=0.008), 2.428735e-09, 4.928220e-05),
        ("linear", dict(linear_start=0.00085, linear_end=0.012), 0.004682, 0.068265),
    ],
)
def test_last_step_matches_published_values(name, options, snr, alpha):
    schedule = schedules.make_schedule(name, 1000, **options)
    last = jnp.array(999)
    np.testing.assert_allclose(schedule.alpha(last), alpha, rtol=2e-4)
    np.testing.assert_allclose(np.exp(schedule.log_snr(last)), snr, rtol=2e-4)


def test_betas_of_each_name():
    options = dict(linear_start=0.0004, linear_end=0.04)
    root = [0.02, 0.11, 0.2]  # evenly spaced between the roots of the ends
    np.testing.assert_allclose(schedules.make_schedule("linear", 3, **options).betas, np.square(root), rtol=1e-12)
    np.testing.assert_allclose(
        schedules.make_schedule("sqrt_linear", 3, **options).betas, [0.0004, 0.0202, 0.04], rtol=1e-12
    )
    np.testing.assert_allclose(
        schedules.make_schedule("sqrt", 3, **options).betas, [0.02, 0.0202**0.5, 0.2], rtol=1e-12
    )


def test_cosine_clips_and_follows_its_formula():
    schedule = schedules.make_schedule("cosine", 1000, cosine_s=0.008)
    assert schedule.betas.max() == 0.999 and np.sum(schedule.betas == 0.999) == 1
    t = 500  # alphas_cumprod is f(t+1) / f(0) until the clip
    f = np.cos((np.array([t + 1, 0]) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(schedule.alphas_cumprod[t], f[0] / f[1], rtol=1e-10)


def test_float64_tables_and_float32_values():
    assert LDM.betas.dtype == LDM.alphas_cumprod.dtype == np.float64
    t = jnp.array([0, 10, 999])
    for values in (LDM.alpha(t), LDM.sigma(t), jax.jit(LDM.log_snr)(t)):
        assert values.dtype == jnp.float32 and values.shape == (3,)
    np.testing.assert_allclose(LDM.alpha(t) ** 2 + LDM.sigma(t) ** 2, 1, rtol=1e-6)
    np.testing.assert_allclose(LDM.alpha(jnp.array(0)) ** 2, 1 - 0.0015, rtol=1e-6)
    np.testing.assert_allclose(np.exp(LDM.log_snr(t)), (LDM.alpha(t) / LDM.sigma(t)) ** 2, rtol=1e-5)


@pytest.mark.parametrize("v_posterior", [0.0, 0.25, 1.0])
def test_posterior_is_bayes_rule(v_posterior):
    schedule = schedules.make_schedule("linear", 100, v_posterior=v_posterior)
    # q(z_{t-1} | z_0) = N(a' z_0, s'^2), q(z_t | z_{t-1}) = N(sqrt(1-b) z_{t-1}, b): the product's precision and mean.
    b, acp_prev = schedule.betas[1:], schedule.alphas_cumprod[:-1]
    precision = (1 - b) / b + 1 / (1 - acp_prev)
    expected = (1 - v_posterior) / precision + v_posterior * b
    np.testing.assert_allclose(schedule.posterior_variance[1:], expected, rtol=1e-9)
    np.testing.assert_allclose(
        schedule.posterior_mean_coef1[1:], np.sqrt(acp_prev) / (1 - acp_prev) / precision, rtol=1e-9
    )
    np.testing.assert_allclose(schedule.posterior_mean_coef2[1:], np.sqrt(1 - b) / b / precision, rtol=1e-9)
    np.testing.assert_allclose(schedule.posterior_log_variance_clipped[1:], np.log(expected), rtol=1e-9)


def test_first_posterior_step_reaches_the_data():
    assert LDM.posterior_variance[0] == 0 and LDM.posterior_mean_coef2[0] == 0
    np.testing.assert_allclose(LDM.posterior_mean_coef1[0], 1, rtol=1e-12)
    np.testing.assert_allclose(LDM.posterior_log_variance_clipped[0], np.log(1e-20))


def test_lvlb_weights():
    acp, var = LDM.alphas_cumprod, LDM.posterior_variance
    # The bound's term |mu - mu_theta|^2 / (2 var): mu depends on eps through z_0 = (z_t - sigma eps) / alpha.
    per_eps = LDM.posterior_mean_coef1 * np.sqrt((1 - acp) / acp)
    weights = LDM.lvlb_weights("eps")
    np.testing.assert_allclose(weights[1:], (per_eps**2)[1:] / (2 * var[1:]), rtol=1e-9)
    assert weights[0] == weights[1] and np.all(np.isfinite(weights))
    weights = LDM.lvlb_weights("x0")
    np.testing.assert_allclose(weights[1:], 0.5 * np.sqrt(acp[1:]) / (2 * 1 - acp[1:]), rtol=1e-12)
    assert weights[0] == weights[1]
    assert np.all(LDM.lvlb_weights("v") == 1)


def test_equal_schedules_are_one_static_argument():
    same = schedules.make_schedule("linear", 1000, linear_start=0.0015, linear_end=0.0195)
    other = schedules.make_schedule("linear", 1000, linear_start=0.0015, linear_end=0.0155)
    assert same == LDM and hash(same) == hash(LDM) and other != LDM and LDM != 3
    traces = []

    def alpha(schedule, t):
        traces.append(1)
        return schedule.alpha(t)

    jitted = jax.jit(alpha, static_argnums=0)
    for schedule in (LDM, same, other):
        jitted(schedule, 3)
    assert len(traces) == 2


def test_from_config():
    section = SimpleNamespace(
        timesteps=1000, beta_schedule="linear", linear_start=0.0015, linear_end=0.0195, cosine_s=0.008, v_posterior=0.0
    )
    assert schedules.from_config(section) == LDM


@pytest.mark.parametrize(
    ("name", "steps", "options", "message"),
    [
        ("line", 10, {}, "beta_schedule.*'line'.*linear, cosine, sqrt_linear, sqrt"),
        ("linear", 1, {}, "at least 2"),
        ("linear", 10, dict(v_posterior=1.5), "v_posterior"),
        ("linear", 10, dict(linear_start=-1.0), "linear_start"),
        ("linear", 10, dict(linear_end=1.5), "betas must lie in"),
    ],
)
def test_mistakes_are_named(name, steps, options, message):
    with pytest.raises(UserError, match=message):
        schedules.make_schedule(name, steps, **options)


def test_unknown_parameterization():
    with pytest.raises(UserError, match="'score'.*eps, x0, v"):
        LDM.lvlb_weights("score")
