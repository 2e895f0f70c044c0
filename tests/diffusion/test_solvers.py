"""The tables of the samplers on data for which everything is known: a point, and a Gaussian. NumPy, float64."""

import numpy as np
import pytest

from latent_diffusion.diffusion import grids, solvers
from latent_diffusion.diffusion.schedule import make_schedule

SCHEDULE = make_schedule("linear", 1000, linear_start=0.00085, linear_end=0.012)
MEAN, STD = 0.3, 0.5
METHODS = [*solvers.METHODS, "ddim 0.5", "ddim 1"]  # with eta
NOISY = ["ddpm", "ddim 1", "euler_ancestral", "dpmpp_2m_sde"]


def smooth_grid(schedule, steps, end):
    """Levels even in log(sigma / alpha), from timestep T - 1 to `end`; their timesteps are not used."""
    acp = schedule.alphas_cumprod[[-1, end]]
    noise_level = np.exp(np.linspace(*np.log(1 / acp - 1) / 2, steps + 1))
    alpha = 1 / np.sqrt(1 + noise_level**2)
    return grids.Grid(np.zeros(steps + 1), alpha, noise_level * alpha)


def run_table(method, grid, z, to_x0, noises=(), eta=0.0):
    """What `samplers.trajectory` does, for arrays of any shape.

    to_x0: (z, alpha, sigma) -> the predicted data. noises: one for each call.

    Returns: where the network was called, one for each call, and the result.
    """
    calls = solvers.METHODS[method].calls(grid, 0.0, eta)
    steps, bases = ({name: np.asarray(values, np.float64) for name, values in (columns or {}).items()}
                    for columns in (calls.step, calls.base))
    states, base, here, history = [], z, z, []
    for i, at in enumerate(calls.at):
        states.append(here)
        x0 = to_x0(here, grid.alpha[at], grid.sigma[at])
        eps = (here - grid.alpha[at] * x0) / grid.sigma[at]
        terms = {"base": base, "x0": x0, "eps": eps} | {f"history{j + 1}": past for j, past in enumerate(history)}
        if len(noises):
            terms["noise"] = noises[i]
        here = _combined(steps, terms, i)
        base = _combined(bases, terms, i) if bases else here
        history = [x0 if solvers.METHODS[method].history == "x0" else eps, *history]
    return [*states, here]


def _combined(columns, terms, i):
    for name, values in columns.items():
        assert name in terms or values[i] == 0, (name, i)  # nothing is used before it is there
    return sum(values[i] * terms[name] for name, values in columns.items() if name in terms)


def run(name, grid, z, to_x0, noises=()):
    method, _, eta = name.partition(" ")
    return run_table(method, grid, z, to_x0, noises, float(eta or 0))


def table(name, grid):
    method, _, eta = name.partition(" ")
    return solvers.METHODS[method].calls(grid, 0.0, float(eta or 0))


def moments(name, grid, mean, std, start):
    """Means and deviations of the states for Gaussian data and a start N(start), exactly: all is affine, so that each
    state is a vector of the coefficients of 1, the initial noise, and the noise of each call."""
    count = len(table(name, grid).at)
    basis = np.eye(count + 2)

    def to_x0(z, alpha, sigma):
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return mean * basis[0] + gain * (z - alpha * mean * basis[0])

    states = np.array(run(name, grid, start[0] * basis[0] + start[1] * basis[1], to_x0, basis[2:]))
    return states[:, 0], np.sqrt((states[:, 1:] ** 2).sum(1))


def marginal(grid, i, mean=MEAN, std=STD):
    return grid.alpha[i] * mean, np.sqrt(grid.alpha[i] ** 2 * std**2 + grid.sigma[i] ** 2)


