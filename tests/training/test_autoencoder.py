"""Stage 1: each loss against its formula, and the step's gradients against one plain, slow scalar loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_runs

from latent_diffusion import keys, parallel
from latent_diffusion.data import transforms
from latent_diffusion.training import autoencoder as stage1

REAL, FAKE = jnp.array([2.0, 0.5, -1.0]), jnp.array([-3.0, 0.25, 1.0])


def softplus(x):
    return np.log1p(np.exp(np.asarray(x, np.float64)))


@pytest.mark.parametrize("name,expected", [
    ("hinge", 0.5 * ((0 + 0.5 + 2.0) / 3 + (0 + 1.25 + 2.0) / 3)),
    ("vanilla", 0.5 * (softplus(-REAL).mean() + softplus(FAKE).mean())),
    ("non_saturating", softplus(-REAL).mean() + softplus(FAKE).mean()),
])
def test_discriminator_losses(name, expected):
    np.testing.assert_allclose(stage1.DISCRIMINATOR_LOSSES[name](REAL, FAKE), expected, rtol=1e-6)


@pytest.mark.parametrize("name,expected", [
    ("hinge", 1.75 / 3), ("vanilla", 1.75 / 3), ("non_saturating", softplus(-FAKE).mean())])
def test_generator_losses(name, expected):
    np.testing.assert_allclose(stage1.GENERATOR_LOSSES[name](FAKE), expected, rtol=1e-6)


@pytest.mark.parametrize("nll,g,expected", [
    ([3.0, 4.0], [0.0, 2.0], 5.0 / 2.0001 * 0.5),  # ratio of norms, 1e-4 in the denominator
    ([3.0, 4.0], [0.0, 0.0], 1e4 * 0.5),           # clamped before the weight is applied
])
def test_adaptive_weight(nll, g, expected):
    found = stage1.adaptive_weight(jnp.array(nll), jnp.array(g), 0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_psnr_of_a_constant_error():
    """10 grey levels everywhere: 20 log10(255 / 10) dB; the rounding to 8 bits hides errors below half a level."""
    x = jnp.zeros((1, 4, 4, 3))
    np.testing.assert_allclose(stage1.psnr(x + 0.4 / 127.5, x + 10 / 127.5), 20 * np.log10(25.5), rtol=1e-5)


def test_kl_nll_sums_over_pixels_and_means_over_images():
    config = tiny_runs.autoencoder_config()
    x, x_rec = jnp.zeros((2, 4, 4, 3)), jnp.full((2, 4, 4, 3), 0.5)
    nll, parts = stage1.negative_log_likelihood(x, x_rec, jnp.asarray(0.3), {}, jax.random.key(0), config)
    np.testing.assert_allclose(nll, 48 * (0.5 / np.exp(0.3) + 0.3), rtol=1e-6)
    np.testing.assert_allclose(parts["pixel_loss"], 0.5)


def test_vq_nll_is_a_mean_without_logvar():
    config = tiny_runs.autoencoder_config("vq", pixel="l2")
    x, x_rec = jnp.zeros((2, 4, 4, 3)), jnp.full((2, 4, 4, 3), 0.5)
    nll, _ = stage1.negative_log_likelihood(x, x_rec, jnp.asarray(0.3), {}, jax.random.key(0), config)
    np.testing.assert_allclose(nll, 0.25, rtol=1e-6)


def test_lpips_is_broadcast_over_the_map(monkeypatch):
    """KL: an LPIPS value d counts as weight * d at each of the H W C positions of the summed map."""
    config = tiny_runs.autoencoder_config(perceptual_weight=0.7)
    monkeypatch.setattr(stage1, "perceptual_distance", lambda *args: jnp.array([0.1, 0.3]))
    x = jnp.zeros((2, 4, 4, 3))
    nll, parts = stage1.negative_log_likelihood(x, x, jnp.zeros(()), {}, jax.random.key(0), config)
    np.testing.assert_allclose(nll, 48 * 0.7 * 0.2, rtol=1e-6)
    np.testing.assert_allclose(parts["perceptual_loss"], 0.2, rtol=1e-6)


def test_perplexity_of_uniform_and_single_codes():
    def use(indices):
        result = jax.pmap(lambda i: stage1.codebook_use(i, 16), axis_name=parallel.AXIS)(indices)
        return jax.tree.map(lambda x: float(x[0]), result)
    uniform = use(jnp.arange(16).reshape(2, 8))  # half of the codes on each device
    single = use(jnp.full((2, 8), 3))
    assert uniform["perplexity"] == pytest.approx(16, rel=1e-4) and uniform["codes_used"] == 16
    assert single["perplexity"] == pytest.approx(1, rel=1e-4) and single["codes_used"] == 1


def plain_generator_loss(params, state, batch, key, d_weight, networks, config):
    """The generator's loss as one scalar, with the adaptive weight given."""
    rec_key, lpips_key = jax.random.split(key)
    (x_rec, regularization), _ = stage1.reconstruct(
        params["autoencoder"], batch, rec_key, models=networks, config=config)
    nll, _ = stage1.negative_log_likelihood(batch["image"], x_rec, params["logvar"], {}, lpips_key, config)
    logits, _ = stage1.discriminator(config).apply(
        {"params": state.disc_params["discriminator"], "batch_stats": state.disc_stats}, x_rec, train=True,
        mutable=["batch_stats"])
    weight = config.training.loss.codebook_weight if config.model.kind == "vq" else config.training.loss.kl_weight
    return nll + weight * regularization - d_weight * jnp.mean(logits), (nll, jnp.mean(logits))


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_generator_step_is_the_gradient_of_the_plain_loss(kind):
    """Plain SGD, so the parameters' change is the gradient; the oracle differentiates nll and g separately, and gets
    floats where the step gets bytes."""
    config = tiny_runs.autoencoder_config(kind, kl_weight=1e-2, learn_logvar=kind == "kl")
    with config.unlocked():
        config.optimizer.learning_rate = 0.25  # large, so that float32 parameters hold the change exactly enough
    networks, batch = tiny_runs.networks(config), tiny_runs.image_batch()
    floats = batch | {"image": transforms.to_float(batch["image"])}
    state, step = tiny_runs.autoencoder_run(config)
    before = jax.tree.map(jnp.asarray, parallel.to_host(state))
    after, [metrics] = tiny_runs.advance(state, step, batch, {}, 1)
    change = jax.tree.map(lambda a, b: (b - a) / 0.25, before.params, parallel.to_host(after.params))
    key = jax.random.split(jax.random.fold_in(jax.random.key(7), 0))[0]

    def oracle(batch):
        def last_layer(which):
            def loss(kernel):
                params = jax.tree.map(lambda x: x, before.params)
                params["autoencoder"]["decoder"]["conv_out"]["kernel"] = kernel
                return plain_generator_loss(params, before, batch, key, 0.0, networks, config)[1][which]
            kernel = before.params["autoencoder"]["decoder"]["conv_out"]["kernel"]
            return jax.lax.pmean(jax.grad(loss)(kernel), parallel.AXIS)
        d_weight = jnp.clip(jnp.linalg.norm(last_layer(0)) / (jnp.linalg.norm(last_layer(1)) + 1e-4), 0, 1e4)
        d_weight = d_weight * config.training.loss.disc_weight
        gradient = jax.grad(plain_generator_loss, has_aux=True)(
            before.params, before, batch, key, d_weight, networks, config)[0]
        return d_weight, jax.lax.pmean(gradient, parallel.AXIS)
    d_weight, gradient = jax.pmap(oracle, axis_name=parallel.AXIS, out_axes=None)(parallel.shard(floats))

    np.testing.assert_allclose(metrics["adaptive_weight"], d_weight, rtol=1e-4)
    for (path, found), expected in zip(jax.tree.leaves_with_path(change), jax.tree.leaves(gradient), strict=True):
        scale = float(np.abs(expected).max()) + 1e-2
        np.testing.assert_allclose(-found, expected, atol=1e-3 * scale, err_msg=jax.tree_util.keystr(path))
    assert float(optax.tree.norm(gradient)) == pytest.approx(float(metrics["grad_norm"]), rel=1e-3)


