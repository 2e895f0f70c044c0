"""The denoising UNet (paper section 3.2-3.3 and appendix E), after ADM (arXiv 2105.05233) and CompVis latent-diffusion.

Module names mirror the reference's state dict: `input_blocks_1_0` is its `input_blocks.1.0`, with the initial
convolution and the downsamplers counted as input blocks.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from latent_diffusion.errors import UserError
from latent_diffusion.models.layers import (
    AttentionBlock,
    Downsample,
    ResBlock,
    SpatialTransformer,
    Upsample,
    compute_dtype,
    conv,
    dense,
    group_norm,
    remat,
    timestep_embedding,
)


class UNet(nn.Module):
    """Predicts eps, x0 or v from (z_t, t) and optional conditions.

    `attention_resolutions` are downsampling factors: 2 means attention at half the latents' resolution.
    `num_head_channels` wins over `num_heads`; -1 means not given, as for `num_heads_upsample`. `in_channels` counts
    the channels of `concat` too. `num_classes` > 0 adds a label embedding to the time embedding. `image_size` is
    informative. Parameters do not depend on `dtype` and `remat`. Raises UserError for heads, sizes, channels or
    conditions that do not fit these fields.
    """

    image_size: int = 32
    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    num_res_blocks: int = 2
    attention_resolutions: Sequence[int] = (4, 2, 1)
    channel_mult: Sequence[int] = (1, 2, 4, 4)
    dropout: float = 0.0
    conv_resample: bool = True
    num_heads: int = -1
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    use_spatial_transformer: bool = False
    transformer_depth: int = 1
    context_dim: int | None = None
    num_classes: int = 0
    legacy: bool = True
    norm_groups: int = 32
    dtype: str = "float32"
    remat: str = "none"

    def head_layout(self, channels: int, *, upsampling: bool = False) -> tuple[int, int]:
        """(heads, channels per head) of the attention over `channels` channels.

        `legacy` matters in two cases. Without the spatial transformer and with only `num_heads` given, the output
        blocks follow `num_heads_upsample`, while the newer code ignores it. With the spatial transformer,
        `num_head_channels` only decides the number of heads, which then share all channels.
        """
        if self.num_heads == -1 and self.num_head_channels == -1:
            raise UserError("model: set num_heads or num_head_channels")
        if self.num_head_channels != -1:
            if channels % self.num_head_channels and not self.use_spatial_transformer:
                raise UserError(
                    f"model.num_head_channels is {self.num_head_channels}, which does not divide {channels}"
                )
            heads = channels // self.num_head_channels
        elif upsampling and self.legacy and not self.use_spatial_transformer and self.num_heads_upsample != -1:
            heads = self.num_heads_upsample
        else:
            heads = self.num_heads
        if heads < 1 or channels % heads:
            raise UserError(f"model: {channels} channels cannot be divided into {heads} attention heads")
        if self.num_head_channels != -1 and not self.legacy:
            return heads, self.num_head_channels
        return heads, channels // heads

    def _check(self, z_t: jax.Array, context: jax.Array | None, label: jax.Array | None) -> None:
        factor = 2 ** (len(self.channel_mult) - 1)
        if z_t.shape[1] % factor or z_t.shape[2] % factor:
            raise UserError(
                f"latent size {z_t.shape[1]}x{z_t.shape[2]} is not a multiple of {factor}, as this UNet needs"
            )
        if z_t.shape[3] != self.in_channels:
            raise UserError(f"UNet input has {z_t.shape[3]} channels, model.in_channels is {self.in_channels}")
        if bool(self.context_dim) and not self.use_spatial_transformer:
            raise UserError("model.context_dim needs model.use_spatial_transformer")
        width = None if context is None else context.shape[-1]
        if width != (self.context_dim or None):
            raise UserError(f"UNet context has width {width}, model.context_dim is {self.context_dim}")
        if (label is not None) != (self.num_classes > 0):
            raise UserError(
                f"UNet label is {'' if label is not None else 'not '}given, num_classes is {self.num_classes}"
            )

    @nn.compact
    def __call__(
        self,
        z_t: Float[Array, "b h w c"],
        t: Num[Array, "b"],
        context: Float[Array, "b s e"] | None = None,
        concat: Float[Array, "b h w c2"] | None = None,
        label: Int[Array, "b"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "b h w d"]:
        """Noisy latents, timesteps in [0, T) -> prediction (B, H, W, out_channels), float32.

        `context` (B, S, context_dim) feeds the cross-attention, `concat` is appended to the channels of z_t, `label`
        is in [0, num_classes).
        """
        x = z_t if concat is None else jnp.concatenate([z_t, concat], axis=-1)
        self._check(x, context, label)
        dtype = compute_dtype(self.dtype)
        width = 4 * self.model_channels
        emb = dense(timestep_embedding(t, self.model_channels), width, "time_embed_0", dtype=dtype)
        emb = dense(nn.silu(emb), width, "time_embed_2", dtype=dtype)
        if label is not None:
            normal = nn.initializers.normal(1.0)
            emb = emb + nn.Embed(self.num_classes, width, embedding_init=normal, dtype=dtype, name="label_emb")(label)

        h, skips, factor = self._down(x, emb, context, train)
        h = self._residual(h, emb, h.shape[-1], "middle_block_0", train)
        h = self._attend(h, context, "middle_block_1")
        h = self._residual(h, emb, h.shape[-1], "middle_block_2", train)
        h = self._up(h, emb, context, skips, factor, train)
        h = nn.silu(group_norm(h, "out_0", eps=1e-5, groups=self.norm_groups, dtype=dtype))
        return conv(h, self.out_channels, "out_2", zero_init=True, dtype=dtype).astype(jnp.float32)

    def _down(
        self, x: jax.Array, emb: jax.Array, context: jax.Array | None, train: bool
    ) -> tuple[jax.Array, list[jax.Array], int]:
        """The input blocks: (output, outputs of all of them, downsampling factor reached)."""
        dtype = compute_dtype(self.dtype)
        h = conv(x, self.model_channels, "input_blocks_0_0", dtype=dtype)
        skips, factor = [h], 1
        for level, mult in enumerate(self.channel_mult):
            for _ in range(self.num_res_blocks):
                name = f"input_blocks_{len(skips)}"
                h = self._residual(h, emb, mult * self.model_channels, f"{name}_0", train)
                if factor in self.attention_resolutions:
                    h = self._attend(h, context, f"{name}_1")
                skips.append(h)
            if level != len(self.channel_mult) - 1:
                name = f"input_blocks_{len(skips)}_0"
                if self.resblock_updown:
                    h = self._residual(h, emb, h.shape[-1], name, train, resample="down")
                else:
                    h = Downsample(self.conv_resample, dtype, name=name)(h)
                skips.append(h)
                factor *= 2
        return h, skips, factor

    def _up(
        self,
        h: jax.Array,
        emb: jax.Array,
        context: jax.Array | None,
        skips: list[jax.Array],
        factor: int,
        train: bool,
    ) -> jax.Array:
        """The output blocks; each takes [h, the skip of its mirror image]."""
        dtype = compute_dtype(self.dtype)
        block = 0
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            for i in range(self.num_res_blocks + 1):
                name, part = f"output_blocks_{block}", 1
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = self._residual(h, emb, mult * self.model_channels, f"{name}_0", train)
                if factor in self.attention_resolutions:
                    h = self._attend(h, context, f"{name}_1", upsampling=True)
                    part = 2
                if level and i == self.num_res_blocks:
                    if self.resblock_updown:
                        h = self._residual(h, emb, h.shape[-1], f"{name}_{part}", train, resample="up")
                    else:
                        h = Upsample(self.conv_resample, dtype, name=f"{name}_{part}")(h)
                    factor //= 2
                block += 1
        return h

    def _residual(
        self, h: jax.Array, emb: jax.Array, channels: int, name: str, train: bool, resample: str | None = None
    ) -> jax.Array:
        return remat(ResBlock, self.remat)(
            channels,
            dropout=self.dropout if train else 0.0,
            use_scale_shift_norm=self.use_scale_shift_norm,
            resample=resample,
            groups=self.norm_groups,
            dtype=compute_dtype(self.dtype),
            name=name,
        )(h, emb)

    def _attend(self, h: jax.Array, context: jax.Array | None, name: str, upsampling: bool = False) -> jax.Array:
        heads, head_dim = self.head_layout(h.shape[-1], upsampling=upsampling)
        common = dict(groups=self.norm_groups, dtype=compute_dtype(self.dtype), name=name)
        if self.use_spatial_transformer:
            return SpatialTransformer(heads, head_dim, self.transformer_depth, self.remat, **common)(h, context)
        return remat(AttentionBlock, self.remat)(heads, self.use_new_attention_order, **common)(h)
