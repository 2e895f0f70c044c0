"""A tiny text encoder of CLIP's form with random weights, in the files in which CLIP comes."""

import numpy as np
from safetensors.numpy import save_file

from latent_diffusion import clip_tokens

WIDTH, MAX_LENGTH = 32, 8
SIZES = dict(layers=1, heads=2, head_dim=16, max_length=MAX_LENGTH)
TOKENIZER = clip_tokens.from_merges([("r", "e"), ("re", "d</w>")])


def tensors() -> dict[str, np.ndarray]:
    """By the names of transformers' CLIPTextModel, with its shapes."""
    layer = {"layer_norm1": (WIDTH,), "layer_norm2": (WIDTH,), "mlp.fc1": (4 * WIDTH, WIDTH),
             "mlp.fc2": (WIDTH, 4 * WIDTH)}
    layer |= {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in ("q", "k", "v", "out")}
    shapes = {f"encoder.layers.0.{name}": shape for name, shape in layer.items()} | {
        "embeddings.token_embedding": (TOKENIZER.size, WIDTH), "embeddings.position_embedding": (MAX_LENGTH, WIDTH),
        "final_layer_norm": (WIDTH,)}
    shapes = {f"{name}.weight": shape for name, shape in shapes.items()} | {
        f"{name}.bias": shape[:1] for name, shape in shapes.items() if "embedding" not in name}
    rng = np.random.default_rng(4)
    return {f"text_model.{name}": ("norm" in name and "weight" in name) + 0.3 * rng.standard_normal(shape, np.float32)
            for name, shape in shapes.items()}


def write(folder) -> dict:
    """Writes them; returns the ``conditioning.text`` section that names them."""
    save_file(tensors(), folder / "model.safetensors")
    TOKENIZER.save(folder)
    return dict(kind="clip", weights=str(folder / "model.safetensors"), vocab=str(folder), **SIZES)
