"""Noise schedules of the variance-preserving diffusion process.

The forward process (Ho et al. 2020, eq. 4) is z_t = alpha(t) z_0 + sigma(t) eps with
alpha(t)^2 = prod_{s<=t} (1 - beta_s) and sigma(t)^2 = 1 - alpha(t)^2, for t = 0 .. T-1 (t = 0 already carries the first
step's noise). Everything is computed in float64 with numpy and becomes float32 where it meets device arrays.
"""

import dataclasses
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from latent_diffusion.errors import UserError, choose


def _linear(timesteps: int, start: float, end: float, cosine_s: float) -> np.ndarray:
    # Latent diffusion's "linear" is linear in sqrt(beta); other libraries call it "scaled_linear".
    return np.linspace(start**0.5, end**0.5, timesteps, dtype=np.float64) ** 2


def _cosine(timesteps: int, start: float, end: float, cosine_s: float) -> np.ndarray:
    # Nichol & Dhariwal 2021, eq. 17; betas are clipped because the last one would be 1.
    grid = np.arange(timesteps + 1, dtype=np.float64) / timesteps + cosine_s
    alphas_cumprod = np.cos(grid / (1 + cosine_s) * np.pi / 2) ** 2
    return np.clip(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0, 0.999)


def _sqrt_linear(timesteps: int, start: float, end: float, cosine_s: float) -> np.ndarray:
    return np.linspace(start, end, timesteps, dtype=np.float64)


def _sqrt(timesteps: int, start: float, end: float, cosine_s: float) -> np.ndarray:
    return np.linspace(start, end, timesteps, dtype=np.float64) ** 0.5


BETA_SCHEDULES = {"linear": _linear, "cosine": _cosine, "sqrt_linear": _sqrt_linear, "sqrt": _sqrt}
PARAMETERIZATIONS = ("eps", "x0", "v")


def check_parameterization(name: str) -> None:
    """Raises UserError unless `name` is one of PARAMETERIZATIONS."""
    if name not in PARAMETERIZATIONS:
        choices = ", ".join(PARAMETERIZATIONS)
        raise UserError(f"diffusion.parameterization: unknown value {name!r}; choose from {choices}")


def gather(values: np.ndarray, t: Int[Array, "..."]) -> Float[Array, "..."]:
    """float32 values[t] for a float64 table; `t` may be traced. Indices outside the table are clamped by jax."""
    return jnp.asarray(values, jnp.float32)[t]


