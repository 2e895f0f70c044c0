"""Attention: the kernel that is used, and how channels are divided into heads."""

import functools
import logging
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from latent_diffusion.errors import choose_by_variable

log = logging.getLogger(__name__)
LARGE = 2**19  # entries of a table of weights from which on its gradient is taken head by head
WIDE = 256  # channels of a head from which on that is not done, because the products that it repeats cost too much


@functools.cache
def _say_once(level: int, message: str) -> None:
    log.log(level, message)


def _why_not_flash(q: jax.Array, k: jax.Array) -> str:
    """Why cuDNN's kernel is not asked for on this GPU; empty if it is. It says itself what else it does not take."""
    width, generation = q.shape[-1], str(getattr(jax.local_devices()[0], "compute_capability", "")).partition(".")[0]
    widest = 256 if generation == "9" else 128  # JAX lets 256 pass after Hopper too, where cuDNN has gaps
    if not choose_by_variable({"auto": True, "xla": False}, "LATENT_DIFFUSION_ATTENTION"):
        return "LATENT_DIFFUSION_ATTENTION=xla"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's kernel computes in 16 bits, not in {q.dtype}"
    if not generation.isdecimal() or int(generation) < 8:
        return "cuDNN's kernel needs an NVIDIA GPU from Ampere on"
    if width > widest:
        return f"cuDNN's kernel takes heads of up to {widest} channels here, not {width}"
    return "there is one key only" if k.shape[1] == 1 else ""  # a class: nothing to gain


@jax.named_scope("attention")
def attention(
    q: Float[Array, "b t n d"], k: Float[Array, "b s n d"], v: Float[Array, "b s n d"], *, causal: bool = False
) -> Float[Array, "b t n d"]:
    """softmax(q k^T / sqrt(d)) v for n heads (equation in section 3.3 of the paper); the softmax is in float32. Of
    `causal` attention, query i sees the keys up to i.

    The only place that chooses a kernel: on a GPU cuDNN's flash attention, if it takes the inputs, and otherwise plain
    XLA; which one, and the reason, is logged once. LATENT_DIFFUSION_ATTENTION=xla in the environment rules cuDNN out;
    UserError for other values than that and "auto".
    """
    if jax.default_backend() == "gpu":
        if reason := _why_not_flash(q, k):
            _say_once(logging.INFO, f"attention: XLA, because {reason}")
        else:
            try:
                out = jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
            except NotImplementedError as error:  # shapes that it is not made for
                _say_once(logging.INFO, f"attention: XLA, where cuDNN says: {error}")
            except (RuntimeError, ValueError) as error:  # it is missing or too old
                _say_once(logging.WARNING, f"attention: XLA, because cuDNN failed: {error}")
            else:
                _say_once(logging.INFO, f"attention: cuDNN's flash kernel for heads of {q.shape[-1]} channels")
                return out
    if causal:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)
    # Heads first, and q scaled instead of the logits: faster on a CPU, at 1024 tokens 40 instead of 64 ms.
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q / math.sqrt(q.shape[-1]), k, v))
    large = q.shape[2] * k.shape[2] >= LARGE and q.shape[-1] < WIDE and jax.default_backend() == "cpu"
    return jnp.moveaxis((_of_large_tables if large else _softmax_attention)(q, k, v), 1, 2)


def _softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T) v, heads first."""
    logits = jnp.matmul(q, jnp.swapaxes(k, -1, -2), preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return weights @ v


# On a CPU the gradient of attention between many tokens takes three times as long as it must: weights and logits of all
# heads go to memory and back several times, and XLA's products with batch dimensions are slow. So the gradient is taken
# for one head after the other, and its weights are computed again instead of stored (as in Dao et al. 2022).
_of_large_tables = jax.custom_vjp(_softmax_attention)


def _forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple]:
    def of_head(qkv: tuple) -> tuple[jax.Array, jax.Array]:
        q, k, v = qkv
        logits = jnp.matmul(q, k.T, preferred_element_type=jnp.float32)
        top = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        return ((weights.astype(v.dtype) @ v) / total).astype(v.dtype), top + jnp.log(total)

    out, normalizer = _map_heads(of_head, q, k, v)
    return out, (q, k, v, out, normalizer)


def _backward(kept: tuple, d_out: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    def of_head(given: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v, out, normalizer, d_out, q_transposed, d_out_transposed = given
        weights = jnp.exp(jnp.matmul(q, k.T, preferred_element_type=jnp.float32) - normalizer)
        d_weights = jnp.matmul(d_out, v.T, preferred_element_type=jnp.float32)
        shared = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
        d_logits, weights = (weights * (d_weights - shared)).astype(q.dtype), weights.astype(q.dtype)
        return d_logits @ k, q_transposed @ d_logits, d_out_transposed @ weights

    # Transposed out here, because inside the compiler would rather transpose the large tables, which is slow.
    dq, dk, dv = _map_heads(of_head, *kept, d_out, jnp.swapaxes(kept[0], -1, -2), jnp.swapaxes(d_out, -1, -2))
    return dq, jnp.swapaxes(dk, -1, -2), jnp.swapaxes(dv, -1, -2)


def _map_heads(function: Callable, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """`function` of a tuple of (t, d) for each example and head of arrays (b, n, t, d), one after the other."""
    batch, heads = arrays[0].shape[:2]
    found = jax.lax.map(function, tuple(x.reshape(batch * heads, *x.shape[2:]) for x in arrays))
    return tuple(x.reshape(batch, heads, *x.shape[1:]) for x in found)


_of_large_tables.defvjp(_forward, _backward)


def split_heads(x: Float[Array, "b t c"], heads: int) -> Float[Array, "b t n d"]:
    """(B, T, N*D) -> (B, T, N, D); head n holds channels n*D .. (n+1)*D - 1."""
    return x.reshape(*x.shape[:2], heads, x.shape[-1] // heads)


def merge_heads(x: Float[Array, "b t n d"]) -> Float[Array, "b t c"]:
    """The inverse of `split_heads`."""
    return x.reshape(*x.shape[:2], -1)
