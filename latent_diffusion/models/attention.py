"""Attention: the kernel that is used, and how channels are divided into heads."""

import functools
import logging
import math
import os

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

log = logging.getLogger(__name__)


@functools.cache
def _say_once(message: str) -> None:
    log.info(message)


def _cudnn_eligible(q: jax.Array, k: jax.Array) -> bool:
    """cuDNN's flash kernel takes 16-bit inputs with a head width that is a multiple of 8, at most 128."""
    if os.environ.get("LATENT_DIFFUSION_ATTENTION", "auto") == "xla" or jax.default_backend() != "gpu":
        return False
    return q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and k.shape[1] > 1


def attention(
    q: Float[Array, "b t n d"], k: Float[Array, "b s n d"], v: Float[Array, "b s n d"]
) -> Float[Array, "b t n d"]:
    """softmax(q k^T / sqrt(d)) v for n heads (equation in section 3.3 of the paper); the softmax is in float32.

    The only place that chooses a kernel: cuDNN's flash attention on a GPU where the inputs are eligible, otherwise
    plain XLA. LATENT_DIFFUSION_ATTENTION=xla in the environment rules cuDNN out. The choice is logged once.
    """
    if _cudnn_eligible(q, k):
        try:
            out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
            _say_once("attention: cuDNN flash kernel")
            return out
        except (NotImplementedError, RuntimeError, ValueError) as error:
            _say_once(f"attention: XLA, because cuDNN refused: {error}")
    else:
        _say_once("attention: XLA")
    # Heads first, and q scaled instead of the logits: faster on a CPU, at 1024 tokens 40 instead of 64 ms.
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q / math.sqrt(q.shape[-1]), k, v))
    logits = jnp.matmul(q, jnp.swapaxes(k, -1, -2), preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.moveaxis(weights @ v, 1, 2)


def split_heads(x: Float[Array, "b t c"], heads: int) -> Float[Array, "b t n d"]:
    """(B, T, N*D) -> (B, T, N, D); head n holds channels n*D .. (n+1)*D - 1."""
    return x.reshape(*x.shape[:2], heads, x.shape[-1] // heads)


def merge_heads(x: Float[Array, "b t n d"]) -> Float[Array, "b t c"]:
    """The inverse of `split_heads`."""
    return x.reshape(*x.shape[:2], -1)
