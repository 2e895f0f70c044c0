"""Blocks against closed forms computed in float64 with numpy."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from latent_diffusion.errors import UserError
from latent_diffusion.models import attention, layers


def _normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def _init(module, *inputs, seed=0):
    """The module's own initial parameters, in float32."""
    init = jax.jit(module.init, compiler_options={"xla_backend_optimization_level": 0})
    return init(jax.random.key(seed, impl="unsafe_rbg"), *inputs)["params"]


def _apply(module, params, *inputs, **options):
    """Compiled as a whole: operation by operation takes several times as long."""
    apply = jax.jit(module.apply, compiler_options={"xla_backend_optimization_level": 0})
    return apply({"params": params}, *inputs, **options)


def _random(module, *inputs, seed=0):
    """Random parameters, those that start at zero included."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), jnp.float32), shapes)


def _softmax_attention(q, k, v):
    """One head, one example: (T, D), (S, D), (S, D)."""
    logits = q @ k.T / math.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


def _group_norm(x, params, eps, groups):
    b, h, w, c = x.shape
    x = x.reshape(b, h * w, groups, c // groups)
    x = (x - x.mean(axis=(1, 3), keepdims=True)) / np.sqrt(x.var(axis=(1, 3), keepdims=True) + eps)
    return x.reshape(b, h, w, c) * params["scale"] + params["bias"]


def test_timestep_embedding():
    t = [0, 1, 999]
    actual = layers.timestep_embedding(jnp.asarray(t), 8)
    for row, step in zip(actual, t, strict=True):
        angles = [step * 10000 ** (-i / 4) for i in range(4)]
        np.testing.assert_allclose(row, [*map(math.cos, angles), *map(math.sin, angles)], atol=1e-4)
    odd = layers.timestep_embedding(jnp.asarray(t), 9)
    np.testing.assert_array_equal(odd[:, :8], actual)
    np.testing.assert_array_equal(odd[:, 8], 0)


def test_attention():
    q, k, v = _normal(0, 2, 5, 3, 4), _normal(1, 2, 6, 3, 4), _normal(2, 2, 6, 3, 4)
    actual = attention.attention(q, k, v)
    q, k, v = _float64((q, k, v))
    for b in range(2):
        for n in range(3):
            np.testing.assert_allclose(
                actual[b, :, n], _softmax_attention(q[b, :, n], k[b, :, n], v[b, :, n]), atol=1e-6
            )


class _Device:
    def __init__(self, compute_capability):
        self.compute_capability = compute_capability


@pytest.fixture
def attend(monkeypatch, caplog):
    """Attention on what looks like a GPU; whether it asked cuDNN for it."""
    asked, plain = [], jax.nn.dot_product_attention

    def dot_product_attention(q, k, v, *, implementation=None, **options):
        asked.append(q.shape[-1])
        if q.shape[-1] == 100:
            raise NotImplementedError("no multiple of 8")
        if q.shape[-1] == 8:
            raise RuntimeError("not installed")
        return plain(q, k, v, **options)

    def attend(dtype, width, keys=64, capability="9.0"):
        asked.clear()
        monkeypatch.setattr(jax, "local_devices", lambda: [_Device(capability)])
        x = [jnp.ones((1, n, 1, width), dtype) for n in (64, keys, keys)]
        np.testing.assert_allclose(attention.attention(*x).astype(jnp.float32), 1, atol=1e-2)
        return bool(asked)

    attention._say_once.cache_clear()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", dot_product_attention)
    with caplog.at_level("INFO"):
        yield attend


def test_attention_kernel_choice(attend, monkeypatch, caplog):
    """cuDNN is asked on a GPU in 16 bits; what it refuses goes to XLA, which is said once, with the reason."""
    assert attend(jnp.bfloat16, 64) and attend(jnp.bfloat16, 40) and attend(jnp.float16, 40)
    assert not attend(jnp.float32, 64)
    assert not attend(jnp.bfloat16, 64, keys=1)  # a class: softmax over one key
    assert not attend(jnp.bfloat16, 384) and not attend(jnp.bfloat16, 384)  # cin256-v2's single head
    assert attend(jnp.bfloat16, 8) and attend(jnp.bfloat16, 100) and attend(jnp.bfloat16, 100)
    with monkeypatch.context() as patched:
        patched.setenv("LATENT_DIFFUSION_ATTENTION", "xla")
        assert not attend(jnp.bfloat16, 64)
        patched.setenv("LATENT_DIFFUSION_ATTENTION", "cudnn")
        with pytest.raises(UserError, match="LATENT_DIFFUSION_ATTENTION: unknown value 'cudnn'; choose from auto, xla"):
            attend(jnp.bfloat16, 64)
        patched.setattr(jax, "default_backend", lambda: "tpu")
        assert not attend(jnp.bfloat16, 64)
    said = [(record.levelname, record.message) for record in caplog.records]
    reasons = ["cuDNN's kernel computes in 16 bits, not in float32", "there is one key only",
               "cuDNN's kernel takes heads of up to 256 channels here, not 384", "LATENT_DIFFUSION_ATTENTION=xla"]
    assert sorted(said) == sorted([
        *[("INFO", f"attention: XLA, because {reason}") for reason in reasons],
        *[("INFO", f"attention: cuDNN's flash kernel for heads of {width} channels") for width in (64, 40)],
        ("INFO", "attention: XLA, where cuDNN says: no multiple of 8"),
        ("WARNING", "attention: XLA, because cuDNN failed: not installed"),
    ])


@pytest.mark.parametrize(
    "capability, widest",
    [("7.0", 0), ("7.5", 0), ("8.0", 128), ("8.9", 128), ("9.0", 256), ("10.0", 128), ("12.0", 128), ("gfx90a", 0)],
)
def test_heads_that_cudnn_takes_by_gpu(attend, capability, widest):
    """NVIDIA's table: Ampere and later; up to 256 channels forward and backward on Hopper alone."""
    for width in (64, 128, 160, 256):
        assert attend(jnp.bfloat16, width, capability=capability) == (width <= widest)


