"""What the loader sends to the devices -> what the steps compute with."""

from typing import Any

import jax.numpy as jnp


def as_floats(batch: dict[str, Any]) -> dict[str, Any]:
    """A compact batch (`data.loader.batches`) as float32: pictures in [-1, 1] from their bytes, which cross the bus as
    they are, and cached latents. What is float32 already stays, and so do class numbers."""
    return {name: _as_float(x) for name, x in batch.items()}


def _as_float(x: Any) -> Any:
    if x.dtype == jnp.uint8:  # x / 127.5 - 1, but exact at both ends where a compiler multiplies by the reciprocal
        return (2.0 * x.astype(jnp.float32) - 255.0) / 255.0
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x
