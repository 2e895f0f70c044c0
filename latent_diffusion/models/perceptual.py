"""LPIPS, the learned perceptual distance (Zhang et al., CVPR 2018), version 0.1 heads on VGG16 or AlexNet.

The networks are torchvision's; parameter names mirror those of the `lpips` package with dots as underscores
(`net_slice1_0`, `lin0_model_1`). Trained parameters come from `latent_diffusion.weights.load_lpips`.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from latent_diffusion.errors import UserError, choose
from latent_diffusion.models.convolution import convolve

# One entry per convolution: name, channels, kernel, stride, padding, max-pool window before it (0: none; stride 2).
# A slice ends where its features are compared.
_VGG = tuple(
    (f"net_slice{level}_{index}", channels, 3, 1, 1, 2 if first and level > 1 else 0)
    for level, channels, indices in (
        (1, 64, (0, 2)),
        (2, 128, (5, 7)),
        (3, 256, (10, 12, 14)),
        (4, 512, (17, 19, 21)),
        (5, 512, (24, 26, 28)),
    )
    for first, index in zip((True, False, False), indices, strict=False)
)
_ALEX = (
    ("net_slice1_0", 64, 11, 4, 2, 0),
    ("net_slice2_3", 192, 5, 1, 2, 3),
    ("net_slice3_6", 384, 3, 1, 1, 3),
    ("net_slice4_8", 256, 3, 1, 1, 0),
    ("net_slice5_10", 256, 3, 1, 1, 0),
)
CONVOLUTIONS = {"vgg": _VGG, "alex": _ALEX}
# Below these sides the last feature map would be empty and the distance NaN.
MIN_SIDE = {"vgg": 16, "alex": 31}
# ImageNet's mean and deviation, moved to inputs in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


def unit_normalize(features: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Divides by the norm over channels (+ 1e-10); all-zero features stay zero and have a finite gradient."""
    squared = jnp.sum(features**2, axis=-1, keepdims=True)
    positive = squared > 0
    norm = jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0)
    return features / (norm + 1e-10)


class LPIPS(nn.Module):
    """Perceptual distance of two batches of images.

    Attributes:
        net: "vgg" (the training loss of the paper; side at least 16) or "alex" (faster; side at least 31).
        dropout: apply the heads' Dropout(0.5) (rng "dropout"). The reference does so while training, by accident.
        dtype: of the convolutions, "float32" or "bfloat16"; the comparison of features is always float32.
    """

    net: str = "vgg"
    dropout: bool = False
    dtype: str = "float32"

    def setup(self):
        convolutions = choose(CONVOLUTIONS, self.net, "LPIPS network")
        self.convolutions = [
            nn.Conv(channels, (kernel,) * 2, stride, ((padding, padding),) * 2, dtype=jnp.dtype(self.dtype), name=name,
                    conv_general_dilated=convolve)
            for name, channels, kernel, stride, padding, _ in convolutions
        ]
        self.heads = [nn.Conv(1, (1, 1), use_bias=False, name=f"lin{i}_model_1") for i in range(5)]
        self.drop = nn.Dropout(0.5, deterministic=not self.dropout)

    def features(self, x: Float[Array, "b h w c"]) -> list[Float[Array, "b ..."]]:
        """The five feature maps that are compared, after their ReLU. `x` in [-1, 1], 1 or 3 channels."""
        if x.shape[-1] == 1:
            x = jnp.repeat(x, 3, axis=-1)
        x = (x - jnp.array(SHIFT, x.dtype)) / jnp.array(SCALE, x.dtype)
        slices = {}
        for conv, (name, *_, pool) in zip(self.convolutions, CONVOLUTIONS[self.net], strict=True):
            if pool:
                x = nn.max_pool(x, (pool, pool), (2, 2))
            x = nn.relu(conv(x))
            slices[name.split("_")[1]] = x
        return list(slices.values())

    def __call__(self, x: Float[Array, "b h w c"], y: Float[Array, "b h w c"]) -> Float[Array, "b"]:
        """LPIPS of each pair, 0 for identical images.

        Args:
            x: images in [-1, 1], 3 channels, or 1 (repeated to 3).
            y: images of the same shape.

        Raises:
            UserError: if the images are too small for the network, or have neither 1 nor 3 channels.
        """
        if min(x.shape[1:3]) < MIN_SIDE[self.net]:
            raise UserError(
                f"LPIPS with {self.net!r} needs images of at least {MIN_SIDE[self.net]} pixels a side, got "
                f"{x.shape[1]}x{x.shape[2]}; use larger images, the network 'vgg' (from {MIN_SIDE['vgg']}), "
                "or no perceptual loss"
            )
        if x.shape[-1] not in (1, 3):
            raise UserError(f"LPIPS compares images of 1 or 3 channels, got {x.shape[-1]}")
        distance = jnp.zeros(x.shape[0], jnp.float32)
        # Two passes, not one over both batches: then no gradient flows through the one that is not differentiated.
        for head, a, b in zip(self.heads, self.features(x), self.features(y), strict=True):
            difference = unit_normalize(a.astype(jnp.float32)) - unit_normalize(b.astype(jnp.float32))
            distance += head(self.drop(difference**2)).mean(axis=(1, 2, 3))
        return distance
