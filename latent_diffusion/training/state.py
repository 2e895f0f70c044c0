"""What a run must remember to go on: one dataclass per stage. No random key: keys come from seed, step and example."""

from typing import Any

import jax
from flax import struct


@struct.dataclass
class TrainState:
    """Stage 2.

    params: ``{"unet", "conditioner"?, "logvar"?}``; ema_params: the averaged subset of it; scale_factor: the number
    the first stage's latents are multiplied with (about 1/std).
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any
    scale_factor: jax.Array


@struct.dataclass
class AutoencoderTrainState:
    """Stage 1.

    params: ``{"autoencoder", "logvar"}``; ema_params: ``{"autoencoder"}`` or empty; disc_params: ``{"discriminator"}``;
    disc_stats: its running batch statistics.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any
    disc_params: Any
    disc_stats: Any
    disc_opt_state: Any
