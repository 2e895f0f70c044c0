"""Configs of diffusers' models and schedulers <-> ours."""

import logging
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from latent_diffusion import defaults, models, sizes
from latent_diffusion.errors import UserError

PIPELINES = ("LDMPipeline", "LDMTextToImagePipeline", "LDMSuperResolutionPipeline", "StableDiffusionPipeline")
_BETA_SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear", "squaredcos_cap_v2": "cosine"}
_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
# Settings that our networks have in one way only: key -> what it must be (also its default there).
_FIXED = {
    "act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5, "center_input_sample": False,
    "time_embedding_type": "positional", "mid_block_scale_factor": 1, "downsample_padding": 1, "norm_type": "group",
    "class_embed_type": None, "addition_embed_type": None, "only_cross_attention": False, "conv_in_kernel": 3,
    "conv_out_kernel": 3, "encoder_hid_dim": None, "lookup_from_codebook": False, "use_quant_conv": True,
    "use_post_quant_conv": True, "resnet_out_scale_factor": 1.0, "cross_attention_norm": None,
    "attention_type": "default", "dual_cross_attention": False, "time_cond_proj_dim": None,
    "resnet_skip_time_act": False, "add_attention": True,
}


def _check_fixed(given: Mapping[str, Any], where: str) -> None:
    for key, needed in _FIXED.items():
        if given.get(key, needed) != needed:
            raise UserError(f"{where}/config.json: {key}={given[key]!r} is not supported, only {needed!r}")


