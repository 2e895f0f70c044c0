"""First stages: KL-regularized and vector-quantized autoencoders, and the identity (paper section 3.1 and appendix G).

Images and latents are NHWC. With n entries in `ch_mult` the downsampling factor is f = 2^(n-1). Parameter names follow
the reference's state dict with dots replaced by underscores inside the encoder and the decoder: `down_0_block_1`,
`mid_attn_1`, `up_2_upsample`. `up_i` is indexed by level: `up_0` is the highest resolution although it runs last.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from latent_diffusion.errors import UserError, choose
from latent_diffusion.models.attention import attention
from latent_diffusion.models.bottleneck import DiagonalGaussian, VectorQuantizer
from latent_diffusion.models.layers import (
    Dtype,
    Upsample,
    compute_dtype,
    conv,
    downsample_mean,
    group_norm,
    remat,
    torch_bias_init,
    torch_kernel_init,
)


class ResnetBlock(nn.Module):
    """norm-swish-conv, norm-swish-dropout-conv, added to the input (through a 1x1 convolution where needed)."""

    channels: int
    dropout: float = 0.0
    groups: int = 32
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        h = nn.silu(group_norm(x, "norm1", eps=1e-6, groups=self.groups, dtype=self.dtype))
        h = conv(h, self.channels, "conv1", dtype=self.dtype)
        h = nn.silu(group_norm(h, "norm2", eps=1e-6, groups=self.groups, dtype=self.dtype))
        h = nn.Dropout(self.dropout, deterministic=self.dropout == 0.0)(h)
        h = conv(h, self.channels, "conv2", dtype=self.dtype)
        if x.shape[-1] != self.channels:
            x = conv(x, self.channels, "nin_shortcut", kernel=1, dtype=self.dtype)
        return x + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all pixels. Unlike the UNet's, its last projection does not start at zero."""

    groups: int = 32
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, height, width, c = x.shape
        h = group_norm(x, "norm", eps=1e-6, groups=self.groups, dtype=self.dtype)
        q, k, v = (
            conv(h, c, name, kernel=1, dtype=self.dtype).reshape(b, height * width, 1, c) for name in ("q", "k", "v")
        )
        return x + conv(attention(q, k, v).reshape(x.shape), c, "proj_out", kernel=1, dtype=self.dtype)


class LinearAttnBlock(nn.Module):
    """Linear attention (arXiv 1812.01243), one head.

    As in the reference: softmax over the positions of k only, and neither a norm nor a residual connection.
    """

    groups: int = 32  # unused: it has no norm
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, height, width, c = x.shape
        qkv = conv(x, 3 * c, "to_qkv", kernel=1, use_bias=False, dtype=self.dtype).reshape(b, height * width, 3 * c)
        q, k, v = jnp.split(qkv, 3, axis=-1)
        k = jax.nn.softmax(k.astype(jnp.float32), axis=1).astype(k.dtype)
        h = jnp.einsum("btd,bde->bte", q, jnp.einsum("btd,bte->bde", k, v))
        return conv(h.reshape(x.shape), c, "to_out", kernel=1, dtype=self.dtype)


ATTENTION = {"vanilla": AttnBlock, "linear": LinearAttnBlock, "none": None}


class DownsampleRight(nn.Module):
    """The first stage's downsampling: one pixel of padding at the right and bottom only, then 3x3 with stride 2."""

    with_conv: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        if not self.with_conv:
            return downsample_mean(x)
        return conv(x, x.shape[-1], "conv", stride=2, padding=((0, 1), (0, 1)), dtype=self.dtype)


def _makers(module: nn.Module, train: bool) -> tuple[Any, Any]:
    """`residual(x, channels, name)` and `attend(x, name)` for the compact body of an Encoder or a Decoder."""
    dtype = compute_dtype(module.dtype)
    residual_block = remat(ResnetBlock, module.remat)
    kind = choose(ATTENTION, module.attn_type, "model.attn_type")
    attention_block = None if kind is None else remat(kind, module.remat)
    dropout = module.dropout if train else 0.0

    def residual(x: jax.Array, channels: int, name: str) -> jax.Array:
        return residual_block(channels, dropout, module.norm_groups, dtype, name=name)(x)

    def attend(x: jax.Array, name: str) -> jax.Array:
        return x if attention_block is None else attention_block(module.norm_groups, dtype, name=name)(x)

    return residual, attend


