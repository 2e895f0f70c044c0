"""The grammar of config names, config files, and validation. A leaf module.

Every file in ``configs/`` has the same sections (`latent_diffusion.defaults`) and the same grammar:

    configs/NAME.py:TOKEN[,TOKEN...][,key=value...]

with at most one *variant* (a row of the paper), the *modifiers* ``emoji`` (built-in data), ``small`` (64-pixel pictures
of any source) and ``smoke`` (tiny, seconds on a CPU) in any order, and the file's own typed arguments. All else is set
with ``--config.section.key=value``.
"""

import json
import runpy
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from latent_diffusion import conditions, defaults, layouts, sizes
from latent_diffusion.data import degradations, masks
from latent_diffusion.errors import UserError, choose

FREELY_CHANGED = (  # keys that a resumed run may change: they alter neither the model nor the data
    "training.num_steps", "training.log_every", "training.image_every", "evaluation", "sampling", "checkpoint",
    "data.workers", "data.threads", "data.data_dir", "data.path", "first_stage.workdir", "first_stage.config",
    "first_stage.cache", "training.initial", "training.initial_skip",
    "conditioning.text.weights", "conditioning.text.vocab",
)


# --- the grammar -----------------------------------------------------------------------------------------------------


def resolve(
    argument: str | None,
    base: ConfigDict,
    *,
    file: str,
    variants: Mapping[str, Mapping],
    modifiers: Mapping[str, Mapping],
    arguments: Mapping[str, tuple[type, Callable[[Any], Mapping]]] | None = None,
) -> ConfigDict:
    """The config that ``configs/FILE:argument`` names.

    Args:
      argument: the text after the colon: ``TOKEN[,TOKEN...][,key=value...]``.
      base: the family's defaults.
      variants: name -> overrides (nested dicts); at most one may be named, the first is the default.
      modifiers: name -> overrides, applied after the variant in the order given here.
      arguments: key -> (type, function from the value to overrides), applied last.

    Raises:
      UserError: an unknown token or key (the message lists the choices), two variants, a value of the wrong type.
    """
    arguments = arguments or {}
    chosen, named, values = [], set(), {}
    for token in filter(None, (argument or "").split(",")):
        key, equals, value = token.partition("=")
        if equals and key in arguments:
            kind = arguments[key][0]
            try:
                values[key] = kind(value)
            except ValueError:
                raise UserError(f"{file}: {key}={value!r} is not of type {kind.__name__}") from None
        elif not equals and token in variants:
            chosen.append(token)
        elif not equals and token in modifiers:
            named.add(token)
        else:
            known = [*variants, *modifiers, *(f"{key}=..." for key in arguments)]
            raise UserError(f"{file}: unknown {'argument' if equals else 'variant'} {token!r}; "
                            f"choose from {', '.join(known)}")
    if len(chosen) > 1:
        raise UserError(f"{file}: {' and '.join(chosen)} are both variants; name one")
    overrides = [variants[name] for name in chosen or list(variants)[:1]]
    overrides += [modifiers[name] for name in modifiers if name in named]
    overrides += [arguments[key][1](value) for key, value in values.items()]
    for override in overrides:
        base.update(override)
    return base.lock()


def data_arguments(stage: str) -> dict[str, tuple[type, Callable[[Any], dict]]]:
    """Typed arguments that every file takes: ``size=PIXELS``, ``folder=DIR``, ``tfds=NAME`` and, for stage 1,
    ``channels=1``."""
    arguments = {
        "size": (int, lambda size: dict(data=dict(image_size=size))),
        "folder": (str, lambda folder: dict(data=dict(source="folder", path=folder))),
        "tfds": (str, lambda name: dict(data=dict(source="tfds", name=name))),
    }
    if stage == "autoencoder":
        arguments["channels"] = (int, lambda n: dict(
            data=dict(channels=n), model=dict(in_channels=n, out_channels=n)))
    return arguments


def load(name: str) -> ConfigDict:
    """The config that ``configs/NAME.py:TOKEN,..`` names, of any folder, or beside the package where there is no such
    file. Raises UserError if there is none, and as `resolve`."""
    file, _, argument = name.partition(":")
    path = epath.Path(file)
    path = path if path.exists() else epath.Path(__file__).parent.parent / file
    if not path.exists():
        raise UserError(f"there is no config file {file}")
    try:
        get_config = runpy.run_path(str(path))["get_config"]
    except (SyntaxError, KeyError) as error:
        raise UserError(f"{file} is no config file ({type(error).__name__}: {error})") from error
    return get_config(argument)


