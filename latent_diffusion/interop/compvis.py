"""Models of CompVis latent-diffusion (and taming-transformers' VQ models in it), in and out.

`import_model` reads what the reference's own `load_state_dict` would, for any model that its yaml form can describe;
`export_model` is its inverse. Weights are float32 here; those that are stored in half precision are widened.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from latent_diffusion import weights
from latent_diffusion.diffusion import schedule as schedule_lib
from latent_diffusion.errors import UserError
from latent_diffusion.interop import compvis_names as names
from latent_diffusion.interop import compvis_settings as settings
from latent_diffusion.interop import parts as parts_lib

StateDict = Mapping[str, np.ndarray]

_EMA = "model_ema."
_BUFFERS = frozenset((
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "lvlb_weights",
))
# Keys that are known and not needed here, and why.
_KNOWN = (
    (r"ddim_\w+", "tables of a sampler"),
    (r"cond_ids", "noise on conditions, which no released model has"),
    (r"(first_stage_model\.|cond_stage_model\.)?colorize", "colors for logged maps"),
    (r"first_stage_model\.loss\..*", "losses of the first stage"),
    (r"(model_ema\.)?(decay|num_updates)", "state of the averages"),
    (r"cond_stage_model\.transformer\.to_logits\..*", "a head that nothing uses"),
    (r".*position_ids", "positions"),
    (r"loss\.discriminator\..*\.(num_batches_tracked|initialized)", "counters"),
    (r"loss\.perceptual_loss\.scaling_layer\..*", "constants"),
    (r"global_step|epoch", "how long it was trained"),
)


@dataclasses.dataclass(frozen=True)
class Component:
    """A row of what is told of an import or export: what it is, how many numbers, where they are, what is to be
    said."""

    name: str
    parameters: int
    source: str
    notes: str = ""


@dataclasses.dataclass(frozen=True)
class Imported:
    """A model of the reference: our config, the parameters as trained and the averages of some of them ({} where there
    are none), both trees of numpy arrays, and what was found."""

    config: ConfigDict
    params: dict[str, Any]
    ema_params: dict[str, Any]
    report: tuple[Component, ...]


def import_model(
    model_yaml: Mapping[str, Any], state_dict: StateDict, *, use_ema: bool = True
) -> tuple[ConfigDict, dict[str, Any]]:
    """The config and the parameters of a model of the reference.

    Args:
      model_yaml: its yaml file as nested mappings, whole or from ``model`` on; of a first stage or a diffusion model.
      state_dict: arrays by the reference's names.
      use_ema: take the averages (``model_ema``) of what has them, where there are any; else the weights as trained.

    Returns:
      (config, params): ``{"unet", "conditioner"?, "first_stage"?, "logvar"?}`` of a diffusion model, or, of a first
      stage, ``{"autoencoder", "logvar", "discriminator"?, "discriminator_stats"?, "lpips"?}``; float32 numpy arrays,
      views of those given where possible. The scale factor is ``config.first_stage.scale_factor``.

    Raises:
      UserError: a description that `compvis_settings.to_config` refuses; a key that is missing or of another shape, by
        name; a noise schedule in the file that is not the description's.
    """
    imported = read_model(model_yaml, state_dict)
    return imported.config, {**imported.params, **(imported.ema_params if use_ema else {})}


def read_model(model_yaml: Mapping[str, Any], state_dict: StateDict) -> Imported:
    """`import_model` with everything: both the weights as trained and their averages, and a report."""
    config = settings.to_config(model_yaml)
    reader = _Reader(state_dict)
    if config.stage == "autoencoder":
        return _read_autoencoder(config, reader)
    return _read_diffusion(config, reader)


class _Reader:
    """Takes arrays out of a state dict and remembers which."""

    def __init__(self, state_dict: StateDict):
        self.state_dict, self.taken = state_dict, set()
        self.keys = frozenset(state_dict)

    def take(self, key: str, path: tuple[str, ...], shape: tuple[int, ...], purpose: str) -> np.ndarray:
        """A parameter as our tree has it: float32, axes in our order."""
        if key not in self.keys:
            raise UserError(f"the weights lack {key}, which {purpose} needs")
        value = names.from_torch(path, np.asarray(self.state_dict[key]))
        if value.size == np.prod(shape, dtype=int) and key.endswith((".loc", ".scale")):
            value = value.reshape(shape)  # ActNorm's parameters are (1, c, 1, 1) there
        if value.shape != tuple(shape):
            wanted = names.to_torch(path, np.broadcast_to(np.float32(0), shape)).shape
            raise UserError(f"{key} has the shape {list(self.state_dict[key].shape)} in the weights, but the "
                            f"description makes it {list(wanted)}")
        self.taken.add(key)
        return value.astype(np.float32, copy=False)

    def take_part(self, part: parts_lib.Part, renamed: Any = lambda key: key) -> dict[str, Any]:
        """All parameters of a network; `renamed` changes their keys."""
        purpose = "the " + " ".join(part.where).replace("_", " ")
        return traverse_util.unflatten_dict({
            path: self.take(renamed(part.key(path)), path, leaf.shape, purpose) for path, leaf in part.shapes.items()})

    def rest(self) -> tuple[list[Component], list[str]]:
        """Rows on the keys that nobody took and that are known, and the keys that are not."""
        rows: dict[str, list[str]] = {}
        unknown = []
        for key in sorted(self.keys - self.taken):
            why = "noise schedule" if key in _BUFFERS else next(
                (why for pattern, why in _KNOWN if re.fullmatch(pattern, key)), None)
            rows.setdefault(why, []).append(key) if why else unknown.append(key)
        found = [Component(why, 0, keys[0] if len(keys) == 1 else f"{len(keys)} keys, {keys[0]} ...", "not needed")
                 for why, keys in rows.items()]
        return found, unknown


def _report(rows: Iterable[Component], reader: _Reader) -> tuple[Component, ...]:
    known, unknown = reader.rest()
    return (*rows, *known, *(Component("unknown", 0, key, "not used") for key in unknown))


# --- diffusion models ------------------------------------------------------------------------------------------------


def _read_diffusion(config: ConfigDict, reader: _Reader) -> Imported:
    config = config.copy_and_resolve_references().unlock()
    if config.conditioning.crossattn == "text" and config.conditioning.text.kind == "clip":
        _measure_clip(config, reader)
    _check_schedule(config, reader)
    params, ema_params, rows = {}, {}, []
    for part in parts_lib.of_diffusion(config.lock()):
        params[part.where[0]] = reader.take_part(part)
        rows.append(Component(part.where[0], part.size, f"{part.prefix}*", _notes(config, part)))
        if part.where == ("unet",) and any(key.startswith(_EMA + "diffusion_model") for key in reader.keys):
            ema_params["unet"] = reader.take_part(part, _ema_key)
            rows.append(Component("unet, averaged", part.size, f"{_EMA}*"))
    config.unlock()
    if ema_params:
        config.ema.decay = round(float(reader.state_dict.get(f"{_EMA}decay", config.ema.decay or 0.9999)), 7)
    if not ema_params and config.ema.decay:
        rows.append(Component("unet, averaged", 0, "not in the file", "the weights as trained are used"))
    if config.diffusion.learn_logvar:
        params["logvar"] = reader.take("logvar", ("logvar",), (config.diffusion.timesteps,), "diffusion.learn_logvar")
        rows.append(Component("logvar", config.diffusion.timesteps, "logvar"))
    if "scale_factor" in reader.keys:
        if np.size(reader.state_dict["scale_factor"]) != 1:
            raise UserError("scale_factor in the weights is not one number")
        reader.taken.add("scale_factor")
        factor = float(np.ravel(reader.state_dict["scale_factor"])[0])
        config.first_stage.update(dict(scale_factor=factor, scale_by_std=True))
    elif not config.first_stage.scale_factor:
        raise UserError("the weights lack scale_factor, which model.params.scale_by_std needs")
    _compare_copies(reader)
    return Imported(config.lock(), params, ema_params, _report(rows, reader))


def _ema_key(key: str) -> str:
    """The average of a parameter of the UNet: its name below ``model`` without dots."""
    return _EMA + key.removeprefix("model.").replace(".", "")


def _notes(config: ConfigDict, part: parts_lib.Part) -> str:
    options = config.conditioning
    if part.where == ("conditioner",) and part.network == "text":
        kind = options.layout if options.crossattn == "layout" else options.text
        return f"{options.crossattn}, {kind.vocab_size} tokens"
    classes = f"{options.num_classes} classes" + (" and none" if options.null_class else "")
    return {"clip": "CLIP's text encoder, frozen", "first_stage": config.first_stage.model.kind,
            "class": classes}.get(part.network, "")


def _measure_clip(config: ConfigDict, reader: _Reader) -> None:
    """The description names CLIP's size; the weights have it."""
    stem = "cond_stage_model.transformer.text_model."
    tokens = reader.state_dict.get(f"{stem}embeddings.token_embedding.weight")
    if tokens is None:
        raise UserError(f"the weights lack {stem}embeddings.token_embedding.weight, which the conditioner needs")
    layers = {key[len(stem) :].split(".")[2] for key in reader.keys if key.startswith(f"{stem}encoder.layers.")}
    vocabulary, width = tokens.shape
    if width != config.conditioning.width:
        raise UserError(f"the text encoder in the weights has the width {width}, but context_dim is "
                        f"{config.conditioning.width}")
    config.conditioning.text.update(dict(vocab_size=vocabulary, layers=len(layers)))


