"""The samplers of several steps, and of noise levels, against diffusers: each state of their trajectories."""

import itertools
import sys

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
KARRAS = dict(**COMMON, use_karras_sigmas=True)
TRAILING = dict(**COMMON, timestep_spacing="trailing")
SDE = dict(algorithm_type="sde-dpmsolver++")
KEY = jax.random.key(3)
SHAPE = (2, 4, 4, 3)


def network(z, t, library):
    """Smooth in z; t is rounded, because diffusers rounds some fractional timesteps."""
    return 0.4 * z + 0.3 * library.sin(1.7 * z) + 0.1 * float(np.cos(np.round(float(t)) / 300))


def our_trajectory(**options):
    """Where the network is called, and the result; without jit the scan is a loop that can be watched."""
    states = []

    def denoise(z, t):
        states.append(np.asarray(z))
        return network(z, t[0], jnp)

    with jax.disable_jit():
        z_0 = samplers.sample(denoise, SCHEDULE, KEY, SHAPE, **options)
    return [*states, np.asarray(z_0)]


def their_trajectory(scheduler, steps, timesteps=None):
    """The same of a scheduler, whose z may be z / alpha; it starts with the same noise."""
    scheduler.set_timesteps(**({"timesteps": timesteps} if timesteps else {"num_inference_steps": steps}))
    z = torch.from_numpy(np.array(samplers.initial_noise(KEY, jnp.arange(SHAPE[0]), SHAPE)))
    if type(scheduler).__name__.startswith(("Euler", "Heun", "LMS")):
        z = z * float(np.sqrt(scheduler.sigmas[0] ** 2 + 1))
    states = []
    for t in scheduler.timesteps:
        here = scheduler.scale_model_input(z, t)
        states.append(here.numpy())
        z = scheduler.step(network(here, t, torch), t, z).prev_sample
    return [*states, z.numpy()]


def assert_same(ours, theirs, tolerance=1e-5):
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max(), err_msg=f"state {i}")


@pytest.mark.parametrize(("method", "scheduler", "spacing"), [
    ("dpmpp_2m", lambda: diffusers.DPMSolverMultistepScheduler(**TRAILING), "clean"),
    ("dpmpp_2m", lambda: diffusers.DPMSolverMultistepScheduler(**KARRAS), "karras"),
    ("unipc", lambda: diffusers.UniPCMultistepScheduler(**TRAILING), "clean"),
    ("unipc", lambda: diffusers.UniPCMultistepScheduler(**KARRAS), "karras"),
    ("euler", lambda: diffusers.EulerDiscreteScheduler(**KARRAS), "karras"),
    ("euler", lambda: diffusers.EulerDiscreteScheduler(**COMMON), "linspace"),
    ("euler", lambda: diffusers.EulerDiscreteScheduler(**TRAILING), "clean"),
    ("heun", lambda: diffusers.HeunDiscreteScheduler(**KARRAS), "karras"),
    ("lms", lambda: diffusers.LMSDiscreteScheduler(**KARRAS), "karras"),
    ("euler", lambda: diffusers.EulerDiscreteScheduler(**COMMON, use_exponential_sigmas=True), "exponential"),
])
@pytest.mark.parametrize("steps", [5, 12])
def test_trajectory(method, scheduler, spacing, steps):
    assert_same(our_trajectory(method=method, steps=steps, spacing=spacing), their_trajectory(scheduler(), steps))


@pytest.mark.parametrize("steps", [12, 13])  # an even number ends with two steps of first order
def test_dpmpp_2s(steps):
    """Their own timesteps are others, one more for an uneven number."""
    timesteps = [int(t) for t in samplers.timesteps("dpmpp_2s", SCHEDULE, steps)[::-1]]
    scheduler = diffusers.DPMSolverSinglestepScheduler(**COMMON, final_sigmas_type="zero")
    assert_same(our_trajectory(method="dpmpp_2s", steps=steps), their_trajectory(scheduler, steps, timesteps))