@pytest.mark.parametrize("name", METHODS)
def test_a_single_point_is_followed_exactly(name):
    """Data that is one point: every state is alpha x0 + sigma times unit noise, as noisy as where the network is called
    next, and the last is the point. So the coefficients of each row belong together, at all places and lengths."""
    grid_list = [grids.make(name, SCHEDULE, steps, spacing) for steps in (1, 2, 3, 7, 20)
                 for spacing in ("clean", "quad", "karras", "linspace")]
    grid_list += [smooth_grid(SCHEDULE, steps, 100) for steps in (1, 2, 5, 16)]  # that do not end with clean data
    grid_list += [grids.make("ddim", SCHEDULE, steps, "reference") for steps in (1, 4, 20)]
    for grid in grid_list:
        means, deviations = moments(name, grid, 1.7, 0.0, (grid.alpha[0] * 1.7, grid.sigma[0]))
        at = np.append(table(name, grid).at, grid.steps)
        if name == "plms" and grid.steps == 1:  # its second call is told a level where it is not
            means, deviations, at = means[:2], deviations[:2], np.array([0, 1])
        if name == "ddpm" and grid.sigma[-1]:  # it never adds noise in the last step
            means, deviations, at = means[:-1], deviations[:-1], at[:-1]
        if name == "ddpm" and grid.sigma[-1]:  # no noise in the last step, wherever it ends
            means, deviations, at = means[:-1], deviations[:-1], at[:-1]
        np.testing.assert_allclose(means, grid.alpha[at] * 1.7, rtol=3e-7)
        np.testing.assert_allclose(deviations, grid.sigma[at], rtol=3e-6, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_number_of_calls(name):
    for steps in (1, 2, 3, 7, 50):
        calls = table(name, grids.make(name, SCHEDULE, steps))
        count = {"heun": 2 * steps - 1, "plms": steps + 1}.get(name, steps)
        assert calls.at.shape == (count,) and list(calls.at) == sorted(calls.at) and calls.at[0] == 0
        for column in [*calls.step.values(), *(calls.base or {}).values()]:
            assert column.shape == (count,) and np.all(np.isfinite(column))
        starts = np.ones(count) if calls.starts is None else calls.starts
        assert starts.sum() == {"dpmpp_2s": steps - (steps - 1) // 2}.get(name, steps) and starts[0]


@pytest.mark.parametrize("name", solvers.METHODS)
def test_noise(name):
    calls = table(name, grids.make(name, SCHEDULE, 6))
    assert solvers.METHODS[name].noisy == ("noise" in calls.step)
    if solvers.METHODS[name].noisy:  # none in the last step
        noise = np.asarray(calls.step["noise"])
        assert noise[-1] == 0 and np.all((noise[:-1] > 0) == (name != "ddim"))


def test_the_last_ancestral_step_has_no_noise_whatever_the_variance():
    noise = solvers.ddpm(grids.make("ddpm", SCHEDULE, 6), 1.0, 0.0).step["noise"]
    assert noise[-1] == 0 and np.all(noise[:-1] > 0)


ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "plms": 2, "dpmpp_2m": 2, "dpmpp_2s": 2, "unipc": 2, "lms": 3}


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_order_of_convergence_to_the_exact_flow(name, order):
    """The probability flow of Gaussian data keeps the standard score of each point."""
    def to_x0(z, alpha, sigma):
        return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (z - alpha * MEAN)

    start, errors = np.array([1.5, -0.7]), []
    for steps in (40, 80, 160):
        grid = smooth_grid(SCHEDULE, steps, 100)
        (mean, std), (end_mean, end_std) = marginal(grid, 0), marginal(grid, -1)
        errors.append(np.abs(run(name, grid, start, to_x0)[-1] - end_mean - end_std * (start - mean) / std).max())
    found = np.log2(np.divide(errors[:-1], errors[1:]))
    assert np.all(found > order - 0.2) and (order > 2 or np.all(found < order + 0.4)), (errors, found)


@pytest.mark.parametrize(("name", "order"), zip(NOISY, (1, 1, 1, 2), strict=True))
def test_order_of_convergence_of_mean_and_deviation(name, order):
    errors = []
    for steps in (40, 80, 160):
        grid = smooth_grid(SCHEDULE, steps, 100)
        means, deviations = moments(name, grid, MEAN, STD, marginal(grid, 0))
        mean, deviation = marginal(grid, -1)
        errors.append(max(abs(means[-1] - mean), abs(deviations[-1] - deviation)))
    found = np.log2(np.divide(errors[:-1], errors[1:]))
    assert np.all(found > order - 0.2) and np.all(found < order + 0.4)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("spacing", ["clean", "uniform", "karras"])
def test_pure_noise_becomes_the_data(name, spacing):
    means, deviations = moments(name, grids.make(name, SCHEDULE, 100, spacing), MEAN, STD, (0.0, 1.0))
    bound = 0.04 if name in NOISY else 0.02
    assert abs(means[-1] - MEAN) < 0.02 and abs(deviations[-1] - STD) < bound


def assert_same_step(one, other, rtol=1e-6):
    for name in one.step.keys() | other.step.keys():
        np.testing.assert_allclose(one.step.get(name, 0 * one.at), other.step.get(name, 0 * one.at), rtol, 1e-12)


@pytest.mark.parametrize("spacing", ["clean", "quad", "exponential"])
def test_methods_that_are_the_same(spacing):
    grid = grids.make("ddim", SCHEDULE, 9, spacing)
    euler, ddim = table("euler", grid), table("ddim", grid)
    ddim.step.pop("noise")
    assert_same_step(euler, ddim)
    assert_same_step(table("euler_ancestral", grid), table("ddim 1", grid), rtol=1e-4)
    # DDPM's z is alpha x0 + sigma eps
    ddpm = table("ddpm", grid).step
    by_hand = {"x0": ddpm["x0"] + ddpm["base"] * grid.alpha[:-1], "eps": ddpm["base"] * grid.sigma[:-1],
               "noise": ddpm["noise"]}
    for name, values in table("ddim 1", grid).step.items():
        np.testing.assert_allclose(by_hand[name], values, 1e-5, 1e-12)


@pytest.mark.parametrize("name", ["euler", "heun", "lms", "dpmpp_2m", "dpmpp_2s", "unipc"])
def test_one_step_is_that_of_ddim(name):
    for grid in (grids.make(name, SCHEDULE, 1), smooth_grid(SCHEDULE, 1, 100)):
        if name == "heun" and grid.sigma[-1]:
            continue  # it corrects the step
        z, predict = np.array([0.4, -1.1]), lambda z, alpha, sigma: np.sin(3 * z) * alpha
        np.testing.assert_allclose(run(name, grid, z, predict)[-1], run("ddim", grid, z, predict)[-1], rtol=1e-6)
