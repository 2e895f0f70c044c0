"""Conditioners tau_theta (paper section 3.3): a condition -> a sequence of vectors for the UNet's cross-attention."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from latent_diffusion.errors import UserError
from latent_diffusion.models.layers import CrossAttention, Dtype, compute_dtype, dense, layer_norm, remat


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
        length = tokens.shape[1]
        if length > self.max_length:
            raise UserError(f"{length} tokens, but conditioning.text.max_length is {self.max_length}")
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
