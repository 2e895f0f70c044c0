"""Learning rates, optimizers, EMA and accumulation against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_runs

from latent_diffusion.training import loop, optimizer


def config(**values):
    found = tiny_runs.get_config("autoencoder_kl", "smoke")
    with found.unlocked():
        found.optimizer.update(values)
        found.training.update(dict(num_steps=110, batch_size=12))
    return found


def test_effective_rate_is_rate_times_batch():
    assert optimizer.effective_learning_rate(config(learning_rate=4.5e-6)) == pytest.approx(5.4e-5)
    assert optimizer.effective_learning_rate(config(learning_rate=4.5e-6, scale_lr=False)) == 4.5e-6


@pytest.mark.parametrize("name,middle,end", [
    ("constant", 1.0, 1.0), ("linear", 0.55, 0.1), ("cosine", 0.55, 0.1)])
def test_schedules(name, middle, end):
    rate = optimizer.schedule(config(learning_rate=1.0, scale_lr=False, schedule=name, warmup_steps=10,
                                     final_factor=0.1))
    np.testing.assert_allclose([rate(0), rate(5), rate(10), rate(60), rate(110)], [0, 0.5, 1, middle, end], atol=1e-6)


def test_adamw_decays_every_parameter_like_torch():
    """One AdamW step: p (1 - lr wd) - lr g / (|g| + eps), biases and norms included."""
    tx = optimizer.create(config(name="adamw", learning_rate=0.1, scale_lr=False, weight_decay=0.01))
    params = {"kernel": jnp.array([2.0, -3.0]), "bias": jnp.array([1.0]), "scale": jnp.array([5.0])}
    grads = jax.tree.map(lambda p: 0.5 * jnp.ones_like(p), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    for name, p in params.items():
        np.testing.assert_allclose(p + updates[name], p * (1 - 0.1 * 0.01) - 0.1, rtol=1e-6)


def test_muon_orthogonalizes_kernels_and_leaves_the_rest_to_adam():
    """A kernel's first update is -lr 0.2 sqrt(longer side) U V^T of its gradient as a matrix, inputs x outputs, up to
    the five Newton-Schulz steps, which bring singular values near 1 only (Jordan 2024; Liu et al. 2025, equation 4);
    weight decay as AdamW's, on all; other parameters as by Adam with Nesterov momentum (Dozat 2016), whose first update
    is -lr (1 + b1 / (1 + b1)) sign(g)."""
    tx = optimizer.create(config(name="muon", learning_rate=0.1, scale_lr=False, weight_decay=0.01, b1=0.5))
    rng = np.random.default_rng(0)
    shapes = {"conv": {"kernel": (3, 3, 4, 8), "bias": (8,)}, "dense": {"kernel": (4, 16)}, "norm": {"scale": (8,)},
              "table": {"embedding": (5, 4)}}
    params, grads = (jax.tree.map(lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32), shapes,
                                  is_leaf=lambda x: isinstance(x, tuple)) for _ in range(2))
    updates, _ = tx.update(grads, tx.init(params), params)
    steps = jax.tree.map(lambda u, p: np.asarray(u + 0.1 * 0.01 * p), updates, params)
    for name, shape in (("conv", (36, 8)), ("dense", (4, 16))):
        u, _, vt = np.linalg.svd(np.asarray(grads[name]["kernel"]).reshape(shape), full_matrices=False)
        found = -steps[name]["kernel"].reshape(shape) / (0.1 * 0.2 * np.sqrt(max(shape)))
        inside = u.T @ found @ vt.T  # in the gradient's own singular vectors
        np.testing.assert_allclose(found, u @ inside @ vt, atol=1e-4)
        np.testing.assert_allclose(inside, np.diag(np.diag(inside)), atol=1e-4)
        assert np.all((0.6 < np.diag(inside)) & (np.diag(inside) < 1.3))
    for name, leaf in (("conv", "bias"), ("norm", "scale"), ("table", "embedding")):
        np.testing.assert_allclose(steps[name][leaf], -0.1 * (4 / 3) * np.sign(grads[name][leaf]), atol=1e-5)


def moments(opt_state, name):
    """The leaves of all moments of a name, first ("mu") or second ("nu")."""
    return [leaf for path, leaf in jax.tree.leaves_with_path(opt_state)
            if name in [getattr(key, "name", None) for key in path]]


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2**-7)])
def test_first_moments_are_kept_in_the_type_of_the_config(dtype, tolerance):
    """AdamW's formula (Loshchilov and Hutter 2019, algorithm 2), up to the rounding of its first moments between steps.
    Only of these: a second moment of 8 bits would not change by the thousandth of itself that b2=0.999 takes away."""
    rate, b1, b2, decay = 0.1, 0.5, 0.75, 0.01
    tx = optimizer.create(config(name="adamw", learning_rate=rate, scale_lr=False, weight_decay=decay, b1=b1, b2=b2,
                                 moment_dtype=dtype))
    rng, m, v = np.random.default_rng(0), 0.0, 0.0
    params = jnp.asarray(rng.uniform(0.5, 2, (8, 16)), jnp.float32)
    state = tx.init(params)
    for n in range(1, 6):
        g = rng.uniform(-2, -0.5, params.shape)  # no sum of two signs, which would magnify what was rounded away
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        expected = -rate * (m / (1 - b1**n) / np.sqrt(v / (1 - b2**n)) + decay * np.asarray(params))
        updates, state = tx.update(jnp.asarray(g, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        [mu], [nu] = moments(state, "mu"), moments(state, "nu")
        assert (mu.dtype, nu.dtype, params.dtype) == (dtype, "float32", "float32")
        np.testing.assert_allclose(updates, expected, rtol=tolerance)
        np.testing.assert_allclose(mu.astype(jnp.float32), m, rtol=tolerance)
        np.testing.assert_allclose(nu, v, rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", "muon"])
@pytest.mark.parametrize("stage, file", [("autoencoder", "autoencoder_kl"), ("diffusion", "pixel_diffusion")])
def test_both_stages_keep_first_moments_in_bfloat16(stage, file, name, tmp_path):
    """Of every parameter of every network, and nothing else."""
    found = tiny_runs.get_config(file, "smoke")
    with found.unlocked():
        found.model.num_res_blocks, found.optimizer.name, found.optimizer.moment_dtype = 0, name, "bfloat16"
        state = loop.STAGES[stage](found, tmp_path, *loop.check(found, tmp_path)).shapes()
    trained = [(state.params, state.opt_state)]
    if stage == "autoencoder":
        trained.append((state.disc_params, state.disc_opt_state))
    for params, opt_state in trained:
        assert len(moments(opt_state, "mu")) == len(jax.tree.leaves(params)) > 5
        assert {x.dtype for x in moments(opt_state, "mu")} == {jnp.dtype("bfloat16")}
        assert {x.dtype for x in [*moments(opt_state, "nu"), *jax.tree.leaves(params)]} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(state.ema_params)} <= {jnp.dtype("float32")}


def test_clipping_by_global_norm():
    tx = optimizer.create(config(name="sgd", learning_rate=1.0, scale_lr=False, clip_norm=1.0))
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    updates, _ = tx.update(grads, tx.init(grads), grads)
    np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-0.6, -0.8], rtol=1e-6)


def test_norm_of_gradients_stores_no_squares():
    tx, params = optimizer.create(config(name="adamw", clip_norm=0.0, b1=0.9)), {"kernel": jnp.ones((512, 512))}

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, gradients):
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, optimizer.gradient_norm(gradients)

    compiled = step.lower(params, tx.init(params), params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < params["kernel"].nbytes / 2
    assert float(compiled(params, tx.init(params), {"kernel": 2 * jnp.ones((512, 512))})[2]) == pytest.approx(1024)


def test_ema_decay_warms_up():
    found = [float(optimizer.ema_decay(jnp.asarray(n), 0.9999, True)) for n in (1, 2, 10, 10**7)]
    np.testing.assert_allclose(found, [2 / 11, 3 / 12, 11 / 20, 0.9999], rtol=1e-6)
    assert float(optimizer.ema_decay(jnp.asarray(1), 0.9, False)) == pytest.approx(0.9)


def test_accumulate_averages_and_carries():
    batch = {"x": jnp.arange(6.0)}
    def add(carry, piece):
        return carry + piece["x"].sum(), piece["x"].mean()
    for pieces in (1, 2, 3):
        carry, mean = optimizer.accumulate(add, jnp.zeros(()), batch, pieces)
        assert (float(carry), float(mean)) == (15.0, 2.5)


def test_accumulated_gradients_take_the_memory_of_one():
    """Of 4 MB, in eight pieces, each a product of the piece and the parameters."""
    params, batch = jnp.ones((1024, 1024)), {"x": jnp.ones((8, 1024))}

    def gradients(params, batch):
        def of_piece(carry, piece):
            return carry, jax.grad(lambda p: jnp.sum(jnp.sin(piece["x"] @ p)))(params)
        return optimizer.accumulate(of_piece, None, batch, 8)[1]

    plan = jax.jit(gradients).lower(params, batch).compile().memory_analysis()
    assert plan.temp_size_in_bytes < 3.5 * params.nbytes