class Encoder(nn.Module):
    """Image (B, H, W, C) -> (B, H/f, W/f, z_channels), or 2 * z_channels with `double_z`. Output float32.

    Levels whose nominal resolution (`resolution` / 2^level, whatever the input's size) is in `attn_resolutions` have
    attention after each residual block; the middle always has it, unless `attn_type` is "none".
    """

    z_channels: int
    double_z: bool
    ch: int
    ch_mult: Sequence[int]
    num_res_blocks: int
    attn_resolutions: Sequence[int]
    resolution: int
    attn_type: str
    dropout: float
    resamp_with_conv: bool
    norm_groups: int
    dtype: str
    remat: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool = False) -> Float[Array, "b h2 w2 d"]:
        residual, attend = _makers(self, train)
        dtype = compute_dtype(self.dtype)
        h = conv(x, self.ch, "conv_in", dtype=dtype)
        for level, mult in enumerate(self.ch_mult):
            for i in range(self.num_res_blocks):
                h = residual(h, self.ch * mult, f"down_{level}_block_{i}")
                if self.resolution // 2**level in self.attn_resolutions:
                    h = attend(h, f"down_{level}_attn_{i}")
            if level != len(self.ch_mult) - 1:
                h = DownsampleRight(self.resamp_with_conv, dtype, name=f"down_{level}_downsample")(h)
        h = residual(h, h.shape[-1], "mid_block_1")
        h = attend(h, "mid_attn_1")
        h = residual(h, h.shape[-1], "mid_block_2")
        h = nn.silu(group_norm(h, "norm_out", eps=1e-6, groups=self.norm_groups, dtype=dtype))
        h = conv(h, self.z_channels * (2 if self.double_z else 1), "conv_out", dtype=dtype)
        return h.astype(jnp.float32)


class Decoder(nn.Module):
    """(B, h, w, z_channels) -> image (B, f*h, f*w, out_channels), float32; through tanh with `tanh_out`.

    Mirrors `Encoder`, with one residual block more per level.
    """

    out_channels: int
    tanh_out: bool
    ch: int
    ch_mult: Sequence[int]
    num_res_blocks: int
    attn_resolutions: Sequence[int]
    resolution: int
    attn_type: str
    dropout: float
    resamp_with_conv: bool
    norm_groups: int
    dtype: str
    remat: str

    @nn.compact
    def __call__(self, z: Float[Array, "b h w c"], *, train: bool = False) -> Float[Array, "b h2 w2 d"]:
        residual, attend = _makers(self, train)
        dtype = compute_dtype(self.dtype)
        channels = self.ch * self.ch_mult[-1]
        h = conv(z, channels, "conv_in", dtype=dtype)
        h = residual(h, channels, "mid_block_1")
        h = attend(h, "mid_attn_1")
        h = residual(h, channels, "mid_block_2")
        for level, mult in reversed(list(enumerate(self.ch_mult))):
            for i in range(self.num_res_blocks + 1):
                h = residual(h, self.ch * mult, f"up_{level}_block_{i}")
                if self.resolution // 2**level in self.attn_resolutions:
                    h = attend(h, f"up_{level}_attn_{i}")
            if level != 0:
                h = Upsample(self.resamp_with_conv, dtype, name=f"up_{level}_upsample")(h)
        h = nn.silu(group_norm(h, "norm_out", eps=1e-6, groups=self.norm_groups, dtype=dtype))
        h = conv(h, self.out_channels, "conv_out", dtype=dtype).astype(jnp.float32)
        return jnp.tanh(h) if self.tanh_out else h


def _trunk(module: nn.Module) -> dict[str, Any]:
    """The settings that Encoder and Decoder have in common, from the autoencoder's fields."""
    names = ("ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resolution", "attn_type", "dropout")
    return {name: getattr(module, name) for name in (*names, "resamp_with_conv", "norm_groups", "dtype", "remat")}


def _conv1x1(in_features: int, features: int) -> nn.Conv:
    """quant_conv and post_quant_conv: in float32, they are cheap and next to the latents."""
    bias_init = torch_bias_init(in_features)
    return nn.Conv(features, (1, 1), kernel_init=torch_kernel_init, bias_init=bias_init)


def _check_size(x: jax.Array, factor: int) -> None:
    height, width = x.shape[1:3]
    if height % factor or width % factor:
        raise UserError(f"image size {height}x{width} is not a multiple of the autoencoder's factor {factor}")


