"""Our parameters by the names of diffusers (and of transformers, for text encoders).

A parameter of ours has one name there, but for the UNet's `qkv`, which has three. Linear layers there are 1x1
convolutions here in some places; values are reshaped.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from latent_diffusion.interop import compvis_names as names

Path = tuple[str, ...]
_RESIDUAL = {"in_layers_0": "norm1", "in_layers_2": "conv1", "emb_layers_1": "time_emb_proj", "out_layers_0": "norm2",
             "out_layers_3": "conv2", "skip_connection": "conv_shortcut", "nin_shortcut": "conv_shortcut"}
_OUTER = {"time_embed_0": "time_embedding.linear_1", "time_embed_2": "time_embedding.linear_2",
          "label_emb": "class_embedding", "input_blocks_0_0": "conv_in", "out_0": "conv_norm_out", "out_2": "conv_out",
          "middle_block_0": "mid_block.resnets.0", "middle_block_1": "mid_block.attentions.0",
          "middle_block_2": "mid_block.resnets.1"}
_PARTS = ("to_q", "to_k", "to_v")
_OLDER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # in files from before 2023


def unet(path: Path, model: Any) -> list[str]:
    """Names of a parameter of the UNet: one, or those of q, k and v. `model`: the config's section."""
    block, *inner, leaf = path
    if block in _OUTER:
        prefix = _OUTER[block]
    else:
        prefix = _unet_block(block, model)
    if inner == ["qkv"]:
        return [f"{prefix}.{part}.{names.LEAVES[leaf]}" for part in _PARTS]
    name = ".".join(_inside_unet(part, model.use_spatial_transformer) for part in inner)
    return [".".join(filter(None, (prefix, name, names.LEAVES[leaf])))]


def _inside_unet(module: str, transformer: bool) -> str:
    if module in _RESIDUAL:
        return _RESIDUAL[module]
    if not transformer and module in ("norm", "proj_out"):
        return {"norm": "group_norm", "proj_out": "to_out.0"}[module]
    return {"op": "conv"}.get(module, re.sub(r"(?<=\d)_|_(?=\d)", ".", module))


def _unet_block(block: str, model: Any) -> str:
    """Where an input or output block is: the reference counts them, diffusers has levels of them."""
    side, index, part = re.fullmatch(r"(input|output)_blocks_(\d+)_(\d)", block).groups()
    each, last = model.num_res_blocks + 1, len(model.channel_mult) - 1
    level, number = divmod(int(index) - (side == "input"), each)
    if side == "input":
        kind = "downsamplers.0" if number == each - 1 else ("resnets", "attentions")[int(part)] + f".{number}"
        return f"down_blocks.{level}.{kind}"
    attends = 2 ** (last - level) in model.attention_resolutions
    kind = "resnets" if part == "0" else "attentions" if part == "1" and attends else "upsamplers"
    return f"up_blocks.{level}.{kind}.{0 if kind == 'upsamplers' else number}"


def first_stage(path: Path, model: Any) -> list[str]:
    """The name of a parameter of an autoencoder. `model`: its section of the config."""
    if path == ("quantize", "embedding"):
        return ["quantize.embedding.weight"]
    side, *inner, leaf = path
    levels = len(model.ch_mult)

    def module(name: str) -> str:
        if found := re.fullmatch(r"(down|up)_(\d+)_(block|attn|downsample|upsample)(?:_(\d+))?", name):
            where, level, kind, number = found.groups()
            level = int(level) if where == "down" else levels - 1 - int(level)
            kind = {"block": "resnets", "attn": "attentions"}.get(kind, f"{kind}rs")
            return f"{where}_blocks.{level}.{kind}.{number or 0}"
        if found := re.fullmatch(r"mid_(block|attn)_(\d)", name):
            return f"mid_block.{'resnets' if found[1] == 'block' else 'attentions'}.{int(found[2]) - 1}"
        attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0",
                     "norm_out": "conv_norm_out"}
        return attention.get(name, _RESIDUAL.get(name, name))

    return [".".join([side, *map(module, inner), names.LEAVES[leaf]])]