def late_config(pieces=1):
    """The discriminator takes part from the second step on, and averages are fast."""
    config = tiny_runs.autoencoder_config(disc_start=1)
    with config.unlocked():
        config.ema.decay = 0.2
        config.training.accumulate = pieces
    return config


@pytest.fixture(scope="module")
def two_steps():
    """(states before, between and after two steps, the metrics of both)."""
    state, step = tiny_runs.autoencoder_run(late_config())
    states, found = [parallel.to_host(state)], []
    for _ in range(2):
        state, [metrics] = tiny_runs.advance(state, step, tiny_runs.image_batch(), {}, 1)
        states.append(parallel.to_host(state))
        found.append(metrics)
    return states, found


def test_both_networks_move_and_logvar_does_not(two_steps):
    (before, _, after), _ = two_steps
    # hinge: the gradient of the last bias is (fakes - reals) / 2 = 0 while no logit has left the margin
    last = max(before.disc_params["discriminator"], key=lambda name: int(name.split("_")[1]))
    paths = [jax.tree_util.keystr(path) for (path, a), b in zip(
        jax.tree.leaves_with_path((before.params["autoencoder"], before.disc_params, before.disc_stats)),
        jax.tree.leaves((after.params["autoencoder"], after.disc_params, after.disc_stats)), strict=True)
        if np.array_equal(a, b)]
    still = [path for path in paths if not path.endswith(f"['{last}']['bias']")]
    # softmax does not see a bias of the keys, which adds the same to all logits of a query
    assert [name for name in still if not name.endswith("['k']['bias']")] == []
    assert after.params["logvar"] == 0.0