def _check_schedule(config: ConfigDict, reader: _Reader) -> None:
    """A file whose betas are others than the description's was trained with another description."""
    betas = reader.state_dict.get("betas")
    ours = schedule_lib.from_config(config.diffusion).betas
    if betas is not None and np.ndim(betas) != 1:
        raise UserError(f"betas in the weights has the shape {list(np.shape(betas))}, not one number for each timestep")
    if betas is None:
        return
    rounding = 1e-4 if betas.itemsize > 2 else 1e-2  # of files in half precision
    betas = betas.astype(np.float64)
    if betas.shape != ours.shape or not np.allclose(betas, ours, rtol=rounding, atol=1e-7):
        raise UserError(f"the weights have the noise schedule {_span(betas)}, the description {_span(ours)}; it is not "
                        "theirs (timesteps, beta_schedule, linear_start, linear_end)")


def _span(betas: np.ndarray) -> str:
    return f"of {len(betas)} steps from {betas[0]:.5g} to {betas[-1]:.5g}"


def _compare_copies(reader: _Reader) -> None:
    """A first stage that conditions as well is in the file twice; both must be the same."""
    for key in reader.keys - reader.taken:
        twin = "first_stage_model." + key.removeprefix("cond_stage_model.")
        if key.startswith("cond_stage_model.") and twin in reader.taken:
            if not np.array_equal(reader.state_dict[key], reader.state_dict[twin]):
                raise UserError(f"{key} is not equal to {twin}: a first stage of its own for the condition is not "
                                "supported")
            reader.taken.add(key)


