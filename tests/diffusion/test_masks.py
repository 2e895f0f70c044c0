"""What samplers do besides stepping: masks, later starts, frames and thresholds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.diffusion import grids, samplers, solvers
from latent_diffusion.diffusion.schedule import make_schedule

SCHEDULE = make_schedule("linear", 8, linear_start=0.05, linear_end=0.4)
KEY = jax.random.key(11)
SHAPE = (2, 2, 3, 2)
Z_0 = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
KEEP = np.random.default_rng(1).integers(0, 2, (2, 2, 3, 1)).astype(np.float32)


def network(z, t, library=jnp):
    return 0.4 * z + 0.3 * library.sin(1.7 * z) + 0.1 * library.cos(t)


def noise(counter):
    """That of the documented keys: of the steps, and of the mask from MASK_NOISE on."""
    return np.stack([jax.random.normal(jax.random.fold_in(jax.random.fold_in(KEY, index), counter), SHAPE[1:])
                     for index in range(SHAPE[0])])


def loop(call, carry, rows):
    """lax.scan without compiling it: so the network can be watched, and it is faster for a few calls."""
    rows = {name: np.asarray(values) for name, values in rows.items()}
    for i in range(len(rows["t"])):
        carry, _ = call(carry, {name: jnp.asarray(values[i]) for name, values in rows.items()})
    return carry, None


@pytest.fixture(autouse=True)
def _not_compiled(monkeypatch):
    monkeypatch.setattr(jax.lax, "scan", loop)


def states(predict=network, keep=None, parameterization="eps", **options):
    """Where the network is called, one for each call, and the result."""
    seen = []

    def denoise(z, t):
        seen.append(np.asarray(z))
        return predict(z, t.reshape(-1, 1, 1, 1))

    if keep is not None:
        options["known"] = samplers.Known(jnp.asarray(Z_0), jnp.asarray(keep))
    z = samplers.sample(denoise, SCHEDULE, KEY, SHAPE, parameterization=parameterization, **options)
    return [*seen, np.asarray(z)]


@pytest.mark.parametrize("method", samplers.METHODS)
def test_what_is_kept_stays_bit_by_bit(method):
    everything = states(keep=np.ones_like(KEEP), method=method, steps=3, eta=0.5)[-1]
    np.testing.assert_array_equal(everything, Z_0)
    half, painted = states(keep=KEEP, method=method, steps=3, eta=0.5)[-1], np.broadcast_to(KEEP == 0, SHAPE)
    np.testing.assert_array_equal(half[~painted], Z_0[~painted])
    assert np.all(np.isfinite(half)) and not np.any(half[painted] == Z_0[painted])


@pytest.mark.parametrize("options", [
    dict(method="ddim", eta=0.5), dict(method="ddpm"), dict(method="heun"), dict(method="unipc"),
    dict(method="ddim", spacing="reference"), dict(method="ddpm", spacing="reference", steps=8)], ids=str)
def test_keeping_nothing_is_no_mask(options):
    options = {"steps": 2} | options
    for one, other in zip(states(keep=np.zeros_like(KEEP), **options), states(**options), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("options", [
    dict(method="ddim", eta=0.6, steps=4, spacing="reference"), dict(method="ddpm", steps=8, spacing="reference"),
    dict(method="ddim", eta=0.6, steps=3), dict(method="ddpm", steps=3)], ids=str)
def test_masks_by_hand(options):
    """Before each step the known data is as noisy as there, and exact at the end. The reference leaves out the end, and
    with ddpm replaces after each step, with the level from before it."""
    reference, ddpm = "spacing" in options, options["method"] == "ddpm"
    t = samplers.timesteps(options["method"], SCHEDULE, options["steps"], options.get("spacing", "clean"))[::-1]
    acp = SCHEDULE.alphas_cumprod[t]
    after = np.append(acp[1:], SCHEDULE.alphas_cumprod[0] if reference and not ddpm else 1.0)
    z, expected = noise(0), []
    for i, (now, then) in enumerate(zip(acp, after, strict=True)):
        held = np.sqrt(now) * Z_0 + np.sqrt(1 - now) * noise(i + 1 + samplers.MASK_NOISE)
        if not (reference and ddpm):
            z = KEEP * held + (1 - KEEP) * z
        expected.append(z)
        eps = network(z, t[i], np)
        x0 = (z - np.sqrt(1 - now) * eps) / np.sqrt(now)
        variance = options.get("eta", 1.0) ** 2 * (1 - then) / (1 - now) * (1 - now / then)
        z = np.sqrt(then) * x0 + np.sqrt(1 - then - variance) * eps + np.sqrt(variance) * noise(i + 1)
        if reference and ddpm:
            z = KEEP * held + (1 - KEEP) * z
    expected.append(z if reference else KEEP * Z_0 + (1 - KEEP) * z)
    for one, other in zip(states(keep=KEEP, **options), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5)


@pytest.mark.parametrize("method", ["heun", "dpmpp_2s", "unipc", "plms"])
def test_masks_of_methods_of_several_calls(method):
    """What is known is as noisy as where a step starts; a call within a step sees the same noise, if what the network
    says of the data there is right."""
    grid = grids.make(method, SCHEDULE, 4)
    calls = solvers.METHODS[method].calls(grid, 0.0, 0.0)
    starts = np.ones(len(calls.at)) if calls.starts is None else calls.starts
    seen = states(lambda z, t: jnp.asarray(Z_0), KEEP, "x0", method=method, steps=4)
    assert len(seen) == len(calls.at) + 1
    for i, at in enumerate(calls.at):
        fresh = noise(i + 1 + samplers.MASK_NOISE) if starts[i] else fresh
        np.testing.assert_allclose(KEEP * seen[i], KEEP * (grid.alpha[at] * Z_0 + grid.sigma[at] * fresh), atol=2e-5)


@pytest.mark.parametrize("spacing", ["clean", "karras"])
@pytest.mark.parametrize("first", [1, 4])
def test_a_later_start_is_the_tail(spacing, first):
    whole = states(steps=5, spacing=spacing)
    tail = states(steps=5, spacing=spacing, first=first, z_T=jnp.asarray(whole[first]))
    assert len(tail) == len(whole) - first
    for one, other in zip(tail, whole[first:], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(("method", "frames", "shown"), [
    ("ddim", 1, [4]), ("ddim", 3, [0, 2, 4]), ("ddim", 5, [0, 1, 2, 3, 4]), ("heun", 3, [0, 4, 8])])
def test_frames_are_predictions_of_the_data(method, frames, shown):
    said = []

    def denoise(z, t):
        said.append(network(z, t.reshape(-1, 1, 1, 1)))
        return said[-1]

    z, kept = samplers.trajectory(denoise, SCHEDULE, KEY, SHAPE, method=method, steps=5, parameterization="x0",
                                  frames=frames)
    np.testing.assert_array_equal(kept, np.stack([said[i] for i in shown]))
    np.testing.assert_allclose(z, kept[-1], atol=1e-6)  # the last step is to clean data


def test_threshold_by_hand():
    """One image that reaches beyond 1, and one that does not and stays."""
    said = np.concatenate([3 * Z_0[:1], 0.2 * np.tanh(Z_0[1:])])
    (_, z) = states(lambda z, t: jnp.asarray(said), parameterization="x0", steps=1, threshold=0.8)
    bound = np.quantile(np.abs(said[0]), 0.8)
    assert bound > 1 and np.abs(z).max() == 1
    np.testing.assert_allclose(z, np.concatenate([np.clip(said[:1], -bound, bound) / bound, said[1:]]), atol=1e-6)


def test_threshold_and_the_noise_agree():
    """The first of two steps: the noise is what z holds besides the thresholded data."""
    z, middle, _ = states(lambda z, t: jnp.asarray(5 * Z_0), parameterization="x0", steps=2, threshold=0.9)
    grid = grids.make("ddim", SCHEDULE, 2)
    bound = np.quantile(np.abs(5 * Z_0).reshape(2, -1), 0.9, axis=1).reshape(2, 1, 1, 1)
    x0 = np.clip(5 * Z_0, -bound, bound) / bound
    eps = (z - grid.alpha[0] * x0) / grid.sigma[0]
    np.testing.assert_allclose(middle, grid.alpha[1] * x0 + grid.sigma[1] * eps, atol=1e-5)


def test_calls_are_counted():
    counts = []
    states(method="heun", steps=3, on_call=lambda n: counts.append(int(n)))
    jax.effects_barrier()
    assert counts == [1, 2, 3, 4, 5]
