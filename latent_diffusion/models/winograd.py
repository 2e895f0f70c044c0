"""3x3 convolutions with 16 multiplications for four pixels instead of 36: Winograd's minimal filtering F(2x2, 3x3),
as in Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016, section 4.

A tile of 2x2 outputs needs 4x4 inputs d; with the matrices below, out = A^T [(G k G^T) * (B^T d B)] A, where * is a
product of each of the 16 entries, over channels a product of matrices. Rounding errors are no larger than those of
XLA's convolutions on a CPU, which sum nine times as many numbers (a test compares both with float64).
"""

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from latent_diffusion.errors import choose_by_variable
from latent_diffusion.models.products import multiply

T = TypeVar("T")
LEAST_WORK = 2**22  # pixels times channels, of inputs and of outputs
MOST_ENTRIES = 2**23  # of a picture: above, its tiles take too much memory, and are no faster


def pays(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Sequence[tuple[int, int]]) -> bool:
    """Whether `convolve` is the faster way, and computes the same: in float32 on a CPU, where XLA's convolutions take
    1.3 to 1.7 times as long and their gradients 2 to 3 times, as measured with jax 0.10. Not for small ones, which gain
    little but take as long to compile. The kernel is transformed at each call, which must be little beside the
    products. The size of the batch has no say, so that results do not depend on it. LATENT_DIFFUSION_CONVOLUTION=xla in
    the environment rules it out; UserError for other values than that and "auto"."""
    wanted = choose_by_variable({"auto": True, "xla": False}, "LATENT_DIFFUSION_CONVOLUTION")
    if not wanted or jax.default_backend() != "cpu":
        return False
    same = kernel.shape[:-2] == (3, 3) and {*strides} == {1} and {*map(tuple, padding)} == {(1, 1)}
    if not same or x.dtype != jnp.float32 or kernel.dtype != jnp.float32:
        return False
    _, height, width, channels = x.shape
    features, pixels = kernel.shape[-1], height * width
    return (min(channels, features) >= 32 and pixels * channels * features >= LEAST_WORK
            and channels * features <= 8192 * pixels and pixels * max(channels, features) <= MOST_ENTRIES)


# Gradients need the 16 tiled arrays of the input again. They are four times as large as the input, so they are made
# again instead of stored.
@functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
@jax.jit
def winograd(x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c d"]) -> Float[Array, "b h w d"]:
    """The 3x3 convolution of `x` padded by 1 on every side. (`flops` knows it by its name.)"""
    height, width = x.shape[1:3]
    rows, columns = (height + 1) // 2, (width + 1) // 2
    x = jnp.pad(x, ((0, 0), (1, 2 * rows - height + 1), (1, 2 * columns - width + 1), (0, 0)))
    tiles = _both_axes(
        _of_inputs, [[x[:, i:i + 2 * rows:2, j:j + 2 * columns:2] for j in range(4)] for i in range(4)])
    weights = _both_axes(_of_kernel, [[kernel[i, j] for j in range(3)] for i in range(3)])
    products = [[multiply(tile, weight) for tile, weight in zip(*pair, strict=True)]
                for pair in zip(tiles, weights, strict=True)]
    out = jnp.stack([jnp.stack(row, axis=3) for row in _both_axes(_of_products, products)], axis=2)
    return out.reshape(x.shape[0], 2 * rows, 2 * columns, -1)[:, :height, :width]


def _both_axes(transform: Callable[[Sequence[T]], list[T]], table: Sequence[Sequence[T]]) -> list[list[T]]:
    """Transforms the columns of a table, then its rows."""
    columns = [transform(column) for column in zip(*table, strict=True)]
    return [transform(row) for row in zip(*columns, strict=True)]


def _of_inputs(d: Sequence[jax.Array]) -> list[jax.Array]:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _of_kernel(k: Sequence[jax.Array]) -> list[jax.Array]:
    return [k[0], (k[0] + k[1] + k[2]) * 0.5, (k[0] - k[1] + k[2]) * 0.5, k[2]]


def _of_products(m: Sequence[jax.Array]) -> list[jax.Array]:
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]