# --- files -----------------------------------------------------------------------------------------------------------


def to_json(config: ConfigDict) -> str:
    """The config as JSON text; `from_json` reads it back equal (tuples included)."""
    return json.dumps(config.to_dict(), indent=1)


def from_json(text: str) -> ConfigDict:
    """Reads what `to_json` wrote; a key that did not exist then has its default."""
    def tuples(value):
        if isinstance(value, dict):
            return {key: tuples(item) for key, item in value.items()}
        return tuple(tuples(item) for item in value) if isinstance(value, list) else value
    saved = tuples(json.loads(text))
    base = {"autoencoder": defaults.autoencoder, "diffusion": defaults.diffusion}.get(saved.get("stage"), ConfigDict)()
    return ConfigDict(defaults.merged(base.to_dict(), saved)).lock()


def flatten(config: ConfigDict) -> dict[str, Any]:
    """``{"section.key": value}`` over all leaves."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat.update({f"{key}.{name}": item for name, item in flatten(value).items()})
        else:
            flat[key] = value
    return flat


def check_same(config: ConfigDict, saved: ConfigDict, workdir: str) -> None:
    """Raises `UserError` naming every key in which a workdir's saved config differs, but for `FREELY_CHANGED`."""
    ours, theirs = flatten(config), flatten(saved)
    differing = [
        f"{key} ({theirs.get(key)!r} there, {ours.get(key)!r} here)" for key in sorted({*ours, *theirs})
        if ours.get(key) != theirs.get(key)
        and not any(key == free or key.startswith(free + ".") for free in FREELY_CHANGED)
    ]
    if differing:
        raise UserError(f"--workdir {workdir} holds a run with another config; it differs in "
                        f"{'; '.join(differing)}. Choose another workdir, or give the same config to resume")


# --- validation ------------------------------------------------------------------------------------------------------

CHOICES = {
    "data.source": ("tfds", "folder", "emoji", "emoji_scenes", "memory"),
    "data.crop": ("center", "random"),
    "data.background": ("white", "random"),
    "data.on_corrupt": ("error", "skip"),
    "data.channels": (1, 3),
    "optimizer.name": ("adam", "adamw", "muon", "sgd"),
    "optimizer.schedule": ("constant", "cosine", "linear"),
    "sampling.sampler": (
        "ddim", "ddpm", "plms", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s", "unipc", "euler", "euler_ancestral", "heun",
        "lms"),
    "sampling.spacing": (
        "clean", "trailing", "uniform", "quad", "linspace", "karras", "exponential", "leading", "leading_1",
        "reference", "reference_quad"),
    "optimizer.moment_dtype": ("float32", "bfloat16"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "full"),
}
STAGE_CHOICES = {
    "autoencoder": {
        "model.kind": ("kl", "vq"),
        "model.attn_type": ("vanilla", "linear", "none"),
        "training.loss.pixel": ("l1", "l2"),
        "training.loss.perceptual": ("vgg", "alex", "none"),
        "training.loss.disc_loss": ("hinge", "vanilla", "non_saturating"),
        "training.loss.disc_norm": ("batch", "actnorm"),
    },
    "diffusion": {
        "conditioning.crossattn": ("none", *conditions.SEQUENCES),
        "conditioning.concat": tuple(conditions.MAPS),
        "conditioning.text.kind": tuple(conditions.TOKENIZERS),
        "conditioning.low_res.degradation": degradations.KINDS,
        "conditioning.inpainting.masks": tuple(masks.PRESETS),
        "diffusion.beta_schedule": ("linear", "cosine", "sqrt_linear", "sqrt"),
        "diffusion.parameterization": ("eps", "x0", "v"),
        "diffusion.loss": ("l1", "l2"),
    },
}
POSITIVE = (
    "data.image_size", "training.batch_size", "training.num_steps", "training.accumulate", "training.log_every",
    "optimizer.learning_rate", "checkpoint.every", "checkpoint.keep", "evaluation.num_images", "sampling.steps",
    "data.threads", "conditioning.low_res.factor", "conditioning.segmentation.channels",
    "conditioning.layout.max_objects", "conditioning.layout.heads", "conditioning.text.heads",
    "conditioning.layout.head_dim", "conditioning.text.head_dim", "conditioning.layout.max_length",
    "conditioning.text.max_length", "conditioning.layout.vocab_size", "conditioning.text.vocab_size",
)


