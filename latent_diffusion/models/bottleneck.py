"""What stands between encoder and decoder of a first stage: a diagonal Gaussian or a codebook (paper section 3.1)."""

from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@flax.struct.dataclass
class DiagonalGaussian:
    """The posterior q(z|x) with diagonal covariance: `mean` and clamped `logvar`, both (B, h, w, c) float32."""

    mean: Any
    logvar: Any

    @classmethod
    def from_moments(cls, moments: Float[Array, "b h w c2"]) -> "DiagonalGaussian":
        """From the encoder's 2c channels [mean, logvar]; logvar is clamped to [-30, 20]."""
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return cls(mean, jnp.clip(logvar, -30.0, 20.0))

    @property
    def std(self) -> Float[Array, "b h w c"]:
        return jnp.exp(0.5 * self.logvar)

    @property
    def var(self) -> Float[Array, "b h w c"]:
        return jnp.exp(self.logvar)

    def sample(self, key: jax.Array) -> Float[Array, "b h w c"]:
        """mean + std * eps with eps drawn from one `key` for the whole batch."""
        return self.sample_from(jax.random.normal(key, self.mean.shape, self.mean.dtype))

    def sample_from(self, eps: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """mean + std * eps, for noise that was drawn per example."""
        return self.mean + self.std * eps

    def mode(self) -> Float[Array, "b h w c"]:
        return self.mean

    def kl(self) -> Float[Array, "b"]:
        """KL(q || N(0, 1)) in nats, summed over each image: 0.5 * sum(mean^2 + var - 1 - logvar)."""
        return 0.5 * jnp.sum(self.mean**2 + self.var - 1.0 - self.logvar, axis=(1, 2, 3))


class VectorQuantizer(nn.Module):
    """Nearest codebook entry with a straight-through gradient (VQ-VAE, arXiv 1711.00937).

    The loss is mean((sg[z_q] - z)^2) * commitment + mean((z_q - sg[z])^2) * codebook. `legacy_beta` puts `beta` on the
    codebook term, as the released models were trained; otherwise it is on the commitment term, as in the paper.
    """

    n_embed: int
    embed_dim: int
    beta: float
    legacy_beta: bool

    @nn.compact
    def __call__(
        self, z: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b h w c"], Int[Array, "b h w"], Float[Array, ""]]:
        bound = 1 / self.n_embed
        init = lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)  # noqa: E731
        codes = self.param("embedding", init, (self.n_embed, self.embed_dim))
        z = z.astype(jnp.float32)
        # Full precision: with TF32 or bfloat16 products the nearest code is often another one.
        products = jnp.einsum("bhwc,nc->bhwn", z, codes, precision=jax.lax.Precision.HIGHEST)
        distances = jnp.sum(z**2, axis=-1, keepdims=True) + jnp.sum(codes**2, axis=-1) - 2 * products
        indices = jnp.argmin(jax.lax.stop_gradient(distances), axis=-1).astype(jnp.int32)
        z_q = codes[indices]
        commitment = jnp.mean((jax.lax.stop_gradient(z_q) - z) ** 2)
        codebook = jnp.mean((z_q - jax.lax.stop_gradient(z)) ** 2)
        loss = commitment + self.beta * codebook if self.legacy_beta else self.beta * commitment + codebook
        return z + jax.lax.stop_gradient(z_q - z), indices, loss