class AutoencoderKL(nn.Module):
    """KL-regularized autoencoder.

    Raises UserError for an unknown `attn_type`, `dtype` or `remat`, or without `double_z`.
    """

    embed_dim: int = 4
    z_channels: int = 4
    double_z: bool = True
    in_channels: int = 3
    out_channels: int = 3
    ch: int = 128
    ch_mult: Sequence[int] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_resolutions: Sequence[int] = ()
    resolution: int = 256
    attn_type: str = "vanilla"
    dropout: float = 0.0
    resamp_with_conv: bool = True
    tanh_out: bool = False
    norm_groups: int = 32
    dtype: str = "float32"
    remat: str = "none"

    @property
    def factor(self) -> int:
        """Pixels per latent pixel, in each direction."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def latent_channels(self) -> int:
        return self.embed_dim

    def setup(self) -> None:
        if not self.double_z:
            raise UserError("model.double_z must be True for kind 'kl': the encoder gives mean and log-variance")
        self.encoder = Encoder(z_channels=self.z_channels, double_z=True, **_trunk(self))
        self.decoder = Decoder(out_channels=self.out_channels, tanh_out=self.tanh_out, **_trunk(self))
        self.quant_conv = _conv1x1(2 * self.z_channels, 2 * self.embed_dim)
        self.post_quant_conv = _conv1x1(self.embed_dim, self.z_channels)

    def encode(self, x: Float[Array, "b h w c"], *, train: bool = False) -> DiagonalGaussian:
        """Images (B, H, W, in_channels) in [-1, 1] -> posterior over (B, H/f, W/f, embed_dim).

        Raises UserError if f does not divide the size.
        """
        _check_size(x, self.factor)
        return DiagonalGaussian.from_moments(self.quant_conv(self.encoder(x, train=train)))

    def decode(self, z: Float[Array, "b h w c"], *, train: bool = False) -> Float[Array, "b h2 w2 d"]:
        """Latents (B, h, w, embed_dim), unscaled -> images (B, f*h, f*w, out_channels), about [-1, 1], not clipped."""
        return self.decoder(self.post_quant_conv(z), train=train)

    def __call__(
        self, x: Float[Array, "b h w c"], key: jax.Array | None = None, *, train: bool = False
    ) -> tuple[Float[Array, "b h w d"], DiagonalGaussian]:
        """(reconstruction, posterior); decodes a sample drawn with `key`, or the mode without one."""
        posterior = self.encode(x, train=train)
        return self.decode(posterior.mode() if key is None else posterior.sample(key), train=train), posterior


class AutoencoderVQ(nn.Module):
    """Vector-quantized autoencoder. Diffusion works on the latents before quantization; `decode` quantizes first.

    `vq_beta` and `vq_legacy_beta`: see VectorQuantizer. Raises UserError as AutoencoderKL does, and with `double_z`.
    """

    embed_dim: int = 3
    z_channels: int = 3
    double_z: bool = False
    in_channels: int = 3
    out_channels: int = 3
    ch: int = 128
    ch_mult: Sequence[int] = (1, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: Sequence[int] = ()
    resolution: int = 256
    attn_type: str = "vanilla"
    dropout: float = 0.0
    resamp_with_conv: bool = True
    tanh_out: bool = False
    norm_groups: int = 32
    n_embed: int = 8192
    vq_beta: float = 0.25
    vq_legacy_beta: bool = True
    dtype: str = "float32"
    remat: str = "none"

    @property
    def factor(self) -> int:
        """Pixels per latent pixel, in each direction."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def latent_channels(self) -> int:
        return self.embed_dim

    def setup(self) -> None:
        if self.double_z:
            raise UserError("model.double_z must be False for kind 'vq': there is no log-variance")
        self.encoder = Encoder(z_channels=self.z_channels, double_z=False, **_trunk(self))
        self.decoder = Decoder(out_channels=self.out_channels, tanh_out=self.tanh_out, **_trunk(self))
        self.quant_conv = _conv1x1(self.z_channels, self.embed_dim)
        self.post_quant_conv = _conv1x1(self.embed_dim, self.z_channels)
        self.quantizer = VectorQuantizer(
            self.n_embed, self.embed_dim, self.vq_beta, self.vq_legacy_beta, name="quantize"
        )

    def encode(self, x: Float[Array, "b h w c"], *, train: bool = False) -> Float[Array, "b h2 w2 d"]:
        """Images (B, H, W, in_channels) in [-1, 1] -> latents (B, H/f, W/f, embed_dim) before quantization.

        Raises UserError if f does not divide the size.
        """
        _check_size(x, self.factor)
        return self.quant_conv(self.encoder(x, train=train))

    def quantize(
        self, z: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b h w c"], Int[Array, "b h w"], Float[Array, ""]]:
        """(nearest codes with the gradient passed straight through to z, their indices, codebook loss)."""
        return self.quantizer(z)

    def decode(
        self, z: Float[Array, "b h w c"], *, train: bool = False, quantize: bool = True
    ) -> Float[Array, "b h2 w2 d"]:
        """Latents (B, h, w, embed_dim) -> images (B, f*h, f*w, out_channels).

        `quantize` False is for latents that are codes already.
        """
        if quantize:
            z, _, _ = self.quantize(z)
        return self.decoder(self.post_quant_conv(z), train=train)

    def __call__(
        self, x: Float[Array, "b h w c"], key: jax.Array | None = None, *, train: bool = False
    ) -> tuple[Float[Array, "b h w d"], Int[Array, "b h2 w2"], Float[Array, ""]]:
        """(reconstruction, code indices, codebook loss). Nothing is random; `key` is there for symmetry."""
        z_q, indices, loss = self.quantize(self.encode(x, train=train))
        return self.decode(z_q, train=train, quantize=False), indices, loss


class AutoencoderIdentity(nn.Module):
    """No first stage: latents are pixels, for diffusion in pixel space (LDM-1). It has no parameters."""

    in_channels: int = 3

    @property
    def factor(self) -> int:
        return 1

    @property
    def latent_channels(self) -> int:
        return self.in_channels

    def encode(self, x: Float[Array, "b h w c"], *, train: bool = False) -> Float[Array, "b h w c"]:
        return x

    def decode(self, z: Float[Array, "b h w c"], *, train: bool = False) -> Float[Array, "b h w c"]:
        return z

    def __call__(
        self, x: Float[Array, "b h w c"], key: jax.Array | None = None, *, train: bool = False
    ) -> tuple[Float[Array, "b h w c"], None]:
        return x, None
