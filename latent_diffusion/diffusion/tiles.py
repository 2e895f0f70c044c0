"""Big pictures piece by piece: overlapping patches whose results are averaged by their distance from the border (the
reference's `split_input_params`, but with patches up to every border)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

MIN_WEIGHT, MAX_WEIGHT = 0.01, 0.5  # of the distance from the patch's border, relative to its side


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where patches of `tile` begin along one axis: every ``tile - overlap``, the last one at the very end."""
    return [*range(0, length - tile, tile - overlap), max(0, length - tile)]


def corners(height: int, width: int, tile: int, overlap: int) -> Int[np.ndarray, "p 2"]:
    """Top and left of the patches of a picture, row by row. An axis shorter than `tile` is one patch."""
    axes = [starts(length, min(tile, length), min(overlap, min(tile, length) - 1)) for length in (height, width)]
    return np.array([(top, left) for top in axes[0] for left in axes[1]], np.int32)


def weights(height: int, width: int) -> Float[np.ndarray, "h w"]:
    """How much each pixel of a patch counts: its distance from the nearest border relative to the side, clipped."""
    y, x = ((np.minimum(np.arange(n), np.arange(n)[::-1]) + 0.5) / n for n in (height, width))
    return np.clip(np.minimum(y[:, None], x[None]), MIN_WEIGHT, MAX_WEIGHT).astype(np.float32)


def _patch(x: Array, corner: Array, height: int, width: int) -> Array:
    return jax.lax.dynamic_slice(x, (0, corner[0], corner[1], 0), (x.shape[0], height, width, x.shape[3]))


def alike(
    function: Callable[[Array, Any], Array], moments: Callable[[Array], Any], x: Float[Array, "b h w c"], tile: int,
    overlap: int,
) -> Float[Array, "b h2 w2 d"]:
    """`tiled` for networks that normalize over what they see: patches that each normalized by their own moments would
    differ in tint (of a gray sky beside a bright object, by a tenth of the range). All are first seen once, to find
    moments for all of them.

    Args:
      function: maps patches and moments, or {} for their own, to the result.
      moments: maps patches to a tree of (mean, variance).
      x, tile, overlap: as for `tiled`.
    """
    height, width = min(tile, x.shape[1]), min(tile, x.shape[2])
    places = corners(x.shape[1], x.shape[2], tile, overlap)
    if len(places) == 1:
        return function(x, {})

    def pool(of_patches: tuple[Array, Array]) -> tuple[Array, Array]:  # (p, ...) each; law of total variance
        mean, variance = of_patches
        return mean.mean(0), variance.mean(0) + mean.var(0)

    found = jax.lax.map(lambda corner: moments(_patch(x, corner, height, width)), jnp.asarray(places))
    shared = jax.tree.map(pool, found, is_leaf=lambda node: isinstance(node, tuple))
    return tiled(lambda patch: function(patch, shared), x, tile, overlap)


def tiled(
    function: Callable[..., Float[Array, "b h2 w2 d"]],
    x: Float[Array, "b h w c"],
    tile: int,
    overlap: int,
    each: tuple[Array, ...] = (),
) -> Float[Array, "b h3 w3 d"]:
    """``function(x)``, computed on patches one after the other, so that only one needs memory.

    Args:
      function: maps patches (b, tile, tile, c), and what `each` adds, to (b, k * tile, k * tile, d), where k may be 4
        or 1/4, say.
      x: of any height and width; an axis shorter than `tile` is one patch.
      tile, overlap: of patches of x, in pixels; overlap < tile. Where k < 1, all starts must be multiples of 1/k.
      each: arrays (p, ...) with a row for each of the `corners`; `function` gets the row of its patch.
    """
    height, width = min(tile, x.shape[1]), min(tile, x.shape[2])
    places = corners(x.shape[1], x.shape[2], tile, overlap)
    if len(places) == 1:
        return function(x, *(rows[0] for rows in each))
    shape = jax.eval_shape(function, jax.ShapeDtypeStruct((x.shape[0], height, width, x.shape[3]), x.dtype),
                           *(jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype) for rows in each))
    weight = jnp.asarray(weights(*shape.shape[1:3]))[None, :, :, None]

    def scaled(length: Any, axis: int) -> Any:
        return length * shape.shape[axis] // (height, width)[axis - 1]

    def add(total: tuple[Array, Array], here: tuple[Array, ...]) -> tuple[tuple[Array, Array], None]:
        corner, *own = here
        patch = _patch(x, corner, height, width)
        place = (0, scaled(corner[0], 1), scaled(corner[1], 2), 0)
        return tuple(
            jax.lax.dynamic_update_slice(whole, jax.lax.dynamic_slice(whole, place, part.shape) + part, place)
            for whole, part in zip(total, (function(patch, *own) * weight, weight), strict=True)), None

    size = (scaled(x.shape[1], 1), scaled(x.shape[2], 2))
    empty = (jnp.zeros((x.shape[0], *size, shape.shape[3]), shape.dtype), jnp.zeros((1, *size, 1), jnp.float32))
    (values, share), _ = jax.lax.scan(add, empty, (places, *each))
    return values / share