def test_average_follows_its_recursion(two_steps):
    """s <- s - (1 - d)(s - p) with d = min(decay, (1 + n) / (10 + n)) after step n, for the autoencoder alone."""
    (before, *states), _ = two_steps
    expected = before.ema_params
    assert set(expected) == {"autoencoder"}
    for decay, state in zip((2 / 11, 0.2), states, strict=True):
        expected = {"autoencoder": jax.tree.map(
            lambda s, p, d=decay: s - (1 - d) * (s - p), expected["autoencoder"], state.params["autoencoder"])}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), states[-1].ema_params, expected)


def test_before_disc_start_the_adversarial_terms_are_zero(two_steps):
    (before, between, _), (first, second) = two_steps
    assert first["disc_factor"] == 0 and first["disc_loss"] == 0 and first["disc_grad_norm"] == 0
    assert first["adaptive_weight"] > 0  # computed all the same
    jax.tree.map(np.testing.assert_array_equal, before.disc_params, between.disc_params)
    np.testing.assert_allclose(first["loss"], first["nll"] + 1e-6 * first["regularization"], rtol=1e-5)
    assert second["disc_factor"] == 1 and second["disc_loss"] > 0 and second["adaptive_weight"] > 0


def test_accumulation_of_two_halves_is_the_whole_batch_without_the_discriminator(two_steps):
    """The adaptive weight and the statistics of its norm depend on the piece, so this is the step before its start."""
    (_, whole, _), (metrics, _) = two_steps
    state, [halves] = tiny_runs.advance(
        *tiny_runs.autoencoder_run(late_config(pieces=2)), tiny_runs.image_batch(), {}, 1)
    np.testing.assert_allclose(metrics["loss"], halves["loss"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), whole.params,
                 parallel.to_host(state.params))


def test_posterior_noise_belongs_to_the_example():
    """The same example in another place of the batch gets the same noise."""
    key, shape = jax.random.key(3), (4, 4, 2)
    a = keys.normal(key, jnp.array([5, 9, 700]), shape)
    b = keys.normal(key, jnp.array([700, 5]), shape)
    np.testing.assert_array_equal(a[2], b[0])
    np.testing.assert_array_equal(a[0], b[1])
    assert abs(float(keys.normal(key, jnp.arange(4000), (8,)).std()) - 1) < 0.01
