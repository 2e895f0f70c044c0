"""Our parameters by the reference's names: the tree of each network <-> the state dict of its torch module.

Module names mirror the reference's, with dots as underscores, so most of this is one rule; the rest is a short table.
"""

import re

import numpy as np

Path = tuple[str, ...]

# What the leaves of a module are called there. ActNorm's scale keeps its name.
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias",
          "mean": "running_mean", "var": "running_var"}
# Regular expressions on our module path, joined by dots, applied in turn. The first of all is that a number is a name
# of its own: "input_blocks_1_0" -> "input_blocks.1.0".
_NUMBERS = (r"(?<=\d)_|_(?=\d)", ".")
_RULES: dict[str, tuple[tuple[str, str], ...]] = {
    "unet": (_NUMBERS,),
    "first_stage": (_NUMBERS, (r"\bmid_(block|attn)\.(\d)", r"mid.\1_\2")),
    "class": (),
    "text": (_NUMBERS, (r"^layers\.", "attn_layers.layers."), (r"^", "transformer.")),
    "clip": (_NUMBERS, (r"^embeddings_", "embeddings."), (r"^encoder_", "encoder."), (r"\bself_attn_", "self_attn."),
             (r"\bmlp_", "mlp."), (r"^", "transformer.text_model.")),
    "segmentation": (),
    "discriminator": (_NUMBERS,), "discriminator_actnorm": (_NUMBERS,),
    "lpips": (_NUMBERS, (r"^net_slice", "net.slice")),
}


def torch_name(network: str, path: Path) -> str:
    """The reference's name of a parameter within its module.

    Args:
      network: "unet", "first_stage", "class", "text" (also for layouts), "clip", "segmentation",
        "discriminator", "discriminator_actnorm" or "lpips".
      path: of the leaf in our tree, ``("input_blocks_1_0", "in_layers_0", "scale")``.
    """
    special = {("first_stage", ("quantize", "embedding")): "quantize.embedding.weight",
               ("text", ("pos_emb",)): "transformer.pos_emb.emb.weight"}
    if (network, path) in special:
        return special[network, path]
    *module, leaf = path
    name = ".".join(module)
    for pattern, replacement in _RULES[network]:
        name = re.sub(pattern, replacement, name)
    kept = network == "discriminator_actnorm" and leaf == "scale"
    return f"{name}.{leaf if kept else LEAVES.get(leaf, leaf)}"


def to_torch(path: Path, value: np.ndarray) -> np.ndarray:
    """A parameter of ours in torch's layout, as a view."""
    if path[-1] == "kernel":
        return value.transpose({2: (1, 0), 3: (2, 1, 0), 4: (3, 2, 0, 1)}[value.ndim])
    return value


def from_torch(path: Path, value: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch`."""
    if path[-1] == "kernel":
        return value.transpose({2: (1, 0), 3: (2, 1, 0), 4: (2, 3, 1, 0)}.get(value.ndim))  # others have no place
    return value
