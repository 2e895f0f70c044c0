"""Folders of diffusers' pipelines, in and out: LDMPipeline, LDMTextToImagePipeline, LDMSuperResolutionPipeline, and
StableDiffusionPipeline in the shape of version 1. Neither diffusers nor torch is needed."""

import collections
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from flax import traverse_util
from ml_collections import ConfigDict

from latent_diffusion import clip_tokens, conditions, defaults, models, sizes, tensor_files
from latent_diffusion.errors import UserError, read_text
from latent_diffusion.interop import diffusers_names as names
from latent_diffusion.interop import diffusers_settings as settings
from latent_diffusion.interop import parts as parts_lib
from latent_diffusion.interop.compvis import Component, Imported

INDEX = "model_index.json"
# Files of weights by preference: whole precision, then half; without and then with several parts.
_WEIGHTS = tuple(f"{stem}{variant}.{ending}" for variant in ("", ".fp16") for ending in ("safetensors", "bin")
                 for stem in ("diffusion_pytorch_model", "model", "pytorch_model"))
_INDICES = tuple(f"{name}.index{variant}.json" for variant in ("", ".fp16") for name in _WEIGHTS if ".fp16" not in name)


# --- in --------------------------------------------------------------------------------------------------------------


def import_model(folder: epath.PathLike) -> tuple[ConfigDict, dict[str, Any]]:
    """The config and parameters of a pipeline's folder, as `compvis.import_model` returns them.

    Raises:
      UserError: no such folder, another pipeline, a network that cannot be built here, or a parameter that is missing
        or has another shape; the message names it.
    """
    imported = read_model(folder)
    return imported.config, imported.params


def read_model(folder: epath.PathLike) -> Imported:
    """`import_model` with a report."""
    folder, config = epath.Path(folder).expanduser(), read_config(folder)
    name, vae = _pipeline(folder)
    rows, params = [], {}
    where = {"unet": folder / "unet", "first_stage": folder / vae,
             "conditioner": folder / ("bert" if name == "LDMTextToImagePipeline" else "text_encoder")}
    for part in parts_lib.of_diffusion(config):
        tree, unknown = _read_part(part, where[part.where[0]], config)
        params[part.where[0]] = tree
        rows.append(Component(part.where[0], part.size, str(where[part.where[0]]),
                              f"not used: {', '.join(unknown[:3])}" if unknown else ""))
    return Imported(config, params, {}, tuple(rows))


def read_config(folder: epath.PathLike) -> ConfigDict:
    """The config alone. Raises UserError as `import_model`."""
    folder = epath.Path(folder).expanduser()
    name, vae = _pipeline(folder)
    try:
        return _config(folder, folder / vae, name)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}: a config.json lacks a key or has one of the wrong type: {error}") from error


def _pipeline(folder: epath.Path) -> tuple[str, str]:
    """The pipeline's class, and the folder of its first stage."""
    index = _json(folder / INDEX)
    name = index.get("_class_name") if isinstance(index, dict) else None
    if name not in settings.PIPELINES:
        raise UserError(f"{folder / INDEX}: {name} is not known here; known are {', '.join(settings.PIPELINES)}")
    return name, "vae" if "vae" in index else "vqvae"


def tokenizer(folder: epath.PathLike, config: ConfigDict) -> conditions.Tokenizer | None:
    """The tokenizer of a text model's folder, None for other models. Raises UserError where its files are missing."""
    if config.conditioning.crossattn != "text":
        return None
    path, kind = epath.Path(folder).expanduser() / "tokenizer", config.conditioning.text.kind
    single = path / "tokenizer.json"  # what transformers writes today, in place of the files of before
    if single.is_file() and not (path / {"clip": "merges.txt", "bert": "vocab.txt"}[kind]).is_file():
        model = _json(single).get("model", {})
        entries = tuple(sorted(model["vocab"], key=model["vocab"].get))
        if kind == "bert":
            return conditions.Vocabulary(entries)
        return clip_tokens.BytePairs(entries, tuple(
            tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]))
    return conditions.TOKENIZERS[kind](path if kind == "clip" else path / "vocab.txt")


def _json(path: epath.Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} does not exist: no folder of a pipeline of diffusers")
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is no JSON file: {error}") from error


def _config(folder: epath.Path, vae: epath.Path, name: str) -> ConfigDict:
    unet, first = _json(folder / "unet" / "config.json"), _json(vae / "config.json")
    config = defaults.diffusion()
    config.model.update(settings.unet_section(unet))
    config.first_stage.model.update(settings.first_stage_section(first, vae.name))
    diffusion, sampling = settings.diffusion_section(_json(folder / "scheduler" / "scheduler_config.json"))
    config.diffusion.update(diffusion)
    config.sampling.update(sampling)
    # A VQModel without the key is from before there was one, when latents were not scaled; its default is not theirs.
    scale = first.get("scaling_factor", 1.0 if config.first_stage.model.kind == "vq" else 0.18215)
    config.first_stage.scale_factor = 1.0 if name == "LDMSuperResolutionPipeline" else float(scale)
    factor = sizes.factor(config.first_stage.model)
    config.data.update(dict(image_size=factor * config.model.image_size, channels=config.first_stage.model.in_channels))
    options = config.conditioning
    options.dropout = 0.0
    if name == "LDMSuperResolutionPipeline":
        options.concat, options.low_res.factor = "low_res", factor
    if name in ("LDMTextToImagePipeline", "StableDiffusionPipeline"):
        _set_text(config, _json(folder / ("bert" if name.startswith("LDM") else "text_encoder") / "config.json"))
    return config.lock()


