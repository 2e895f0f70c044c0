"""What the loader sends to the devices -> what the steps compute with."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array


def as_floats(batch: dict[str, Any]) -> dict[str, Array]:
    """A batch whose pictures of 8 bits, which cross the bus as they are, became float32 in [-1, 1], as by
    `data.transforms.to_float` (to the last digit but one). What is float already stays, and so do class numbers."""
    return {name: x.astype(jnp.float32) / 127.5 - 1.0 if x.dtype == jnp.uint8 else x for name, x in batch.items()}