class _Norm(nn.Module):
    eps: float
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        return layers.group_norm(x, "norm", eps=self.eps, dtype=self.dtype)


@pytest.mark.parametrize(("eps", "scale", "mean"), [(1e-5, 3e-3, 0.0), (1e-6, 1e-3, 0.0), (1e-6, 1.0, 1000.0)])
def test_group_norm(eps, scale, mean):
    # Deviations near sqrt(eps) show which epsilon it is; a mean of 1000 breaks the one-pass variance.
    x = mean + scale * _normal(0, 2, 4, 4, 64)
    params = _random(_Norm(eps), x)
    expected = _group_norm(*_float64((x, params["norm"])), eps, groups=32)
    np.testing.assert_allclose(_apply(_Norm(eps), params, x), expected, atol=1e-3 if mean else 1e-5)


def test_group_norm_of_narrow_and_half_precision_inputs():
    x = _normal(0, 2, 3, 3, 24)
    params = _random(_Norm(1e-5), x)
    expected = _group_norm(*_float64((x, params["norm"])), 1e-5, groups=8)
    np.testing.assert_allclose(_apply(_Norm(1e-5), params, x), expected, atol=1e-5)
    half = _apply(_Norm(1e-5, jnp.bfloat16), params, x)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), expected, atol=0.02)  # rounded once, at the end


class _Affine(nn.Module):
    @nn.compact
    def __call__(self, x):
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        return layers.conv(x, 64, "conv"), layers.conv1x1(flat, 64, "conv1x1"), layers.dense(x, 64, "dense")


def test_initial_values_are_those_of_torch():
    params = _init(_Affine(), jnp.zeros((1, 4, 4, 32)))
    for name, fan_in in (("conv", 9 * 32), ("conv1x1", 32), ("dense", 32)):
        for leaf in params[name].values():
            values = np.asarray(leaf) * math.sqrt(fan_in)  # uniform in [-1, 1]: standard deviation 1/sqrt(3)
            assert 0.9 < np.abs(values).max() <= 1 + 1e-6
            assert abs(values.std() - 1 / math.sqrt(3)) < 0.1
            assert abs(values.mean()) < 0.2