NOT_NEGATIVE = ("training.image_every", "evaluation.every", "optimizer.warmup_steps", "optimizer.clip_norm",
                "data.workers", "evaluation.max_batches", "conditioning.layout.layers", "conditioning.text.layers")


def _value_mistakes(config: ConfigDict, flat: dict[str, Any]) -> list[str]:
    """Values that are impossible whatever the others are."""
    mistakes = [
        f"{key}={flat[key]!r} is not one of {', '.join(map(repr, choices))}"
        for key, choices in {**CHOICES, **choose(STAGE_CHOICES, config.stage, "stage")}.items()
        if flat[key] not in choices
    ]
    mistakes += [f"{key}={flat[key]!r} must be above 0" for key in POSITIVE if key in flat and not flat[key] > 0]
    if config.stage == "autoencoder" and config.model.kind == "identity":
        return ["model.kind='identity' has nothing to train: leave stage 1 out and set first_stage.model.kind=identity "
                "in stage 2"]
    mistakes += [f"{key}={flat[key]!r} must be 0 or above" for key in NOT_NEGATIVE if not flat.get(key, 0) >= 0]
    mistakes += [f"{key}={flat[key]!r} must lie in [0, 1)" for key in (
        "ema.decay", "data.holdout", "conditioning.dropout", "conditioning.text_dropout", "conditioning.label_dropout",
    ) if key in flat and not 0 <= flat[key] < 1]
    if not 0 <= config.seed < 2**32:
        mistakes.append(f"seed={config.seed} must lie between 0 and {2**32 - 1}")
    return mistakes


def _level_mistakes(flat: dict[str, Any]) -> list[str]:
    """Levels of the networks that are none, without which no size can be told."""
    return [f"{key}={flat[key]!r} must be whole numbers above 0, one for each level, as in '(1,2,4)'"
            for key in ("model.ch_mult", "model.channel_mult", "first_stage.model.ch_mult")
            if key in flat and not (flat[key] and all(isinstance(x, int) and x > 0 for x in flat[key]))]