# --- first stages ----------------------------------------------------------------------------------------------------


def _read_autoencoder(config: ConfigDict, reader: _Reader) -> Imported:
    whole = "encoder.conv_in.weight" not in reader.keys and "first_stage_model.encoder.conv_in.weight" in reader.keys
    if whole:  # the first stage of a diffusion model
        reader = _Reader({key.removeprefix("first_stage_model."): value for key, value in reader.state_dict.items()
                          if key.startswith("first_stage_model.")})
    params: dict[str, Any] = {"logvar": np.asarray(config.training.loss.logvar_init, np.float32)}
    ema_params, rows = {}, []
    for part in parts_lib.of_autoencoder(config, loss=True):
        missing = part.prefix and not any(key.startswith(part.prefix) for key in reader.keys)
        name = part.where[0]
        if missing:
            rows.append(Component(name, 0, "not in the file", "the package's is used" if name == "lpips" else
                                  "begins anew where training goes on"))
            continue
        params[name] = reader.take_part(part)
        rows.append(Component(name, part.size, f"{part.prefix}*", config.model.kind if not part.prefix else ""))
        if not part.prefix and f"{_EMA}encoderconv_inweight" in reader.keys:
            ema_params[name] = reader.take_part(part, lambda key: _EMA + key.replace(".", ""))
            rows.append(Component(f"{name}, averaged", part.size, f"{_EMA}*"))
    if "loss.logvar" in reader.keys:
        params["logvar"] = reader.take("loss.logvar", ("logvar",), (), "the loss")
        rows.append(Component("logvar", 1, "loss.logvar"))
    return Imported(config, params, ema_params, _report(rows, reader))


# --- out -------------------------------------------------------------------------------------------------------------


def export_model(
    config: ConfigDict, params: Mapping[str, Any], ema_params: Mapping[str, Any] | None = None, *, step: int = 0
) -> dict[str, np.ndarray]:
    """The state dict of a model, with the reference's keys, shapes and types: the inverse of `import_model`.

    Args:
      config: of stage 1 or 2, with a number in ``first_stage.scale_factor``.
      params: the tree that `import_model` returns, as trained.
      ema_params: averages, ``{"unet": ...}`` or ``{"autoencoder": ...}``; none by default.
      step: how many updates the averages have had.

    Returns:
      Arrays by name, views where possible. What the reference's modules have beside our parameters is made: the tables
      of the noise schedule, counters, constants, and the unused head of its text transformer (zeros).

    Raises:
      UserError: parameters that do not fit the config, or a model that the reference does not have.
    """
    return _export_autoencoder(config, params, ema_params or {}, step) if config.stage == "autoencoder" else (
        _export_diffusion(config, params, ema_params or {}, step))