def test_resampling():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(layers.downsample_mean(x)[0, :, :, 0], [[2.5, 4.5], [10.5, 12.5]])
    up = layers.upsample_nearest(x)[0, :, :, 0]
    np.testing.assert_array_equal(up, np.kron(np.asarray(x[0, :, :, 0]), np.ones((2, 2))))
    # 3x3, stride 2, padding 1 on every side: how many pixels each window of a picture of ones holds
    ones = jnp.ones((1, 4, 4, 1))
    params = {"op": {"kernel": jnp.ones((3, 3, 1, 1)), "bias": jnp.zeros(1)}}
    down = layers.Downsample().apply({"params": params}, ones)
    np.testing.assert_array_equal(down[0, :, :, 0], [[4, 6], [6, 9]])
    assert not layers.Downsample(with_conv=False).init(jax.random.key(0), ones)
    assert not layers.Upsample(with_conv=False).init(jax.random.key(0), ones)


@pytest.mark.parametrize(("resample", "change"), [("up", layers.upsample_nearest), ("down", layers.downsample_mean)])
def test_new_residual_block_is_its_skip_connection(resample, change):
    x, emb = _normal(0, 2, 4, 4, 16), _normal(1, 2, 8)
    block = layers.ResBlock(16, resample=resample)
    np.testing.assert_array_equal(block.apply({"params": _init(block, x, emb)}, x, emb), change(x))


def test_scale_and_shift_of_residual_block():
    # After a first convolution of zeros the second norm returns its bias: the block is x + W silu(b (1 + s) + t) + d.
    x, emb = _normal(0, 2, 2, 2, 8), _normal(1, 2, 4)
    block = layers.ResBlock(8, use_scale_shift_norm=True)
    params = _random(block, x, emb)
    params["in_layers_2"] = jax.tree.map(jnp.zeros_like, params["in_layers_2"])
    last = params["out_layers_3"]
    center = jnp.zeros_like(last["kernel"]).at[1, 1].set(last["kernel"][1, 1])  # no neighbors
    params["out_layers_3"] = last | {"kernel": center}
    actual = _apply(block, params, x, emb)

    x, emb, p = _float64((x, emb, params))
    silu = lambda a: a / (1 + np.exp(-a))  # noqa: E731
    scale_shift = silu(emb) @ p["emb_layers_1"]["kernel"] + p["emb_layers_1"]["bias"]
    h = p["out_layers_0"]["bias"] * (1 + scale_shift[:, :8]) + scale_shift[:, 8:]
    h = silu(h) @ p["out_layers_3"]["kernel"][1, 1] + p["out_layers_3"]["bias"]
    np.testing.assert_allclose(actual, x + h[:, None, None, :], atol=1e-5)


def test_dropout_of_residual_block():
    x, emb = _normal(0, 1, 16, 16, 8), _normal(1, 1, 4)
    params = _random(layers.ResBlock(8), x, emb)
    keep = layers.ResBlock(8, dropout=0.25)
    kernel = params["out_layers_3"]["kernel"]
    params["out_layers_3"] = {"kernel": jnp.zeros_like(kernel).at[1, 1].set(jnp.eye(8)), "bias": jnp.zeros(8)}
    full = _apply(layers.ResBlock(8), params, x, emb) - x
    some = _apply(keep, params, x, emb, rngs={"dropout": jax.random.key(0)}) - x
    kept = np.abs(some) > 1e-6
    assert abs(kept.mean() - 0.75) < 0.04  # 2048 values: standard error 0.01
    np.testing.assert_allclose(some[kept], full[kept] / 0.75, atol=1e-4)


@pytest.mark.parametrize("new_order", [False, True])
def test_attention_block(new_order):
    x, heads, c = _normal(0, 2, 2, 3, 8), 2, 8
    block = layers.AttentionBlock(heads, new_order)
    params = _random(block, x)
    actual = _apply(block, params, x)

    x, p = _float64((x, params))
    h = _group_norm(x, p["norm"], 1e-5, groups=8).reshape(2, 6, c)
    qkv = h @ p["qkv"]["kernel"][0] + p["qkv"]["bias"]
    qkv = qkv.reshape(2, 6, 3, heads, 4) if new_order else qkv.reshape(2, 6, heads, 3, 4).swapaxes(2, 3)
    h = np.stack(
        [
            np.concatenate([_softmax_attention(*qkv[b, :, :, n].swapaxes(0, 1)) for n in range(heads)], axis=-1)
            for b in range(2)
        ]
    )
    h = h @ p["proj_out"]["kernel"][0] + p["proj_out"]["bias"]
    np.testing.assert_allclose(actual, x + h.reshape(x.shape), atol=1e-5)


