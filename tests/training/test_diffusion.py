"""Stage 2: the loss, what is drawn per example, conditioning, EMA, against numbers computed here in other words."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from latent_diffusion import config as config_lib
from latent_diffusion import keys, parallel
from latent_diffusion.data import transforms
from latent_diffusion.diffusion import schedule as schedule_lib
from latent_diffusion.training import diffusion as stage2
from latent_diffusion.training import optimizer

FROZEN = {"null": tiny_runs.NULL}


def random_params(config):
    return jax.tree.map(jnp.asarray, tiny_runs.random_state(config).params)


@functools.cache
def compiled_losses(json, train, transform=lambda function: function):
    config = config_lib.from_json(json)
    static = dict(models=tiny_runs.networks(config), schedule=schedule_lib.from_config(config.diffusion),
                  config=config, scale_factor=jnp.ones(()), train=train)
    def run(params, batch):
        return transform(lambda p: stage2.loss_and_metrics(p, FROZEN, batch, jax.random.key(5), **static))(params)
    return jax.pmap(run, axis_name=parallel.AXIS, in_axes=(None, 0))


def losses(config, params, batch, train=True, **options):
    """Loss and metrics of one device's batch; with transform=jax.grad, gradients in place of the loss."""
    found = compiled_losses(config_lib.to_json(config), train, **options)(
        params, jax.tree.map(lambda x: jnp.asarray(x)[None], batch))
    return jax.tree.map(lambda x: np.asarray(x[0]), found)


def test_fresh_unet_predicts_zero_so_the_loss_is_the_noise_itself():
    """The UNet starts with a zero-initialized output: the eps loss is the mean square of the examples' own noise."""
    config = tiny_runs.diffusion_config(conditioning=dict(dropout=0.0))
    fresh = jax.jit(functools.partial(
        stage2.create_state, models=tiny_runs.networks(config), tx=optimizer.create(config), config=config))
    params = dict(fresh(jax.random.key(0, impl="unsafe_rbg")).params)  # compiles twice as fast
    batch = tiny_runs.latent_batch()
    loss, metrics = losses(config, params, batch)
    eps_key = jax.random.split(jax.random.key(5), 5)[2]
    eps = keys.normal(eps_key, jnp.asarray(batch["index"]), batch["latent_mean"].shape[1:])
    np.testing.assert_allclose(loss, np.mean(np.square(eps)), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_simple"], loss, rtol=1e-6)


def test_gradient_reaches_conditioner_and_class_table():
    config = tiny_runs.diffusion_config()
    gradients, _ = losses(config, random_params(config), tiny_runs.latent_batch(),
                          transform=functools.partial(jax.grad, has_aux=True))
    norms = jax.tree.map(lambda g: float(np.abs(g).max()), gradients)
    assert all(norm > 1e-6 for norm in jax.tree.leaves(norms["conditioner"])), norms["conditioner"]
    assert norms["unet"]["label_emb"]["embedding"] > 1e-4
    used = np.abs(gradients["conditioner"]["token_emb"]["embedding"]).max(1) > 0
    tokens = set(tiny_runs.latent_batch()["tokens"].ravel().tolist()) | set(tiny_runs.NULL["tokens"].tolist())
    assert set(np.flatnonzero(used).tolist()) <= tokens


@pytest.mark.parametrize("name", ["tokens", "label"])
def test_condition_matters(name):
    config = tiny_runs.diffusion_config(conditioning=dict(dropout=0.0))
    params, batch = random_params(config), tiny_runs.latent_batch()
    loss, _ = losses(config, params, batch)
    swapped, _ = losses(config, params, {**batch, name: np.roll(batch[name], 1, axis=0)})
    assert abs(loss - swapped) > 1e-4


def test_dropout_replaces_by_the_null_condition_at_the_given_rates():
    n = 20_000
    options = tiny_runs.diffusion_config(
        conditioning=dict(dropout=0.1, text_dropout=0.2, label_dropout=0.5)).conditioning
    batch = {"tokens": jnp.full((n, 8), 9), "label": jnp.full((n,), 1), "index": jnp.arange(n)}
    dropped = stage2.drop_conditions(batch, tiny_runs.NULL, jax.random.key(0), options)
    text = np.asarray((dropped["tokens"] == tiny_runs.NULL["tokens"]).all(1))
    label = np.asarray(dropped["label"] == 5)
    assert np.all(text | (np.asarray(dropped["tokens"]) == 9).all(1))
    assert text.mean() == pytest.approx(1 - 0.9 * 0.8, abs=0.015)
    assert label.mean() == pytest.approx(1 - 0.9 * 0.5, abs=0.015)
    assert (text & label).mean() == pytest.approx(0.1 + 0.9 * 0.2 * 0.5, abs=0.015)


def test_full_dropout_equals_training_on_the_null_condition():
    config = tiny_runs.diffusion_config(conditioning=dict(dropout=1 - 1e-9))
    params, batch = random_params(config), tiny_runs.latent_batch()
    always, _ = losses(config, params, batch)
    null = {**batch, "tokens": np.tile(tiny_runs.NULL["tokens"], (8, 1)), "label": np.full(8, 5, np.int32)}
    nothing, _ = losses(config, params, null, train=False)
    np.testing.assert_allclose(always, nothing, rtol=1e-6)


def test_evaluation_drops_nothing():
    config = tiny_runs.diffusion_config(conditioning=dict(dropout=1 - 1e-9))
    kept = tiny_runs.diffusion_config(conditioning=dict(dropout=0.0))
    params, batch = random_params(config), tiny_runs.latent_batch()
    np.testing.assert_allclose(
        losses(config, params, batch, train=False)[0], losses(kept, params, batch)[0], rtol=1e-6)


def test_scale_factor_is_one_over_std():
    """Moments of posterior samples over both devices: 1/std of latents drawn from N(mean, std)."""
    config = tiny_runs.diffusion_config()
    rng = np.random.default_rng(0)
    shape = (64, 8, 8, 3)
    mean = 3 + 2 * rng.standard_normal(shape).astype(np.float32)
    batch = {"latent_mean": mean, "latent_std": np.full(shape, 1.5, np.float32), "index": np.arange(64, dtype=np.int32)}
    moments = parallel.pmap_evaluate(stage2.latent_moments, models=tiny_runs.networks(config))
    sums = jax.device_get(moments({}, {}, parallel.shard(batch), jax.random.key(0)))
    assert sums["count"] == mean.size
    std = np.sqrt(sums["square"] / sums["count"] - (sums["sum"] / sums["count"]) ** 2)
    assert float(std) == pytest.approx(2.5, rel=0.02)  # sqrt(2^2 + 1.5^2)


def test_bytes_are_the_pictures_that_floats_are():
    """Pictures and low-resolution pictures of 8 bits, with networks that hand on what they are given."""
    config = tiny_runs.diffusion_config(conditioning=dict(crossattn="none", label=False, concat="low_res"))
    networks = SimpleNamespace(first_stage=SimpleNamespace(apply=lambda variables, x, method: x),
                               unet=SimpleNamespace(apply=lambda variables, z, t, concat, train: z * concat))
    batch, rng = tiny_runs.image_batch(), np.random.default_rng(1)
    batch["low_res"] = rng.integers(256, size=batch["image"].shape, dtype=np.uint8)
    floats = batch | {name: transforms.to_float(batch[name]) for name in ("image", "low_res")}
    static = dict(scale_factor=jnp.ones(()), models=networks, config=config, train=False,
                  schedule=schedule_lib.from_config(config.diffusion))
    found, expected = (stage2.loss_and_metrics(
        {"unet": {}}, {}, jax.tree.map(jnp.asarray, every), jax.random.key(0), **static)[0]
        for every in (batch, floats))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_online_encoding_equals_cached_posteriors():
    config = tiny_runs.diffusion_config(conditioning=dict(dropout=0.0))
    networks = tiny_runs.networks(config)
    images = jnp.asarray(transforms.to_float(tiny_runs.image_batch()["image"]))
    rng, shapes = np.random.default_rng(0), jax.eval_shape(networks.first_stage.init, jax.random.key(1), images[:1])
    first_stage = jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape, np.float32), shapes["params"])
    index = jnp.arange(8)

    @jax.jit
    def encoded(first_stage):
        batch = {"image": images, "index": index}
        return stage2.posterior(networks, first_stage, images), stage2.latents(
            networks, first_stage, batch, jax.random.key(2))

    (mean, std), online = encoded(first_stage)
    cached = stage2.latents(
        networks, None, {"latent_mean": mean, "latent_std": std, "index": index}, jax.random.key(2))
    np.testing.assert_allclose(online, cached, atol=1e-6)
    np.testing.assert_allclose(
        (online - mean) / std, keys.normal(jax.random.key(2), index, mean.shape[1:]), atol=1e-3)


