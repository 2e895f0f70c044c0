"""Samplers: one `lax.scan` that runs any of the methods in `solvers` over any of the grids in `grids`.

`sample` may be called inside jit. Only shapes, the method, the spacing and the number of steps are static; eta,
temperature and whatever the denoise function closes over (parameters, guidance scale) may be traced, so changing them
never recompiles.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key, Num

from latent_diffusion.diffusion import grids, process, solvers
from latent_diffusion.diffusion.schedule import NoiseSchedule, check_parameterization
from latent_diffusion.errors import UserError, choose

DenoiseFn = Callable[[Float[Array, "b ..."], Num[Array, "b"]], Float[Array, "b ..."]]
Scalar = Num[ArrayLike, ""]
Row = dict[str, Array]  # one call's numbers, scalars
METHODS = solvers.METHODS
MASK_NOISE = 2**30  # added to the counter of the noise on what a mask keeps


class Known(NamedTuple):
    """What a mask keeps: z_0 (b, ...), and keep (b, ..., 1 or c) with 1 = known, 0 = to be painted."""

    z_0: Float[Array, "b ..."]
    keep: Float[Array, "b ..."]


@dataclasses.dataclass(frozen=True)
class Options:
    """How `sample` draws. Static but for eta, indices, temperature, z_T and known, which may be traced.

    method: a name of `METHODS`.
    steps: how many levels are visited, 1 .. T. So many calls of the network, but for plms one more, for heun twice as
      many less one, and for spacing "reference" about that.
    eta: of ddim, 0 (deterministic) to 1 (ancestral variance); the others do not use it.
    parameterization: what the network predicts: "eps", "x0" or "v".
    indices: (B,) numbers of the images; 0 .. B-1 if not given.
    spacing: see `grids.make`.
    clip_x0: clip the predicted data to [-1, 1] at each call; for pixels, not for latents. The predicted noise is made
      to agree with it.
    threshold: 0, or the quantile of |x0| that each image is clipped to, and divided by if it exceeds 1: dynamic
      thresholding (Saharia et al. 2022, section 2.3; 0.995 there), instead of clipping.
    x0_fn: applied to the predicted data at each call, such as a quantizer. ddpm, ddim and euler, which use the
      predicted noise too, leave that as it is, as the reference; methods that use nothing else make it agree.
    temperature: multiplies the noise added by the steps (not the initial noise).
    z_T: (B, ...) to start from, instead of `initial_noise`.
    first: begin with this step, with a z_T as noisy as `first_level` says.
    known: what is to stay. Before each step it is replaced by the known data as noisy as there, and at the end by the
      known data (Lugmayr et al. 2022, eq. 8, without resampling). With spacing "reference" by the reference's rules:
      not at the end, and of ddpm after each step, as noisy as before it.
    frames: how many predictions of the data to return, evenly spaced over the calls, the last one's among them.
    on_call: called on the host with the number of each call that was made, from 1 on.
    """

    method: str = "ddim"
    steps: int = 50
    eta: Scalar = 0.0
    parameterization: str = "eps"
    indices: Int[ArrayLike, "b"] | None = None
    spacing: str = "clean"
    clip_x0: bool = False
    threshold: float = 0.0
    x0_fn: Callable[[Array], Array] | None = None
    temperature: Scalar = 1.0
    z_T: Float[Array, "b ..."] | None = None
    first: int = 0
    known: Known | None = None
    frames: int = 0
    on_call: Callable[[Any], None] | None = None


def timesteps(method: str, schedule: NoiseSchedule, steps: int, spacing: str = "clean") -> Num[np.ndarray, "s"]:
    """The timesteps that a sampler visits, ascending: int32, or float64 where they are fractional. See `grids.make`.

    Raises:
        UserError: for an unknown method or spacing, and impossible numbers of steps.
    """
    choose(METHODS, method, "sampling.sampler")
    t = grids.make(method, schedule, steps, spacing).t[-2::-1]
    return t.astype(np.int32) if np.all(t == np.round(t)) else t


def _noise(rng: Key[Array, ""], indices: Int[ArrayLike, "b"], counter: int | Array, shape: tuple[int, ...]) -> Array:
    """Standard normal noise of images `indices` for one call: a function of (rng, index, counter) alone."""

    def draw(index):
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(rng, index), counter), shape[1:])

    return jax.vmap(draw)(jnp.asarray(indices))


def initial_noise(rng: Key[Array, ""], indices: Int[ArrayLike, "b"], shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    """The pure noise from which `sample` starts: image k depends on `rng` and indices[k] only, not on the batch.

    Args:
        rng: one key.
        indices: (B,) global numbers of the images.
        shape: (B, ...).
    """
    return _noise(rng, indices, 0, shape)


def first_level(method: str, schedule: NoiseSchedule, steps: int, spacing: str, first: int) -> tuple[float, float]:
    """(alpha, sigma) that an image must be noised to before `sample` may begin with step `first` (image-to-image; Meng
    et al. 2022, SDEdit). With spacing "reference" one level more than that of the step, as CompVis stable-diffusion
    does."""
    grid = grids.make(method, schedule, steps, spacing)
    at = max(0, first - 1) if spacing.startswith("reference") else first
    return float(grid.alpha[at]), float(grid.sigma[at])


def sample(
    denoise_fn: DenoiseFn, schedule: NoiseSchedule, rng: Key[Array, ""], shape: tuple[int, ...], **options: Any
) -> Float[Array, "b ..."]:
    """Draws latents (or images) by running the diffusion backwards from noise: the first result of `trajectory`."""
    return trajectory(denoise_fn, schedule, rng, shape, **options)[0]


def trajectory(
    denoise_fn: DenoiseFn, schedule: NoiseSchedule, rng: Key[Array, ""], shape: tuple[int, ...], **options: Any
) -> tuple[Float[Array, "b ..."], Float[Array, "f b ..."]]:
    """Draws latents (or images), and keeps what was predicted on the way.

    Args:
        denoise_fn: (z_t, t) -> prediction; z_t float32 of `shape`, t (B,) int32, or float32 where the spacing has
            fractional timesteps.
        schedule: of the model.
        rng: one key. Image k sees noise made from `rng`, indices[k] and the call only, whatever the batch.
        shape: (B, ...), of the result.
        options: see `Options`.

    Returns:
        z_0, float32 of `shape`, and the frames (frames, B, ...).

    Raises:
        UserError: for unknown names and impossible numbers of steps, see `grids.make`.
    """
    asked = Options(**options)
    check_parameterization(asked.parameterization)
    method = choose(METHODS, asked.method, "sampling.sampler")
    grid = grids.make(asked.method, schedule, asked.steps, asked.spacing)
    if not 0 <= asked.first < grid.steps:
        raise UserError(f"first={asked.first} must be less than the {grid.steps} steps of the sampler")
    grid = grid.after(asked.first)
    calls = method.calls(grid, schedule.v_posterior, asked.eta)
    if asked.frames > len(calls.at):
        raise UserError(f"frames={asked.frames} is more than the {len(calls.at)} predictions that there are")
    if asked.indices is None:
        asked = dataclasses.replace(asked, indices=jnp.arange(shape[0]))
    z_T = initial_noise(rng, asked.indices, shape) if asked.z_T is None else asked.z_T.astype(jnp.float32)

    def call(carry: tuple, row: Row) -> tuple[tuple, None]:
        return _call(denoise_fn, asked, method, rng, carry, row), None

    history = jnp.zeros((_depth(calls), *shape))
    frames = jnp.zeros((asked.frames, *shape))
    (_, z_0, _, frames), _ = jax.lax.scan(call, (z_T, z_T, history, frames), _rows(grid, calls, asked.frames))
    if asked.known is not None and not _as_reference(asked):
        z_0 = _keep(asked.known, z_0, asked.known.z_0)
    return z_0, frames


def _call(
    denoise_fn: DenoiseFn, asked: Options, method: solvers.Method, rng: Key[Array, ""], carry: tuple, row: Row
) -> tuple:
    """One call of the network, and where it leads: `solvers.Calls`. carry: base, where the network is called, history
    and frames."""
    base, here, history, frames = carry
    keep_after = asked.known is not None and _as_reference(asked) and asked.method == "ddpm"
    if asked.known is not None and not keep_after:
        held = jnp.where(row["starts"], _keep(asked.known, here, _noised(asked, rng, row)), here)
        base, here = jnp.where(row["base_is_here"], held, base), held

    prediction = denoise_fn(here, jnp.full(here.shape[:1], row["t"])).astype(jnp.float32)
    level = {name: row[name] for name in ("alpha", "sigma")}
    x0 = process.x0_of(asked.parameterization, prediction, here, **level, inverse_alpha=row["inverse_alpha"],
                       noise_level=row["noise_level"])
    eps = process.eps_of(asked.parameterization, prediction, here, **level)
    x0, eps = _limited(asked, method, x0, eps, here, row)
    terms = {"base": base, "x0": x0, "eps": eps} | {f"history{j + 1}": past for j, past in enumerate(history)}
    if method.noisy:
        terms["noise"] = asked.temperature * _noise(rng, asked.indices, row["counter"], here.shape)
    here = _combined("step", terms, row)
    base = _combined("base", terms, row) if any(name.startswith("base.") for name in row) else here
    if keep_after:
        base = here = _keep(asked.known, here, _noised(asked, rng, row))

    if len(history):
        history = jnp.concatenate([(x0 if method.history == "x0" else eps)[None], history[:-1]])
    if asked.frames:
        frames = frames.at[row["frame"]].set(x0, mode="drop")
    if asked.on_call is not None:
        jax.debug.callback(asked.on_call, row["counter"])
    return base, here, history, frames


def _combined(prefix: str, terms: dict[str, Array], row: Row) -> Array:
    return sum(row[f"{prefix}.{name}"] * term for name, term in terms.items() if f"{prefix}.{name}" in row)


def _as_reference(asked: Options) -> bool:
    return asked.spacing.startswith("reference")


def _keep(known: Known, z: Array, held: Array) -> Array:
    return known.keep * held + (1 - known.keep) * z


def _noised(asked: Options, rng: Key[Array, ""], row: Row) -> Array:
    """The known data as noisy as where the network is called."""
    z_0 = asked.known.z_0
    return row["alpha"] * z_0 + row["sigma"] * _noise(rng, asked.indices, row["counter"] + MASK_NOISE, z_0.shape)


def _limited(
    asked: Options, method: solvers.Method, x0: Array, eps: Array, z: Array, row: Row
) -> tuple[Array, Array]:
    """x0 after clipping, thresholding and `x0_fn`, and the eps that goes with it."""
    if asked.threshold:
        size = jnp.quantile(jnp.abs(x0).reshape(x0.shape[0], -1), asked.threshold, axis=1)
        size = jnp.maximum(size, 1.0).reshape(-1, *[1] * (x0.ndim - 1))
        x0 = jnp.clip(x0, -size, size) / size
    elif asked.clip_x0:
        x0 = jnp.clip(x0, -1.0, 1.0)
    if asked.x0_fn is not None:
        x0 = asked.x0_fn(x0)
    if asked.threshold or asked.clip_x0 or (asked.x0_fn is not None and method.history == "eps"):
        eps = process.eps_of("x0", x0, z, alpha=row["alpha"], sigma=row["sigma"])
    return x0, eps


def _depth(calls: solvers.Calls) -> int:
    """How many predictions of earlier calls a method needs."""
    names = [*calls.step, *(calls.base or {})]
    return max((int(name.removeprefix("history")) for name in names if name.startswith("history")), default=0)


def _rows(grid: grids.Grid, calls: solvers.Calls, frames: int) -> Row:
    """What the loop needs to know at each call, arrays (m,)."""
    at, count = calls.at, len(calls.at)
    t = grid.t[at]
    columns = {"alpha": grid.alpha[at], "sigma": grid.sigma[at], "inverse_alpha": 1 / grid.alpha[at],
               "noise_level": grid.noise_level[at]}
    columns |= {f"step.{name}": values for name, values in calls.step.items()}
    columns |= {f"base.{name}": values for name, values in (calls.base or {}).items()}
    starts = np.ones(count, bool) if calls.starts is None else calls.starts
    same = starts if calls.base is None else np.all(
        [np.equal(calls.base.get(name, 0.0), values) for name, values in calls.step.items()]
        + [np.equal(calls.step.get(name, 0.0), values) for name, values in calls.base.items()], axis=0)
    shown = np.full(count, frames)  # out of range: not kept
    shown[np.round(np.linspace(count - 1, 0, frames)).astype(int)] = np.arange(frames)[::-1]
    return {name: jnp.asarray(values, jnp.float32) for name, values in columns.items()} | {
        "t": jnp.asarray(t, jnp.int32 if np.all(t == np.round(t)) else jnp.float32),
        "counter": jnp.arange(1, count + 1), "frame": jnp.asarray(shown),
        "starts": jnp.asarray(starts), "base_is_here": jnp.asarray(np.append(True, same[:-1]))}
