"""Classifier-free guidance against its formula, and the gradients of `toward` by finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.diffusion.guidance import classifier_free, corrected, toward
from latent_diffusion.diffusion.schedule import make_schedule

Z = jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
T = jnp.array([5, 5, 5])
SCHEDULE = make_schedule("linear", 20, linear_start=0.01, linear_end=0.3)
COND = {"context": jnp.array([1.0, 2.0, 3.0]).reshape(3, 1, 1), "label": jnp.array([4, 5, 6])}
NULL = {"context": jnp.zeros((1, 1, 1)), "label": jnp.array([9, 9, 9])}


def denoise(z, t, cond):
    shift = (cond["context"][:, 0, 0] + cond["label"]).reshape(-1, 1, 1, 1)
    return jnp.sin(z) * shift + t.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1.5, 7.5])
def test_formula(scale):
    guided = classifier_free(denoise, COND, NULL, scale)(Z, T)
    labels = np.array([5.0, 7.0, 9.0]).reshape(3, 1, 1, 1)
    expected = np.sin(Z) * (9 + scale * (labels - 9)) + 5
    np.testing.assert_allclose(guided, expected, rtol=1e-5)


@pytest.mark.parametrize("options", [
    {}, dict(rescale=0.7), dict(two_passes=True), dict(rescale=1.0, two_passes=True)], ids=str)
def test_scale_one_is_the_conditional_prediction_bit_by_bit(options):
    def huge(z, t, cond):  # u + (c - u) would lose c entirely
        return jnp.where(cond["label"].reshape(-1, 1, 1, 1) == 9, 1e30, denoise(z, t, cond))

    np.testing.assert_array_equal(classifier_free(huge, COND, NULL, 1.0, **options)(Z, T), denoise(Z, T, COND))


def test_one_batch_unconditional_first():
    seen = []

    def record(z, t, cond):
        seen.append((z, t, cond))
        return denoise(z, t, cond)

    classifier_free(record, COND, NULL, 2.0)(Z, T)
    ((z, t, cond),) = seen
    np.testing.assert_array_equal(z, np.concatenate([Z, Z]))
    np.testing.assert_array_equal(t, [5] * 6)
    np.testing.assert_array_equal(cond["label"], [9, 9, 9, 4, 5, 6])
    np.testing.assert_array_equal(cond["context"].ravel(), [0, 0, 0, 1, 2, 3])


def test_scale_is_traced_and_may_differ_by_example():
    traces = []

    @jax.jit
    def run(scale):
        traces.append(1)
        return classifier_free(denoise, COND, NULL, scale)(Z, T)

    one_by_one = np.stack([run(jnp.full(3, s, jnp.float32))[i] for i, s in enumerate((1.0, 2.0, 3.0))])
    np.testing.assert_array_equal(run(jnp.array([1.0, 2.0, 3.0], jnp.float32)), one_by_one)
    assert len(traces) == 1


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_two_passes_are_one_of_twice_the_size(rescale):
    seen = []

    def record(z, t, cond):
        seen.append(len(z))
        return denoise(z, t, cond)

    one, two = (classifier_free(record, COND, NULL, 3.0, rescale=rescale, two_passes=passes)(Z, T)
                for passes in (False, True))
    assert seen == [6, 3, 3]
    np.testing.assert_allclose(one, two, rtol=1e-6)


@pytest.mark.parametrize("amount", [0.3, 1.0])
def test_rescale_moves_the_deviation_to_that_of_the_conditional(amount):
    conditional, plain = denoise(Z, T, COND), classifier_free(denoise, COND, NULL, 5.0)(Z, T)
    found = classifier_free(denoise, COND, NULL, 5.0, rescale=amount)(Z, T)
    wanted = amount * conditional.std((1, 2, 3)) + (1 - amount) * plain.std((1, 2, 3))
    np.testing.assert_allclose(found.std((1, 2, 3)), wanted, rtol=1e-5)
    ratio = np.asarray(found / plain).reshape(3, -1)
    np.testing.assert_allclose(ratio.min(1), ratio.max(1), rtol=1e-4)  # one factor for each example


def test_interval_excludes_its_lower_end_and_includes_its_upper_one():
    alpha, sigma = SCHEDULE.levels(T)
    level = float((sigma / alpha)[0])
    guided = classifier_free(denoise, COND, NULL, 4.0)(Z, T)
    for low, high, inside in ((level - 0.1, level, True), (level, level + 0.1, False), (0.0, 9.0, True)):
        found = classifier_free(denoise, COND, NULL, 4.0, interval=(low, high), schedule=SCHEDULE)(Z, T)
        np.testing.assert_allclose(found, guided if inside else denoise(Z, T, COND), rtol=1e-5)


def test_outside_of_the_interval_the_work_is_half():
    """At run time: one call of the condition's batch, where inside it is twice the size."""
    sizes = []

    def record(z, t, cond):
        jax.debug.callback(lambda z: sizes.append(len(z)), z)
        return denoise(z, t, cond)

    run = jax.jit(classifier_free(record, COND, NULL, 4.0, interval=(0.2, 9.0), schedule=SCHEDULE))
    for t, size in ((0, 3), (10, 6)):
        sizes.clear()
        jax.block_until_ready(run(Z, jnp.full(3, t)))
        jax.effects_barrier()
        assert sizes == [size]


LEVELS = [level[:, None, None, None] for level in SCHEDULE.levels(T)]


def network(parameterization, z, t):
    """The same nonlinear eps, told as eps, x0 or v."""
    alpha, sigma = LEVELS
    eps = jnp.sin(1.3 * z) + 0.2 * z
    x0 = (z - sigma * eps) / alpha
    return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[parameterization]


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_toward_against_finite_differences(parameterization):
    alpha, sigma = (np.asarray(level, np.float64) for level in LEVELS)
    z, scale, h = np.asarray(Z, np.float64), np.array([0.5, 1.0, 2.0]).reshape(3, 1, 1, 1), 1e-6

    def eps(z):
        return np.sin(1.3 * z) + 0.2 * z

    def distance(z):  # each entry's own
        return ((z - sigma * eps(z)) / alpha - 0.4) ** 4

    slope = (distance(z + h) - distance(z - h)) / (2 * h)
    found = toward(lambda z, t: network(parameterization, z, t), lambda x0: ((x0 - 0.4) ** 4).sum((1, 2, 3)),
                   jnp.asarray(scale.ravel(), jnp.float32), SCHEDULE, parameterization)(Z, T)
    wanted = eps(z) + scale * sigma * slope
    x0 = (z - sigma * wanted) / alpha
    wanted = {"eps": wanted, "x0": x0, "v": alpha * wanted - sigma * x0}[parameterization]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_a_correction_that_does_nothing_changes_nothing(parameterization):
    found = corrected(lambda z, t: network(parameterization, z, t), lambda eps, z, t: eps, SCHEDULE, parameterization)
    np.testing.assert_allclose(found(Z, T), network(parameterization, Z, T), atol=1e-5)
