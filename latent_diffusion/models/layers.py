"""Building blocks of the networks, after CompVis latent-diffusion, on NHWC arrays.

Two conventions hold in all of `models`:

- Parameters are initialized as torch does by default (uniform in +-1/sqrt(fan_in), weights and biases alike), because
  the published results were trained from there and Flax's own defaults differ.
- A 1x1 convolution stays a convolution and a linear layer a `Dense`, so that a torch weight becomes ours by reversing
  its axes (4-d: OIHW -> HWIO, 3-d: OIT -> TIO, 2-d: transpose) and nothing has to be known about the layer.

Blocks take the dropout rate that is in force (0.0 when evaluating) as a field, so they need no `train` argument and
can be rematerialized as they are. Parameters are float32; `dtype` is the compute type. Norms and softmax work in
float32.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float, Num

from latent_diffusion.errors import UserError, choose
from latent_diffusion.models.attention import attention, merge_heads, split_heads
from latent_diffusion.models.convolution import convolve
from latent_diffusion.models.products import multiply

Dtype = Any
KEYS_AND_VALUES = ("to_k", "to_v")

torch_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(+-1/sqrt(fan_in))


def torch_bias_init(fan_in: int) -> Callable[..., jax.Array]:
    """U(+-1/sqrt(fan_in)): torch draws biases like weights."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def conv(
    x: Float[Array, "b h w c"],
    features: int,
    name: str,
    *,
    kernel: int = 3,
    stride: int = 1,
    padding: tuple[tuple[int, int], tuple[int, int]] | None = None,
    use_bias: bool = True,
    zero_init: bool = False,
    dtype: Dtype = jnp.float32,
) -> Float[Array, "b h2 w2 d"]:
    """A torch-like convolution named `name` of the calling module. The default padding is kernel // 2 on every side."""
    side = (kernel // 2, kernel // 2)
    zeros = nn.initializers.zeros
    return nn.Conv(
        features,
        (kernel, kernel),
        (stride, stride),
        padding=(side, side) if padding is None else padding,
        use_bias=use_bias,
        kernel_init=zeros if zero_init else torch_kernel_init,
        bias_init=zeros if zero_init else torch_bias_init(kernel * kernel * x.shape[-1]),
        dtype=dtype,
        conv_general_dilated=convolve,
        name=name,
    )(x)


def conv1x1(
    x: Float[Array, "b t c"], features: int, name: str, *, zero_init: bool = False, dtype: Dtype = jnp.float32
) -> Float[Array, "b t d"]:
    """torch's Conv1d with kernel size 1, which the reference uses inside its UNet's attention."""
    zeros = nn.initializers.zeros
    return nn.Conv(
        features,
        (1,),
        padding=((0, 0),),
        kernel_init=zeros if zero_init else torch_kernel_init,
        bias_init=zeros if zero_init else torch_bias_init(x.shape[-1]),
        dtype=dtype,
        conv_general_dilated=convolve,
        name=name,
    )(x)


def dense(
    x: Float[Array, "*b c"], features: int, name: str, *, use_bias: bool = True, dtype: Dtype = jnp.float32
) -> Float[Array, "*b d"]:
    """A torch-like linear layer named `name` of the calling module."""
    bias_init = torch_bias_init(x.shape[-1])
    return nn.Dense(
        features, use_bias=use_bias, kernel_init=torch_kernel_init, bias_init=bias_init, dtype=dtype,
        dot_general=multiply, name=name,
    )(x)


class GroupNorm(nn.Module):
    """Flax's GroupNorm, faster on a CPU: it reduces over pixels first and then over the channels of a group, and
    spreads the statistics over the channels once.

    A collection "moments" holds mean and variance of the input, both (b, groups): if it is mutable, they are stored in
    it; otherwise, if it is given, they are used instead of the input's own, for patches of a picture that are to be
    normalized alike. Statistics in float32; the variance in two passes, because the one-pass formula is wrong by 3e-2
    already at mean 100, std 1.
    """

    groups: int
    epsilon: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b *s c"]) -> Float[Array, "b *s c"]:
        batch, channels = x.shape[0], x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))

        def of_groups(values: jax.Array) -> jax.Array:
            return values.mean(axis=1).reshape(batch, self.groups, -1).mean(axis=-1)

        def spread(values: jax.Array) -> jax.Array:
            return jax.lax.optimization_barrier(jnp.repeat(values, channels // self.groups, axis=-1)[:, None])

        h = x.reshape(batch, -1, channels).astype(jnp.float32)
        wanted = self.is_mutable_collection("moments") and not self.is_initializing()
        given = None if wanted else self.get_variable("moments", "groups")
        mean = of_groups(h) if given is None else given[0]
        h = h - spread(mean)
        variance = of_groups(h**2) if given is None else given[1]
        if wanted:
            self.put_variable("moments", "groups", (mean, variance))
        h = h * (jax.lax.rsqrt(spread(variance) + self.epsilon) * scale) + bias
        return h.reshape(x.shape).astype(self.dtype)


def group_norm(
    x: Float[Array, "b *s c"], name: str, *, eps: float, groups: int = 32, dtype: Dtype = jnp.float32
) -> Float[Array, "b *s c"]:
    """`GroupNorm` named `name` of the calling module.

    The reference always has 32 groups and cannot build channel counts that 32 does not divide. Here such (small)
    networks get gcd(groups, channels) groups.
    """
    return GroupNorm(math.gcd(groups, x.shape[-1]), eps, dtype, name=name)(x)


def layer_norm(x: Float[Array, "*b c"], name: str, *, dtype: Dtype = jnp.float32) -> Float[Array, "*b c"]:
    """LayerNorm over channels with torch's epsilon; statistics in float32."""
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=dtype, name=name)(x)


# ------------------------------------------------------------------------------------------------ rematerialization


def _save_products(primitive: Any, *args: Any, **params: Any) -> bool:
    """Keep convolutions and products with weights; recompute the rest, with it attention's batched products."""
    if primitive.name == "conv_general_dilated":
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)


