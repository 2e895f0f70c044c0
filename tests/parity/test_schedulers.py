"""Schedules, conversions and samplers against diffusers, step by step with the same noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from diffusers.schedulers import scheduling_ddpm  # noqa: E402

from latent_diffusion.diffusion import process, samplers  # noqa: E402
from latent_diffusion.diffusion.schedule import make_schedule  # noqa: E402

BETAS = dict(linear_start=0.0015, linear_end=0.0195)
SCHEDULE = make_schedule("linear", 1000, **BETAS)
COMMON = dict(num_train_timesteps=1000, beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear")
PREDICTION = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
KEY = jax.random.key(3)
SHAPE = (2, 4, 4, 3)
ATOL = 5e-5


def network(z_t, t, library, parameterization):
    """A smooth function for both libraries: the best answer for Gaussian data, and some ripples."""
    alpha, sigma = SCHEDULE.alphas_cumprod[t] ** 0.5, (1 - SCHEDULE.alphas_cumprod[t]) ** 0.5
    eps = sigma / (0.25 * alpha**2 + sigma**2) * z_t + 0.1 * alpha * library.sin(1.7 * z_t + t / 300)
    x0 = (z_t - sigma * eps) / alpha
    return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[parameterization]


def our_trajectory(schedule=SCHEDULE, parameterization="eps", **options):
    """The states before each step and after the last; without jit the scan is a loop that can be watched."""
    states = []

    def denoise(z_t, t):
        states.append(np.asarray(z_t))
        return network(z_t, int(t[0]), jnp, parameterization)

    with jax.disable_jit():
        z_0 = samplers.sample(denoise, schedule, KEY, SHAPE, parameterization=parameterization, **options)
    return [*states, np.asarray(z_0)]


def noises(count):
    """The noise of each step, from the documented keys."""
    keys = [[jax.random.fold_in(jax.random.fold_in(KEY, k), i) for k in range(SHAPE[0])] for i in range(count + 1)]
    return [torch.from_numpy(np.stack([jax.random.normal(key, SHAPE[1:]) for key in row])) for row in keys]


def their_trajectory(scheduler, steps, monkeypatch=None, parameterization="eps", **options):
    scheduler.set_timesteps(steps)
    noise = noises(len(scheduler.timesteps))
    z, states = noise[0], []
    for i, t in enumerate(scheduler.timesteps):
        states.append(z.numpy())
        if monkeypatch:
            monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, i=i, **__: noise[i + 1])
        elif options.get("eta"):
            options["variance_noise"] = noise[i + 1]
        z = scheduler.step(network(z, int(t), torch, parameterization), int(t), z, **options).prev_sample
    return [*states, z.numpy()]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        np.testing.assert_allclose(a, b, atol=ATOL, rtol=ATOL, err_msg=f"state {i}")


@pytest.mark.parametrize(
    ("name", "theirs", "betas"),
    [
        ("linear", "scaled_linear", BETAS),
        ("sqrt_linear", "linear", dict(linear_start=1e-4, linear_end=2e-2)),
        ("cosine", "squaredcos_cap_v2", dict(cosine_s=0.008)),
    ],
)
def test_alphas_cumprod(name, theirs, betas):
    ends = {"beta_start": betas.get("linear_start", 1e-4), "beta_end": betas.get("linear_end", 2e-2)}
    scheduler = diffusers.DDPMScheduler(1000, beta_schedule=theirs, **ends)
    schedule = make_schedule(name, 1000, **betas)
    np.testing.assert_allclose(schedule.betas[:999], scheduler.betas[:999], rtol=2e-4)
    np.testing.assert_allclose(schedule.alphas_cumprod, scheduler.alphas_cumprod, atol=2e-6)


def test_add_noise_and_velocity():
    scheduler = diffusers.DDPMScheduler(**COMMON)
    z_0, eps = (torch.from_numpy(np.array(jax.random.normal(jax.random.key(i), (4, 4, 4, 3)))) for i in range(2))
    t = np.array([0, 3, 500, 999])
    arguments = SCHEDULE, jnp.asarray(z_0), jnp.asarray(t), jnp.asarray(eps)
    theirs = scheduler.add_noise(z_0, eps, torch.from_numpy(t))
    np.testing.assert_allclose(process.q_sample(*arguments), theirs, atol=ATOL)
    v = process.target(SCHEDULE, "v", arguments[1], arguments[3], arguments[2])
    np.testing.assert_allclose(v, scheduler.get_velocity(z_0, eps, torch.from_numpy(t)), atol=ATOL)


@pytest.mark.parametrize("parameterization", PREDICTION)
@pytest.mark.parametrize("t", [1, 400, 981])
def test_conversion_to_data(parameterization, t):
    scheduler = diffusers.DDIMScheduler(**COMMON, clip_sample=False, prediction_type=PREDICTION[parameterization])
    scheduler.set_timesteps(50)
    z_t, prediction = np.array(jax.random.normal(KEY, (2, 1, 4, 4, 3)))
    theirs = scheduler.step(torch.from_numpy(prediction), t, torch.from_numpy(z_t)).pred_original_sample
    ours = process.to_x0(SCHEDULE, parameterization, jnp.asarray(prediction), jnp.asarray(z_t), jnp.array([t]))
    np.testing.assert_allclose(ours, theirs, atol=ATOL, rtol=ATOL)


@pytest.mark.parametrize("parameterization", PREDICTION)
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("spacing", ["clean", "reference"])
def test_ddim(parameterization, eta, spacing):
    theirs = {
        "reference": dict(timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False),
        "clean": dict(timestep_spacing="trailing", set_alpha_to_one=True),
    }
    scheduler = diffusers.DDIMScheduler(
        **COMMON, **theirs[spacing], clip_sample=False, prediction_type=PREDICTION[parameterization]
    )
    ours = our_trajectory(method="ddim", steps=20, eta=eta, parameterization=parameterization, spacing=spacing)
    assert_same(ours, their_trajectory(scheduler, 20, eta=eta, parameterization=parameterization))


@pytest.mark.parametrize("parameterization", PREDICTION)
@pytest.mark.parametrize("steps", [20, 7])
def test_strided_ddpm(parameterization, steps, monkeypatch):
    scheduler = diffusers.DDPMScheduler(
        **COMMON, clip_sample=False, timestep_spacing="trailing", prediction_type=PREDICTION[parameterization]
    )
    ours = our_trajectory(method="ddpm", steps=steps, parameterization=parameterization)
    assert_same(ours, their_trajectory(scheduler, steps, monkeypatch, parameterization))


@pytest.mark.parametrize(("v_posterior", "variance"), [(0.0, "fixed_small"), (1.0, "fixed_large")])
def test_full_ddpm(v_posterior, variance, monkeypatch):
    scheduler = diffusers.DDPMScheduler(
        **(COMMON | dict(num_train_timesteps=30)), clip_sample=False, variance_type=variance
    )
    schedule = make_schedule("linear", 30, **BETAS, v_posterior=v_posterior)
    ours = our_trajectory(schedule, method="ddpm", steps=30)
    assert_same(ours, their_trajectory(scheduler, 30, monkeypatch))


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
def test_clipping(method, monkeypatch):
    options = dict(**COMMON, clip_sample=True, timestep_spacing="trailing")
    if method == "ddim":
        theirs = their_trajectory(diffusers.DDIMScheduler(**options), 20, use_clipped_model_output=True)
    else:
        theirs = their_trajectory(diffusers.DDPMScheduler(**options), 20, monkeypatch)
    assert_same(our_trajectory(method=method, steps=20, clip_x0=True), theirs)


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 400, 999, 1000])
def test_clean_timesteps_are_their_trailing_ones(steps):
    scheduler = diffusers.DDIMScheduler(**COMMON, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    np.testing.assert_array_equal(samplers.timesteps("ddim", SCHEDULE, steps)[::-1], scheduler.timesteps)


@pytest.mark.parametrize("steps", [1, 10, 50, 100, 250, 500])
def test_reference_timesteps_are_their_leading_ones(steps):
    scheduler = diffusers.DDIMScheduler(**COMMON, timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(steps)
    np.testing.assert_array_equal(samplers.timesteps("ddim", SCHEDULE, steps, "reference")[::-1], scheduler.timesteps)
