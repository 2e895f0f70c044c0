"""Grids of noise levels: lengths, ends, and formulas written anew."""

import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.diffusion import grids, samplers
from latent_diffusion.diffusion.schedule import make_schedule

SCHEDULE = make_schedule("linear", 1000, linear_start=0.00085, linear_end=0.012)
LINEAR = [spacing for spacing in grids.SPACINGS if not spacing.startswith("reference")]


@pytest.mark.parametrize("spacing", LINEAR)
@pytest.mark.parametrize("total", [2, 10, 1000])
def test_lengths_ends_and_bounds(spacing, total):
    schedule = make_schedule("linear", total)
    counts = {*range(1, min(total, 30) + 1), total // 3 or 1, total // 2, total - 1, total}
    for steps in sorted(counts - ({total} if spacing == "leading_1" else set())):  # T - 1 + 1 is not in the schedule
        grid = grids.make("ddim", schedule, steps, spacing)
        assert grid.steps == steps and grid.t.shape == grid.alpha.shape == grid.sigma.shape == (steps + 1,)
        assert grid.alpha[-1] == 1 and grid.sigma[-1] == 0
        assert np.all(np.diff(grid.sigma) < 0) and np.all(np.diff(grid.t[:-1]) < 0)
        assert np.all((grid.t >= 0) & (grid.t <= total - 1))
        np.testing.assert_allclose(grid.alpha**2 + grid.sigma**2, 1)
        if spacing in ("clean", "trailing", "linspace", "karras", "exponential"):
            assert round(grid.t[0], 6) == total - 1


@pytest.mark.parametrize("spacing", ["karras", "linspace", "quad"])
def test_levels_of_fractional_timesteps(spacing):
    grid = grids.make("ddim", SCHEDULE, 20, spacing)
    alpha, sigma = SCHEDULE.levels(jnp.asarray(grid.t[:-1], jnp.float32))
    np.testing.assert_allclose(alpha, grid.alpha[:-1], atol=1e-4)
    np.testing.assert_allclose(sigma, grid.sigma[:-1], atol=1e-4)


@pytest.mark.parametrize(("method", "steps", "length"), [
    ("ddim", 50, 50), ("ddim", 400, 500), ("plms", 400, 500), ("ddpm", 1000, 1000), ("dpmpp_2m", 20, 20)])
def test_reference_ends_where_the_reference_does(method, steps, length):
    grid = grids.make(method, SCHEDULE, steps, "reference")
    assert grid.steps == length
    np.testing.assert_allclose(grid.alpha[-1], 1 if method == "ddpm" else SCHEDULE.alphas_cumprod[0] ** 0.5)


def test_quad_is_the_reference_s_where_that_repeats_nothing():
    for steps in (2, 10, 20):
        expected = (np.linspace(0, np.sqrt(800), steps) ** 2).astype(int) + 1
        assert list(samplers.timesteps("ddim", SCHEDULE, steps, "quad")) == list(expected)
        assert list(samplers.timesteps("ddim", SCHEDULE, steps, "reference_quad")) == list(expected)


@pytest.mark.parametrize("steps", [1, 10, 50, 250, 500])
def test_uniform_is_the_reference_s_where_steps_divides(steps):
    expected = range(1, 1001, 1000 // steps)
    assert list(samplers.timesteps("ddim", SCHEDULE, steps, "uniform")) == list(expected)


def test_karras_by_hand():
    acp = SCHEDULE.alphas_cumprod
    low, high = ((1 - acp[i]) ** 0.5 / acp[i] ** 0.5 for i in (0, -1))
    expected = [(high ** (1 / 7) + i / 8 * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for i in range(9)] + [0.0]
    np.testing.assert_allclose(grids.make("euler", SCHEDULE, 9, "karras").noise_level, expected)


def test_first_level():
    grid = grids.make("ddim", SCHEDULE, 20, "reference")
    for first, clean, reference in ((0, 0, 0), (5, 5, 4)):  # the reference noises one level more
        alpha, sigma = samplers.first_level("ddim", SCHEDULE, 20, "reference", first)
        assert (alpha, sigma) == (grid.alpha[reference], grid.sigma[reference])
        alpha, _ = samplers.first_level("ddim", SCHEDULE, 20, "clean", first)
        assert alpha == grids.make("ddim", SCHEDULE, 20).alpha[clean]
