"""FLOPs against closed forms; those of whole networks are in tests/parity, against torch's counts."""

import jax
import jax.numpy as jnp
import pytest

from latent_diffusion import flops

X = jax.ShapeDtypeStruct((2, 8, 6, 3), jnp.float32)


def convolution(x, kernel, **options):
    return jax.lax.conv_general_dilated(
        x, kernel, options.pop("strides", (1, 1)), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


@pytest.mark.parametrize("function, arguments, expected", [
    (jnp.matmul, ((4, 5), (5, 7)), 2 * 4 * 5 * 7),
    (jnp.matmul, ((3, 4, 5), (3, 5, 7)), 2 * 3 * 4 * 5 * 7),
    (convolution, ((2, 8, 6, 3), (3, 3, 3, 10)), 2 * 2 * 8 * 6 * 9 * 3 * 10),
    (lambda x, k: convolution(x, k, strides=(2, 2)), ((2, 8, 6, 3), (3, 3, 3, 10)), 2 * 2 * 4 * 3 * 9 * 3 * 10),
    (lambda x, k: convolution(x, k, feature_group_count=3), ((2, 8, 6, 3), (3, 3, 1, 6)), 2 * 2 * 8 * 6 * 9 * 6),
    (lambda x, y: jax.lax.scan(lambda z, _: (z @ y, None), x, length=5)[0], ((4, 4), (4, 4)), 5 * 2 * 4**3),
    (lambda x, y: jax.lax.cond(x[0, 0] > 0, lambda: x @ y, lambda: x @ y @ y), ((4, 4), (4, 4)), 2 * 2 * 4**3),
    (jax.jit(jax.checkpoint(lambda x, y: jax.nn.silu(x @ y))), ((4, 4), (4, 4)), 2 * 4**3),
    (lambda x, y: jnp.exp(x) + y, ((4, 4), (4, 4)), 0),
])
def test_counts(function, arguments, expected):
    assert flops.count(function, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in arguments)) == expected


def test_a_gradient_by_input_and_weights_is_three_times_the_work():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 5), (5, 7))]
    forward = flops.count(jnp.matmul, *shapes)
    assert flops.count(jax.value_and_grad(lambda x, y: jnp.sum(x @ y) ** 2, (0, 1)), *shapes) == 3 * forward


@pytest.mark.parametrize("kind, expected", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H200", 989e12), ("NVIDIA H200 NVL", 835e12), ("NVIDIA B200", 2250e12), ("NVIDIA GB200", 2500e12),
    ("NVIDIA B300 SXM6 AC", 2250e12), ("NVIDIA GB300", 2500e12), ("NVIDIA A100-SXM4-40GB", 312e12),
    ("NVIDIA A10", 125e12), ("NVIDIA A10G", 70e12), ("NVIDIA L40S", 362e12), ("Tesla V100-SXM2-16GB", 125e12),
    ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v4", 275e12), ("TPU v4 lite", 138e12), ("TPU7x", 1153.5e12),
    # Unknown, though a name that is known begins alike.
    ("cpu", None), ("NVIDIA H20", None), ("NVIDIA A10M", None), ("NVIDIA L400", None), ("Tesla V100-PCIE-16GB", None),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("TPU v40", None), ("TPU7", None), ("TPU8i", None),
])
def test_peaks(kind, expected):
    assert flops.peak(kind) == expected
