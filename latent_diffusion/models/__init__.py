"""Networks, built from a config by `build`. They know nothing of losses, schedules, data or devices."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from latent_diffusion import sizes
from latent_diffusion.errors import UserError, choose
from latent_diffusion.models.autoencoder import AutoencoderIdentity, AutoencoderKL, AutoencoderVQ
from latent_diffusion.models.clip import CLIPTextTransformer
from latent_diffusion.models.conditioning import (
    ClassEmbedder,
    HybridConditioner,
    SpatialRescaler,
    TextTransformer,
)
from latent_diffusion.models.unet import UNet


@dataclasses.dataclass(frozen=True)
class Models:
    """The networks of a stage, without parameters. What a stage does not have is None."""

    unet: UNet | None
    conditioner: nn.Module | None
    first_stage: nn.Module | None


def _fields(module: type[nn.Module], config: Any) -> dict[str, Any]:
    """The keys of `config` that are fields of `module`, lists as tuples (a module must be hashable)."""
    names = {field.name for field in dataclasses.fields(module)} - {"name", "parent"}
    return {
        key: tuple(value) if isinstance(value, list | tuple) else value for key, value in config.items() if key in names
    }


FIRST_STAGES: dict[str, type[nn.Module]] = {
    "kl": AutoencoderKL,
    "vq": AutoencoderVQ,
    "identity": AutoencoderIdentity,
}


def build_first_stage(model_config: Any) -> nn.Module:
    """The autoencoder of a stage-1 `model` section. Keys that its kind does not use are ignored.

    Raises UserError for an unknown `kind`.
    """
    kind = choose(FIRST_STAGES, model_config.get("kind", ""), "model.kind")
    fields = _fields(kind, model_config)
    fields.pop("double_z", None)  # it follows from the kind
    return kind(**fields)


def _class_embedder(config: Any) -> nn.Module:
    return ClassEmbedder(sizes.label_rows(config), config.conditioning.width)


def _transformer(config: Any, options: Any) -> nn.Module:
    fields = {key: options[key] for key in ("vocab_size", "max_length", "layers", "heads", "head_dim")}
    fields |= dict(width=config.conditioning.width, dtype=config.model.dtype)
    if options.get("kind") == "clip":
        return CLIPTextTransformer(**fields)
    return TextTransformer(remat=config.model.remat, **fields)


def _spatial_rescaler(config: Any) -> nn.Module:
    options, factor = config.conditioning.segmentation, sizes.factor(config.first_stage.model)
    return SpatialRescaler(options.num_classes, int(math.log2(factor)), options.channels)


CONDITIONERS: dict[str, Callable[[Any], nn.Module | None]] = {
    "none": lambda config: None,
    "class": _class_embedder,
    "text": lambda config: _transformer(config, config.conditioning.text),
    "layout": lambda config: _transformer(config, config.conditioning.layout),
    "vectors": lambda config: None,  # as they are given
}
MAP_CONDITIONERS: dict[str, Callable[[Any], nn.Module | None]] = {
    "none": lambda config: None,
    "segmentation": _spatial_rescaler,
    "low_res": lambda config: None,     # pixels as they are
    "inpainting": lambda config: None,  # the first stage
}


def _conditioner(config: Any) -> nn.Module | None:
    options = config.conditioning
    sequence = choose(CONDITIONERS, options.crossattn, "conditioning.crossattn")(config)
    spatial = choose(MAP_CONDITIONERS, options.concat, "conditioning.concat")(config)
    if sequence is not None and options.width != config.model.context_dim:
        raise UserError(f"conditioning.width is {options.width}, but model.context_dim is {config.model.context_dim}")
    return HybridConditioner(sequence, spatial) if sequence is not None and spatial is not None else (
        sequence or spatial)


def _unet(config: Any) -> UNet:
    fields = _fields(UNet, config.model)
    if config.conditioning.label and not fields.get("num_classes"):
        fields["num_classes"] = sizes.label_rows(config)
    return UNet(**fields)


def build(config: Any) -> Models:
    """The networks of `config.stage`: the only factory of networks.

    Raises UserError for an unknown stage, kind or conditioning, or if conditioning.width is not
    model.context_dim.
    """
    if choose({"autoencoder": 1, "diffusion": 2}, config.stage, "stage") == 1:
        return Models(unet=None, conditioner=None, first_stage=build_first_stage(config.model))
    return Models(_unet(config), _conditioner(config), build_first_stage(config.first_stage.model))
