"""Samplers on Gaussian data, where the best prediction and the exact answer have closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.diffusion import process, samplers
from latent_diffusion.diffusion.schedule import make_schedule
from latent_diffusion.errors import UserError

SCHEDULE = make_schedule("linear", 1000, linear_start=0.00085, linear_end=0.012)
MEAN, STD = 0.3, 0.5
KEY = jax.random.key(7, impl="unsafe_rbg")  # compiles faster; the default where keys themselves are tested
THREEFRY = jax.random.key(7)
SHAPE = (4, 4, 4, 2)


def gaussian_denoiser(z_t, t, parameterization="eps", mean=MEAN, std=STD):
    """E[eps | z_t] for data N(mean, std^2), where z_t is N(alpha mean, alpha^2 std^2 + sigma^2); as eps, x0 or v."""
    alpha, sigma = (process.broadcast_to_image(f(t), z_t) for f in (SCHEDULE.alpha, SCHEDULE.sigma))
    eps = sigma * (z_t - alpha * mean) / (alpha**2 * std**2 + sigma**2)
    if parameterization == "eps":
        return eps
    return process.target(SCHEDULE, parameterization, (z_t - sigma * eps) / alpha, eps, t)


@partial(jax.jit, static_argnames=("method", "steps", "parameterization", "spacing", "shape", "clip_x0"))
def draw(shape=SHAPE, parameterization="eps", rng=KEY, **options):
    denoise = partial(gaussian_denoiser, parameterization=parameterization)
    return samplers.sample(denoise, SCHEDULE, rng, shape, parameterization=parameterization, **options)


def exact_flow(z_T):
    """The probability flow of Gaussian data keeps the standard score of each point."""
    acp = SCHEDULE.alphas_cumprod[-1]
    return MEAN + STD * (np.asarray(z_T) - np.sqrt(acp) * MEAN) / np.sqrt(acp * STD**2 + 1 - acp)


def test_ddim_converges_to_the_exact_flow_at_first_order():
    z_T = samplers.initial_noise(KEY, jnp.arange(4), SHAPE)
    error = {n: np.abs(draw(steps=n) - exact_flow(z_T)).max() for n in (125, 250, 500)}
    assert error[500] < 0.02
    assert 1.7 < error[125] / error[250] < 2.3 and 1.7 < error[250] / error[500] < 2.3


@pytest.mark.parametrize(
    "options", [dict(method="ddpm"), dict(eta=1.0), dict(eta=0.0), dict(method="ddpm", v_posterior=1.0)]
)
def test_all_steps_recover_mean_and_deviation(options):
    schedule = make_schedule(
        "linear", 1000, linear_start=0.00085, linear_end=0.012, v_posterior=options.pop("v_posterior", 0.0)
    )
    z = jax.jit(
        lambda: samplers.sample(
            gaussian_denoiser, schedule, KEY, (32, 8, 8, 4), steps=1000, **({"method": "ddim"} | options)
        )
    )()
    n = z.size  # standard errors: STD / sqrt(n) and STD / sqrt(2 n); the flow keeps 3 % of the initial mean's offset
    assert abs(float(z.mean()) - MEAN) < 4 * STD / n**0.5 + 0.011
    assert abs(float(z.std()) - STD) < 4 * STD / (2 * n) ** 0.5 + 0.005


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
def test_a_single_image_is_found_in_one_step(method):
    # Data that is one point: eps is known exactly, so every number of steps must end on the point.
    for steps in (1, 2, 7):
        z = samplers.sample(
            partial(gaussian_denoiser, std=0.0), SCHEDULE, KEY, SHAPE, method=method, steps=steps, eta=0.5
        )
        np.testing.assert_allclose(z, MEAN, atol=1e-5)


@pytest.mark.parametrize("options", [
    dict(eta=0.7), dict(method="ddpm"), dict(spacing="reference", eta=1.0), dict(method="plms")])
def test_parameterizations_agree(options):
    eps, x0, v = (draw(steps=20, parameterization=p, **options) for p in ("eps", "x0", "v"))
    np.testing.assert_allclose(x0, eps, atol=1e-4)
    np.testing.assert_allclose(v, eps, atol=1e-4)


def test_ddim_with_eta_one_is_ancestral_sampling():
    np.testing.assert_allclose(draw(steps=50, eta=1.0), draw(method="ddpm", steps=50), atol=2e-5)


@pytest.mark.parametrize("options", [dict(method="ddpm"), dict(eta=1.0), dict(method="plms")])
def test_an_image_does_not_depend_on_the_batch(options):
    together = draw(rng=THREEFRY, steps=5, indices=jnp.array([5, 2, 9, 0]), **options)
    noise = samplers.initial_noise(THREEFRY, jnp.array([5, 2, 9, 0]), SHAPE)
    for k, index in enumerate((5, 2, 9, 0)):
        indices = jnp.array([index])
        np.testing.assert_array_equal(samplers.initial_noise(THREEFRY, indices, (1, *SHAPE[1:]))[0], noise[k])
        alone = draw((1, *SHAPE[1:]), rng=THREEFRY, steps=5, indices=indices, **options)
        np.testing.assert_allclose(alone[0], together[k], atol=5e-6)
    assert np.unique(np.asarray(noise)).size == noise.size


def test_noise_is_that_of_the_documented_key():
    noise = samplers.initial_noise(THREEFRY, jnp.array([3]), (1, 4, 4, 2))
    key = jax.random.fold_in(jax.random.fold_in(THREEFRY, 3), 0)
    np.testing.assert_array_equal(noise[0], jax.random.normal(key, (4, 4, 2)))


def test_one_scan_and_nothing_recompiles():
    traces = []

    def denoise(z_t, t):
        traces.append(t.shape)
        return gaussian_denoiser(z_t, t)

    @jax.jit
    def run(rng, eta, temperature):
        return samplers.sample(denoise, SCHEDULE, rng, SHAPE, steps=40, eta=eta, temperature=temperature)

    jaxpr = jax.make_jaxpr(run)(KEY, 0.0, 1.0)
    loops = str(jaxpr).count("scan[")
    before = len(traces)
    outputs = [run(KEY, 0.0, 1.0), run(KEY, 0.5, 1.0), run(jax.random.key(8, impl="unsafe_rbg"), 0.0, 0.3)]
    assert loops == 1 and len(traces) == before < 3 and set(traces) == {(4,)}
    assert not np.allclose(outputs[0], outputs[1]) and not np.allclose(outputs[0], outputs[2])


def test_temperature_zero_removes_the_noise_of_the_steps():
    z_T = jnp.zeros(SHAPE)
    z = samplers.sample(gaussian_denoiser, SCHEDULE, KEY, SHAPE, method="ddpm", steps=20, temperature=0.0, z_T=z_T)
    np.testing.assert_array_equal(z, np.broadcast_to(z[:1, :1, :1, :1], SHAPE))


@pytest.mark.parametrize("v_posterior", [0.0, 1.0])
def test_the_last_step_adds_no_noise(v_posterior):
    schedule = make_schedule("linear", 10, linear_start=0.1, linear_end=0.9, v_posterior=v_posterior)

    def constant(z_t, t):
        return jnp.full_like(z_t, 0.25)

    for method in ("ddpm", "ddim"):
        z = samplers.sample(constant, schedule, KEY, SHAPE, method=method, steps=10, eta=1.0, parameterization="x0")
        np.testing.assert_allclose(z, 0.25, atol=1e-6)


def test_reference_spacing_stops_at_the_noise_of_timestep_zero():
    # One known image: the reference's last step leaves alpha(0) image + sigma(0) noise of unit variance.
    z = samplers.sample(
        partial(gaussian_denoiser, std=0.0), SCHEDULE, KEY, (16, 8, 8, 4), steps=50, eta=1.0, spacing="reference"
    )
    acp = SCHEDULE.alphas_cumprod[0]
    np.testing.assert_allclose(z.mean(), np.sqrt(acp) * MEAN, atol=4 * np.sqrt((1 - acp) / z.size))
    np.testing.assert_allclose(z.std(), np.sqrt(1 - acp), rtol=0.05)


# --- PLMS ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(steps=1), dict(steps=7), dict(steps=20, spacing="reference")])
def test_plms_is_ddim_where_eps_is_constant(options):
    # Every combination of equal predictions is that prediction: the weights of each must add up to 1.
    eps = jax.random.normal(jax.random.key(3), SHAPE)
    z_T = samplers.initial_noise(KEY, jnp.arange(4), SHAPE)
    plms, ddim = (samplers.sample(lambda z_t, t: eps, SCHEDULE, KEY, SHAPE, method=method, z_T=z_T, **options)
                  for method in ("plms", "ddim"))
    np.testing.assert_allclose(plms, ddim, atol=2e-5)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_plms_calls_the_network_once_more_than_it_steps(steps):
    seen = []

    def denoise(z_t, t):
        jax.debug.callback(lambda t: seen.append(int(t[0])), t, ordered=True)
        return gaussian_denoiser(z_t, t)

    jax.block_until_ready(samplers.sample(denoise, SCHEDULE, KEY, SHAPE, method="plms", steps=steps))
    jax.effects_barrier()
    visited = [int(t) for t in samplers.timesteps("plms", SCHEDULE, steps)[::-1]]
    # The first step is made twice, the second time from where it led to.
    assert seen == [visited[0], *(visited[1:2] or visited), *visited[1:]] and len(seen) == steps + 1


def test_plms_is_far_closer_to_the_exact_flow_than_ddim():
    z_T = samplers.initial_noise(KEY, jnp.arange(4), SHAPE)

    def error(method, steps):
        return np.abs(draw(method=method, steps=steps) - exact_flow(z_T)).max()

    # Both end with a step to clean data, whose error is of first order and about all that is left to PLMS.
    for steps in (25, 100):
        assert error("plms", steps) < error("ddim", steps) / (2.8 if steps < 50 else 3.8), steps
    assert error("plms", 100) < error("ddim", 250)


def test_plms_by_hand():
    """Six predictions that are random numbers: each step is DDIM's with the weights of Liu et al. 2022, eq. 12, and
    before there are three predictions, with those of Adams and Bashforth's lower orders."""
    steps, acp = 5, SCHEDULE.alphas_cumprod
    t = samplers.timesteps("plms", SCHEDULE, steps)[::-1]
    level = np.append(acp[t], 1.0)
    given = np.random.default_rng(0).standard_normal(1000)

    def move(z, eps, i):
        x0 = (z - np.sqrt(1 - level[i]) * eps) / np.sqrt(level[i])
        return np.sqrt(level[i + 1]) * x0 + np.sqrt(1 - level[i + 1]) * eps

    def predict(z, t):  # it depends on where it is asked, too
        return given[t] + 0.1 * z

    z, old = 0.7, []
    for i in range(steps):
        eps = predict(z, t[i])
        if i == 0:
            combined = (eps + predict(move(z, eps, 0), t[1])) / 2
        elif i == 1:
            combined = (3 * eps - old[-1]) / 2
        elif i == 2:
            combined = (23 * eps - 16 * old[-1] + 5 * old[-2]) / 12
        else:
            combined = (55 * eps - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
        z, old = move(z, combined, i), [*old, eps]
    table = jnp.asarray(given, jnp.float32)
    found = samplers.sample(lambda z_t, t: table[t][:, None, None, None] + 0.1 * z_t, SCHEDULE, KEY, (2, 1, 1, 1),
                            method="plms", steps=steps, z_T=jnp.full((2, 1, 1, 1), 0.7))
    np.testing.assert_allclose(found, z, rtol=1e-3)


def test_plms_with_reference_spacing_stops_at_the_noise_of_timestep_zero():
    z_T = jnp.full(SHAPE, 0.4)  # eps of one known image, from a z_T that is z standard deviations off, stays z
    z = draw_point(z_T, spacing="reference")
    acp, last = SCHEDULE.alphas_cumprod[0], SCHEDULE.alphas_cumprod[981]
    score = (0.4 - np.sqrt(last) * MEAN) / np.sqrt(1 - last)
    np.testing.assert_allclose(z, np.sqrt(acp) * MEAN + np.sqrt(1 - acp) * score, atol=1e-5)
    np.testing.assert_allclose(draw_point(z_T, spacing="clean"), MEAN, atol=1e-5)


def draw_point(z_T, **options):
    return samplers.sample(partial(gaussian_denoiser, std=0.0), SCHEDULE, KEY, SHAPE, method="plms", steps=50, z_T=z_T,
                           **options)


@pytest.mark.parametrize("options", [dict(eta=1.0), dict(temperature=3.0), dict(rng=jax.random.key(9))])
def test_plms_has_no_noise(options):
    z_T = jnp.full(SHAPE, 0.4)
    np.testing.assert_array_equal(draw(method="plms", steps=6, z_T=z_T, **options),
                                  draw(method="plms", steps=6, z_T=z_T))


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
def test_clip_x0(method):
    def far(z_t, t):
        return jnp.full_like(z_t, 3.0)

    z = samplers.sample(far, SCHEDULE, KEY, SHAPE, method=method, steps=10, parameterization="x0", clip_x0=True)
    np.testing.assert_allclose(z, 1.0, atol=1e-5)


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
@pytest.mark.parametrize("total", [2, 10, 1000])
def test_clean_spacing(method, total):
    schedule = make_schedule("linear", total)
    for steps in sorted({1, 2, total // 3 or 1, total // 2, total - 1, total}):
        t = samplers.timesteps(method, schedule, steps)
        assert len(t) == steps and t[-1] == total - 1 and t[0] >= 0
        assert np.all(np.diff(t) >= total // steps) and np.all(np.diff(t) <= -(-total // steps))


def test_clean_spacing_of_the_paper():
    # Lin et al. 2023, table 2, "trailing", 10 of 1000 steps; counted from 1 there.
    t = samplers.timesteps("ddim", SCHEDULE, 10)
    assert list(t + 1) == [100, 200, 300, 400, 500, 600, 700, 800, 900, 1000]


def test_reference_spacing_lengths():
    # From the reference's users: 400 steps run 500, 50 run 50; below 501, exactly these counts crash.
    lengths = {n: len(samplers.timesteps("ddim", SCHEDULE, n, "reference")) for n in (20, 50, 200, 250, 400, 500)}
    assert lengths == {20: 20, 50: 50, 200: 200, 250: 250, 400: 500, 500: 500}
    assert list(samplers.timesteps("ddim", SCHEDULE, 50, "reference")[[0, 1, -1]]) == [1, 21, 981]
    for steps in (27, 111, 300, 333, 501, 999, 1000):
        with pytest.raises(UserError, match=f"{steps} steps leave the schedule"):
            samplers.timesteps("ddim", SCHEDULE, steps, "reference")


def test_reference_spacing_names_counts_that_work():
    with pytest.raises(UserError, match="use 250 or 500 steps, or spacing 'clean'"):
        samplers.timesteps("ddim", SCHEDULE, 300, "reference")
    with pytest.raises(UserError, match="use 500 steps"):
        samplers.timesteps("ddim", SCHEDULE, 1000, "reference")
    with pytest.raises(UserError, match="ddpm runs all 1000"):
        samplers.timesteps("ddpm", SCHEDULE, 50, "reference")
    assert list(samplers.timesteps("ddpm", SCHEDULE, 1000, "reference")) == list(range(1000))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(method="magic"), "'magic'.*ddim, ddpm"),
        (dict(spacing="odd"), "'odd'.*clean, .*reference"),
        (dict(parameterization="flow"), "'flow'.*eps, x0, v"),
        (dict(steps=0), "0 is not between 1 and the 1000"),
        (dict(steps=1001), "1001 is not between"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=message):
        samplers.sample(gaussian_denoiser, SCHEDULE, KEY, SHAPE, **options)