def _set_text(config: ConfigDict, given: Mapping[str, Any]) -> None:
    """The text encoder's section, of an LDMBertModel or a CLIPTextModel."""
    options = config.conditioning
    clip = given.get("model_type", "").startswith("clip")
    given = given.get("text_config", given) if clip else given
    if clip and given.get("hidden_act", "quick_gelu") != "quick_gelu":
        raise UserError(f"text_encoder/config.json: hidden_act={given['hidden_act']!r} is not supported, only "
                        "'quick_gelu'")
    width = given["hidden_size"] if clip else given["d_model"]
    heads = given["num_attention_heads"] if clip else given["encoder_attention_heads"]
    options.update(dict(crossattn="text", width=width, dropout=0.1))
    options.text.update(dict(
        kind="clip" if clip else "bert", vocab_size=given["vocab_size"], heads=heads,
        max_length=given["max_position_embeddings"], head_dim=width // heads if clip else given["head_dim"],
        layers=given["num_hidden_layers"] if clip else given["encoder_layers"]))


def _read_part(part: parts_lib.Part, folder: epath.Path, config: ConfigDict) -> tuple[dict[str, Any], list[str]]:
    """The parameters of a network, and the names in its file that nothing asked for."""
    file, tensors = _open(folder)
    used, flat = set(), {}
    for path, leaf in part.shapes.items():
        keys = [next((name for name in names.spellings(key) if name in tensors), key)
                for key in names.NETWORKS[part.network](path, _section(part, config))]
        for key in keys:
            if key not in tensors:
                raise UserError(f"{file} lacks {key}")
        try:
            value = names.from_theirs(path, [tensors[key] for key in keys], leaf.shape, *_heads(part, path, config))
        except ValueError:
            raise UserError(f"{file}: {keys[0]} has the shape {list(tensors[keys[0]].shape)}, which does not fit its "
                            f"config.json (here {list(leaf.shape)})") from None
        flat[path] = value.astype(np.float32, copy=False)
        used |= set(keys)
    return traverse_util.unflatten_dict(flat), names.unused(tensors, used)


def _open(folder: epath.Path) -> tuple[epath.Path, Mapping[str, np.ndarray]]:
    """The tensors of a network's folder, from one file or from several parts, and the file that names them."""
    if file := next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None):
        return file, tensor_files.open_tensors(file)[0]
    if file := next((folder / name for name in _INDICES if (folder / name).is_file()), None):
        parts = sorted(set(_json(file)["weight_map"].values()))
        return file, collections.ChainMap(*(dict(tensor_files.open_tensors(folder / part)[0]) for part in parts))
    there = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "it does not exist"
    raise UserError(f"{folder} holds no weights such as {_WEIGHTS[0]} ({there})")


def _section(part: parts_lib.Part, config: ConfigDict) -> Any:
    return {"unet": config.model, "first_stage": config.first_stage.model}.get(part.network)


def _heads(part: parts_lib.Part, path: tuple[str, ...], config: ConfigDict) -> tuple[int, bool]:
    """How the channels of the UNet's `qkv` are divided: number of heads, and whether in the newer order."""
    if part.network != "unet" or path[-2:-1] != ("qkv",):
        return 1, False
    channels = part.shapes[path].shape[-1] // 3
    heads, _ = models.build(config).unet.head_layout(channels, upsampling=path[0].startswith("output"))
    return heads, config.model.use_new_attention_order


# --- out -------------------------------------------------------------------------------------------------------------