def test_feed_forward_gates_with_the_exact_gelu():
    x = _normal(0, 2, 3, 4)
    params = _random(layers.GEGLUFeedForward(), x)
    actual = _apply(layers.GEGLUFeedForward(), params, x)
    x, p = _float64((x, params))
    h = x @ p["net_0_proj"]["kernel"] + p["net_0_proj"]["bias"]
    value, gate = h[..., :16], h[..., 16:]
    h = value * gate * 0.5 * (1 + erf(gate / math.sqrt(2)))
    np.testing.assert_allclose(actual, h @ p["net_2"]["kernel"] + p["net_2"]["bias"], rtol=1e-5, atol=1e-5)


def test_new_spatial_transformer_is_the_identity():
    x, context = _normal(0, 1, 2, 2, 8), _normal(1, 1, 3, 5)
    block = layers.SpatialTransformer(heads=2, head_dim=3)  # inner width 6, apart from the 8 channels
    params = _init(block, x, context)
    assert params["proj_in"]["kernel"].shape == (1, 1, 8, 6)
    np.testing.assert_array_equal(_apply(block, params, x, context), x)


def test_unknown_names_list_the_choices():
    with pytest.raises(UserError, match="none, dots, full"):
        layers.remat(layers.ResBlock, "all")
    with pytest.raises(UserError, match="float32, bfloat16"):
        layers.compute_dtype("float16")


@pytest.mark.parametrize("features", [5, 32])
@pytest.mark.parametrize("side, kernel, stride, padding", [
    (2, 3, 1, ((1, 1), (1, 1))), (1, 3, 1, ((1, 1), (1, 1))), (2, 3, 2, ((0, 1), (0, 1))), (2, 4, 2, ((1, 1), (1, 1))),
    (4, 3, 2, ((1, 1), (1, 1))), (5, 3, 1, ((1, 1), (1, 1))), (3, 1, 1, ((0, 0), (0, 0))), (3, 1, 1, ((1, 1), (1, 1))),
    (3, 1, 2, ((0, 0), (0, 0))), (8, 3, 1, ((1, 1), (1, 1))), (16, 3, 2, ((0, 1), (0, 1))),
    (16, 4, 2, ((1, 1), (1, 1)))])
def test_convolutions_as_products_are_the_plain_ones(side, kernel, stride, padding, features):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, side, side, 3)), jnp.float32)
    weights = jnp.asarray(rng.standard_normal((kernel, kernel, 3, features)), jnp.float32)
    arguments = ((stride, stride), padding)
    layout = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"))
    plain = jax.lax.conv_general_dilated(x, weights, *arguments, **layout)
    traced = jax.make_jaxpr(lambda *inputs: layers.convolve(*inputs, *arguments, **layout))(x, weights)
    assert "conv_general_dilated" not in str(traced) or features < 32
    ours = layers.convolve(x, weights, *arguments, **layout)
    np.testing.assert_allclose(ours, plain, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("tokens", [24, 7])
def test_gradient_of_large_attention_is_that_of_plain_attention(monkeypatch, dtype, tolerance, tokens):
    """The way it takes on a CPU with many tokens, against the plain form; self- and cross-attention."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, d_out = (jax.random.normal(key, (2, 24, 3, 8)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, tokens, 3, 8)) for key in keys[2:])

    def gradients(dtype):
        out, backward = jax.vjp(attention.attention, *(x.astype(dtype) for x in (q, k, v)))
        return out, *backward(d_out.astype(dtype))

    expected = gradients(jnp.float32)
    monkeypatch.setattr(attention, "LARGE", 1)
    found = gradients(dtype)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == dtype
        np.testing.assert_allclose(x.astype(jnp.float32), y, rtol=0, atol=tolerance * float(jnp.abs(y).max()))
