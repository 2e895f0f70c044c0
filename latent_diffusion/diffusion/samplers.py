"""Samplers: one `lax.scan` over a table of precomputed numbers, and one small rule per method for a step.

`sample` may be called inside jit. Only shapes, the method and the number of steps are static; eta, temperature and
whatever the denoise function closes over (parameters, guidance scale) may be traced, so changing them never recompiles.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key, Num

from latent_diffusion.diffusion import process
from latent_diffusion.diffusion.schedule import NoiseSchedule, check_parameterization, posterior
from latent_diffusion.errors import UserError, choose

DenoiseFn = Callable[[Float[Array, "b ..."], Int[Array, "b"]], Float[Array, "b ..."]]
Scalar = Num[ArrayLike, ""]
Row = dict[str, Any]  # one step's numbers, scalars

SPACINGS = ("clean", "reference", "leading", "leading_1")


def ddpm_step(row: Row, z_t: Array, x0: Array, eps: Array, noise: Array, *, eta: Scalar, temperature: Scalar) -> Array:
    """Ancestral sampling (Ho et al. 2020, algorithm 2); `eta` is not used. The last step adds no noise."""
    return row["coef_z_0"] * x0 + row["coef_z_t"] * z_t + temperature * jnp.sqrt(row["variance"]) * noise


def ddim_step(row: Row, z_t: Array, x0: Array, eps: Array, noise: Array, *, eta: Scalar, temperature: Scalar) -> Array:
    """DDIM (Song et al. 2021, eq. 12 and 16): deterministic for eta 0, as noisy as ancestral sampling for eta 1."""
    variance = eta**2 * row["ddim_variance"]
    # eta > 1 may ask for more noise than the level to be reached has.
    direction = jnp.sqrt(jnp.maximum(row["sigma_prev_squared"] - variance, 0.0))
    return row["alpha_prev"] * x0 + direction * eps + temperature * jnp.sqrt(variance) * noise


METHODS = {"ddpm": ddpm_step, "ddim": ddim_step, "plms": ddim_step}  # plms: DDIM's step on a better eps, see `_plms`

# Adams-Bashforth: the weights of eps at this timestep and of those before it, by how many of these there are.
_ADAMS_BASHFORTH = np.array([[24, 0, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]]) / 24


def timesteps(method: str, schedule: NoiseSchedule, steps: int, spacing: str = "clean") -> Int[np.ndarray, "s"]:
    """The timesteps that a sampler visits, ascending.

    "clean" gives exactly `steps` of them, evenly spaced and ending with T - 1 (the "trailing" spacing of Lin et al.
    2023, table 2). "reference" gives those of CompVis latent-diffusion: for ddim and plms range(0, T, T // steps) + 1,
    whose length differs from `steps` unless that divides T, and which for some counts leaves the schedule; for ddpm all
    T.

    "leading" and "leading_1" are those of diffusers with that name and steps_offset 0 or 1: k T // steps, for k below
    `steps`.

    Raises:
        UserError: for an unknown method or spacing, for `steps` outside 1 .. T, and for counts that the reference's
            spacing cannot do (with the nearest that it does exactly).
    """
    choose(METHODS, method, "sampling.sampler")
    if spacing not in SPACINGS:
        raise UserError(f"sampler spacing: unknown value {spacing!r}; choose from {', '.join(SPACINGS)}")
    total = schedule.timesteps
    if not 1 <= steps <= total:
        raise UserError(f"sampling.steps: {steps} is not between 1 and the {total} steps of the model's schedule")
    if spacing.startswith("leading"):
        return np.arange(steps, dtype=np.int32) * (total // steps) + (spacing == "leading_1")
    if spacing == "clean":
        return np.round(np.arange(1, steps + 1) * total / steps).astype(np.int32) - 1
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


def step_table(method: str, schedule: NoiseSchedule, steps: int, spacing: str = "clean") -> dict[str, np.ndarray]:
    """What each step needs to know, in the order in which the steps run; float64 except "t".

    Skipped timesteps are those of a respaced schedule: the step goes from alphas_cumprod[t] to that of the next visited
    timestep. The last step goes to clean data, except for ddim and plms with spacing "reference", which stop at the
    noise level of timestep 0.
    """
    t = timesteps(method, schedule, steps, spacing)
    acp = schedule.alphas_cumprod[t]
    last = schedule.alphas_cumprod[0] if method != "ddpm" and spacing == "reference" else 1.0
    acp_prev = np.append(last, acp[:-1])
    table = posterior(acp, acp_prev, schedule.v_posterior) | {
        "t": t,
        "alpha_prev": np.sqrt(acp_prev),
        "sigma_prev_squared": 1 - acp_prev,
        "ddim_variance": (1 - acp_prev) / (1 - acp) * (1 - acp / acp_prev),
    }
    table["variance"][0] = 0.0  # with v_posterior > 0 it is not, but the last step of ancestral sampling adds no noise
    return {name: values[::-1] for name, values in table.items()}


def _noise(rng: Key[Array, ""], indices: Int[ArrayLike, "b"], counter: int | Array, shape: tuple[int, ...]) -> Array:
    """Standard normal noise of images `indices` for one step: a function of (rng, index, counter) alone."""

    def draw(index):
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(rng, index), counter), shape[1:])

    return jax.vmap(draw)(jnp.asarray(indices))


def initial_noise(rng: Key[Array, ""], indices: Int[ArrayLike, "b"], shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    """The pure noise from which `sample` starts: image k depends on `rng` and indices[k] only, not on the batch.

    Args:
        rng: one key.
        indices: (B,) numbers of the images.
        shape: (B, ...), of the result.
    """
    return _noise(rng, indices, 0, shape)


def sample(
    denoise_fn: DenoiseFn,
    schedule: NoiseSchedule,
    rng: Key[Array, ""],
    shape: tuple[int, ...],
    *,
    method: str = "ddim",
    steps: int = 50,
    eta: Scalar = 0.0,
    parameterization: str = "eps",
    indices: Int[ArrayLike, "b"] | None = None,
    spacing: str = "clean",
    clip_x0: bool = False,
    temperature: Scalar = 1.0,
    z_T: Float[Array, "b ..."] | None = None,
) -> Float[Array, "b ..."]:
    """Draws latents (or images) by running the diffusion backwards from noise.

    Args:
        denoise_fn: (z_t, t) -> prediction; z_t float32 of `shape`, t int32 (B,).
        schedule: of the model.
        rng: one key. Image k sees noise made from `rng`, indices[k] and the step only, whatever the batch.
        shape: (B, ...), of the result.
        method: "ddim", "ddpm" or "plms".
        steps: number of calls of `denoise_fn` (with spacing "reference": about that; of plms: one more), 1 .. T.
        eta: of ddim, 0 (deterministic) to 1 (ancestral variance); the others do not use it.
        parameterization: what `denoise_fn` predicts: "eps", "x0" or "v".
        indices: (B,) numbers of the images; 0 .. B-1 if not given.
        spacing: see `timesteps`.
        clip_x0: clip the predicted data to [-1, 1] at each step; for pixels, not for latents. The predicted noise is
            made to agree with it.
        temperature: multiplies the noise added by the steps (not the initial noise).
        z_T: (B, ...) to start from, instead of `initial_noise`.

    Returns:
        z_0, float32 of `shape`.

    Raises:
        UserError: for unknown names and impossible numbers of steps, see `timesteps`.
    """
    check_parameterization(parameterization)
    table = step_table(method, schedule, steps, spacing)
    count = len(table["t"])
    rows = {name: jnp.asarray(values, jnp.float32) for name, values in table.items() if name != "t"}
    rows |= {"t": jnp.asarray(table["t"], jnp.int32), "counter": jnp.arange(1, count + 1)}
    if indices is None:
        indices = jnp.arange(shape[0])
    if z_T is None:
        z_T = initial_noise(rng, indices, shape)

    def predict(z_t, t):
        t = jnp.full(shape[:1], t, jnp.int32)
        prediction = denoise_fn(z_t, t).astype(jnp.float32)
        x0 = process.to_x0(schedule, parameterization, prediction, z_t, t)
        if clip_x0:
            x0 = jnp.clip(x0, -1.0, 1.0)
            return x0, process.to_eps(schedule, "x0", x0, z_t, t)
        return x0, process.to_eps(schedule, parameterization, prediction, z_t, t)

    def step(z_t, row):
        x0, eps = predict(z_t, row["t"])
        noise = _noise(rng, indices, row["counter"], shape)
        return METHODS[method](row, z_t, x0, eps, noise, eta=eta, temperature=temperature), None

    z_T = z_T.astype(jnp.float32)
    if method == "plms":
        return _plms(lambda z_t, t: predict(z_t, t)[1], schedule, rows, z_T)
    z_0, _ = jax.lax.scan(step, z_T, rows)
    return z_0


def _plms(
    predict_eps: Callable[[Array, Array], Array], schedule: NoiseSchedule, rows: dict[str, Array], z_T: Array
) -> Array:
    """PNDM's linear multistep method (Liu et al. 2022) as CompVis latent-diffusion has it, in steps + 1 predictions.

    A step is DDIM's with a combination of eps here and at up to three timesteps before. The first, which has none
    before it, is made twice from z_T: with eps there, and then with the mean of that eps and the one at the point it
    led to.
    """
    count = len(rows["t"])
    steps = np.append(0, np.arange(count))  # the step that each prediction is for
    places = np.append(0, np.minimum(np.append(1, np.arange(1, count)), count - 1))  # the timestep that it is made at
    weights = _ADAMS_BASHFORTH[np.minimum(steps, 3)]
    weights[1] = [0.5, 0.5, 0, 0]
    calls = {name: values[steps] for name, values in rows.items()} | {
        "t_here": rows["t"][places], "weights": jnp.asarray(weights, jnp.float32),
        "is_first": jnp.arange(count + 1) == 0, "is_second": jnp.arange(count + 1) == 1}

    def call(carry, row):
        here, start, before = carry  # where eps is predicted, where the step starts, the last three eps
        eps = predict_eps(here, row["t_here"])
        combined = jnp.tensordot(row["weights"], jnp.concatenate([eps[None], before]), 1)
        x0 = process.to_x0(schedule, "eps", combined, start, jnp.full(z_T.shape[:1], row["t"], jnp.int32))
        reached = ddim_step(row, start, x0, combined, jnp.zeros_like(start), eta=0.0, temperature=0.0)
        before = jnp.where(row["is_second"], before, jnp.concatenate([eps[None], before[:-1]]))
        return (reached, jnp.where(row["is_first"], start, reached), before), None

    (z_0, _, _), _ = jax.lax.scan(call, (z_T, z_T, jnp.zeros((3, *z_T.shape))), calls)
    return z_0