REMAT = {
    "none": lambda block: block,
    "dots": lambda block: nn.remat(block, policy=_save_products),
    "full": lambda block: nn.remat(block),
}


def remat(block: Any, name: str) -> Any:
    """The module class `block` with rematerialization `name`; outputs and parameters do not change.

    "none" keeps every activation, "dots" keeps the results of convolutions and linear layers, "full" keeps the inputs
    of the block only. Raises UserError for another name.
    """
    return choose(REMAT, name, "model.remat")(block)


def compute_dtype(name: str) -> Dtype:
    """The compute type for `model.dtype`; raises UserError unless it is "float32" or "bfloat16"."""
    return choose({"float32": jnp.float32, "bfloat16": jnp.bfloat16}, name, "model.dtype")


# ----------------------------------------------------------------------------------------------------------- resampling


def upsample_nearest(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Each pixel becomes 2x2 pixels."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def downsample_mean(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """The mean of every 2x2 pixels."""
    return nn.avg_pool(x, (2, 2), strides=(2, 2))


class Upsample(nn.Module):
    """Nearest neighbor x2, then a 3x3 convolution if `with_conv`."""

    with_conv: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        x = upsample_nearest(x)
        return conv(x, x.shape[-1], "conv", dtype=self.dtype) if self.with_conv else x


class Downsample(nn.Module):
    """The UNet's downsampling: a 3x3 convolution of stride 2 padded by 1 on every side, or the mean of 2x2."""

    with_conv: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return conv(x, x.shape[-1], "op", stride=2, dtype=self.dtype) if self.with_conv else downsample_mean(x)


# ---------------------------------------------------------------------------------------------------------- UNet blocks


def timestep_embedding(t: Num[Array, "b"], width: int) -> Float[Array, "b d"]:
    """[cos(t f_i), sin(t f_i)] with f_i = 10000^(-i / (width // 2)), float32; an odd width is padded with a zero."""
    half = width // 2
    frequencies = jnp.exp(-math.log(10000) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.pad(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1), ((0, 0), (0, width % 2)))


class ResBlock(nn.Module):
    """The UNet's residual block (ADM's): the time embedding is added, or scales and shifts the second norm.

    With `resample` "up" or "down" both the branch and the skip are resampled (nearest / mean of 2x2) after the first
    activation. The second convolution starts at zero, so a new block is its skip connection.
    """

    channels: int
    dropout: float = 0.0
    use_scale_shift_norm: bool = False
    resample: str | None = None
    groups: int = 32
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], emb: Float[Array, "b e"]) -> Float[Array, "b h2 w2 d"]:
        norm = functools.partial(group_norm, eps=1e-5, groups=self.groups, dtype=self.dtype)
        h = nn.silu(norm(x, "in_layers_0"))
        if self.resample is not None:
            change = {"up": upsample_nearest, "down": downsample_mean}[self.resample]
            h, x = change(h), change(x)
        h = conv(h, self.channels, "in_layers_2", dtype=self.dtype)

        width = 2 * self.channels if self.use_scale_shift_norm else self.channels
        emb = dense(nn.silu(emb), width, "emb_layers_1", dtype=self.dtype)[:, None, None, :]
        if self.use_scale_shift_norm:
            scale, shift = jnp.split(emb, 2, axis=-1)
            h = norm(h, "out_layers_0") * (1 + scale) + shift
        else:
            h = norm(h + emb, "out_layers_0")
        h = nn.Dropout(self.dropout, deterministic=self.dropout == 0.0)(nn.silu(h))
        h = conv(h, self.channels, "out_layers_3", zero_init=True, dtype=self.dtype)

        if x.shape[-1] != self.channels:
            x = conv(x, self.channels, "skip_connection", kernel=1, dtype=self.dtype)
        return x + h


