"""Classifier-free guidance against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.diffusion.guidance import classifier_free

Z = jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
T = jnp.array([5, 5, 5])
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


def test_scale_one_is_the_conditional_prediction_bit_by_bit():
    def huge(z, t, cond):  # u + (c - u) would lose c entirely
        return jnp.where(cond["label"].reshape(-1, 1, 1, 1) == 9, 1e30, denoise(z, t, cond))

    np.testing.assert_array_equal(classifier_free(huge, COND, NULL, 1.0)(Z, T), denoise(Z, T, COND))


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
