"""Model descriptions of CompVis latent-diffusion (the ``model`` part of its yaml files) -> our configs.

Only what decides the networks, the schedule and the loss is taken over; the data and the schedule of the learning rate
are the user's. What cannot be done here is an error that names the key.
"""

from collections.abc import Mapping
from typing import Any

import yaml
from etils import epath
from ml_collections import ConfigDict

from latent_diffusion import config as config_lib
from latent_diffusion import defaults, layouts, sizes
from latent_diffusion.errors import UserError, read_text

UNCONDITIONAL, FIRST_STAGE = "__is_unconditional__", "__is_first_stage__"
_ENCODERS = {"AutoencoderKL": "kl", "VQModel": "vq", "VQModelInterface": "vq", "IdentityFirstStage": "identity"}
_DIFFUSION = ("LatentDiffusion", "DDPM", "Layout2ImgDiffusion")
# Keys of ``ddconfig`` and what they are called here; their defaults are those of the reference's Encoder and Decoder.
DDCONFIG = {"z_channels": "z_channels", "in_channels": "in_channels", "out_ch": "out_channels", "ch": "ch",
             "ch_mult": "ch_mult", "num_res_blocks": "num_res_blocks", "attn_resolutions": "attn_resolutions",
             "resolution": "resolution", "attn_type": "attn_type", "dropout": "dropout",
             "resamp_with_conv": "resamp_with_conv", "tanh_out": "tanh_out"}
_DDCONFIG_DEFAULTS = dict(ch_mult=(1, 2, 4, 8), attn_type="vanilla", dropout=0.0, resamp_with_conv=True, tanh_out=False)
UNET = ("image_size", "in_channels", "model_channels", "out_channels", "num_res_blocks", "attention_resolutions",
         "dropout", "channel_mult", "conv_resample", "num_heads", "num_head_channels", "num_heads_upsample",
         "use_scale_shift_norm", "resblock_updown", "use_new_attention_order", "use_spatial_transformer",
         "transformer_depth", "context_dim", "num_classes", "legacy")
_UNET_DEFAULTS = dict(dropout=0.0, channel_mult=(1, 2, 4, 8), conv_resample=True, num_heads=-1, num_head_channels=-1,
                      num_heads_upsample=-1, use_scale_shift_norm=False, resblock_updown=False,
                      use_new_attention_order=False, use_spatial_transformer=False, transformer_depth=1, context_dim=0,
                      num_classes=0, legacy=True)
# Parameters of DDPM that decide the schedule and the loss: name there -> (name here, default there).
DIFFUSION_KEYS = {
    "timesteps": ("timesteps", 1000), "beta_schedule": ("beta_schedule", "linear"),
    "linear_start": ("linear_start", 1e-4), "linear_end": ("linear_end", 2e-2), "cosine_s": ("cosine_s", 8e-3),
    "parameterization": ("parameterization", "eps"), "loss_type": ("loss", "l2"),
    "l_simple_weight": ("l_simple_weight", 1.0), "original_elbo_weight": ("original_elbo_weight", 0.0),
    "v_posterior": ("v_posterior", 0.0), "learn_logvar": ("learn_logvar", False), "logvar_init": ("logvar_init", 0.0),
}
# Forms of layouts by ``cond_stage_key``.
LAYOUT_KEYS = {"coordinates_bbox": "boxes", "objects_bbox": "boxes", "objects_center_points": "centers"}


def read(path: epath.PathLike) -> dict[str, Any]:
    """A yaml file as nested dicts. Raises UserError where it is none."""
    file = epath.Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{path} {'is a folder' if file.exists() else 'does not exist'}")
    try:
        description = yaml.safe_load(read_text(file))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no yaml file: {error}") from error
    if not isinstance(description, dict):
        raise UserError(f"{path} describes no model")
    return description


def to_config(description: Mapping[str, Any]) -> ConfigDict:
    """Our config for a model of the reference.

    Args:
      description: a whole yaml file, its ``model`` part, or that of a first stage; nested mappings.

    Returns:
      A locked config of stage 1 or 2. ``sampling.spacing`` is "reference", so that samplers visit the reference's
      timesteps. ``data`` says nothing but the size and the channels of the pictures.

    Raises:
      UserError: a class that is not known here, or a setting that cannot be done; the message names the key.
    """
    model = _plain(description.get("model", description))
    target, params = _target(model, "model")
    try:
        if target in _ENCODERS:
            return _first_stage_config(params, model)
        if target in _DIFFUSION:
            return _diffusion_config(target, params, model)
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError) as error:  # ConfigDict's own message names the key
        raise UserError(f"a setting of the description is of the wrong type: {error}") from error
    known = ", ".join((*_ENCODERS, *_DIFFUSION))
    raise UserError(f"model.target={model['target']} is not known here; known are {known}")