def _put_part(state: dict[str, np.ndarray], part: parts_lib.Part, tree: Any, renamed: Any = lambda key: key) -> None:
    flat = traverse_util.flatten_dict(dict(tree))
    if wrong := set(flat) ^ set(part.shapes):
        raise UserError(f"the parameters of {part.where[0]} are not those of the config: {'/'.join(sorted(wrong)[0])}")
    for path, leaf in part.shapes.items():
        value = np.asarray(flat[path], np.float32)
        if value.shape != leaf.shape:
            raise UserError(f"{part.where[0]}: {'/'.join(path)} has the shape {list(value.shape)}, the config makes it "
                            f"{list(leaf.shape)}")
        if part.network == "discriminator_actnorm" and path[-1] in ("loc", "scale"):
            value = value.reshape(1, -1, 1, 1)
        state[renamed(part.key(path))] = names.to_torch(path, value)


def _export_diffusion(
    config: ConfigDict, params: Mapping[str, Any], ema_params: Mapping[str, Any], step: int
) -> dict[str, np.ndarray]:
    state, options = schedule_buffers(config.diffusion), config.conditioning
    if not config.first_stage.scale_factor:
        raise UserError("first_stage.scale_factor=0: put in the number that was measured")
    if config.first_stage.scale_by_std:
        state["scale_factor"] = np.asarray(config.first_stage.scale_factor, np.float32)
    if config.diffusion.learn_logvar:
        state["logvar"] = np.asarray(params["logvar"], np.float32)
    for part in parts_lib.of_diffusion(config):
        _put_part(state, part, params[part.where[0]])
        if part.where == ("unet",) and "unet" in ema_params:
            _put_part(state, part, ema_params["unet"], _ema_key)
            state |= _ema_state(config, step)
        if part.network == "text":
            size = (options.layout if options.crossattn == "layout" else options.text).vocab_size
            head = "cond_stage_model.transformer.to_logits."
            state |= {f"{head}weight": np.zeros((size, options.width), np.float32),
                      f"{head}bias": np.zeros((size,), np.float32)}
        if part.network == "clip":
            state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = np.arange(
                options.text.max_length, dtype=np.int64)[None]
    if options.concat == "inpainting" and options.crossattn == "none":
        state |= {key.replace("first_stage_model.", "cond_stage_model.", 1): value for key, value in state.items()
                  if key.startswith("first_stage_model.")}
    return state


def _export_autoencoder(
    config: ConfigDict, params: Mapping[str, Any], ema_params: Mapping[str, Any], step: int
) -> dict[str, np.ndarray]:
    state: dict[str, np.ndarray] = {}
    for part in parts_lib.of_autoencoder(config, loss="discriminator" in params):
        tree = params.get(part.where[0]) or (weights.load_lpips("vgg") if part.network == "lpips" else {})
        _put_part(state, part, tree)
        if not part.prefix and "autoencoder" in ema_params:
            _put_part(state, part, ema_params["autoencoder"], lambda key: _EMA + key.replace(".", ""))
            state |= _ema_state(config, step)
        if part.where == ("discriminator_stats",):
            state |= {key.replace("running_mean", "num_batches_tracked"): np.asarray(step, np.int64)
                      for key in state if key.endswith("running_mean")}
        if part.network == "discriminator_actnorm":
            state |= {key.removesuffix("loc") + "initialized": np.asarray(1, np.uint8)
                      for key in state if key.endswith(".loc")}
    if "discriminator" in params:
        from latent_diffusion.models.perceptual import SCALE, SHIFT

        layer = "loss.perceptual_loss.scaling_layer."
        state |= {layer + name: np.asarray(values, np.float32).reshape(1, 3, 1, 1)
                  for name, values in (("shift", SHIFT), ("scale", SCALE))}
        if config.model.kind == "kl":
            state["loss.logvar"] = np.asarray(params["logvar"], np.float32)
    return state


def _ema_state(config: ConfigDict, step: int) -> dict[str, np.ndarray]:
    return {f"{_EMA}decay": np.asarray(config.ema.decay, np.float32), f"{_EMA}num_updates": np.asarray(step, np.int32)}


def schedule_buffers(diffusion: Any) -> dict[str, np.ndarray]:
    """The tables that the reference's DDPM registers, float32 from float64; `diffusion` is the config's section."""
    schedule = schedule_lib.from_config(diffusion)
    acp = schedule.alphas_cumprod
    tables = {
        "betas": schedule.betas, "alphas_cumprod": acp, "alphas_cumprod_prev": schedule.alphas_cumprod_prev,
        "sqrt_alphas_cumprod": np.sqrt(acp), "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - acp),
        "log_one_minus_alphas_cumprod": np.log(1 - acp), "sqrt_recip_alphas_cumprod": np.sqrt(1 / acp),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / acp - 1), "posterior_variance": schedule.posterior_variance,
        "posterior_log_variance_clipped": schedule.posterior_log_variance_clipped,
        "posterior_mean_coef1": schedule.posterior_mean_coef1, "posterior_mean_coef2": schedule.posterior_mean_coef2,
    }
    return {name: values.astype(np.float32) for name, values in tables.items()}
