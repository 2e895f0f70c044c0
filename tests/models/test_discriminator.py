"""The PatchGAN against published sizes, and its norms against numpy on the global batch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.errors import UserError
from latent_diffusion.models.discriminator import ActNorm, BatchNorm, PatchDiscriminator

KEY = jax.random.key(0, impl="unsafe_rbg")  # compiles in a quarter of the time of the default
X = 3.0 + 2.0 * jax.random.normal(jax.random.key(1), (8, 4, 4, 6)) * jnp.arange(1, 7)


@pytest.fixture(scope="module", autouse=True)
def _compile_fast():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def init_shapes(network, channels=3, side=64):
    return jax.eval_shape(lambda: network.init(KEY, jnp.zeros((1, side, side, channels)), train=True))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_parameter_count_of_pix2pix():
    # pix2pix prints 2.769 M for its default discriminator, on an input and an output image (6 channels).
    assert round(count(init_shapes(PatchDiscriminator(64, 3), channels=6)["params"]) / 1e6, 3) == 2.769


@pytest.mark.parametrize(("layers", "field"), [(3, 70), (2, 34), (1, 16)])
def test_receptive_field(layers, field):
    # Isola et al. 2017, section 4.4 and appendix: 70x70 with three stride-2 layers, 16x16 with one.
    network = PatchDiscriminator(2, layers)
    x = jax.random.normal(KEY, (1, 96, 96, 1))

    @jax.jit
    @jax.grad
    def gradient_of_a_central_logit(x):
        logits = network.apply(network.init(KEY, x, train=True), x, train=False)
        return logits[0, logits.shape[1] // 2, logits.shape[2] // 2, 0]

    rows = np.nonzero(np.abs(gradient_of_a_central_logit(x))[0].sum(axis=(1, 2)))[0]
    assert rows[-1] - rows[0] + 1 == field


def test_names_and_biases():
    params = init_shapes(PatchDiscriminator(8, 3))["params"]
    assert set(params) == {f"main_{i}" for i in (0, 2, 3, 5, 6, 8, 9, 11)}
    assert {name for name, p in params.items() if {"kernel", "bias"} == set(p)} == {"main_0", "main_11"}
    assert [params[f"main_{i}"]["kernel"].shape[-1] for i in (0, 2, 5, 8, 11)] == [8, 16, 32, 64, 1]
    params = init_shapes(PatchDiscriminator(8, 5, norm="actnorm"), side=256)["params"]
    assert [params[f"main_{i}"]["bias"].shape[0] for i in (0, 2, 5, 8, 11, 14, 17)] == [8, 16, 32, 64, 64, 64, 1]
    assert set(params["main_3"]) == {"loc", "scale"}


def test_initial_values():
    params = jax.jit(lambda: PatchDiscriminator(64, 3).init(KEY, jnp.zeros((1, 32, 32, 3)), train=True))()["params"]
    np.testing.assert_allclose(np.std(params["main_8"]["kernel"]), 0.02, rtol=0.01)
    scale = params["main_9"]["scale"]
    np.testing.assert_allclose([np.mean(scale), np.std(scale)], [1, 0.02], atol=0.004)
    assert np.all(params["main_9"]["bias"] == 0)
    bias, bound = params["main_0"]["bias"], 1 / np.sqrt(3 * 16)
    assert np.abs(bias).max() <= bound
    np.testing.assert_allclose(np.std(bias), bound / np.sqrt(3), rtol=0.15)  # of a uniform distribution


@pytest.mark.parametrize("norm", ["batch", "actnorm"])
def test_statistics_collection_exists_for_either_norm(norm):
    network = PatchDiscriminator(2, 1, norm=norm)
    x = jax.random.normal(KEY, (2, 16, 16, 3))
    variables = network.init(KEY, x, train=True)
    logits, updated = network.apply(variables, x, train=True, mutable=["batch_stats"])
    assert logits.shape == (2, 6, 6, 1)
    assert jax.tree.structure(updated["batch_stats"]) == jax.tree.structure(variables["batch_stats"])
    assert network.apply(variables, x, train=False).shape == (2, 6, 6, 1)


def batch_norm(x, axis_name=None):
    module = BatchNorm(axis_name)
    return module.apply(module.init(KEY, x, train=True), x, train=True, mutable=["batch_stats"])


def test_batch_norm_in_numpy():
    y, updated = batch_norm(X)
    x, n = np.asarray(X, np.float64), 8 * 4 * 4
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    scale = np.asarray(BatchNorm().init(KEY, X, train=True)["params"]["scale"])
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5) * scale, atol=1e-5)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(updated["batch_stats"]["var"], 0.9 + 0.1 * var * n / (n - 1), rtol=1e-5)


def test_init_and_evaluation_leave_running_statistics_alone():
    module = BatchNorm()
    variables = module.init(KEY, X, train=True)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)
    y, updated = module.apply(variables, X, train=False, mutable=["batch_stats"])
    np.testing.assert_array_equal(updated["batch_stats"]["var"], 1)
    np.testing.assert_allclose(y, X * variables["params"]["scale"], rtol=1e-4)


def test_batch_norm_of_a_far_mean():
    y, _ = batch_norm(1000 + jax.random.normal(KEY, (64, 4, 4, 1)))
    np.testing.assert_allclose(
        [y.mean(), y.std()], [0, BatchNorm().init(KEY, X[..., :1], train=True)["params"]["scale"][0]], atol=1e-3
    )


def test_batch_norm_spans_the_axis():
    y, updated = batch_norm(X)
    sharded, stats = jax.vmap(lambda x: batch_norm(x, "batch"), axis_name="batch")(X.reshape(4, 2, 4, 4, 6))
    np.testing.assert_allclose(sharded.reshape(y.shape), y, atol=1e-5)
    for name in ("mean", "var"):
        np.testing.assert_allclose(stats["batch_stats"][name], np.tile(updated["batch_stats"][name], (4, 1)), rtol=1e-5)


@pytest.mark.parametrize("norm", ["batch", "actnorm"])
@pytest.mark.parametrize("parallel", ["vmap", "pmap"])
def test_gradients_and_init_do_not_depend_on_the_number_of_devices(norm, parallel):
    if parallel == "pmap" and jax.local_device_count() < 2:
        pytest.skip("needs two devices")
    x = jax.random.normal(KEY, (4, 16, 16, 3))
    alone, parted = PatchDiscriminator(4, 1, norm), PatchDiscriminator(4, 1, norm, axis_name="batch")

    def loss(params, stats, x, network):
        logits = network.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])[0]
        return jnp.mean(jax.nn.relu(1 - 40 * logits))  # hinge, away from both ends

    def start(x):
        return parted.init(KEY, x, train=True)

    def gradient(variables, x):
        grads = jax.grad(loss)(variables["params"], variables["batch_stats"], x, parted)
        return jax.lax.pmean(grads, "batch")

    transform = jax.pmap if parallel == "pmap" else jax.vmap
    parts = x.reshape(2, 2, 16, 16, 3)
    whole = jax.jit(lambda: alone.init(KEY, x, train=True))()
    variables = jax.jit(transform(start, axis_name="batch"))(parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=2e-4, atol=1e-6), variables, whole)
    expected = jax.jit(partial(jax.grad(loss), network=alone))(whole["params"], whole["batch_stats"], x)
    found = jax.block_until_ready(jax.jit(transform(gradient, axis_name="batch"))(variables, parts))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-3, atol=1e-5), found, expected)


def test_actnorm_normalizes_its_first_batch_with_the_unbiased_deviation():
    module = ActNorm("batch")  # not bound here: moments of this batch alone
    variables = module.init(KEY, X, train=True)
    y = np.asarray(module.apply(variables, X, train=True), np.float64)
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(y.std((0, 1, 2), ddof=1), 1, rtol=1e-4)
    other = module.apply(variables, 2 * X, train=True)
    np.testing.assert_allclose(other, variables["params"]["scale"] * (2 * X + variables["params"]["loc"]), rtol=1e-6)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="'instance'.*batch, actnorm"):
        init_shapes(PatchDiscriminator(norm="instance"))
    with pytest.raises(UserError, match="3 layers needs images of at least 24 pixels"):
        init_shapes(PatchDiscriminator(), side=16)
