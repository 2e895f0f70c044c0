"""The samplers of higher order against diffusers' schedulers, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from latent_diffusion.diffusion import samplers  # noqa: E402
from latent_diffusion.diffusion.schedule import make_schedule  # noqa: E402

SCHEDULE = make_schedule("linear", 1000, linear_start=0.0015, linear_end=0.0195)
COMMON = dict(num_train_timesteps=1000, beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear")
KEY = jax.random.key(3)
SHAPE = (2, 4, 4, 3)
KARRAS = dict(use_karras_sigmas=True)
TRAILING = dict(timestep_spacing="trailing")


def network(z_t, t, library):
    return 0.4 * z_t + 0.3 * library.sin(1.7 * z_t) + 0.01 * float(np.cos(np.round(float(t)) / 300))


def our_trajectory(**options):
    states = []

    def denoise(z_t, t):
        states.append(np.asarray(z_t))
        return network(z_t, t[0], jnp)

    with jax.disable_jit():
        z_0 = samplers.sample(denoise, SCHEDULE, KEY, SHAPE, **options)
    return [*states, np.asarray(z_0)]


def their_trajectory(scheduler, steps, timesteps=None):
    scheduler.set_timesteps(**(dict(timesteps=timesteps) if timesteps else dict(num_inference_steps=steps)))
    z = torch.from_numpy(np.array(samplers.initial_noise(KEY, jnp.arange(SHAPE[0]), SHAPE)))
    scaled = type(scheduler).__name__[:4] in ("Eule", "Heun", "LMSD")  # theirs is z / alpha
    if scaled:
        z = z * float(np.sqrt(scheduler.sigmas[0] ** 2 + 1))
    states = []
    for t in scheduler.timesteps:
        x = scheduler.scale_model_input(z, t) if scaled else z
        states.append(x.numpy())
        z = scheduler.step(network(x, t, torch), t, z).prev_sample
    return [*states, z.numpy()]


@pytest.mark.parametrize(("method", "spacing", "scheduler", "options"), [
    ("dpmpp_2m", "clean", "DPMSolverMultistepScheduler", TRAILING),
    ("dpmpp_2m", "karras", "DPMSolverMultistepScheduler", KARRAS),
    ("dpmpp_2m", "exponential", "DPMSolverMultistepScheduler", dict(use_exponential_sigmas=True)),
    ("unipc", "clean", "UniPCMultistepScheduler", TRAILING),
    ("unipc", "karras", "UniPCMultistepScheduler", KARRAS),
    ("euler", "karras", "EulerDiscreteScheduler", KARRAS),
    ("euler", "linspace", "EulerDiscreteScheduler", {}),
    ("heun", "karras", "HeunDiscreteScheduler", KARRAS),
    ("lms", "karras", "LMSDiscreteScheduler", KARRAS),
])
def test_every_state(method, spacing, scheduler, options):
    theirs = their_trajectory(getattr(diffusers, scheduler)(**COMMON, **options), 12)
    assert_same(our_trajectory(method=method, steps=12, spacing=spacing), theirs)


@pytest.mark.parametrize("steps", [12, 13])
def test_dpmpp_2s(steps):
    timesteps = [int(t) for t in samplers.timesteps("dpmpp_2s", SCHEDULE, steps)[::-1]]
    scheduler = diffusers.DPMSolverSinglestepScheduler(**COMMON, final_sigmas_type="zero")
    assert_same(our_trajectory(method="dpmpp_2s", steps=steps), their_trajectory(scheduler, steps, timesteps))


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        np.testing.assert_allclose(a, b, atol=5e-5, rtol=5e-5, err_msg=f"state {i}")
