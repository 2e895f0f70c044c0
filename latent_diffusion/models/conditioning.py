"""Conditioners tau_theta (paper section 3.3): a condition -> a sequence of vectors for the UNet's cross-attention, or
-> a map that is joined to z_t channel by channel."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from latent_diffusion.errors import UserError
from latent_diffusion.models.layers import (
    CrossAttention,
    Dtype,
    compute_dtype,
    dense,
    downsample_mean,
    layer_norm,
    remat,
    torch_kernel_init,
)


class ClassEmbedder(nn.Module):
    """One vector per class, initially N(0, 1). `num_classes` counts the null class of classifier-free guidance."""

    num_classes: int
    width: int

    @nn.compact
    def __call__(self, label: Int[Array, "b"], *, train: bool = False) -> Float[Array, "b 1 d"]:
        """Labels in [0, num_classes) -> (B, 1, width)."""
        normal = nn.initializers.normal(1.0)
        return nn.Embed(self.num_classes, self.width, embedding_init=normal, name="embedding")(label)[:, None, :]


class FeedForward(nn.Module):
    """Linear to 4C, exact (erf) GELU, linear back to C."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        h = nn.gelu(dense(x, 4 * x.shape[-1], "net_0_0", dtype=self.dtype), approximate=False)
        return dense(h, x.shape[-1], "net_2", dtype=self.dtype)


def checked_length(tokens: Int[Array, "b l"], max_length: int) -> int:
    """How many tokens each text has. Raises UserError for more than there are positions."""
    length = tokens.shape[1]
    if length > max_length:
        raise UserError(f"{length} tokens, but conditioning.text.max_length is {max_length}")
    return length


class TextTransformer(nn.Module):
    """The reference's text encoder, trained jointly with the UNet (paper section 4.3.1 and Table 17).

    A pre-norm transformer encoder with learned positions. Its heads have `head_dim` channels each whatever the `width`
    is. No mask: padding is attended to, so always pad as in training. The reference's unused head `to_logits` is left
    out. `layers_{2k}` is the attention and `layers_{2k+1}` the feed-forward of layer k, `_0` the norm before it.
    With 0 layers it is the normalized sum of token and position embeddings, which a short run learns best.
    """

    vocab_size: int
    max_length: int = 77
    width: int = 1280
    layers: int = 32
    heads: int = 8
    head_dim: int = 64
    dtype: str = "float32"
    remat: str = "none"

    @nn.compact
    def __call__(self, tokens: Int[Array, "b l"], *, train: bool = False) -> Float[Array, "b l d"]:
        """Token ids (B, L <= max_length) -> (B, L, width), float32. Raises UserError if L is too long."""
        length = checked_length(tokens, self.max_length)
        dtype = compute_dtype(self.dtype)
        attend, feed = remat(CrossAttention, self.remat), remat(FeedForward, self.remat)
        small = nn.initializers.normal(0.02)
        positions = self.param("pos_emb", small, (self.max_length, self.width))
        x = nn.Embed(self.vocab_size, self.width, embedding_init=small, name="token_emb")(tokens)
        x = (x + positions[:length]).astype(dtype)
        for i in range(0, 2 * self.layers, 2):
            h = layer_norm(x, f"layers_{i}_0", dtype=dtype)
            x = x + attend(self.heads, self.head_dim, "to_out", dtype, name=f"layers_{i}_1")(h)
            h = layer_norm(x, f"layers_{i + 1}_0", dtype=dtype)
            x = x + feed(dtype, name=f"layers_{i + 1}_1")(h)
        return layer_norm(x, "norm", dtype=dtype).astype(jnp.float32)


class _Kernel(nn.Module):
    """The kernel of a convolution, for where it is applied in another way."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("kernel", torch_kernel_init, self.shape)


class SpatialRescaler(nn.Module):
    """A semantic map -> `width` channels at the latents' size (paper section 4.3.2): `stages` times half the size, then
    a 1x1 convolution without bias.

    The reference halves by bilinear interpolation without antialiasing, which at a factor of 2 is the mean of 2x2.
    """

    num_classes: int
    stages: int
    width: int = 3

    @nn.compact
    def __call__(
        self, segmentation: Int[Array, "b h w"] | Float[Array, "b h w k"], *, train: bool = False
    ) -> Float[Array, "b h2 w2 d"]:
        """Class numbers (B, H, W), or a weight for each class (B, H, W, num_classes) -> (B, H / 2^stages, ..., width).

        Both linear maps commute, so class numbers are looked up before they are averaged: no one-hot map is made.
        """
        kernel = _Kernel((1, 1, self.num_classes, self.width), name="channel_mapper")()
        integer = jnp.issubdtype(segmentation.dtype, jnp.integer)
        x = kernel[0, 0][segmentation] if integer else segmentation @ kernel[0, 0]
        for _ in range(self.stages):
            x = downsample_mean(x)
        return x


class HybridConditioner(nn.Module):
    """Two conditioners side by side: `crossattn` for a sequence, `concat` for a map."""

    crossattn: nn.Module
    concat: nn.Module

    def __call__(self, y: Array, spatial: Array, *, train: bool = False) -> tuple[Array, Array]:
        return self.sequence(y, train=train), self.map(spatial, train=train)

    def sequence(self, y: Array, *, train: bool = False) -> Float[Array, "b t d"]:
        return self.crossattn(y, train=train)

    def map(self, spatial: Array, *, train: bool = False) -> Float[Array, "b h w d"]:
        return self.concat(spatial, train=train)
