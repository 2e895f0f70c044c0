"""Classifier-free guidance (Ho & Salimans 2021)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Num

from latent_diffusion.diffusion.process import broadcast_to_image

Condition = Any  # a tree of arrays with one row per example


def classifier_free(
    denoise: Callable[[Array, Array, Condition], Array],
    cond: Condition,
    null_cond: Condition,
    scale: Num[ArrayLike, ""] | Num[ArrayLike, "b"],
) -> Callable[[Float[Array, "b ..."], Int[Array, "b"]], Float[Array, "b ..."]]:
    """A denoise function that moves predictions away from the unconditional one: u + scale * (c - u).

    Both are computed in one batch of twice the size, unconditional first. The rule is the same for predictions of eps,
    x0 and v, because at given z_t and t each is an affine function of the others.

    Args:
        denoise: (z_t, t, condition) -> prediction.
        cond: tree of arrays (B, ...).
        null_cond: the same tree with the null condition, arrays (B, ...) or (1, ...).
        scale: one number or one per example; may be traced. At exactly 1 the conditional prediction itself is returned.
            If it is always 1, calling `denoise` with `cond` directly saves half the work.
    """
    both = jax.tree.map(lambda null, c: jnp.concatenate([jnp.broadcast_to(null, c.shape), c]), null_cond, cond)

    def guided(z_t, t):
        prediction = denoise(jnp.concatenate([z_t, z_t]), jnp.concatenate([t, t]), both)
        unconditional, conditional = jnp.split(prediction, 2)
        s = broadcast_to_image(jnp.broadcast_to(jnp.asarray(scale, prediction.dtype), t.shape), conditional)
        return jnp.where(s == 1, conditional, unconditional + s * (conditional - unconditional))

    return guided
