"""Which way a convolution is computed; the results are those of `jax.lax`, but for rounding."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion.models import winograd
from latent_diffusion.models.products import multiply

MOST_PIXELS = 64  # of an output that is a product of patches on a CPU


def convolve(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: Sequence[tuple[int, int]], *,
    precision: Any = None, **options: Any,
) -> jax.Array:
    """`lax.conv_general_dilated`, but on a CPU `winograd` where it is faster, and everywhere a product where that is
    what it amounts to: with each pixel for a 1x1 kernel, which XLA's CPU convolution does not share out between
    threads, and with the patches of small pictures (`_patches_pay`)."""
    if {*kernel.shape[:-2], *strides} == {1} and not np.any(padding):
        return multiply(x, kernel.reshape(kernel.shape[-2:]), precision=precision)
    if winograd.pays(x, kernel, strides, padding):
        return winograd.winograd(x, kernel)
    lengths = [(low + side + high - size) // stride + 1 for side, (low, high), size, stride in zip(
        x.shape[1:3], padding, kernel.shape[:2], strides, strict=True)]
    if not _patches_pay(x, kernel, math.prod(lengths)):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, precision=precision, **options)
    rows, columns = (
        [slice(i, i + stride * (length - 1) + 1, stride) for i in range(size)]
        for length, size, stride in zip(lengths, kernel.shape[:2], strides, strict=True))
    with jax.named_scope("patches"):  # for profiles
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        patches = jnp.concatenate([x[:, row, column] for row in rows for column in columns], axis=-1)
        return multiply(patches, kernel.reshape(-1, kernel.shape[-1]), precision=precision)


def _patches_pay(x: jax.Array, kernel: jax.Array, pixels: int) -> bool:
    """Whether a product of the patches, for `pixels` of the output, is faster. Everywhere for a picture that is hardly
    larger than the kernel: on the coarsest 2x2 level of LDM-8, XLA exchanges picture and kernel, and its CPU code then
    takes 11 times as long; on 4x4 pixels it takes 1.3 (jax 0.10) to 2.5 times (0.12) as long. On a CPU up to 8x8 pixels
    (XLA: 1.2 to 1.5 times as long, gradients 2 to 3 times), unless there are few features to make the patches for."""
    if x.shape[1] * x.shape[2] < 2 * kernel.shape[0] * kernel.shape[1]:
        return True
    return jax.default_backend() == "cpu" and pixels <= MOST_PIXELS and kernel.shape[-1] >= 32