def _plain(value: Any) -> Any:
    """Nested mappings as dicts, sequences as tuples, and numbers that yaml reads as text ("1e-6") as numbers."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return tuple(map(_plain, value)) if hasattr(value, "__iter__") else value


def _target(part: Any, where: str) -> tuple[str, dict[str, Any]]:
    """The class of a ``{target, params}``, without its module, and its arguments."""
    if not isinstance(part, Mapping) or "target" not in part:
        raise UserError(f"{where} has no target: it is no model of latent-diffusion's yaml form")
    return str(part["target"]).rsplit(".", 1)[-1], dict(part.get("params") or {})


def _needed(params: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in params:
        raise UserError(f"{where}.{name} is missing")
    return params[name]


# --- first stages ----------------------------------------------------------------------------------------------------


def first_stage_model(part: Any, where: str) -> dict[str, Any]:
    """Our ``model`` section of stage 1 for a ``{target, params}``."""
    target, params = _target(part, where)
    if target not in _ENCODERS:
        raise UserError(f"{where}.target: {target} is not known here; known are {', '.join(_ENCODERS)}")
    section = defaults.autoencoder().model.to_dict() | {"kind": _ENCODERS[target]}
    if section["kind"] == "identity":
        return section
    dd, inside = {**_DDCONFIG_DEFAULTS, **_needed(params, "ddconfig", where)}, f"{where}.ddconfig"
    if dd.get("use_linear_attn"):
        dd["attn_type"] = "linear"
    for name in ("give_pre_end", "conv_shortcut"):
        if dd.get(name):
            raise UserError(f"{inside}.{name} is not supported")
    section |= {ours: _needed(dd, theirs, inside) for theirs, ours in DDCONFIG.items()}
    section |= {"embed_dim": _needed(params, "embed_dim", where), "double_z": section["kind"] == "kl"}
    if bool(dd.get("double_z", True)) != section["double_z"]:
        raise UserError(f"{inside}.double_z={dd.get('double_z', True)} does not go with {target}")
    if section["kind"] == "vq":
        section["n_embed"] = _needed(params, "n_embed", where)
        if params.get("remap"):
            raise UserError(f"{where}.remap={params['remap']} is not supported: all codes are used here")
    return section


def _first_stage_config(params: dict[str, Any], model: dict[str, Any]) -> ConfigDict:
    config = defaults.autoencoder()
    section = first_stage_model(model, "model.params")
    if section["kind"] == "identity":
        raise UserError("model.target: IdentityFirstStage has no weights")
    config.model.update(section)
    config.data.update(dict(image_size=section["resolution"], channels=section["in_channels"]))
    config.ema.decay = 0.9999 if params.get("use_ema") else 0.0
    config.optimizer.learning_rate = float(model.get("base_learning_rate", config.optimizer.learning_rate))
    loss = params.get("lossconfig") or {"target": "Identity"}
    name, options = _target(loss, "model.params.lossconfig")
    if "LPIPSWithDiscriminator" in name:
        given = {"disc_num_layers": "disc_layers", "disc_ndf": "disc_channels", "pixel_loss": "pixel"} | {
            name: name for name in ("disc_start", "disc_weight", "disc_factor", "disc_loss", "kl_weight",
                                    "codebook_weight", "perceptual_weight", "logvar_init")}
        reference = dict(disc_weight=1.0, kl_weight=1.0) | options
        if options.get("disc_conditional"):
            raise UserError("model.params.lossconfig.disc_conditional is not supported")
        config.training.loss.update({ours: _as(config.training.loss[ours], reference[theirs], f"lossconfig.{theirs}")
                                     for theirs, ours in given.items() if theirs in reference})
        config.training.loss.disc_norm = "actnorm" if options.get("use_actnorm") else "batch"
    return config.lock()


# --- diffusion models ------------------------------------------------------------------------------------------------


def _diffusion_config(target: str, params: dict[str, Any], model: dict[str, Any]) -> ConfigDict:
    config, where = defaults.diffusion(), "model.params"
    if params.get("given_betas") is not None:
        raise UserError(f"{where}.given_betas is not supported: name the schedule with beta_schedule")
    if params.get("num_timesteps_cond", 1) != 1:
        raise UserError(f"{where}.num_timesteps_cond={params['num_timesteps_cond']} is not supported, only 1: no noise "
                        "on conditions")
    config.first_stage.model.update(
        dict(kind="identity") if target == "DDPM" else first_stage_model(
            _needed(params, "first_stage_config", where), f"{where}.first_stage_config.params"))
    unet = _unet(_needed(params, "unet_config", where))
    first = config.first_stage.model
    if first.kind == "identity":
        first.in_channels = first.out_channels = unet["out_channels"]
    config.model.update(unet)
    config.diffusion.update({ours: _as(config.diffusion[ours], params.get(theirs, default), theirs)
                             for theirs, (ours, default) in DIFFUSION_KEYS.items()})
    config.data.update(dict(channels=first.in_channels, image_size=sizes.factor(first) * _as(
        0, params.get("image_size", unet["image_size"]), "image_size")))
    config.model.image_size = config.data.image_size // sizes.factor(first)
    config.first_stage.scale_by_std = bool(params.get("scale_by_std"))
    config.first_stage.scale_factor = 0.0 if params.get("scale_by_std") else float(params.get("scale_factor", 1.0))
    config.ema.decay = 0.9999 if params.get("use_ema", True) else 0.0
    config.optimizer.learning_rate = float(model.get("base_learning_rate", config.optimizer.learning_rate))
    for key in ("parameterization", "loss", "beta_schedule"):
        choices = config_lib.STAGE_CHOICES["diffusion"][f"diffusion.{key}"]
        if config.diffusion[key] not in choices:
            raise UserError(f"{where}: {key} {config.diffusion[key]!r} is not one of {', '.join(choices)}")
    _set_conditions(config, target, params)
    # The reference drops no condition in training, but its models are guided away from these null conditions.
    guided = config.conditioning.crossattn in ("text", "vectors") or (
        config.conditioning.crossattn == "class" and config.conditioning.null_class)
    config.conditioning.dropout = 0.1 if guided else 0.0
    config.sampling.update(dict(steps=200, spacing="reference"))
    return config.lock()


def _as(like: Any, value: Any, key: str) -> Any:
    """`value` in the type that the config has for it: yaml's ``1`` may stand for 1.0. `key` is its name there."""
    try:
        return type(like)(value) if isinstance(like, bool | int | float) else value
    except (TypeError, ValueError) as error:
        raise UserError(f"model.params.{key}={value!r} is not of type {type(like).__name__}") from error