@pytest.mark.parametrize(("spacing", "options"), [
    ("leading", dict(timestep_spacing="leading")), ("leading_1", dict(timestep_spacing="leading", steps_offset=1)),
    ("trailing", dict(timestep_spacing="trailing")), ("linspace", dict(timestep_spacing="linspace"))])
@pytest.mark.parametrize("steps", [2, 7, 20, 50, 300])
def test_timesteps(spacing, options, steps):
    scheduler = (diffusers.EulerDiscreteScheduler if spacing == "linspace" else diffusers.DDIMScheduler)(
        **COMMON, **options)
    scheduler.set_timesteps(steps)
    ours = samplers.timesteps("euler", SCHEDULE, steps, spacing)[::-1]
    np.testing.assert_allclose(ours, scheduler.timesteps, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize(("spacing", "offset"), [("leading", 0), ("leading_1", 1)])
def test_ddim_with_leading_timesteps(spacing, offset):
    """The last step is to clean data, as with their set_alpha_to_one."""
    scheduler = diffusers.DDIMScheduler(**COMMON, timestep_spacing="leading", steps_offset=offset, clip_sample=False)
    assert_same(our_trajectory(method="ddim", steps=20, spacing=spacing), their_trajectory(scheduler, 20))


def our_noise(call):
    """What the samplers add after their call of the network number `call`, from 1 on."""
    return torch.from_numpy(np.array(samplers._noise(KEY, jnp.arange(SHAPE[0]), call, SHAPE)))


@pytest.mark.parametrize(("method", "scheduler", "spacing"), [
    ("euler_ancestral", lambda: diffusers.EulerAncestralDiscreteScheduler(**COMMON), "linspace"),
    ("euler_ancestral", lambda: diffusers.EulerAncestralDiscreteScheduler(**TRAILING), "clean"),
    ("dpmpp_2m_sde", lambda: diffusers.DPMSolverMultistepScheduler(**TRAILING, **SDE), "clean"),
    ("dpmpp_2m_sde", lambda: diffusers.DPMSolverMultistepScheduler(**KARRAS, **SDE), "karras"),
])
@pytest.mark.parametrize("steps", [5, 12])
def test_trajectory_of_noisy_samplers(monkeypatch, method, scheduler, spacing, steps):
    scheduler, calls = scheduler(), itertools.count(1)
    monkeypatch.setattr(
        sys.modules[type(scheduler).__module__], "randn_tensor", lambda *args, **kwargs: our_noise(next(calls)))
    ours = our_trajectory(method=method, steps=steps, spacing=spacing)
    assert_same(ours, their_trajectory(scheduler, steps), tolerance=5e-5)  # theirs adds noise of 80 to z / alpha


@pytest.mark.parametrize(("parameterization", "theirs"), [("v", "v_prediction"), ("x0", "sample")])
@pytest.mark.parametrize(("method", "scheduler", "spacing"), [
    ("ddim", lambda kind: diffusers.DDIMScheduler(**TRAILING, prediction_type=kind, clip_sample=False), "clean"),
    ("dpmpp_2m", lambda kind: diffusers.DPMSolverMultistepScheduler(**KARRAS, prediction_type=kind), "karras"),
    ("unipc", lambda kind: diffusers.UniPCMultistepScheduler(**TRAILING, prediction_type=kind), "clean"),
    ("euler", lambda kind: diffusers.EulerDiscreteScheduler(**KARRAS, prediction_type=kind), "karras"),
])
def test_trajectory_of_other_predictions(method, scheduler, spacing, parameterization, theirs):
    """Ten steps, because their DDIM goes on by T // steps, whatever the timesteps are."""
    ours = our_trajectory(method=method, steps=10, spacing=spacing, parameterization=parameterization)
    assert_same(ours, their_trajectory(scheduler(theirs), 10))
