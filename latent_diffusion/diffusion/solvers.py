"""The samplers' steps, each as a table of numbers.

Every method here is a general linear method: where the network is called next is a linear combination of

    base     the point that the step starts from
    x0, eps  what the network predicts where it was called last
    noise    fresh, of unit variance
    history  the predictions (x0 or eps, by method) of the calls before, newest first

with coefficients that depend on the noise levels alone. They are computed here in float64, one row for each call, so
that one loop (`samplers.sample`) runs all methods and nothing is lost where levels are close or far apart. A method of
two calls a step (Heun's, 2S) keeps `base` during the first; UniPC corrects it. In the names below, primes are levels
after the step: z' = alpha' z_0 + sigma' eps.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from latent_diffusion.diffusion.grids import Grid
from latent_diffusion.diffusion.schedule import posterior

Column = Any  # (m,) float64, or traced where eta is


@dataclasses.dataclass(frozen=True)
class Calls:
    """What happens at each of m calls of the network.

    at: (m,) which level of the grid the network is called at.
    step: coefficients (m,) by name, "base", "x0", "eps", "noise", "history1" .., of where it is called next; the last
      row is the result.
    base: the same for the new `base`; None where that is `step`, as for every method of one call a step.
    starts: (m,) whether a step begins with the call.
    """

    at: np.ndarray
    step: dict[str, Column]
    base: dict[str, Column] | None = None
    starts: np.ndarray | None = None


def ddpm(grid: Grid, v_posterior: float, eta: Any) -> Calls:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), the variance as `NoiseSchedule` says; no noise in the last
    step."""
    acp = grid.alpha**2
    q = posterior(acp[:-1], acp[1:], v_posterior)
    q["variance"][-1] = 0.0  # with v_posterior > 0 it is not
    step = {"base": q["coef_z_t"], "x0": q["coef_z_0"], "noise": np.sqrt(q["variance"])}
    return Calls(np.arange(grid.steps), step)


def ddim(grid: Grid, v_posterior: float, eta: Any) -> Calls:
    """DDIM (Song et al. 2021, eq. 12 and 16): z' = alpha' x0 + sqrt(sigma'^2 - s^2) eps + s noise, with s = eta times
    the deviation of ancestral sampling."""
    acp = grid.alpha**2
    variance = eta**2 * posterior(acp[:-1], acp[1:])["variance"]
    # eta > 1 may ask for more noise than the level to be reached has.
    direction = jnp.sqrt(jnp.maximum(grid.sigma[1:] ** 2 - variance, 0.0))
    return Calls(np.arange(grid.steps), {"x0": grid.alpha[1:], "eps": direction, "noise": jnp.sqrt(variance)})


def euler(grid: Grid, v_posterior: float, eta: Any) -> Calls:
    """Euler's method for the probability flow dx/d(noise level) = eps (Karras et al. 2022, eq. 4), where x = z / alpha:
    the same as DDIM with eta 0."""
    return Calls(np.arange(grid.steps), {"x0": grid.alpha[1:], "eps": grid.sigma[1:]})


def euler_ancestral(grid: Grid, v_posterior: float, eta: Any) -> Calls:
    """Euler's method to a lower level than the next, then noise up to that (k-diffusion's sample_euler_ancestral): the
    same as DDIM with eta 1."""
    s, target = grid.noise_level[:-1], grid.noise_level[1:]
    up = np.minimum(target, target * np.sqrt(1 - (target / s) ** 2))
    down = np.sqrt(target**2 - up**2)
    alpha = grid.alpha[1:]
    return Calls(np.arange(grid.steps), {"x0": alpha, "eps": alpha * down, "noise": alpha * up})


def heun(grid: Grid, v_posterior: float, eta: Any) -> Calls:
    """Heun's method (Karras et al. 2022, algorithm 1): Euler's step, then again with the mean of eps at both ends. The
    step to clean data is Euler's, so that n steps are 2 n - 1 calls."""
    rows = []  # (level, step, base, starts)
    for i, clean in enumerate(grid.sigma[1:] == 0):
        euler_step = {"x0": grid.alpha[i + 1], "eps": grid.sigma[i + 1]}
        rows.append((i, euler_step, euler_step if clean else {"base": 1.0}, True))
        if not clean:
            both = _mean_of_two(grid, i)
            rows.append((i + 1, both, both, False))
    return _collect(rows)


