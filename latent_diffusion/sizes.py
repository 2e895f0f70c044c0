"""Sizes that follow from a config, before any network is built. A leaf module."""

from typing import Any


def factor(first: Any) -> int:
    """How many times smaller a first stage makes pictures, f = 2^m (paper section 3.1); `first` is its section."""
    return 1 if first.kind == "identity" else 2 ** (len(first.ch_mult) - 1)


def unet_factor(config: Any) -> int:
    """How many times smaller the UNet's coarsest level is than the latents."""
    return 2 ** (len(config.model.channel_mult) - 1)


def latent_channels(config: Any) -> int:
    """Channels of the latents that stage 2 is trained on."""
    first = config.first_stage.model
    return config.data.channels if first.kind == "identity" else first.embed_dim


def map_channels(config: Any) -> int:
    """How many channels ``conditioning.concat`` adds to the UNet's input."""
    return {"segmentation": config.conditioning.segmentation.channels, "low_res": config.data.channels,
            "inpainting": latent_channels(config) + 1}.get(config.conditioning.concat, 0)


def complete(config: Any) -> None:
    """Fills in the sizes of the UNet's input and output that are 0 and follow from the first stage, whose own channels
    are the data's where it is the identity."""
    first, model, channels = config.first_stage.model, config.model, latent_channels(config)
    if first.kind == "identity":
        first.in_channels = first.out_channels = config.data.channels
    model.image_size = model.image_size or config.data.image_size // factor(first)
    model.in_channels = model.in_channels or channels + map_channels(config)
    model.out_channels = model.out_channels or channels


def label_rows(config: Any) -> int:
    """Rows of the class table; the last is the null class, if there is one."""
    return config.conditioning.num_classes + bool(config.conditioning.null_class)
