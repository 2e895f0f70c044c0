"""The PatchGAN discriminator of pix2pix (Isola et al. 2017), as taming-transformers trains it.

Module names are the indices of the reference's torch Sequential (`main_0`, `main_2`, ...).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from latent_diffusion.errors import UserError, choose


def _axis_is_bound(axis_name: str) -> bool:
    try:
        jax.lax.axis_size(axis_name)
    except NameError:
        return False
    return True


def global_moments(
    x: Float[Array, "b h w c"], axis_name: str | None
) -> tuple[Float[Array, "c"], Float[Array, "c"], int]:
    """Mean, biased variance and number of values per channel, over all devices of `axis_name` if given. float32.

    Two passes: the variance is the mean of the squared distances from the global mean, because E[x^2] - E[x]^2 cancels.
    Devices must hold equally many values.
    """

    def reduce(value):
        value = value.mean(axis=(0, 1, 2))
        return jax.lax.pmean(value, axis_name) if axis_name else value

    x = x.astype(jnp.float32)
    mean = reduce(x)
    variance = reduce((x - mean) ** 2)
    count = x.size // x.shape[-1] * (jax.lax.axis_size(axis_name) if axis_name else 1)
    return mean, variance, count


class BatchNorm(nn.Module):
    """torch's BatchNorm2d over the global batch: eps 1e-5, momentum 0.1, unbiased running variance.

    Written out because flax's keeps the biased variance. With `axis_name`, training must run under that axis.
    """

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
        channels = x.shape[-1]
        scale = self.param("scale", lambda key: 1 + 0.02 * jax.random.normal(key, (channels,)))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        if not train:
            mean, variance = running_mean.value, running_var.value
        elif self.is_initializing():
            # The axis may not be bound yet, and running statistics must not move.
            mean, variance, _ = global_moments(x, None)
        else:
            mean, variance, count = global_moments(x, self.axis_name)
            if self.is_mutable_collection("batch_stats"):
                unbiased = variance * (count / max(count - 1, 1))
                running_mean.value = 0.9 * running_mean.value + 0.1 * jax.lax.stop_gradient(mean)
                running_var.value = 0.9 * running_var.value + 0.1 * jax.lax.stop_gradient(unbiased)
        return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias


class ActNorm(nn.Module):
    """Per channel scale * (x + loc), with parameters that normalize the batch given to `init` (Glow, section 3.1).

    loc = -mean, scale = 1 / (std + 1e-6) with the unbiased std, over all devices when `axis_name` is bound at `init`.
    """

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
        def moments():
            return global_moments(x, self.axis_name if self.axis_name and _axis_is_bound(self.axis_name) else None)

        def initial_scale(key):
            _, variance, count = moments()
            return 1 / (jnp.sqrt(variance * (count / max(count - 1, 1))) + 1e-6)

        loc = self.param("loc", lambda key: -moments()[0])
        scale = self.param("scale", initial_scale)
        # The reference keeps this flag too; here it makes `batch_stats` exist whatever the norm.
        self.variable("batch_stats", "initialized", jnp.ones, ())
        return scale * (x + loc)


NORMS = {"batch": BatchNorm, "actnorm": ActNorm}


class PatchDiscriminator(nn.Module):
    """Classifies overlapping patches as real or fake.

    Attributes:
        ndf: channels after the first convolution.
        num_layers: number of stride-2 convolutions; the receptive field is 70 pixels for 3 and 34 for 2.
        norm: "batch" or "actnorm".
        axis_name: the pmap axis over which moments are taken; None outside pmap.
    """

    ndf: int = 64
    num_layers: int = 3
    norm: str = "batch"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b i j 1"]:
        """Logits of the patches.

        Args:
            x: images in [-1, 1].
            train: normalize with the moments of this (global) batch and, if "batch_stats" is mutable, update the
                running ones.

        Raises:
            UserError: for an unknown norm, or images too small for `num_layers`.
        """
        make_norm = choose(NORMS, self.norm, "discriminator norm")
        if min(x.shape[1:3]) // 2**self.num_layers < 3:
            raise UserError(
                f"a discriminator of {self.num_layers} layers needs images of at least {3 * 2**self.num_layers} pixels "
                f"a side, got {x.shape[1]}x{x.shape[2]}; use fewer layers"
            )

        def conv(x, index, features, stride, use_bias):
            bound = (16 * x.shape[-1]) ** -0.5  # torch's default bias: U(-1, 1) / sqrt(fan_in)
            return nn.Conv(
                features,
                (4, 4),
                stride,
                padding=((1, 1), (1, 1)),
                use_bias=use_bias,
                kernel_init=nn.initializers.normal(0.02),
                bias_init=lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound),
                name=f"main_{index}",
            )(x)

        x = nn.leaky_relu(conv(x, 0, self.ndf, 2, True), 0.2)
        for i in range(1, self.num_layers + 1):
            # BatchNorm removes the mean, so a bias before it would be idle.
            features, stride = self.ndf * min(2**i, 8), 2 if i < self.num_layers else 1
            x = conv(x, 3 * i - 1, features, stride, self.norm != "batch")
            x = nn.leaky_relu(make_norm(self.axis_name, name=f"main_{3 * i}")(x, train=train), 0.2)
        return conv(x, 3 * self.num_layers + 2, 1, 1, True)
