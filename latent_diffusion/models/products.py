"""The product that linear layers and convolutions share."""

from typing import Any

import jax
import jax.numpy as jnp


def multiply(
    x: jax.Array, kernel: jax.Array, dimension_numbers: Any = None, precision: Any = None, **options: Any
) -> jax.Array:
    """x @ kernel over the last axis of `x`, whose other axes become one: XLA's CPU code takes half the time for the
    gradient of such a kernel. (A `dot_general` for Flax.)"""
    product = jnp.dot(x.reshape(-1, x.shape[-1]), kernel, precision=precision, **options)
    return product.reshape(*x.shape[:-1], kernel.shape[-1])