def lms(grid: Grid, v_posterior: float, eta: Any, order: int = 4) -> Calls:
    """Linear multistep (k-diffusion's sample_lms): eps as a polynomial of the noise level through this and up to three
    levels before, integrated exactly."""
    s, rows = grid.noise_level, []
    for i in range(grid.steps):
        nodes = s[i - np.arange(min(i + 1, order))]
        weights = []
        for j, node in enumerate(nodes):
            others = np.delete(nodes, j)
            # Relative to s[i]: the levels may span five orders of magnitude.
            lagrange = np.polynomial.Polynomial(np.polynomial.polynomial.polyfromroots(others - s[i]))
            weights.append(lagrange.integ()(s[i + 1] - s[i]) / np.prod(node - others))
        names = ("eps", "history1", "history2", "history3")
        step = dict(zip(names, grid.alpha[i + 1] * np.array(weights), strict=False))
        rows.append((i, step | {"base": grid.alpha[i + 1] / grid.alpha[i]}, None, True))
    return _collect(rows)


_ADAMS_BASHFORTH = np.array([[24, 0, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]]) / 24


def plms(grid: Grid, v_posterior: float, eta: Any) -> Calls:
    """PNDM's linear multistep method (Liu et al. 2022, eq. 12) as CompVis latent-diffusion has it, in n + 1 calls:
    DDIM's step with a combination of eps here and at up to three levels before. The first, which has none before it, is
    made twice: with eps there, and then with the mean of that eps and the one at the point it led to, which is not used
    again.
    """
    (ratio, slope), second = _flow(grid, 0), _mean_of_two(grid, 0)
    rows = [(0, {"base": ratio, "eps": slope}, {"base": 1.0}, True), (min(1, grid.steps - 1), second, second, False)]
    for i in range(1, grid.steps):
        ratio, slope = _flow(grid, i)
        weights = slope * _ADAMS_BASHFORTH[min(i, 3)]
        # The calls before were those at levels i - 1 .. 1, then the second one of the first step, then its first.
        places = [f"history{j + (j >= i)}" for j in range(1, min(i, 3) + 1)]
        step = {"base": ratio, "eps": weights[0]} | dict(zip(places, weights[1:], strict=False))
        rows.append((i, step, step, True))
    return _collect(rows)


def dpmpp_2m(grid: Grid, v_posterior: float, eta: Any) -> Calls:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2). The last of less than 15 steps, and any to clean data, is of
    first order, as in its authors' code."""
    rows = []
    for i in range(grid.steps):
        ratio, gain, h, h_before = _exponential(grid, i)
        last = i == grid.steps - 1 and (grid.sigma[-1] == 0 or grid.steps < 15)
        step = {"base": ratio, "x0": gain}
        if i > 0 and not last:
            step |= _extrapolated(gain, h / h_before)
        rows.append((i, step, None, True))
    return _collect(rows)


def dpmpp_2m_sde(grid: Grid, v_posterior: float, eta: Any) -> Calls:
    """DPM-Solver++(2M) for the reverse SDE, with the midpoint rule (Lu et al. 2022b, section 5; k-diffusion's
    sample_dpmpp_2m_sde with eta 1); its noise is always that of the SDE."""
    rows = []
    for i in range(grid.steps):
        ratio, _, h, h_before = _exponential(grid, i)
        gain = -grid.alpha[i + 1] * np.expm1(-2 * h)
        step = {"base": ratio * np.exp(-h), "x0": gain, "noise": grid.sigma[i + 1] * np.sqrt(-np.expm1(-2 * h))}
        if i > 0 and grid.sigma[i + 1] > 0:
            step |= _extrapolated(gain, h / h_before)
        rows.append((i, step, None, True))
    return _collect(rows)


def dpmpp_2s(grid: Grid, v_posterior: float, eta: Any) -> Calls:
    """DPM-Solver++(2S) (Lu et al. 2022b, algorithm 1): a step spans two of the grid's, with the network called at the
    level between, so that n levels are n calls. A step to clean data is of first order, and single."""
    rows, i, clean = [], 0, grid.sigma[-1] == 0
    while i < grid.steps:
        ratio, gain, h, _ = _exponential(grid, i)
        first = {"base": ratio, "x0": gain}
        if i + 1 < grid.steps - clean:
            rows.append((i, first, {"base": 1.0}, True))
            log_snr = grid.log_snr
            whole = log_snr[i + 2] - log_snr[i]
            gain, share = -grid.alpha[i + 2] * np.expm1(-whole), whole / (2 * h)
            second = {"base": grid.sigma[i + 2] / grid.sigma[i], "x0": gain * share, "history1": gain * (1 - share)}
            rows.append((i + 1, second, second, False))
            i += 2
        else:
            rows.append((i, first, first, True))
            i += 1
    return _collect(rows)