def _unet(part: Any) -> dict[str, Any]:
    where = "model.params.unet_config"
    target, params = _target(part, where)
    if target != "UNetModel":
        raise UserError(f"{where}.target: {target} is not known here, only UNetModel")
    if params.get("dims", 2) != 2 or params.get("n_embed") is not None:
        name = "dims" if params.get("dims", 2) != 2 else "n_embed"
        raise UserError(f"{where}.params.{name}={params[name]} is not supported")
    unknown = set(params) - {*UNET, "dims", "n_embed", "use_checkpoint", "use_fp16"}
    if unknown:
        raise UserError(f"{where}.params.{sorted(unknown)[0]} is not known here")
    given = {**_UNET_DEFAULTS, **{key: value for key, value in params.items() if value is not None}}
    unet = {name: _needed(given, name, f"{where}.params") for name in UNET}
    if isinstance(unet["context_dim"], tuple):
        unet["context_dim"], = unet["context_dim"]
    return unet | {"remat": "full" if params.get("use_checkpoint") else "none"}


def conditioning_key(target: str, params: Mapping[str, Any]) -> str | None:
    """How the reference gives the condition to its UNet: None, concat, crossattn, hybrid or adm, with its rule for
    files from before this key existed."""
    stage = params.get("cond_stage_config", UNCONDITIONAL if target == "DDPM" else None)
    if target != "DDPM" and stage is None:
        raise UserError("model.params.cond_stage_config is missing")
    if stage == UNCONDITIONAL:
        return None
    if target == "DDPM" or params.get("conditioning_key") is not None:
        return params.get("conditioning_key")
    return "concat" if params.get("concat_mode", True) else "crossattn"