class AttentionBlock(nn.Module):
    """Self-attention over all pixels, for a UNet without cross-attention.

    `new_order`: the 3C channels after `qkv` are [q, k, v][head] instead of the older [head][q, k, v]. The output
    projection starts at zero. Raises UserError if the heads do not divide the channels.
    """

    heads: int
    new_order: bool = False
    groups: int = 32
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, height, width, c = x.shape
        if c % self.heads:
            raise UserError(f"model.num_heads: {self.heads} attention heads do not divide {c} channels")
        h = group_norm(x, "norm", eps=1e-5, groups=self.groups, dtype=self.dtype).reshape(b, height * width, c)
        qkv = conv1x1(h, 3 * c, "qkv", dtype=self.dtype)
        if self.new_order:
            q, k, v = (split_heads(part, self.heads) for part in jnp.split(qkv, 3, axis=-1))
        else:
            q, k, v = jnp.split(split_heads(qkv, self.heads), 3, axis=-1)
        h = conv1x1(merge_heads(attention(q, k, v)), c, "proj_out", zero_init=True, dtype=self.dtype)
        return x + h.reshape(x.shape)


class CrossAttention(nn.Module):
    """Attention from `x` to `context` (to `x` itself without a context): q, k, v without bias, output with bias.

    A collection "context", if given, holds the keys and values of `context`: see `keys_and_values`.
    """

    heads: int
    head_dim: int
    out_name: str = "to_out_0"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t c"], context: Float[Array, "b s e"] | None = None) -> Float[Array, "b t c"]:
        context = x if context is None else context
        inner = self.heads * self.head_dim
        project = functools.partial(dense, features=inner, use_bias=False, dtype=self.dtype)
        q = project(x, name="to_q")
        k, v = (self.get_variable("context", name) if self.has_variable("context", name) else project(
            context, name=name) for name in KEYS_AND_VALUES)
        h = attention(*(split_heads(part, self.heads) for part in (q, k, v)))
        return dense(merge_heads(h), x.shape[-1], self.out_name, dtype=self.dtype)


@jax.named_scope("keys_and_values")
def keys_and_values(params: Any, context: Float[Array, "b s e"], dtype: Dtype) -> dict:
    """The collection "context" for a UNet with `params`: keys and values of all of its cross-attention, which depend on
    nothing else, so that a sampler computes them once for all steps."""
    kernels = traverse_util.flatten_dict(params)
    found = {path[:-1]: multiply(context.astype(dtype), kernel.astype(dtype))
             for path, kernel in kernels.items() if path[-3:-1] in {("attn2", name) for name in KEYS_AND_VALUES}}
    return traverse_util.unflatten_dict(found)


class GEGLUFeedForward(nn.Module):
    """Linear to 2 * 4C, first half times the exact (erf) GELU of the second half, linear back to C."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        c = x.shape[-1]
        value, gate = jnp.split(dense(x, 8 * c, "net_0_proj", dtype=self.dtype), 2, axis=-1)
        return dense(value * nn.gelu(gate, approximate=False), c, "net_2", dtype=self.dtype)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each on a LayerNorm of its input and added to it.

    This is the order of the released models; Table 16 of the paper lists the feed-forward before the cross-attention.
    """

    heads: int
    head_dim: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t c"], context: Float[Array, "b s e"] | None = None) -> Float[Array, "b t c"]:
        norm = functools.partial(layer_norm, dtype=self.dtype)
        attend = functools.partial(CrossAttention, self.heads, self.head_dim, dtype=self.dtype)
        x = x + attend(name="attn1")(norm(x, "norm1"))
        x = x + attend(name="attn2")(norm(x, "norm2"), context)
        return x + GEGLUFeedForward(dtype=self.dtype, name="ff")(norm(x, "norm3"))


class SpatialTransformer(nn.Module):
    """`depth` transformer blocks over all pixels, between 1x1 convolutions, added to the input (paper, appendix E.2.1).

    The last projection starts at zero. Without `context` its attention is a second self-attention.
    """

    heads: int
    head_dim: int
    depth: int = 1
    remat: str = "none"
    groups: int = 32
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], context: Float[Array, "b s e"] | None = None
    ) -> Float[Array, "b h w c"]:
        b, height, width, c = x.shape
        inner = self.heads * self.head_dim
        h = group_norm(x, "norm", eps=1e-6, groups=self.groups, dtype=self.dtype)
        h = conv(h, inner, "proj_in", kernel=1, dtype=self.dtype).reshape(b, height * width, inner)
        block = remat(TransformerBlock, self.remat)
        for i in range(self.depth):
            h = block(self.heads, self.head_dim, dtype=self.dtype, name=f"transformer_blocks_{i}")(h, context)
        h = h.reshape(b, height, width, inner)
        return x + conv(h, c, "proj_out", kernel=1, zero_init=True, dtype=self.dtype)
