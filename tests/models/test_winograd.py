"""Winograd's convolutions against sums of shifted pictures in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion import flops
from latent_diffusion.models import layers, winograd

SAME = ((1, 1), (1, 1))


def inputs(batch, height, width, channels, features):
    """x, kernel, and a gradient of the output."""
    rng = np.random.default_rng(0)
    shapes = (batch, height, width, channels), (3, 3, channels, features), (batch, height, width, features)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def shifted(x):
    """{(i, j): x moved so that the kernel's entry i, j falls on it}, float64."""
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), *SAME, (0, 0)))
    return {(i, j): padded[:, i:i + x.shape[1], j:j + x.shape[2]] for i in range(3) for j in range(3)}


def exact(x, kernel):
    return sum(part @ kernel[at] for at, part in shifted(x).items())


@pytest.mark.parametrize("height, width, channels, features", [(8, 8, 32, 48), (7, 10, 4, 5), (1, 2, 3, 1)])
def test_value_and_gradients(height, width, channels, features):
    x, kernel, d_out = inputs(2, height, width, channels, features)
    value, gradients = jax.vjp(winograd.winograd, x, kernel)
    np.testing.assert_allclose(value, exact(x, kernel), atol=1e-4)
    d_x, d_kernel = gradients(d_out)
    np.testing.assert_allclose(d_x, exact(d_out, kernel[::-1, ::-1].swapaxes(2, 3)), atol=1e-4)
    for at, part in shifted(x).items():
        np.testing.assert_allclose(d_kernel[at], np.einsum("bhwc,bhwd->cd", part, d_out), atol=1e-4)


def test_rounding_errors_are_those_of_a_plain_convolution():
    x, kernel, _ = inputs(2, 16, 16, 64, 64)
    wanted = exact(x, kernel)
    plain = jax.lax.conv_general_dilated(x, kernel, (1, 1), SAME, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    errors = [np.sqrt(np.mean((found - wanted) ** 2)) for found in (winograd.winograd(x, kernel), plain)]
    assert errors[0] < 1.5 * errors[1] < 1e-5 * wanted.std()


def test_gradients_keep_nothing_but_the_inputs():
    x, kernel, _ = inputs(2, 8, 8, 8, 8)
    kept = jax.tree.leaves(jax.jit(lambda *inputs: jax.vjp(winograd.winograd, *inputs)[1])(x, kernel))
    assert sum(leaf.size for leaf in kept) == x.size + kernel.size


def test_it_counts_as_the_convolution_that_it_is():
    x, kernel, _ = inputs(2, 8, 6, 4, 5)
    assert flops.count(lambda *inputs: 2 * winograd.winograd(*inputs), x, kernel) == 2 * 2 * 8 * 6 * 5 * 9 * 4


@pytest.mark.parametrize("shape, features, change, expected", [
    ((1, 32, 32, 64), 64, {}, True),
    ((4, 8, 8, 512), 512, {}, True),
    ((4, 8, 8, 1024), 384, {}, True),
    ((4, 8, 8, 768), 768, {}, False),  # transforming the kernel takes longer
    ((1, 16, 16, 64), 64, {}, False),  # not worth compiling
    ((1, 256, 256, 3), 128, {}, False),
    ((1, 256, 256, 128), 128, {}, True),
    ((1, 512, 512, 128), 128, {}, False),  # memory
    ((1, 32, 32, 64), 64, {"strides": (2, 2)}, False),
    ((1, 32, 32, 64), 64, {"padding": ((0, 1), (0, 1))}, False),
    ((1, 32, 32, 64), 64, {"side": 5}, False),
    ((1, 32, 32, 64), 64, {"dtype": jnp.bfloat16}, False),
])
def test_where_it_pays(monkeypatch, shape, features, change, expected):
    dtype, side = change.pop("dtype", jnp.float32), change.pop("side", 3)
    x = jax.ShapeDtypeStruct(shape, dtype)
    kernel = jax.ShapeDtypeStruct((side, side, shape[-1], features), dtype)
    options = {"strides": (1, 1), "padding": SAME, **change}

    def pays():
        found = []
        jax.eval_shape(lambda *inputs: found.append(winograd.pays(*inputs, **options)), x, kernel)
        return found.pop()

    assert pays() == expected
    monkeypatch.setenv("LATENT_DIFFUSION_CONVOLUTION", "xla")
    assert not pays()


def test_layers_use_it():
    x, kernel, _ = map(jnp.asarray, inputs(1, 8, 8, 256, 256))
    traced = jax.make_jaxpr(lambda *inputs: layers.convolve(*inputs, (1, 1), SAME))(x, kernel)
    assert "winograd" in str(traced)
    np.testing.assert_array_equal(layers.convolve(x, kernel, (1, 1), SAME), winograd.winograd(x, kernel))
