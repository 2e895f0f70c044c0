"""The samplers' tables, run in numpy in float64."""

import numpy as np

from latent_diffusion.diffusion import solvers
from latent_diffusion.diffusion.grids import Grid


def smooth_grid(schedule, steps, end):
    """Levels even in log(sigma / alpha), from timestep T - 1 to `end`; their timesteps are not used."""
    acp = schedule.alphas_cumprod[[-1, end]]
    noise_level = np.exp(np.linspace(*np.log(1 / acp - 1) / 2, steps + 1))
    alpha = 1 / np.sqrt(1 + noise_level**2)
    return Grid(np.zeros(steps + 1), alpha, noise_level * alpha)


def run(method, grid, z, to_x0, noises=(), eta=0.0):
    """What `samplers.trajectory` does, for arrays of any shape.

    to_x0: (z, alpha, sigma) -> the predicted data. noises: one for each call.

    Returns: where the network was called, one for each call, and the result.
    """
    calls = solvers.METHODS[method].calls(grid, 0.0, eta)
    states, base, here, history = [], z, z, []
    for i, at in enumerate(calls.at):
        states.append(here)
        x0 = to_x0(here, grid.alpha[at], grid.sigma[at])
        eps = (here - grid.alpha[at] * x0) / grid.sigma[at]
        terms = {"base": base, "x0": x0, "eps": eps} | {f"history{j + 1}": past for j, past in enumerate(history)}
        if len(noises):
            terms["noise"] = noises[i]
        here = _combined(calls.step, terms, i)
        base = here if calls.base is None else _combined(calls.base, terms, i)
        history = [x0 if solvers.METHODS[method].history == "x0" else eps, *history]
    return [*states, here]


def _combined(columns, terms, i):
    for name, values in columns.items():
        assert name in terms or values[i] == 0, (name, i)  # nothing is used before it is there
    return sum(float(values[i]) * terms[name] for name, values in columns.items() if name in terms)
