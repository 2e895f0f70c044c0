"""CLIP's text encoder (Radford et al. 2021) as Stable Diffusion v1 uses it: frozen, its last states are the context."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from latent_diffusion.errors import UserError
from latent_diffusion.models.attention import attention, merge_heads, split_heads
from latent_diffusion.models.conditioning import checked_length
from latent_diffusion.models.layers import Dtype, compute_dtype, dense, layer_norm


class CLIPLayer(nn.Module):
    """Causal self-attention, and a feed-forward of four times the width with quick GELU, x sigmoid(1.702 x)."""

    heads: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        width = x.shape[-1]
        h = layer_norm(x, "layer_norm1", dtype=self.dtype)
        q, k, v = (split_heads(dense(h, width, f"self_attn_{name}_proj", dtype=self.dtype), self.heads)
                   for name in "qkv")
        h = merge_heads(attention(q, k, v, causal=True))
        x = x + dense(h, width, "self_attn_out_proj", dtype=self.dtype)
        h = dense(layer_norm(x, "layer_norm2", dtype=self.dtype), 4 * width, "mlp_fc1", dtype=self.dtype)
        return x + dense(h * jax.nn.sigmoid(1.702 * h), width, "mlp_fc2", dtype=self.dtype)


class CLIPTextTransformer(nn.Module):
    """The defaults are ViT-L/14's: 123,060,480 parameters. The names are those of `transformers`, dots as underscores.

    Padding is attended to like any token, and the pooled output is not used: the context is every token's last state.
    """

    vocab_size: int = 49408
    max_length: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    head_dim: int = 64
    dtype: str = "float32"

    @nn.compact
    def __call__(self, tokens: Int[Array, "b l"], *, train: bool = False) -> Float[Array, "b l d"]:
        """Token ids (B, L <= max_length) -> (B, L, width), float32.

        Raises UserError if L is too long, or if the heads do not make up the width.
        """
        length = checked_length(tokens, self.max_length)
        if self.heads * self.head_dim != self.width:
            raise UserError(f"{self.heads} heads of {self.head_dim} channels do not make up the width {self.width}")
        small = nn.initializers.normal(0.02)
        x = nn.Embed(self.vocab_size, self.width, embedding_init=small, name="embeddings_token_embedding")(tokens)
        x = x + nn.Embed(self.max_length, self.width, embedding_init=small,
                         name="embeddings_position_embedding")(jnp.arange(length))
        x = x.astype(compute_dtype(self.dtype))
        for i in range(self.layers):
            x = CLIPLayer(self.heads, x.dtype, name=f"encoder_layers_{i}")(x)
        return layer_norm(x, "final_layer_norm", dtype=x.dtype).astype(jnp.float32)