def export_model(
    config: ConfigDict, params: Mapping[str, Any], folder: epath.PathLike,
    tokenizer: conditions.Tokenizer | None = None,
) -> None:
    """Writes a folder that ``from_pretrained`` of the pipeline loads: the inverse of `import_model`.

    Args:
      config: of stage 2, with a number in ``first_stage.scale_factor``.
      params: as `import_model` returns them; the averages, if these are to be drawn with.
      folder: new or empty.
      tokenizer: of a text model.

    Raises:
      UserError: a folder that holds something, or a model that diffusers cannot build or has no pipeline for.
    """
    folder = epath.Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output {folder} exists and is not empty; give another")
    if config.stage != "diffusion":
        raise UserError("a folder of diffusers is written of a diffusion model (stage 2), with its first stage in it")
    pipeline, scale = settings.pipeline_of(config), config.first_stage.scale_factor
    if pipeline == "LDMSuperResolutionPipeline" and scale != 1:
        raise UserError(f"the latents are scaled by {scale:g}, but diffusers' super-resolution does not scale them")
    first = "vae" if pipeline == "StableDiffusionPipeline" else "vqvae"
    configs = {"unet": settings.unet_config(config),
               first: settings.first_stage_config(config.first_stage.model, scale)}
    where = {"unet": "unet", "first_stage": first}
    if config.conditioning.crossattn == "text":
        where["conditioner"] = "text_encoder" if pipeline.startswith("Stable") else "bert"
        configs[where["conditioner"]] = _text_config(config)
    files = {part.where[0]: _their_tensors(part, params, config) for part in parts_lib.of_diffusion(config)}
    for name, given in configs.items():
        _write(folder / name / "config.json", given)
    for part, tensors in files.items():
        file = "model.safetensors" if part == "conditioner" else "diffusion_pytorch_model.safetensors"
        tensor_files.save_tensors(folder / where[part] / file, tensors)
    _write(folder / "scheduler" / "scheduler_config.json", settings.scheduler_config(config))
    _write(folder / INDEX, _index(pipeline, configs))
    if tokenizer is not None:
        _write_tokenizer(folder / "tokenizer", config, tokenizer)


def _write(path: epath.Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def _their_tensors(part: parts_lib.Part, params: Mapping[str, Any], config: ConfigDict) -> dict[str, np.ndarray]:
    flat, tensors = traverse_util.flatten_dict(dict(params[part.where[0]])), {}
    if wrong := set(flat) ^ set(part.shapes):
        raise UserError(f"the parameters of {part.where[0]} are not those of the config: {'/'.join(sorted(wrong)[0])}")
    for path in part.shapes:
        keys = names.NETWORKS[part.network](path, _section(part, config))
        values = names.to_theirs(path, flat[path], *_heads(part, path, config), part.network)
        tensors |= dict(zip(keys, values, strict=True))
    if part.network == "text":  # a head that nothing uses
        size, width = config.conditioning.text.vocab_size, config.conditioning.width
        tensors |= {"to_logits.weight": np.zeros((size, width), np.float32),
                    "to_logits.bias": np.zeros(size, np.float32)}
    return tensors


def _text_config(config: ConfigDict) -> dict[str, Any]:
    options, text = config.conditioning, config.conditioning.text
    if text.max_length != 77:
        raise UserError(f"conditioning.text.max_length={text.max_length}, but diffusers' pipelines have 77 tokens")
    if text.kind == "clip":
        return dict(architectures=["CLIPTextModel"], model_type="clip_text_model", hidden_size=options.width,
                    intermediate_size=4 * options.width, num_attention_heads=text.heads, num_hidden_layers=text.layers,
                    max_position_embeddings=text.max_length, vocab_size=text.vocab_size, hidden_act="quick_gelu",
                    layer_norm_eps=1e-5, projection_dim=options.width, torch_dtype="float32", bos_token_id=0,
                    eos_token_id=2, pad_token_id=1)
    return dict(architectures=["LDMBertModel"], model_type="ldmbert", vocab_size=text.vocab_size, d_model=options.width,
                max_position_embeddings=text.max_length, encoder_layers=text.layers, encoder_ffn_dim=4 * options.width,
                encoder_attention_heads=text.heads, head_dim=text.head_dim, activation_function="gelu", dropout=0.0,
                attention_dropout=0.0, activation_dropout=0.0, pad_token_id=0, torch_dtype="float32")


def _index(pipeline: str, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    index: dict[str, Any] = {"_class_name": pipeline, "scheduler": ["diffusers", "DDIMScheduler"]}
    index |= {name: ["diffusers", given["_class_name"]] for name, given in configs.items() if "_class_name" in given}
    if "bert" in configs:
        index |= {"bert": ["latent_diffusion", "LDMBertModel"], "tokenizer": ["transformers", "BertTokenizer"]}
    if "text_encoder" in configs:
        index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
                  "safety_checker": [None, None], "feature_extractor": [None, None], "image_encoder": [None, None],
                  "requires_safety_checker": False}
    return index


def _write_tokenizer(folder: epath.Path, config: ConfigDict, tokenizer: conditions.Tokenizer) -> None:
    tokenizer.save(folder)
    length = config.conditioning.text.max_length
    if config.conditioning.text.kind == "clip":
        _write(folder / "tokenizer_config.json", dict(
            tokenizer_class="CLIPTokenizer", model_max_length=length, bos_token="<|startoftext|>",
            eos_token="<|endoftext|>", unk_token="<|endoftext|>", pad_token="<|endoftext|>"))
    else:
        _write(folder / "tokenizer_config.json", dict(
            tokenizer_class="BertTokenizer", model_max_length=length, do_lower_case=True, unk_token="[UNK]",
            sep_token="[SEP]", pad_token="[PAD]", cls_token="[CLS]", mask_token="[MASK]"))