def _size_mistakes(config: ConfigDict) -> list[str]:
    """Sizes and channel counts that do not fit each other."""
    mistakes = []
    first = config.model if config.stage == "autoencoder" else config.first_stage.model
    section = "model" if config.stage == "autoencoder" else "first_stage.model"
    factor = sizes.factor(first)
    size = config.data.image_size
    if size % factor:
        mistakes.append(f"data.image_size={size} is not a multiple of the downsampling factor {factor} "
                        f"(2^(len({section}.ch_mult)-1)); the nearest is {max(1, round(size / factor)) * factor}")
    if first.kind != "identity" and first.ch % first.norm_groups:
        mistakes.append(f"{section}.ch={first.ch} is not a multiple of {section}.norm_groups={first.norm_groups}")
    for key in ("in_channels", "out_channels"):
        if first.kind != "identity" and first[key] != config.data.channels:
            mistakes.append(f"{section}.{key}={first[key]} but data.channels={config.data.channels}; make them equal")
    if config.stage == "diffusion":
        latent = sizes.latent_channels(config)
        for key, more in (("in_channels", sizes.map_channels(config)), ("out_channels", 0)):
            if config.model[key] != latent + more:
                mistakes.append(f"model.{key}={config.model[key]} but the first stage has {latent} latent channels"
                                + (f" and conditioning.concat adds {more}" if more else ""))
        mistakes += _conditioning_mistakes(config, size // factor)
        if config.model.model_channels % config.model.norm_groups:
            mistakes.append(f"model.model_channels={config.model.model_channels} is not a multiple of "
                            f"model.norm_groups={config.model.norm_groups}")
        if config.model.image_size != size // factor:
            mistakes.append(f"model.image_size={config.model.image_size} but the latents of {size}-pixel images are "
                            f"{size // factor} wide; set it to that, or to 0")
        down = sizes.unet_factor(config)
        if size // factor % down:
            mistakes.append(f"the latents are {size // factor} wide, which the UNet's {down}x downsampling "
                            f"(len(model.channel_mult)={len(config.model.channel_mult)}) does not divide; the nearest "
                            f"data.image_size is {max(1, round(size / factor / down)) * factor * down}")
        if config.sampling.steps > config.diffusion.timesteps:
            mistakes.append(f"sampling.steps={config.sampling.steps} exceeds "
                            f"diffusion.timesteps={config.diffusion.timesteps}")
    return mistakes


def _conditioning_mistakes(config: ConfigDict, latent_size: int) -> list[str]:
    """Conditions that the networks or the data cannot take."""
    options, mistakes = config.conditioning, []
    if options.crossattn != "none":
        if not config.model.use_spatial_transformer:
            mistakes.append("conditioning.crossattn needs model.use_spatial_transformer=True")
        if config.model.context_dim != options.width:
            mistakes.append(f"model.context_dim={config.model.context_dim} and conditioning.width={options.width} must "
                            "be equal")
    elif config.model.context_dim:
        mistakes.append(f"model.context_dim={config.model.context_dim} but conditioning.crossattn='none' gives "
                        "cross-attention nothing; set it to 0, or choose a condition")
    if options.text.weights and not (options.crossattn == "text" and options.text.kind == "clip"):
        mistakes.append("conditioning.text.weights is for conditioning.crossattn='text' with "
                        "conditioning.text.kind='clip'; leave it empty")
    if not options.null_class and (options.dropout or options.label_dropout):
        mistakes.append("conditioning.null_class=False leaves no class for conditioning.dropout and label_dropout; set "
                        "them to 0")
    if options.crossattn == "text" and options.text.kind == "clip" and (
            options.text.heads * options.text.head_dim != options.width):
        mistakes.append(f"conditioning.text: {options.text.heads} heads of {options.text.head_dim} channels, but CLIP "
                        f"needs them to make up conditioning.width={options.width}")
    if options.crossattn == "layout":
        mistakes += layouts.check_options(options.layout)
    if options.concat == "low_res" and config.data.image_size != latent_size * options.low_res.factor:
        mistakes.append(f"conditioning.low_res.factor={options.low_res.factor} makes pictures of "
                        f"{config.data.image_size / options.low_res.factor:g} pixels, but the latents, to which they "
                        f"are joined, are {latent_size} wide; make the factor that of the first stage")
    if config.first_stage.cache and (options.concat != "none" or options.crossattn == "layout"):
        what = options.concat if options.concat != "none" else options.crossattn
        mistakes.append(f"first_stage.cache holds latents only, and conditioning by {what} is made from the pictures; "
                        "leave it empty")
    return mistakes


def validate(config: ConfigDict, *, num_devices: int = 1, num_processes: int = 1) -> None:
    """Raises one `UserError` that lists every mistake in `config`, before anything is compiled.

    Args:
      config: a resolved config.
      num_devices: devices of all processes together.
      num_processes: processes that each read a part of the batch.
    """
    mistakes = _value_mistakes(config, flatten(config))
    pieces = num_devices * config.training.accumulate
    if config.training.batch_size % pieces:
        mistakes.append(f"training.batch_size={config.training.batch_size} does not divide over {num_devices} devices "
                        f"x {config.training.accumulate} accumulation steps; use a multiple of {pieces}")
    if config.training.batch_size % num_processes:
        mistakes.append(f"training.batch_size={config.training.batch_size} does not divide over {num_processes} "
                        "processes")
    for key, needed in (("path", "folder"), ("name", "tfds")):
        if config.data.source == needed and not config.data[key]:
            mistakes.append(f"data.{key} is empty: set --config.data.{key} for data.source={needed}")
    if config.stage == "diffusion" and config.first_stage.cache:
        mistakes += [f"first_stage.cache cannot hold random variants of an image but its mirror image: set "
                     f"data.{key}={plain!r}, or leave the cache out" for key, plain in (
                         ("crop", "center"), ("background", "white")) if config.data[key] == "random"]
    flat = flatten(config)
    impossible = any(  # then nothing can be said of sizes
        flat.get(key, 1) <= 0 for key in POSITIVE if key.startswith(("data.image_size", "conditioning.")))
    mistakes += _level_mistakes(flat) or ([] if impossible else _size_mistakes(config))
    if mistakes:
        raise UserError("config: " + "; ".join(mistakes))