def bert(path: Path, model: Any = None) -> list[str]:
    """The name of a parameter of the paper's text encoder in LDMBertModel."""
    if path == ("pos_emb",):
        return ["model.embed_positions.weight"]
    block, *inner, leaf = path
    outer = {"token_emb": "embed_tokens", "norm": "layer_norm"}
    if block in outer:
        return [f"model.{outer[block]}.{names.LEAVES[leaf]}"]
    index, part = map(int, re.fullmatch(r"layers_(\d+)_(\d)", block).groups())
    kind = ("self_attn_layer_norm", "self_attn", "final_layer_norm", "")[2 * (index % 2) + part]
    projections = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj", "net_0_0": "fc1",
                   "net_2": "fc2"}
    modules = (f"model.layers.{index // 2}", kind, *map(projections.get, inner), names.LEAVES[leaf])
    return [".".join(filter(None, modules))]


def clip(path: Path, model: Any = None) -> list[str]:
    """The name of a parameter of CLIP's text encoder in transformers."""
    return [names.torch_name("clip", path).removeprefix("transformer.")]


NETWORKS: dict[str, Callable[[Path, Any], list[str]]] = {
    "unet": unet, "first_stage": first_stage, "text": bert, "clip": clip}


def spellings(key: str) -> Iterator[str]:
    """A name as files have it: today's, that of an attention before 2023, that of CLIP since transformers 5."""
    yield key
    yield key.removeprefix("text_model.")
    for new, old in _OLDER.items():
        key = key.replace(f".{new}.", f".{old}.")
    yield key


# --- values ----------------------------------------------------------------------------------------------------------


def from_theirs(
    path: Path, values: list[np.ndarray], shape: tuple[int, ...], heads: int, new_order: bool
) -> np.ndarray:
    """A parameter of ours from the arrays under its names.

    Raises ValueError if they do not have its shape.
    """
    if path[-2:-1] == ("qkv",):
        values = [np.concatenate(values) if new_order else _by_heads(values, heads)]
    (value,) = values
    if path[-1] != "kernel":
        if value.shape != shape:
            raise ValueError
        return value
    if value.ndim == 2:
        value = value.T
        if value.shape != shape[-2:] or value.size != np.prod(shape, dtype=int):
            raise ValueError
        return value.reshape(shape)
    value = value.transpose({3: (2, 1, 0), 4: (2, 3, 1, 0)}[value.ndim])
    if value.size != np.prod(shape, dtype=int) or value.shape[-2:] != shape[-2:]:
        raise ValueError
    return value.reshape(shape)


def to_theirs(path: Path, value: np.ndarray, heads: int, new_order: bool, network: str) -> list[np.ndarray]:
    """The inverse: arrays in the order of the names, as diffusers stores them today."""
    value = np.asarray(names.to_torch(path, np.asarray(value, np.float32)))
    linear = len(path) > 1 and (path[-2] == "qkv" or (network == "first_stage" and path[-2] in ("q", "k", "v")) or (
        path[-2] == "proj_out" and (network == "first_stage" or value.ndim == 3)))
    if linear and path[-1] == "kernel":
        value = value.reshape(value.shape[:2])
    if path[-2:-1] != ("qkv",):
        return [value]
    if new_order:
        return np.split(value, 3)
    parts = value.reshape(heads, 3, -1, *value.shape[1:])
    return [parts[:, i].reshape(-1, *value.shape[1:]) for i in range(3)]


def _by_heads(values: list[np.ndarray], heads: int) -> np.ndarray:
    """q, k and v as the older order has them: [head][q, k, v]."""
    split = [value.reshape(heads, -1, *value.shape[1:]) for value in values]
    return np.stack(split, axis=1).reshape(-1, *values[0].shape[1:])


def unused(keys: Mapping[str, Any], used: set[str]) -> list[str]:
    """Keys that nobody took, but for those that nothing uses."""
    return sorted(key for key in set(keys) - used if not key.endswith("position_ids") and "to_logits" not in key)
