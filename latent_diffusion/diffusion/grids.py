"""The noise levels that a sampler visits: how many, which, and where it ends. NumPy, float64.

A level is a pair (alpha, sigma) of z_t = alpha z_0 + sigma eps, alpha^2 + sigma^2 = 1, with the timestep t that the
network is told. Between the timesteps of the schedule, t is fractional and log(sigma / alpha) is interpolated.
"""

import dataclasses
from functools import cached_property

import numpy as np
from jaxtyping import Float, Shaped

from latent_diffusion.diffusion.schedule import NoiseSchedule
from latent_diffusion.errors import UserError

# Several of these agree with others' names: clean (= trailing), leading and linspace with those of Lin et al. 2023,
# table 2, and of diffusers; karras and exponential with k-diffusion's, whose own default is linspace.
SPACINGS = ("clean", "trailing", "uniform", "quad", "linspace", "karras", "exponential",
            "leading", "leading_1", "reference", "reference_quad")
RHO = 7.0  # Karras et al. 2022, section 3


@dataclasses.dataclass(frozen=True)
class Grid:
    """Levels in the order in which they are visited, noisiest first; the last is where the sampler ends.

    t, alpha, sigma: (n + 1,) float64. The network is called at the first n (by some methods at the last, too, unless
    it is clean data: alpha 1, sigma 0, where t means nothing).
    """

    t: Float[np.ndarray, "levels"]
    alpha: Float[np.ndarray, "levels"]
    sigma: Float[np.ndarray, "levels"]

    @property
    def steps(self) -> int:
        """n, the number of steps."""
        return len(self.t) - 1

    @cached_property
    def noise_level(self) -> Float[np.ndarray, "levels"]:
        """sigma / alpha, the "sigma" of Karras et al. 2022."""
        return self.sigma / self.alpha

    @cached_property
    def log_snr(self) -> Float[np.ndarray, "levels"]:
        """lambda = log(alpha / sigma), half the logarithm of the signal-to-noise ratio; infinite for clean data."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha) - np.log(self.sigma)

    def after(self, first: int) -> "Grid":
        """The same without its first levels, for a start from something less noisy."""
        return Grid(self.t[first:], self.alpha[first:], self.sigma[first:])


def make(method: str, schedule: NoiseSchedule, steps: int, spacing: str = "clean") -> Grid:
    """The grid of a sampler.

    All spacings but the reference's have exactly `steps` levels and end with clean data:
        clean, trailing     evenly spaced timesteps that end with T - 1
        uniform             evenly spaced from 1: the reference's where `steps` divides T
        quad                t = 1 + a k^2, up to 0.8 T: small steps near the data (Song et al. 2021, appendix D.2)
        linspace            t from T - 1 to 0, evenly, fractional
        karras, exponential the noise level, from that of T - 1 to that of 0, even in its 7th root or its logarithm
        leading, leading_1  those of diffusers with that name and steps_offset 0 or 1: k (T // steps)
        reference           those of CompVis latent-diffusion: for ddim and plms range(0, T, T // steps) + 1, whose
                            length differs from `steps` unless that divides T, down to the level of timestep 0; for ddpm
                            all T; for dpmpp_2m (of CompVis stable-diffusion) linspace down to the level of timestep 0
        reference_quad      that code's "quad", which may repeat the smallest timesteps; for ddim and plms

    Raises:
        UserError: for an unknown spacing, for `steps` outside 1 .. T, and for counts that a spacing cannot do (with the
            nearest that it can).
    """
    if spacing not in SPACINGS:
        raise UserError(f"sampler spacing: unknown value {spacing!r}; choose from {', '.join(SPACINGS)}")
    total = schedule.timesteps
    if not 1 <= steps <= total:
        raise UserError(f"sampling.steps: {steps} is not between 1 and the {total} steps of the model's schedule")
    if spacing == "reference_quad" and method not in ("ddim", "plms"):
        raise UserError("sampler spacing: reference_quad is for ddim and plms; use quad")
    if spacing in ("karras", "exponential"):
        return _of_noise_levels(schedule, _noise_levels(schedule, steps, spacing))
    if spacing == "reference" and method == "dpmpp_2m":
        return _of_log_alphas(schedule, np.linspace(total - 1, 0, steps + 1))
    if spacing == "linspace":
        t = np.linspace(total - 1, 0, steps)
        return _of_noise_levels(schedule, np.exp(np.interp(t, np.arange(total), schedule.log_noise_level)))
    t = _timesteps(method, total, steps, spacing)[::-1]
    acp = schedule.alphas_cumprod[t]
    ends_noisy = spacing.startswith("reference") and method in ("ddim", "plms")
    acp = np.append(acp, schedule.alphas_cumprod[0] if ends_noisy else 1.0)
    return Grid(np.append(t, 0).astype(np.float64), np.sqrt(acp), np.sqrt(1 - acp))


def _timesteps(method: str, total: int, steps: int, spacing: str) -> Shaped[np.ndarray, "s"]:
    """Whole timesteps, ascending."""
    k = np.arange(steps)
    if spacing in ("clean", "trailing"):
        return np.round((k + 1) * total / steps).astype(np.int32) - 1
    if spacing.startswith("leading"):
        t = k * (total // steps) + (spacing == "leading_1")
        if t[-1] >= total:
            raise UserError(f"sampling.steps: {steps} steps leave the schedule with spacing 'leading_1'; use less, or "
                            "spacing 'leading'")
        return t.astype(np.int32)
    if spacing == "uniform":
        return (k * total // steps + (2 * steps <= total)).astype(np.int32)
    if spacing in ("quad", "reference_quad"):
        t = (np.linspace(0, np.sqrt(total * 0.8), steps) ** 2).astype(np.int32) + 1
        if spacing == "reference_quad":
            return np.minimum(t, total - 1)
        for i in range(1, steps):  # no timestep twice, and all of them in the schedule
            t[i] = max(t[i], t[i - 1] + 1)
        return np.minimum(t, total - 1 - k[::-1])
    return _reference_timesteps(method, total, steps)


def _reference_timesteps(method: str, total: int, steps: int) -> Shaped[np.ndarray, "s"]:
    if method == "ddpm":
        if steps != total:
            raise UserError(
                f"sampling.steps: with spacing 'reference' ddpm runs all {total} steps; use spacing 'clean' for {steps}"
            )
        return np.arange(total, dtype=np.int32)
    visited = np.arange(0, total, total // steps, dtype=np.int32) + 1
    if visited[-1] >= total:
        exact = [s for s in range(1, total // 2 + 1) if total % s == 0]
        nearest = [*[s for s in exact if s < steps][-1:], *[s for s in exact if s > steps][:1]]
        raise UserError(
            f"sampling.steps: {steps} steps leave the schedule with spacing 'reference'; "
            f"use {' or '.join(map(str, nearest))} steps, or spacing 'clean'"
        )
    return visited


def _noise_levels(schedule: NoiseSchedule, steps: int, spacing: str) -> Float[np.ndarray, "s"]:
    """Descending, from the schedule's largest noise level to its smallest."""
    low, high = np.exp(schedule.log_noise_level[[0, -1]])
    if spacing == "exponential":
        return np.exp(np.linspace(np.log(high), np.log(low), steps))
    return np.linspace(high ** (1 / RHO), low ** (1 / RHO), steps) ** RHO  # Karras et al. 2022, eq. 5


def _of_noise_levels(schedule: NoiseSchedule, noise_level: Float[np.ndarray, "s"]) -> Grid:
    t = np.interp(np.log(noise_level), schedule.log_noise_level, np.arange(schedule.timesteps))
    noise_level = np.append(noise_level, 0.0)
    alpha = 1 / np.sqrt(1 + noise_level**2)
    return Grid(np.append(t, 0.0), alpha, noise_level * alpha)


def _of_log_alphas(schedule: NoiseSchedule, t: Float[np.ndarray, "s"]) -> Grid:
    """As DPM-Solver's own code: between timesteps it is log(alpha) that is interpolated; the last level is that of
    t[-1]."""
    log_alpha = np.interp(t, np.arange(schedule.timesteps), np.log(schedule.alphas_cumprod) / 2)
    return Grid(t, np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha)))