@dataclasses.dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """One discrete schedule. Frozen and hashable by value, so it can be closed over or passed as a static argument.

    Attributes:
        betas: (T,) float64, the variances added per step.
        alphas_cumprod: (T,) float64, alpha(t)^2.
        v_posterior: in [0, 1]; the ancestral step's variance is (1 - v) beta_tilde + v beta (0: the true posterior).
    """

    betas: np.ndarray
    alphas_cumprod: np.ndarray
    v_posterior: float = 0.0

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, NoiseSchedule)
            and self.v_posterior == other.v_posterior
            and np.array_equal(self.betas, other.betas)
            and np.array_equal(self.alphas_cumprod, other.alphas_cumprod)
        )

    def __hash__(self) -> int:
        return hash((self.betas.tobytes(), self.alphas_cumprod.tobytes(), self.v_posterior))

    @property
    def timesteps(self) -> int:
        """T, the number of steps."""
        return len(self.betas)

    @cached_property
    def alphas_cumprod_prev(self) -> np.ndarray:
        """(T,) float64, alpha(t-1)^2, with 1 (clean data) before the first step."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @cached_property
    def log_noise_level(self) -> np.ndarray:
        """(T,) float64, log(sigma / alpha), ascending."""
        return (np.log1p(-self.alphas_cumprod) - np.log(self.alphas_cumprod)) / 2

    @cached_property
    def posterior_variance(self) -> np.ndarray:
        """(T,) float64, the variance of the ancestral step (Ho et al., eq. 7); starts with 0 when v_posterior is 0."""
        return posterior(self.alphas_cumprod, self.alphas_cumprod_prev, self.v_posterior)["variance"]

    @cached_property
    def posterior_log_variance_clipped(self) -> np.ndarray:
        """(T,) float64, log of posterior_variance with a floor of 1e-20, because it starts at 0."""
        return np.log(np.maximum(self.posterior_variance, 1e-20))

    @cached_property
    def posterior_mean_coef1(self) -> np.ndarray:
        """(T,) float64, the factor of z_0 in the mean of q(z_{t-1} | z_t, z_0) (Ho et al., eq. 7)."""
        return posterior(self.alphas_cumprod, self.alphas_cumprod_prev)["coef_z_0"]

    @cached_property
    def posterior_mean_coef2(self) -> np.ndarray:
        """(T,) float64, the factor of z_t in the mean of q(z_{t-1} | z_t, z_0) (Ho et al., eq. 7)."""
        return posterior(self.alphas_cumprod, self.alphas_cumprod_prev)["coef_z_t"]

    def alpha(self, t: Int[Array, "..."]) -> Float[Array, "..."]:
        """sqrt(alphas_cumprod[t]): how much of the data is left at step t; float32, in (0, 1)."""
        return gather(np.sqrt(self.alphas_cumprod), t)

    def sigma(self, t: Int[Array, "..."]) -> Float[Array, "..."]:
        """sqrt(1 - alphas_cumprod[t]): the standard deviation of the noise at step t; float32, in (0, 1)."""
        return gather(np.sqrt(1 - self.alphas_cumprod), t)

    def levels(self, t: Num[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """(alpha, sigma) at timesteps that may be fractional (float32), between which log(sigma / alpha) is
        interpolated."""
        if jnp.issubdtype(t.dtype, jnp.integer):
            return self.alpha(t), self.sigma(t)
        grid = jnp.arange(self.timesteps, dtype=jnp.float32)
        noise_level = jnp.exp(jnp.interp(t, grid, jnp.asarray(self.log_noise_level)))
        alpha = jax.lax.rsqrt(1 + noise_level**2)
        return alpha, noise_level * alpha

    def log_snr(self, t: Int[Array, "..."]) -> Float[Array, "..."]:
        """log(alpha(t)^2 / sigma(t)^2), natural logarithm; float32."""
        return gather(-2 * self.log_noise_level, t)

    def lvlb_weights(self, parameterization: str) -> np.ndarray:
        """Weights of the variational bound's terms, (T,) float64, as CompVis latent-diffusion computes them.

        "eps": beta^2 / (2 var_post (1 - beta) (1 - alphas_cumprod)).
        "x0": 0.5 sqrt(alphas_cumprod) / (2 - alphas_cumprod); the denominator is a precedence slip of that code (for
        2 (1 - alphas_cumprod)) which is kept, so that losses compare.
        "v": ones; that code has no v, and Stability AI's later version of it uses ones.
        The first entry (infinite for "eps") is replaced by the second.

        Raises:
            UserError: for an unknown parameterization.
        """
        check_parameterization(parameterization)
        if parameterization == "eps":
            with np.errstate(divide="ignore"):
                weights = self.betas**2 / (2 * self.posterior_variance * (1 - self.betas) * (1 - self.alphas_cumprod))
        elif parameterization == "x0":
            weights = 0.5 * np.sqrt(self.alphas_cumprod) / (2 - self.alphas_cumprod)
        else:
            weights = np.ones_like(self.betas)
        weights[0] = weights[1]
        return weights


def posterior(
    alphas_cumprod: np.ndarray, alphas_cumprod_prev: np.ndarray, v_posterior: float = 0.0
) -> dict[str, np.ndarray]:
    """Coefficients of q(z_prev | z_t, z_0) between any two noise levels (Ho et al. 2020, eq. 7), float64.

    Args:
        alphas_cumprod: (S,) alpha^2 of z_t.
        alphas_cumprod_prev: (S,) alpha^2 of z_prev, not smaller.
        v_posterior: interpolates the variance from the posterior's (0) to the forward step's beta (1).

    Returns:
        "coef_z_0", "coef_z_t": the mean is coef_z_0 z_0 + coef_z_t z_t; "variance".
    """
    betas = 1 - alphas_cumprod / alphas_cumprod_prev
    variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
    return {
        "coef_z_0": betas * np.sqrt(alphas_cumprod_prev) / (1 - alphas_cumprod),
        "coef_z_t": (1 - alphas_cumprod_prev) * np.sqrt(1 - betas) / (1 - alphas_cumprod),
        "variance": (1 - v_posterior) * variance + v_posterior * betas,
    }


def make_schedule(
    name: str,
    timesteps: int,
    *,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
    v_posterior: float = 0.0,
) -> NoiseSchedule:
    """Builds a schedule of `timesteps` steps.

    Args:
        name: "linear" (sqrt(beta) is linear; the released models), "cosine", "sqrt_linear" (beta is linear), "sqrt".
        timesteps: T, at least 2.
        linear_start: first beta of all schedules but "cosine".
        linear_end: last beta of all schedules but "cosine".
        cosine_s: offset of the cosine schedule.
        v_posterior: see NoiseSchedule.

    Raises:
        UserError: for an unknown name, fewer than 2 steps, v_posterior outside [0, 1], or betas outside (0, 1).
    """
    make_betas = choose(BETA_SCHEDULES, name, "diffusion.beta_schedule")
    if timesteps < 2:
        raise UserError(f"diffusion.timesteps: {timesteps} is too few; give at least 2")
    if not 0 <= v_posterior <= 1:
        raise UserError(f"diffusion.v_posterior: {v_posterior} is not in [0, 1]")
    if linear_start < 0 or linear_end < 0:
        raise UserError(f"diffusion.linear_start, linear_end: {linear_start}, {linear_end} must be positive")
    betas = make_betas(timesteps, linear_start, linear_end, cosine_s)
    if not np.all((betas > 0) & (betas < 1)):
        raise UserError(
            f"diffusion.beta_schedule {name!r}: betas must lie in (0, 1) but run from {betas.min():g} to "
            f"{betas.max():g}; change linear_start, linear_end or cosine_s"
        )
    return NoiseSchedule(betas, np.cumprod(1 - betas), v_posterior)


def from_config(diffusion) -> NoiseSchedule:
    """The schedule of a config's `diffusion` section.

    Reads timesteps, beta_schedule, linear_start, linear_end, cosine_s and v_posterior.
    """
    return make_schedule(
        diffusion.beta_schedule,
        diffusion.timesteps,
        linear_start=diffusion.linear_start,
        linear_end=diffusion.linear_end,
        cosine_s=diffusion.cosine_s,
        v_posterior=diffusion.v_posterior,
    )
