"""Batches as they are sent -> as they are computed with."""

import jax
import numpy as np

from latent_diffusion.data import transforms
from latent_diffusion.training.batch import as_floats


def test_every_byte():
    """Compiled, against exact numbers and against what the loader gives without `compact`."""
    x = np.arange(256, dtype=np.uint8)
    found = jax.jit(as_floats)({"image": x})["image"]
    assert found.dtype == np.float32 and found[0] == -1 and found[255] == 1
    np.testing.assert_allclose(found, (2 * x.astype(np.float64) - 255) / 255, atol=1.2e-7)
    np.testing.assert_allclose(found, transforms.to_float(x), atol=1.2e-7)


def test_all_else_stays():
    batch = {"mask": np.ones((2, 4, 4, 1), np.float32), "latent_mean": np.zeros(3, np.float16),
             "label": np.array([255, 3], np.int32)}
    assert all(as_floats(batch)[name] is x for name, x in batch.items())