def unipc(grid: Grid, v_posterior: float, eta: Any) -> Calls:
    """UniPC of order 2 with B(h) = e^h - 1 (Zhao et al. 2023, algorithms 5 and 6): the prediction at a point corrects
    the step that led there, and then predicts the next; the last step is of first order."""
    rows, corrected = [], {"base": 1.0}
    order = 1
    for i in range(grid.steps):
        if i > 0:
            corrected = _unified(grid, i - 1, order, correct=True)
        order = 1 if i in (0, grid.steps - 1) else 2
        predicted = _unified(grid, i, order, correct=False)
        from_corrected = predicted.pop("base")
        step = {name: from_corrected * c for name, c in corrected.items()}
        for name, c in predicted.items():
            step[name] = step.get(name, 0.0) + c
        rows.append((i, step, corrected, True))
    return _collect(rows)


def _unified(grid: Grid, i: int, order: int, correct: bool) -> dict[str, float]:
    """UniPC's step from level i to i + 1. The predictions m at the levels i + 1, i and i - 1 are x0, history1 and
    history2 when correcting, which is done with the first; when predicting those at i and i - 1 are x0 and history1."""
    ratio, gain, h, h_before = _exponential(grid, i)
    names = ("x0", "history1", "history2") if correct else (None, "x0", "history1")
    step = {"base": ratio, names[1]: gain}
    weights = np.array([0.5])  # of the differences (m[i - 1] - m[i]) / r and, when correcting, m[i + 1] - m[i]
    r = -h_before / h if order == 2 else 0.0
    if order == 2 and correct:
        phi = (np.expm1(-h) / -h - 1) / np.expm1(-h), ((np.expm1(-h) / -h - 1) / -h - 0.5) * 2 / np.expm1(-h)
        weights = np.linalg.solve([[1.0, 1.0], [r, 1.0]], phi)
    terms = ([(names[2], weights[0] / r)] if order == 2 else []) + ([(names[0], weights[-1])] if correct else [])
    for name, weight in terms:
        step[name] = step.get(name, 0.0) + gain * weight
        step[names[1]] -= gain * weight
    return step


def _flow(grid: Grid, i: int) -> tuple[float, float]:
    """(a, b) of z' = a z + b eps along the probability flow with constant eps, from level i to i + 1."""
    ratio = grid.alpha[i + 1] / grid.alpha[i]
    return ratio, grid.alpha[i + 1] * (grid.noise_level[i + 1] - grid.noise_level[i])


def _mean_of_two(grid: Grid, i: int) -> dict[str, float]:
    """The step from level i to i + 1 with the mean of eps at this call and the one before."""
    ratio, slope = _flow(grid, i)
    return {"base": ratio, "eps": slope / 2, "history1": slope / 2}


def _extrapolated(gain: float, ratio: float) -> dict[str, float]:
    """`gain` times x0 in the middle of the step, on the line through this and the one before; `ratio` of the steps."""
    extra = gain * ratio / 2
    return {"x0": gain + extra, "history1": -extra}


def _exponential(grid: Grid, i: int) -> tuple[float, float, float, float]:
    """(a, b, h, h before) of z' = a z + b x0 along the probability flow with constant x0, from level i to i + 1, where
    h is the step in log(alpha / sigma) (Lu et al. 2022b, eq. 9)."""
    log_snr = grid.log_snr
    h = log_snr[i + 1] - log_snr[i]
    h_before = log_snr[i] - log_snr[i - 1] if i > 0 else np.nan
    return grid.sigma[i + 1] / grid.sigma[i], -grid.alpha[i + 1] * np.expm1(-h), h, h_before


def _collect(rows: list[tuple[int, dict[str, float], dict[str, float] | None, bool]]) -> Calls:
    """The columns of rows (level, step, base, starts)."""
    def columns(dicts: Sequence[dict[str, float]]) -> dict[str, np.ndarray]:
        names = sorted(set().union(*dicts))
        return {name: np.array([row.get(name, 0.0) for row in dicts], np.float64) for name in names}

    at, steps, bases, starts = zip(*rows, strict=True)
    return Calls(np.array(at), columns(steps), None if bases[0] is None else columns(bases), np.array(starts))


@dataclasses.dataclass(frozen=True)
class Method:
    """calls: (grid, v_posterior, eta) -> Calls. history: what it keeps of the calls before, "x0" or "eps". noisy:
    whether it adds noise."""

    calls: Callable[[Grid, float, Any], Calls]
    history: str = "x0"
    noisy: bool = False


METHODS = {
    "ddim": Method(ddim, noisy=True), "ddpm": Method(ddpm, noisy=True), "plms": Method(plms, "eps"),
    "dpmpp_2m": Method(dpmpp_2m), "dpmpp_2m_sde": Method(dpmpp_2m_sde, noisy=True), "dpmpp_2s": Method(dpmpp_2s),
    "unipc": Method(unipc), "euler": Method(euler), "euler_ancestral": Method(euler_ancestral, noisy=True),
    "heun": Method(heun, "eps"), "lms": Method(lms, "eps"),
}