def config_of_steps(pieces=1):
    return tiny_runs.diffusion_config(
        ema=dict(decay=0.9999, warmup=True, include_conditioner=False), training=dict(accumulate=pieces),
        diffusion=dict(learn_logvar=True, logvar_init=0.5))


def test_ema_follows_its_recursion_and_covers_the_unet_only():
    config = config_of_steps()
    state, step = tiny_runs.diffusion_run(config)
    assert set(state.ema_params) == {"unet"}
    expected = jax.tree.map(np.asarray, parallel.to_host(state.params["unet"]))
    for n in (1, 2, 3):
        state, [metrics] = tiny_runs.advance(state, step, tiny_runs.latent_batch(), FROZEN, 1)
        decay = min(0.9999, (1 + n) / (10 + n))
        assert metrics["ema_decay"] == pytest.approx(decay)
        now = parallel.to_host(state.params["unet"])
        expected = jax.tree.map(lambda s, p, d=decay: s - (1 - d) * (s - p), expected, now)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
                 parallel.to_host(state.ema_params["unet"]), expected)


def test_accumulation_equals_the_whole_batch():
    """Noise, t and dropout belong to the example, so the cut changes nothing but the order of the sum."""
    found = []
    for pieces in (1, 2):
        config = config_of_steps(pieces)
        state, metrics = tiny_runs.advance(*tiny_runs.diffusion_run(config), tiny_runs.latent_batch(), FROZEN, 2)
        found.append((parallel.to_host(state.params), [m["loss"] for m in metrics]))
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found[0][0], found[1][0])


def test_learned_logvar_moves_and_a_constant_one_shifts_the_loss():
    config = config_of_steps()
    state, step = tiny_runs.diffusion_run(config)
    assert state.params["logvar"].shape == (1000,)
    state, [metrics] = tiny_runs.advance(state, step, tiny_runs.latent_batch(), FROZEN, 1)
    np.testing.assert_allclose(metrics["loss"], metrics["loss_simple"] / np.exp(0.5) + 0.5, rtol=1e-5)
    logvar = parallel.to_host(state.params["logvar"])
    assert 0 < np.count_nonzero(logvar != 0.5) <= 8  # the timesteps that were drawn

    constant = tiny_runs.diffusion_config(diffusion=dict(logvar_init=0.5))
    loss, metrics = losses(constant, random_params(constant), tiny_runs.latent_batch())
    np.testing.assert_allclose(loss, metrics["loss_simple"] / np.exp(0.5) + 0.5, rtol=1e-5)
