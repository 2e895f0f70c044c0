"""Our configs -> model descriptions of CompVis latent-diffusion: the inverse of `compvis_settings`."""

import logging
from typing import Any

from ml_collections import ConfigDict

from latent_diffusion import sizes
from latent_diffusion.errors import UserError
from latent_diffusion.interop.compvis_settings import (
    DDCONFIG,
    DIFFUSION_KEYS,
    FIRST_STAGE,
    LAYOUT_KEYS,
    UNCONDITIONAL,
    UNET,
)


def to_description(config: ConfigDict, *, averaged: bool | None = None, with_loss: bool = True) -> dict[str, Any]:
    """The yaml file of a model, as nested dicts: `to_config` makes the same networks, schedule and loss of it.

    Args:
      config: of either stage.
      averaged: whether there are averages of its weights; by default whether training keeps some.
      with_loss: describe the losses of a first stage, whose weights are part of the reference's.

    Raises UserError for a model that the reference cannot build.
    """
    if config.stage == "autoencoder":
        model = _describe_first_stage(config.model, "VQModel", "model")
        if with_loss:
            model["params"]["lossconfig"] = _describe_loss(config)
        if config.ema.decay > 0 if averaged is None else averaged:
            model["params"]["use_ema"] = True
        return {"model": {"base_learning_rate": config.optimizer.learning_rate, **model}}
    first, unet = config.first_stage.model, config.model
    _check_groups(unet.norm_groups, [unet.model_channels * mult for mult in unet.channel_mult], "model")
    if config.diffusion.parameterization == "v":
        raise UserError("diffusion.parameterization='v' is unknown to latent-diffusion, which has eps and x0")
    fields = {name: _yaml(unet[name]) for name in UNET}
    fields |= {name: fields[name] or None for name in ("num_classes", "context_dim")}
    params = {theirs: _yaml(config.diffusion[ours]) for theirs, (ours, _) in DIFFUSION_KEYS.items()} | {
        "image_size": unet.image_size, "channels": unet.out_channels, "first_stage_key": "image",
        "use_ema": config.ema.decay > 0 if averaged is None else averaged,
        "scale_by_std": bool(config.first_stage.scale_by_std),
        "scale_factor": 1.0 if config.first_stage.scale_by_std else config.first_stage.scale_factor,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": fields | {
            "use_checkpoint": unet.remat != "none"}},
        "first_stage_config": _describe_first_stage(first, "VQModelInterface", "first_stage.model"),
        **_describe_conditions(config)}
    return {"model": {"base_learning_rate": config.optimizer.learning_rate,
                      "target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}


def _check_groups(groups: int, channels: list[int], key: str) -> None:
    if groups != 32:
        raise UserError(f"{key}.norm_groups={groups}, but latent-diffusion always has 32 groups")
    if odd := [c for c in channels if c % 32]:
        raise UserError(f"{key}: {odd[0]} channels do not divide into the 32 groups that latent-diffusion always has")


def _yaml(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _describe_first_stage(section: Any, vq: str, key: str) -> dict[str, Any]:
    if section.kind == "identity":
        return {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    _check_groups(section.norm_groups, [section.ch * mult for mult in section.ch_mult], key)
    ddconfig = {theirs: _yaml(section[ours]) for theirs, ours in DDCONFIG.items()} | {"double_z": section.kind == "kl"}
    params = {"embed_dim": section.embed_dim, "ddconfig": ddconfig, "lossconfig": {"target": "torch.nn.Identity"}}
    if section.kind == "vq":
        params["n_embed"] = section.n_embed
    return {"target": f"ldm.models.autoencoder.{vq if section.kind == 'vq' else 'AutoencoderKL'}", "params": params}


def _describe_loss(config: ConfigDict) -> dict[str, Any]:
    loss, kl = config.training.loss, config.model.kind == "kl"
    params = {"disc_start": loss.disc_start, "disc_weight": loss.disc_weight, "disc_factor": loss.disc_factor,
              "disc_num_layers": loss.disc_layers, "disc_loss": loss.disc_loss,
              "disc_in_channels": config.data.channels, "perceptual_weight": loss.perceptual_weight,
              "use_actnorm": loss.disc_norm == "actnorm"}
    params |= {"kl_weight": loss.kl_weight, "logvar_init": loss.logvar_init} if kl else {
        "codebook_weight": loss.codebook_weight, "disc_ndf": loss.disc_channels, "pixel_loss": loss.pixel}
    return {"target": "ldm.modules.losses.LPIPSWithDiscriminator" if kl
            else "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": params}


def _warn_of_text(options: Any) -> None:
    """The reference's text encoders name no tokenizer and no size of CLIP."""
    if options.text.kind == "bert" and options.text.vocab_size != 30522:
        logging.warning("the vocabulary of %d entries is this model's own, but latent-diffusion has "
                        "bert-base-uncased's: give it tokens, not text", options.text.vocab_size)
    if options.text.kind == "clip" and (options.width, options.text.layers) != (768, 12):
        logging.warning("the text encoder is not CLIP ViT-L/14, which latent-diffusion always has")


def _describe_conditions(config: ConfigDict) -> dict[str, Any]:
    options, encoders = config.conditioning, "ldm.modules.encoders.modules."
    sequence, spatial, identity = options.crossattn, options.concat, {"target": "torch.nn.Identity"}
    transformer = options.layout if sequence == "layout" else options.text
    if sequence in ("text", "layout") and (transformer.heads, transformer.head_dim) != (8, 64) and not (
            sequence == "text" and options.text.kind == "clip"):
        raise UserError(f"conditioning.{sequence} has {transformer.heads} heads of {transformer.head_dim} channels, "
                        "but latent-diffusion's transformer has 8 of 64")
    bert = {"n_embed": options.width, "n_layer": transformer.layers, "vocab_size": transformer.vocab_size,
            "max_seq_len": transformer.max_length}
    layout_key = next((key for key, form in LAYOUT_KEYS.items() if form == options.layout.form), "")
    stages = {
        "class": ("class_label", {"target": encoders + "ClassEmbedder", "params": {
            "n_classes": sizes.label_rows(config), "embed_dim": options.width, "key": "class_label"}}),
        "text": ("caption", {"target": encoders + "BERTEmbedder", "params": bert}),
        "layout": (layout_key, {"target": encoders + "BERTEmbedder", "params": bert | {"use_tokenizer": False}}),
        "vectors": ("vectors", identity),
        "segmentation": ("segmentation", {"target": encoders + "SpatialRescaler", "params": {
            "n_stages": sizes.factor(config.first_stage.model).bit_length() - 1,
            "in_channels": options.segmentation.num_classes, "out_channels": options.segmentation.channels}}),
        "low_res": ("LR_image", identity), "inpainting": ("masked_image", FIRST_STAGE),
    }
    if sequence == "text":
        _warn_of_text(options)
    if sequence == "text" and options.text.kind == "clip":
        stages["text"] = ("caption", {"target": encoders + "FrozenCLIPEmbedder", "params": {
            "max_length": options.text.max_length}})
    if options.label and (sequence, spatial) != ("none", "none"):
        raise UserError("conditioning.label beside another condition is unknown to latent-diffusion")
    if options.label:
        return {"conditioning_key": "adm", "cond_stage_key": "class_label", "cond_stage_config": identity}
    if (sequence, spatial) == ("none", "none"):
        return {"cond_stage_config": UNCONDITIONAL}
    key = "concat" if sequence == "none" else "crossattn" if spatial == "none" else "hybrid"
    name, stage = stages[spatial if sequence == "none" else sequence]
    return {"conditioning_key": key, "cond_stage_key": name, "cond_stage_config": stage,
            "cond_stage_trainable": stage not in (identity, FIRST_STAGE)}
