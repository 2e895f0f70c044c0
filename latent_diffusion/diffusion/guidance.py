"""Guidance: denoise functions made from denoise functions.

    classifier_free   away from the unconditional prediction (Ho & Salimans 2021)
    autoguidance      away from the prediction of a weaker model (Karras et al. 2024)
    corrected         by a function of the user's, such as a classifier's gradient (Dhariwal & Nichol 2021)
    toward            by the gradient of a distance of what is predicted (Rombach et al. 2022, appendix C)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num

from latent_diffusion.diffusion import process
from latent_diffusion.diffusion.process import broadcast_to_image
from latent_diffusion.diffusion.samplers import DenoiseFn
from latent_diffusion.diffusion.schedule import NoiseSchedule, check_parameterization

Condition = Any  # a tree of arrays with one row per example
Scale = Num[ArrayLike, ""] | Num[ArrayLike, "b"]
Correction = Callable[[Float[Array, "b ..."], Float[Array, "b ..."], Num[Array, "b"]], Float[Array, "b ..."]]


def classifier_free(
    denoise: Callable[[Array, Array, Condition], Array], cond: Condition, null_cond: Condition, scale: Scale, *,
    two_passes: bool = False, **options: Any,
) -> DenoiseFn:
    """A denoise function that moves predictions away from the unconditional one: u + scale * (c - u).

    The rule is the same for predictions of eps, x0 and v, because at given z_t and t each is an affine function of the
    others.

    Args:
        denoise: (z_t, t, condition) -> prediction.
        cond: tree of arrays (B, ...).
        null_cond: the same tree with the null condition, or what is to be avoided (a "negative prompt"): arrays (B,
            ...) or (1, ...).
        scale: one number or one per example; may be traced. At exactly 1 the conditional prediction itself is returned.
            If it is always 1, calling `denoise` with `cond` directly saves half the work.
        two_passes: compute both one after the other, which needs less memory, instead of in one batch of twice the
            size, unconditional first.
        options: see `_guided`.
    """
    null_cond = jax.tree.map(lambda null, c: jnp.broadcast_to(null, c.shape), null_cond, cond)
    together = jax.tree.map(lambda null, c: jnp.concatenate([null, c]), null_cond, cond)

    def both(z_t: Array, t: Array) -> tuple[Array, Array]:
        if two_passes:
            return denoise(z_t, t, null_cond), denoise(z_t, t, cond)
        unconditional, conditional = jnp.split(
            denoise(jnp.concatenate([z_t, z_t]), jnp.concatenate([t, t]), together), 2)
        return unconditional, conditional

    return _guided(both, lambda z_t, t: denoise(z_t, t, cond), scale, **options)


def autoguidance(denoise_fn: DenoiseFn, weak_fn: DenoiseFn, scale: Scale, **options: Any) -> DenoiseFn:
    """w + scale * (prediction - w) with w that of a weaker model, such as an earlier checkpoint (Karras et al. 2024,
    eq. 4).

    Args: see `classifier_free`; both functions are given the condition already, and predict the same thing.
    """
    return _guided(lambda z_t, t: (weak_fn(z_t, t), denoise_fn(z_t, t)), denoise_fn, scale, **options)


def _guided(
    both: Callable[[Array, Array], tuple[Array, Array]], alone: DenoiseFn, scale: Scale, *,
    rescale: Num[ArrayLike, ""] = 0.0, interval: Any = None, schedule: NoiseSchedule | None = None,
) -> DenoiseFn:
    """What the two ways of guidance share.

    rescale: 0 .. 1, how far each guided prediction is given the standard deviation of the unguided one, against
      pictures that are too bright or saturated (Lin et al. 2023, section 3.4; 0.7 there).
    interval: (low, high): guide only where low < sigma / alpha <= high, elsewhere call `alone`, which saves the other
      half of the work (Kynkäänniemi et al. 2024). Needs `schedule`, and one t for all examples.
    """
    def guided(z_t: Array, t: Array) -> Array:
        unguided, conditional = both(z_t, t)
        s = broadcast_to_image(jnp.broadcast_to(jnp.asarray(scale, conditional.dtype), t.shape), conditional)
        mixed = unguided + s * (conditional - unguided)
        axes = tuple(range(1, mixed.ndim))
        ratio = conditional.std(axes, keepdims=True) / jnp.maximum(mixed.std(axes, keepdims=True), 1e-12)
        mixed = mixed * (1 + rescale * (ratio - 1))
        return jnp.where(s == 1, conditional, mixed)

    def within(z_t: Array, t: Array) -> Array:
        alpha, sigma = schedule.levels(t[0])
        level = sigma / alpha
        return jax.lax.cond((interval[0] < level) & (level <= interval[1]), guided, alone, z_t, t)

    return guided if interval is None else within


def corrected(
    denoise_fn: DenoiseFn, correction: Correction, schedule: NoiseSchedule, parameterization: str
) -> DenoiseFn:
    """Predictions whose eps has gone through ``correction(eps, z_t, t) -> eps``, whatever it is that is predicted.

    As -eps / sigma is the score, eps - sigma * gradient of log p(y | z_t) is that of p(z_t | y): see `classifier`.
    """
    check_parameterization(parameterization)

    def denoise(z_t: Array, t: Array) -> Array:
        level = process.levels(schedule, t, z_t)
        eps = correction(process.eps_of(parameterization, denoise_fn(z_t, t), z_t, **level), z_t, t)
        x0 = (z_t - level["sigma"] * eps) / level["alpha"]
        return process.prediction_of(parameterization, x0, eps, **level)

    return denoise


def classifier(
    log_prob: Callable[[Array, Array], Float[Array, "b"]], scale: Scale, schedule: NoiseSchedule
) -> Correction:
    """The correction of classifier guidance (Dhariwal & Nichol 2021, algorithm 2): eps - scale * sigma * gradient.

    log_prob: (z_t, t) -> log p(y | z_t) of each example, as a classifier of noisy latents says it.
    """
    def correction(eps: Array, z_t: Array, t: Array) -> Array:
        gradient = jax.grad(lambda z: log_prob(z, t).sum())(z_t)
        s = jnp.broadcast_to(jnp.asarray(scale, z_t.dtype), t.shape) * schedule.levels(t)[1]
        return eps - broadcast_to_image(s, z_t) * gradient

    return correction


def toward(
    denoise_fn: DenoiseFn, distance: Callable[[Array], Float[Array, "b"]], scale: Scale, schedule: NoiseSchedule,
    parameterization: str,
) -> DenoiseFn:
    """Guides an unconditional model to data with a small distance from something, through the gradient of what it
    predicts: eps + scale * sigma * d distance(x0(z_t)) / d z_t (Rombach et al. 2022, appendix C: log p =
    -distance, with distance(x0) = |y - T(D(x0))|^2 / 2 for an image y, a degradation T and the decoder D).
    """
    check_parameterization(parameterization)

    def denoise(z_t: Array, t: Array) -> Array:
        level = process.levels(schedule, t, z_t)
        alpha, sigma = level["alpha"], level["sigma"]

        def far(z: Array) -> tuple[Array, Array]:
            prediction = denoise_fn(z, t)
            eps = process.eps_of(parameterization, prediction, z, **level)
            return distance((z - sigma * eps) / alpha).sum(), prediction

        gradient, prediction = jax.grad(far, has_aux=True)(z_t)
        s = broadcast_to_image(jnp.broadcast_to(jnp.asarray(scale, z_t.dtype), t.shape), z_t)
        # d prediction / d eps at given z_t: 1, -sigma / alpha for x0, and alpha + sigma^2 / alpha = 1 / alpha for v
        factor = {"eps": 1.0, "x0": -sigma / alpha, "v": 1 / alpha}[parameterization]
        return prediction + factor * s * sigma * gradient

    return denoise
