"""First stages: shapes at every factor, posterior and quantizer against closed forms. test_published_models.py counts
their parameters."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from latent_diffusion.errors import UserError
from latent_diffusion.models.autoencoder import (
    AutoencoderIdentity,
    AutoencoderKL,
    AutoencoderVQ,
    DownsampleRight,
    LinearAttnBlock,
)
from latent_diffusion.models.bottleneck import DiagonalGaussian, VectorQuantizer


def _shapes(module, size=64):
    x = jax.ShapeDtypeStruct((1, size, size, module.in_channels), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), x)["params"]


def _count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


TINY = {"ch": 16, "num_res_blocks": 1, "resolution": 32}


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
def test_shapes_at_every_factor(levels):
    factor = 2 ** (levels - 1)
    kl = AutoencoderKL(embed_dim=2, z_channels=5, in_channels=1, out_channels=2, ch_mult=(1,) * levels, **TINY)
    vq = AutoencoderVQ(embed_dim=2, z_channels=5, in_channels=1, out_channels=2, ch_mult=(1,) * levels, **TINY)
    x = jax.ShapeDtypeStruct((3, 32, 48, 1), jnp.float32)
    latent = (3, 32 // factor, 48 // factor, 2)
    key = jax.random.key(0)
    for module in (kl, vq):
        assert module.factor == factor and module.latent_channels == 2
        params = jax.eval_shape(module.init, key, x)
        z = jax.eval_shape(lambda p, x, m=module: m.apply(p, x, method="encode"), params, x)
        z = z.mean if isinstance(z, DiagonalGaussian) else z
        assert z.shape == latent
        rec = jax.eval_shape(lambda p, z, m=module: m.apply(p, z, method="decode"), params, z)
        assert rec.shape == (3, 32, 48, 2)
    rec, indices, loss = jax.eval_shape(vq.apply, params, x)
    assert rec.shape == (3, 32, 48, 2) and indices.shape == latent[:3] and loss.shape == ()


def test_places_of_attention_follow_the_configured_resolution():
    # Nominal resolutions 32, 16, 8 whatever the input is. The decoder has one block more; up_0 is full resolution.
    params = _shapes(AutoencoderKL(ch_mult=(1, 2, 4), attn_resolutions=(16,), **TINY), size=8)
    attention = lambda tree: {name for name in tree if "attn" in name}  # noqa: E731
    assert attention(params["encoder"]) == {"down_1_attn_0", "mid_attn_1"}
    assert attention(params["decoder"]) == {"up_1_attn_0", "up_1_attn_1", "mid_attn_1"}
    assert params["encoder"].keys() >= {"down_0_downsample", "down_1_downsample"}
    assert "down_2_downsample" not in params["encoder"] and "up_0_upsample" not in params["decoder"]
    assert params["decoder"]["up_0_block_1"]["conv2"]["kernel"].shape == (3, 3, 16, 16)
    assert params["decoder"]["up_2_block_0"]["conv1"]["kernel"].shape == (3, 3, 64, 64)
    assert params["decoder"]["up_1_block_0"]["nin_shortcut"]["kernel"].shape == (1, 1, 64, 32)
    assert params["encoder"]["mid_attn_1"]["q"]["bias"].shape == (64,)


def test_options_of_the_networks():
    linear = _shapes(AutoencoderKL(ch_mult=(1, 2), attn_type="linear", **TINY))["encoder"]["mid_attn_1"]
    assert linear["to_qkv"]["kernel"].shape == (1, 1, 32, 96) and "bias" not in linear["to_qkv"]
    assert linear.keys() == {"to_qkv", "to_out"}
    none = _shapes(AutoencoderKL(ch_mult=(1, 2), attn_type="none", attn_resolutions=(32, 16), **TINY))
    assert not any("attn" in name for name in (*none["encoder"], *none["decoder"]))
    plain = _shapes(AutoencoderKL(ch_mult=(1, 2), resamp_with_conv=False, **TINY))
    assert not any("sample" in name for name in (*plain["encoder"], *plain["decoder"]))


def test_downsampling_pads_right_and_bottom_only():
    # How many pixels of a picture of ones each 3x3 window of stride 2 holds
    params = {"conv": {"kernel": jnp.ones((3, 3, 1, 1)), "bias": jnp.zeros(1)}}
    down = DownsampleRight().apply({"params": params}, jnp.ones((1, 4, 4, 1)))
    np.testing.assert_array_equal(down[0, :, :, 0], [[9, 6], [6, 4]])


def test_linear_attention():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 2, 3, 4))
    qkv, out, bias = rng.normal(size=(4, 12)), rng.normal(size=(4, 4)), rng.normal(size=4)
    params = {"to_qkv": {"kernel": qkv[None, None]}, "to_out": {"kernel": out[None, None], "bias": bias}}
    actual = LinearAttnBlock().apply({"params": jax.tree.map(jnp.float32, params)}, jnp.float32(x))
    q, k, v = np.split(x.reshape(6, 4) @ qkv, 3, axis=-1)
    k = np.exp(k) / np.exp(k).sum(axis=0)  # over positions
    np.testing.assert_allclose(actual.reshape(6, 4), q @ (k.T @ v) @ out + bias, rtol=1e-4, atol=1e-5)


def test_posterior():
    rng = np.random.default_rng(0)
    mean, logvar = rng.normal(size=(2, 2, 3, 4)), rng.normal(size=(2, 2, 3, 4))
    logvar[0, 0, 0, :2] = -40, 30  # clamped to -30 and 20
    posterior = DiagonalGaussian.from_moments(jnp.float32(np.concatenate([mean, logvar], axis=-1)))
    logvar = np.clip(logvar, -30, 20)
    std = np.exp(logvar / 2)
    np.testing.assert_allclose(posterior.std, std, rtol=1e-5)
    np.testing.assert_allclose(posterior.var, std**2, rtol=1e-5)
    np.testing.assert_array_equal(posterior.mode(), jnp.float32(mean))
    # KL = cross entropy with N(0, 1) minus entropy
    kl = 0.5 * (np.log(2 * np.pi) + mean**2 + std**2) - norm(mean, std).entropy()
    np.testing.assert_allclose(posterior.kl(), kl.sum(axis=(1, 2, 3)), rtol=1e-5)
    eps = rng.normal(size=mean.shape)
    np.testing.assert_allclose(posterior.sample_from(jnp.float32(eps)), mean + std * eps, rtol=1e-4, atol=1e-5)

    wide = DiagonalGaussian(jnp.full((1, 100, 100, 1), 3.0), jnp.full((1, 100, 100, 1), np.log(4.0)))
    sample = np.asarray(wide.sample(jax.random.key(0)))
    assert abs(sample.mean() - 3) < 0.1 and abs(sample.std() - 2) < 0.07  # standard errors 0.02 and 0.014


@pytest.mark.parametrize("legacy", [True, False])
def test_quantizer(legacy):
    rng = np.random.default_rng(0)
    z, codes, cotangent = rng.normal(size=(2, 3, 3, 4)), rng.normal(size=(7, 4)), rng.normal(size=(2, 3, 3, 4))
    module = VectorQuantizer(7, 4, 0.25, legacy)

    def loss(z, codes):
        z_q, indices, codebook_loss = module.apply({"params": {"embedding": codes}}, z)
        return jnp.sum(z_q * cotangent) + codebook_loss, (z_q, indices, codebook_loss)

    (grad_z, grad_codes), (z_q, indices, codebook_loss) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(
        jnp.float32(z), jnp.float32(codes)
    )
    nearest = ((z[..., None, :] - codes) ** 2).sum(-1).argmin(-1)
    np.testing.assert_array_equal(indices, nearest)
    np.testing.assert_allclose(z_q, codes[nearest], atol=1e-6)
    np.testing.assert_allclose(codebook_loss, 1.25 * ((codes[nearest] - z) ** 2).mean(), rtol=1e-5)
    commitment, codebook = (1.0, 0.25) if legacy else (0.25, 1.0)
    difference = 2 * (z - codes[nearest]) / z.size
    np.testing.assert_allclose(grad_z, cotangent + commitment * difference, atol=1e-5)  # straight through
    expected = np.zeros_like(codes)
    np.add.at(expected, nearest, -codebook * difference)
    np.testing.assert_allclose(grad_codes, expected, atol=1e-5)


def test_initial_codebook():
    module = VectorQuantizer(64, 32, 0.25, True)
    codes = np.asarray(module.init(jax.random.key(0), jnp.zeros((1, 1, 1, 32)))["params"]["embedding"])
    assert codes.shape == (64, 32)
    assert 0.95 / 64 < np.abs(codes).max() <= 1 / 64  # U(-1/n, 1/n)
    assert abs(codes.std() * 64 - 1 / np.sqrt(3)) < 0.02


def _jit(function):
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def test_vq_decodes_the_nearest_codes():
    module = AutoencoderVQ(
        embed_dim=2, n_embed=5, ch_mult=(1,), attn_type="none", tanh_out=True, ch=8, num_res_blocks=0
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.float32(rng.normal(size=s.shape)), _shapes(module, size=4))
    apply = partial(module.apply, {"params": params}, method="decode")
    decode, unquantizing = _jit(apply), _jit(partial(apply, quantize=False))
    codes = np.asarray(params["quantize"]["embedding"])
    z = jnp.float32(codes[[[0, 3], [4, 4]]][None] + 1e-3 * rng.normal(size=(1, 2, 2, 2)))
    actual, unquantized = decode(z), unquantizing(z)
    exact = unquantizing(jnp.float32(codes[[[0, 3], [4, 4]]][None]))
    np.testing.assert_allclose(actual, exact, atol=1e-6)
    assert np.abs(unquantized - exact).max() > 1e-5
    assert np.abs(actual).max() <= 1  # tanh


def test_remat_dropout_and_precision():
    fields = TINY | {"ch_mult": (1,), "dropout": 0.5}
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.normal(size=(2, 8, 8, 3)))
    params = jax.tree.map(lambda s: jnp.float32(0.1 * rng.normal(size=s.shape)), _shapes(AutoencoderKL(**fields)))

    def loss(module):
        return lambda params: jnp.sum(jnp.sin(module.apply({"params": params}, x)[0]))

    value, grads, saved = {}, {}, {}
    for remat in ("none", "dots", "full"):
        function = loss(AutoencoderKL(**fields, remat=remat))
        saved[remat] = _count(jax.eval_shape(lambda params, f=function: jax.vjp(f, params)[1], params))
        if remat != "full":  # the UNet's test compares that one
            value[remat], grads[remat] = _jit(jax.value_and_grad(function))(params)
    assert saved["full"] < saved["dots"] < saved["none"]
    np.testing.assert_allclose(value["dots"], value["none"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads["dots"], grads["none"])

    with pytest.raises(Exception, match="dropout"):  # random numbers are needed in training only
        jax.eval_shape(lambda p: AutoencoderKL(**fields).apply({"params": p}, x, train=True), params)
    half = AutoencoderKL(**fields, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(_shapes(half))} == {jnp.dtype("float32")}
    outputs = jax.eval_shape(half.apply, {"params": params}, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype("float32")}


def test_identity():
    module, x = AutoencoderIdentity(in_channels=1), jnp.ones((1, 3, 5, 1))
    assert module.factor == 1 and module.latent_channels == 1
    assert not module.init(jax.random.key(0), x)
    assert module.apply({}, x, method="encode") is x and module.apply({}, x, method="decode") is x


@pytest.mark.parametrize(
    ("module", "size", "message"),
    [
        (AutoencoderKL(ch_mult=(1, 1, 1), **TINY), 6, "6x6 is not a multiple of the autoencoder's factor 4"),
        (AutoencoderKL(double_z=False), 32, "double_z must be True"),
        (AutoencoderVQ(double_z=True), 32, "double_z must be False"),
        (AutoencoderKL(attn_type="flash"), 32, "vanilla, linear, none"),
        (AutoencoderVQ(remat="some"), 32, "none, dots, full"),
        (AutoencoderVQ(dtype="float64"), 32, "float32, bfloat16"),
    ],
)
def test_mistakes_are_named(module, size, message):
    with pytest.raises(UserError, match=message):
        _shapes(module, size)
