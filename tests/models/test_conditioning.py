"""Conditioners, and the factory of all networks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy.special import erf

from latent_diffusion import models
from latent_diffusion.errors import UserError
from latent_diffusion.models.autoencoder import AutoencoderIdentity, AutoencoderKL, AutoencoderVQ
from latent_diffusion.models.conditioning import ClassEmbedder, SpatialRescaler, TextTransformer


def _count(module, inputs):
    shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("width", "layers", "vocab_size", "max_length", "published"),
    [
        (640, 32, 30522, 77, 186_154_682),  # text2img256
        (1280, 32, 30522, 77, 581_994_042),  # txt2img-1p4B
        (512, 16, 8192, 92, 58_858_496),  # layout2img
    ],
)
def test_parameter_count_of_released_text_encoders(width, layers, vocab_size, max_length, published):
    # The published numbers include the linear layer `to_logits`, which the released models never use.
    to_logits = width * vocab_size + vocab_size
    module = TextTransformer(vocab_size, max_length, width, layers, heads=8, head_dim=64)
    assert _count(module, jnp.zeros((1, max_length), jnp.int32)) == published - to_logits


def test_class_embedder():
    label = jnp.asarray([3, 999])
    assert _count(ClassEmbedder(1000, 512), label) == 512_000  # cin256
    module = ClassEmbedder(1000, 16)
    params = module.init(jax.random.key(0), label)
    table = np.asarray(params["params"]["embedding"]["embedding"])
    assert abs(table.std() - 1) < 0.03 and abs(table.mean()) < 0.04  # N(0, 1); standard errors 0.006 and 0.008
    actual = module.apply(params, label)
    assert actual.shape == (2, 1, 16)
    np.testing.assert_array_equal(actual[:, 0], table[np.asarray(label)])


def test_text_transformer():
    tokens = jnp.asarray([[1, 4, 2, 0], [1, 3, 3, 2]])
    module = TextTransformer(vocab_size=5, max_length=6, width=8, layers=1, heads=2, head_dim=3)
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)
    actual = module.apply({"params": params}, tokens)

    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x, q):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * q["scale"] + q["bias"]

    def linear(x, q):
        return x @ q["kernel"] + q.get("bias", 0)

    x = p["token_emb"]["embedding"][np.asarray(tokens)] + p["pos_emb"][:4]
    h, q = norm(x, p["layers_0_0"]), p["layers_0_1"]
    assert "bias" not in q["to_q"]
    heads = lambda name: linear(h, q[name]).reshape(2, 4, 2, 3)  # noqa: E731
    logits = np.einsum("btnd,bsnd->bnts", heads("to_q"), heads("to_k")) / math.sqrt(3)  # padding is attended to
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    x = x + linear(np.einsum("bnts,bsnd->btnd", weights, heads("to_v")).reshape(2, 4, 6), q["to_out"])
    h = linear(norm(x, p["layers_1_0"]), p["layers_1_1"]["net_0_0"])
    x = x + linear(h * 0.5 * (1 + erf(h / math.sqrt(2))), p["layers_1_1"]["net_2"])
    np.testing.assert_allclose(actual, norm(x, p["norm"]), atol=2e-5)

    with pytest.raises(UserError, match="7 tokens, but conditioning.text.max_length is 6"):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 7), jnp.int32))


def test_initial_embeddings_of_the_text_transformer():
    module = TextTransformer(vocab_size=300, max_length=50, width=64, layers=0)
    params = module.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    for table in (params["token_emb"]["embedding"], params["pos_emb"]):
        assert abs(float(table.std()) - 0.02) < 1e-3


KL = {"kind": "kl", "embed_dim": 4, "z_channels": 4, "double_z": True, "ch_mult": [1, 2], "n_embed": 8}


def _diffusion(**conditioning):
    return ConfigDict(
        {
            "stage": "diffusion",
            "model": {"model_channels": 32, "context_dim": 16, "num_classes": 0, "dtype": "float32", "remat": "none"},
            "first_stage": {"model": KL},
            "conditioning": {
                "crossattn": "none",
                "concat": "none",
                "label": False,
                "num_classes": 10,
                "null_class": True,
                "width": 16,
                "text": {"vocab_size": 50, "max_length": 8, "layers": 1, "heads": 2, "head_dim": 8},
            }
            | conditioning,
        }
    )


def test_build():
    networks = models.build(ConfigDict({"stage": "autoencoder", "model": KL}))
    assert networks == models.Models(None, None, AutoencoderKL(embed_dim=4, z_channels=4, ch_mult=(1, 2)))
    hash(networks)  # static in compiled functions

    networks = models.build(_diffusion())
    assert networks.conditioner is None
    assert networks.first_stage.factor == 2 and networks.first_stage.latent_channels == 4
    assert networks.unet.model_channels == 32 and networks.unet.num_classes == 0

    networks = models.build(_diffusion(crossattn="class"))
    assert networks.conditioner == ClassEmbedder(11, 16)  # the null class is the last
    networks = models.build(_diffusion(crossattn="text", label=True))
    assert networks.conditioner == TextTransformer(50, 8, 16, layers=1, heads=2, head_dim=8)
    assert networks.unet.num_classes == 11


def test_build_first_stage():
    vq = {**KL, "kind": "vq", "vq_legacy_beta": False, "double_z": False}
    assert models.build_first_stage(vq) == AutoencoderVQ(
        embed_dim=4, z_channels=4, ch_mult=(1, 2), n_embed=8, vq_legacy_beta=False
    )
    assert models.build_first_stage({**KL, "kind": "identity", "in_channels": 1}) == AutoencoderIdentity(1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (_diffusion(crossattn="image"), "none, class, text, layout"),
        (_diffusion(concat="depth"), "none, segmentation, low_res, inpainting"),
        (_diffusion(crossattn="class", width=8), "conditioning.width is 8, but model.context_dim is 16"),
        (ConfigDict({"stage": "both"}), "autoencoder, diffusion"),
        (ConfigDict({"stage": "autoencoder", "model": {"kind": "vae"}}), "kl, vq, identity"),
    ],
)
def test_mistakes_are_named(config, message):
    with pytest.raises(UserError, match=message):
        models.build(config)


def _half(x):
    """Bilinear at half the size, corners not aligned, no antialiasing: output i samples input 2 i + 0.5."""
    for axis in (1, 2):
        at = 2 * np.arange(x.shape[axis] // 2) + 0.5
        low = np.floor(at).astype(int)
        weight = (at - low).reshape([-1 if i == axis else 1 for i in range(4)])
        x = np.take(x, low, axis) * (1 - weight) + np.take(x, low + 1, axis) * weight
    return x


def test_spatial_rescaler_is_bilinear_halves_then_a_convolution():
    rescaler = SpatialRescaler(num_classes=5, stages=2, width=3)
    classes = np.random.default_rng(0).integers(0, 5, (2, 16, 12)).astype(np.int32)
    params = rescaler.init(jax.random.key(0), jnp.asarray(classes))["params"]
    kernel = np.asarray(params["channel_mapper"]["kernel"])
    assert kernel.shape == (1, 1, 5, 3)
    expected = _half(_half(np.eye(5)[classes])) @ kernel[0, 0]
    for given in (classes, np.eye(5, dtype=np.float32)[classes]):  # numbers, or a weight for each class
        np.testing.assert_allclose(rescaler.apply({"params": params}, jnp.asarray(given)), expected, atol=1e-6)


def test_hybrid_has_both():
    networks = models.build(_diffusion(crossattn="text", concat="segmentation", segmentation={
        "num_classes": 5, "channels": 3}))
    tokens, classes = jnp.zeros((1, 7), jnp.int32), jnp.zeros((1, 16, 16), jnp.int32)
    variables = networks.conditioner.init(jax.random.key(0), tokens, classes)
    assert set(variables["params"]) == {"crossattn", "concat"}
    assert networks.conditioner.apply(variables, tokens, method="sequence").shape == (1, 7, 16)
    stages = len(networks.first_stage.ch_mult) - 1
    assert networks.conditioner.apply(variables, classes, method="map").shape == (1, 16 >> stages, 16 >> stages, 3)