def _set_conditions(config: ConfigDict, target: str, params: Mapping[str, Any]) -> None:
    key = conditioning_key(target, params)
    if key is None:
        return
    if key not in ("concat", "crossattn", "hybrid", "adm"):
        raise UserError(f"model.params.conditioning_key={key!r} is not one of concat, crossattn, hybrid, adm")
    stage = params["cond_stage_config"]
    name, options = (stage, {}) if isinstance(stage, str) else _target(stage, "model.params.cond_stage_config")
    if key == "adm":
        config.conditioning.update(dict(label=True, num_classes=config.model.num_classes, null_class=False))
        return
    if key in ("crossattn", "hybrid"):
        _set_sequence(config, name, options, str(params.get("cond_stage_key", "")))
    if key == "concat":
        _set_map(config, name, options)
    if key == "hybrid":
        _set_map(config, "Identity" if config.model.in_channels == sizes.latent_channels(config) + config.data.channels
                 else FIRST_STAGE, {})


def _set_sequence(config: ConfigDict, name: str, options: Mapping[str, Any], key: str) -> None:
    """A condition for cross-attention."""
    conditioning, width = config.conditioning, config.model.context_dim
    conditioning.width = width
    transformer = dict(vocab_size=int(options.get("vocab_size", 30522)), max_length=int(options.get("max_seq_len", 77)),
                       layers=int(options.get("n_layer", 0)), heads=8, head_dim=64)
    if name == "ClassEmbedder":
        classes = int(options.get("n_classes", 1000))
        null = classes == 1001  # ImageNet's 1000 and "no class", as the reference's notebook uses them
        conditioning.update(dict(crossattn="class", num_classes=classes - null, null_class=null))
    elif name in ("BERTEmbedder", "TransformerEmbedder"):
        tokenized = name == "BERTEmbedder" and options.get("use_tokenizer", True)
        if tokenized or key not in LAYOUT_KEYS:
            conditioning.crossattn = "text"
            conditioning.text.update(transformer)
        else:
            conditioning.crossattn = "layout"
            form, length = LAYOUT_KEYS[key], transformer["max_length"]
            crop = length % layouts.FORMS[form] == 2 % layouts.FORMS[form]  # it has two tokens
            conditioning.layout.update(transformer | dict(
                form=form, crop=crop, max_objects=(length - 2 * crop) // layouts.FORMS[form]))
    elif name == "FrozenCLIPEmbedder":
        conditioning.crossattn = "text"
        conditioning.text.update(dict(kind="clip", vocab_size=49408, max_length=int(options.get("max_length", 77)),
                                      layers=12, heads=width // 64, head_dim=64))
    elif name == "Identity":
        conditioning.crossattn = "vectors"
    else:
        raise UserError(f"model.params.cond_stage_config.target: {name} is not known here for cross-attention")


def _set_map(config: ConfigDict, name: str, options: Mapping[str, Any]) -> None:
    """A condition that is joined to z_t."""
    conditioning, first, where = config.conditioning, config.first_stage.model, "model.params.cond_stage_config"
    factor = sizes.factor(first)
    if name == "SpatialRescaler":
        stages, method = int(options.get("n_stages", 1)), options.get("method", "bilinear")
        if method not in ("bilinear", "area") or options.get("multiplier", 0.5) != 0.5 or options.get("bias"):
            raise UserError(f"{where}: SpatialRescaler is known here with method bilinear, multiplier 0.5 and no bias")
        if options.get("out_channels") is None:
            raise UserError(f"{where}.params.out_channels is missing: a map that stays as it is is not supported")
        if 2**stages != factor:
            raise UserError(f"{where}.params.n_stages={stages} makes maps {2**stages} times smaller, but the first "
                            f"stage makes pictures {factor} times smaller")
        conditioning.concat = "segmentation"
        conditioning.segmentation.update(dict(num_classes=int(options.get("in_channels", 3)),
                                              channels=int(options["out_channels"])))
    elif name == "Identity":
        conditioning.concat = "low_res"
        conditioning.low_res.factor = factor
    elif name == FIRST_STAGE:
        conditioning.concat = "inpainting"
    else:
        raise UserError(f"{where}.target: {name} is not known here for concatenation")
    added = sizes.map_channels(config)
    if config.model.in_channels != config.model.out_channels + added:
        raise UserError(f"model.params.unet_config.params.in_channels={config.model.in_channels}, but latents of "
                        f"{config.model.out_channels} channels and a {conditioning.concat} map of {added} make "
                        f"{config.model.out_channels + added}")