def _multiples(channels: list[int], where: str) -> tuple[int, ...]:
    if any(c % channels[0] for c in channels):
        raise UserError(f"{where}/config.json: block_out_channels={channels} are not multiples of the first")
    return tuple(c // channels[0] for c in channels)


def _side(value: Any, where: str) -> int:
    if isinstance(value, int):
        return value
    if isinstance(value, list) and len(set(value)) == 1:
        return value[0]
    raise UserError(f"{where}/config.json: sample_size={value} is not the side of a square, which is needed here")


def _one(value: Any, key: str, where: str) -> Any:
    """A setting that is one for all levels."""
    values = set(value) if isinstance(value, list) else {value}
    if len(values) != 1:
        raise UserError(f"{where}/config.json: {key}={value} differs between levels, which is not supported")
    return values.pop()


# --- in --------------------------------------------------------------------------------------------------------------


def unet_section(given: Mapping[str, Any], where: str = "unet") -> dict[str, Any]:
    """Our ``model`` section for the config.json of a UNet2DModel or UNet2DConditionModel."""
    _check_fixed(given, where)
    kinds, channels = given["down_block_types"], given["block_out_channels"]
    conditional = "cross_attention_dim" in given
    attention, plain = ("CrossAttnDownBlock2D", "DownBlock2D") if conditional else ("AttnDownBlock2D", "DownBlock2D")
    for kind in kinds:
        if kind not in (attention, plain, "ResnetDownsampleBlock2D"):
            raise UserError(f"{where}/config.json: {kind} is not supported")
    section = dict(
        image_size=_side(given.get("sample_size"), where), in_channels=given["in_channels"],
        out_channels=given["out_channels"],
        model_channels=channels[0], channel_mult=_multiples(channels, where),
        num_res_blocks=_one(given.get("layers_per_block", 2), "layers_per_block", where),
        attention_resolutions=tuple(2**level for level, kind in enumerate(kinds) if kind == attention),
        dropout=float(given.get("dropout", 0.0)), norm_groups=given.get("norm_num_groups") or 32,
        use_scale_shift_norm=given.get("resnet_time_scale_shift", "default") == "scale_shift",
        resblock_updown=given.get("downsample_type", "conv") == "resnet" or "ResnetDownsampleBlock2D" in kinds,
        num_classes=given.get("num_class_embeds") or 0, use_new_attention_order=False, conv_resample=True)
    heads, groups = given.get("attention_head_dim", 8), given.get("attn_norm_num_groups")
    if not conditional and groups != section["norm_groups"] and (groups or section["use_scale_shift_norm"]):
        raise UserError(f"{where}/config.json: attn_norm_num_groups={groups} is not supported, only norm_num_groups="
                        f"{section['norm_groups']}")
    if not conditional:
        return section | (dict(num_heads=1, num_head_channels=-1) if heads is None else dict(
            num_heads=-1, num_head_channels=heads))
    section |= dict(use_spatial_transformer=True, context_dim=given["cross_attention_dim"],
                    transformer_depth=_one(given.get("transformer_layers_per_block", 1),
                                           "transformer_layers_per_block", where))
    heads = given.get("num_attention_heads") or heads  # attention_head_dim is the number of heads there
    if not isinstance(heads, list):
        return section | dict(num_heads=heads, num_head_channels=-1)
    widths = {c // n for c, n in zip(channels, heads, strict=True)}
    if len(widths) != 1:
        raise UserError(f"{where}/config.json: attention_head_dim={heads} gives heads of different widths")
    return section | dict(num_heads=-1, num_head_channels=widths.pop())


def first_stage_section(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Our ``model`` section of stage 1 for the config.json of an AutoencoderKL or VQModel."""
    _check_fixed(given, where)
    vq = "num_vq_embeddings" in given or given.get("_class_name") == "VQModel"
    channels, latent = given["block_out_channels"], given["latent_channels"]
    levels = [given.get("sample_size", 256) // 2**i for i in range(len(channels))]
    attention = tuple(levels[i] for i, kind in enumerate(given["down_block_types"]) if kind == "AttnDownEncoderBlock2D")
    section = defaults.autoencoder().model.to_dict() | dict(
        kind="vq" if vq else "kl", double_z=not vq, z_channels=latent, in_channels=given.get("in_channels", 3),
        embed_dim=(given.get("vq_embed_dim") or latent) if vq else latent, out_channels=given.get("out_channels", 3),
        ch=channels[0], ch_mult=_multiples(channels, where), num_res_blocks=given.get("layers_per_block", 1),
        attn_resolutions=attention, resolution=levels[0], norm_groups=given.get("norm_num_groups", 32),
        attn_type="vanilla" if given.get("mid_block_add_attention", True) else "none")
    if section["attn_type"] == "none" and attention:
        raise UserError(f"{where}/config.json: attention in levels but not in the middle is not supported")
    return section | (dict(n_embed=given.get("num_vq_embeddings", 256)) if vq else {})


def diffusion_section(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our ``diffusion`` and ``sampling`` sections for a scheduler_config.json."""
    schedule = given.get("beta_schedule", "linear")
    if given.get("trained_betas") is not None or schedule not in _BETA_SCHEDULES:
        raise UserError(f"scheduler: beta_schedule={schedule!r} with trained_betas={given.get('trained_betas')} is not "
                        "supported")
    prediction = given.get("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        raise UserError(f"scheduler: prediction_type={prediction!r} is not supported")
    if given.get("rescale_betas_zero_snr"):
        raise UserError("scheduler: rescale_betas_zero_snr=True is not supported")
    kind = given.get("_class_name", "DDIMScheduler")
    return dict(timesteps=given.get("num_train_timesteps", 1000), beta_schedule=_BETA_SCHEDULES[schedule],
                linear_start=given.get("beta_start", 1e-4), linear_end=given.get("beta_end", 0.02),
                parameterization=_PREDICTIONS[prediction]), dict(
        spacing=_spacing(given, kind), clip_x0=bool(given.get("clip_sample", kind[:2] == "DD")),  # DDIM and DDPM do
        sampler={"PNDMScheduler": "plms", "DDPMScheduler": "ddpm"}.get(kind, "ddim"), steps=50)


def _spacing(given: Mapping[str, Any], kind: str) -> str:
    """Our name of the timesteps that a scheduler visits: their own defaults where it does not say."""
    to_one = given.get("set_alpha_to_one", kind != "PNDMScheduler")
    spacing, offset = given.get("timestep_spacing", "leading"), given.get("steps_offset", 0)
    known = {("trailing", True): "clean", ("leading", True, 0): "leading", ("leading", True, 1): "leading_1",
             ("leading", False, 1): "reference"}
    name = known.get((spacing, to_one) if spacing == "trailing" else (spacing, to_one, offset))
    if name is not None and kind in ("DDIMScheduler", "PNDMScheduler", "DDPMScheduler"):
        return name
    logging.warning("the scheduler (%s, timestep_spacing=%s, steps_offset=%s, set_alpha_to_one=%s) has no equal here; "
                    "samples are drawn at other timesteps (sampling.spacing=clean)", kind, spacing, offset, to_one)
    return "clean"


# --- out -------------------------------------------------------------------------------------------------------------


def unet_config(config: ConfigDict) -> dict[str, Any]:
    """The config.json of the UNet. Raises UserError for one that diffusers cannot build."""
    model, unet = config.model, models.build(config).unet
    channels = [model.model_channels * mult for mult in model.channel_mult]
    levels = range(len(channels))
    attends = [2**level in model.attention_resolutions for level in levels]
    if not model.conv_resample:
        raise UserError("model.conv_resample=False is unknown to diffusers")
    common = dict(
        sample_size=model.image_size, in_channels=model.in_channels, out_channels=model.out_channels,
        block_out_channels=channels, layers_per_block=model.num_res_blocks, norm_num_groups=model.norm_groups,
        norm_eps=1e-5, flip_sin_to_cos=True, freq_shift=0, act_fn="silu", dropout=model.dropout, downsample_padding=1,
        mid_block_scale_factor=1, resnet_time_scale_shift="scale_shift" if model.use_scale_shift_norm else "default",
        num_class_embeds=models.build(config).unet.num_classes or None)
    if any(c % model.norm_groups for c in channels):
        raise UserError(f"model.norm_groups={model.norm_groups} does not divide all of {channels}, as diffusers needs")
    heads = [unet.head_layout(c) for c in channels]
    if any(unet.head_layout(c, upsampling=True) != there for c, there in zip(channels, heads, strict=True)):
        raise UserError("model.num_heads_upsample is unknown to diffusers")
    if model.use_spatial_transformer:
        if model.resblock_updown:
            raise UserError("model.resblock_updown with cross-attention is unknown to diffusers")
        if any(number * width != c for (number, width), c in zip(heads, channels, strict=True)):
            raise UserError("attention heads that do not make up all channels are unknown to diffusers")
        numbers = [number for number, _ in heads]
        return dict(
            _class_name="UNet2DConditionModel", cross_attention_dim=model.context_dim,
            attention_head_dim=numbers[0] if len(set(numbers)) == 1 else numbers, use_linear_projection=False,
            transformer_layers_per_block=model.transformer_depth,
            down_block_types=["CrossAttnDownBlock2D" if there else "DownBlock2D" for there in attends],
            up_block_types=["CrossAttnUpBlock2D" if there else "UpBlock2D" for there in reversed(attends)], **common)
    used = [heads[level] for level in levels if attends[level]] + [heads[-1]]  # the middle
    widths = {width for _, width in used}
    single = {number for number, _ in used} == {1}
    if len(widths) > 1 and not single:
        raise UserError(f"attention heads of {', '.join(map(str, sorted(widths)))} channels (model.num_heads="
                        f"{model.num_heads}): diffusers' UNet2DModel has one width for all")
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if model.resblock_updown else (
        "DownBlock2D", "UpBlock2D")
    resample = "resnet" if model.resblock_updown else "conv"
    return dict(
        _class_name="UNet2DModel", attention_head_dim=None if single else widths.pop(),
        attn_norm_num_groups=model.norm_groups, downsample_type=resample, upsample_type=resample,
        time_embedding_type="positional", center_input_sample=False,
        down_block_types=["AttnDownBlock2D" if there else plain[0] for there in attends],
        up_block_types=["AttnUpBlock2D" if there else plain[1] for there in reversed(attends)], **common)


def first_stage_config(section: Any, scale_factor: float) -> dict[str, Any]:
    """The config.json of the autoencoder. Raises UserError for one that diffusers cannot build."""
    if section.attn_type == "linear" or not section.resamp_with_conv or section.tanh_out:
        raise UserError("a first stage with attn_type=linear, resamp_with_conv=False or tanh_out=True is unknown to "
                        "diffusers")
    if section.kind == "kl" and section.embed_dim != section.z_channels:
        raise UserError(f"embed_dim={section.embed_dim} and z_channels={section.z_channels} differ, which diffusers' "
                        "AutoencoderKL does not know")
    levels = range(len(section.ch_mult))
    attends = [section.resolution // 2**level in section.attn_resolutions and section.attn_type != "none"
               for level in levels]
    channels = [section.ch * mult for mult in section.ch_mult]
    if any(c % section.norm_groups for c in channels):
        raise UserError(f"norm_groups={section.norm_groups} of the first stage does not divide all of {channels}, as "
                        "diffusers needs")
    common = dict(
        in_channels=section.in_channels, out_channels=section.out_channels, latent_channels=section.z_channels,
        block_out_channels=channels, layers_per_block=section.num_res_blocks, norm_num_groups=section.norm_groups,
        act_fn="silu", sample_size=section.resolution, scaling_factor=scale_factor,
        mid_block_add_attention=section.attn_type != "none",
        down_block_types=["AttnDownEncoderBlock2D" if there else "DownEncoderBlock2D" for there in attends],
        up_block_types=["AttnUpDecoderBlock2D" if there else "UpDecoderBlock2D" for there in reversed(attends)])
    if section.kind == "vq":
        return dict(_class_name="VQModel", num_vq_embeddings=section.n_embed, vq_embed_dim=section.embed_dim, **common)
    return dict(_class_name="AutoencoderKL", **common)


def scheduler_config(config: ConfigDict) -> dict[str, Any]:
    """The scheduler_config.json of a DDIMScheduler that visits the timesteps that `sample.py` does."""
    diffusion, sampling = config.diffusion, config.sampling
    theirs = {ours: name for name, ours in _BETA_SCHEDULES.items()}
    if diffusion.beta_schedule not in theirs:
        raise UserError(f"diffusion.beta_schedule={diffusion.beta_schedule!r} is unknown to diffusers")
    known = {"clean": ("trailing", 0, True), "trailing": ("trailing", 0, True), "reference": ("leading", 1, False),
             "leading": ("leading", 0, True), "leading_1": ("leading", 1, True)}
    if sampling.spacing not in known:
        raise UserError(f"sampling.spacing={sampling.spacing!r} is unknown to diffusers' DDIM; set it to one of "
                        f"{', '.join(known)}")
    spacing, offset, to_one = known[sampling.spacing]
    if diffusion.beta_schedule == "cosine" and diffusion.cosine_s != 8e-3:
        raise UserError(f"diffusion.cosine_s={diffusion.cosine_s} is unknown to diffusers, which has 0.008")
    return dict(
        _class_name="DDIMScheduler", num_train_timesteps=diffusion.timesteps, beta_start=diffusion.linear_start,
        beta_end=diffusion.linear_end, beta_schedule=theirs[diffusion.beta_schedule],
        clip_sample=bool(sampling.clip_x0), set_alpha_to_one=to_one, steps_offset=offset, timestep_spacing=spacing,
        prediction_type={ours: name for name, ours in _PREDICTIONS.items()}[diffusion.parameterization])


def pipeline_of(config: ConfigDict) -> str:
    """The pipeline of diffusers that draws with a model. Raises UserError where there is none."""
    options = config.conditioning
    kind = (options.crossattn, options.concat, bool(options.label))
    if kind == ("text", "none", False):
        return "StableDiffusionPipeline" if options.text.kind == "clip" else "LDMTextToImagePipeline"
    if kind not in (("none", "none", False), ("none", "low_res", False)):
        given = [name for name in (*kind[:2], "label" * kind[2]) if name not in ("none", "")]
        raise UserError(f"diffusers has no pipeline for a model conditioned by {' and '.join(given)}; export it with "
                        "--format compvis")
    if sizes.factor(config.first_stage.model) == 1:
        raise UserError("diffusers' latent pipelines need a first stage; this model works on pixels")
    return "LDMSuperResolutionPipeline" if options.concat == "low_res" else "LDMPipeline"
