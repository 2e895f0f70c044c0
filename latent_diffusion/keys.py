"""Randomness that belongs to an example, not to a device: the same numbers for any number of devices and hosts.

A key is folded with the example's position in the global stream (training) or with the number of the image
(sampling), so that re-sharding or re-batching never changes what an example sees.
"""

import jax
from jaxtyping import Array, Float, Int, Key


def example_keys(key: Key[Array, ""], index: Int[Array, "b"]) -> Key[Array, "b"]:
    """One key per example: ``fold_in(key, index[i])``."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


def normal(key: Key[Array, ""], index: Int[Array, "b"], shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    """Standard normal noise of shape ``(b, *shape)``."""
    return jax.vmap(lambda k: jax.random.normal(k, shape))(example_keys(key, index))


def integers(key: Key[Array, ""], index: Int[Array, "b"], high: int) -> Int[Array, "b"]:
    """Uniform integers in ``[0, high)``."""
    return jax.vmap(lambda k: jax.random.randint(k, (), 0, high))(example_keys(key, index))


def bernoulli(key: Key[Array, ""], index: Int[Array, "b"], probability: float) -> Array:
    """Booleans of shape ``(b,)``, true with the given probability."""
    return jax.vmap(lambda k: jax.random.bernoulli(k, probability))(example_keys(key, index))
