"""Batches as they are sent -> as they are computed with."""

import jax
import numpy as np
import program_files

from latent_diffusion.benchmark import loading, work
from latent_diffusion.data import transforms
from latent_diffusion.training.batch import as_floats


def test_every_byte():
    """Compiled with optimizations, which multiply by reciprocals: against exact numbers, and against what the loader
    gives without `compact`."""
    x = np.arange(256, dtype=np.uint8)
    jax.config.update("jax_disable_most_optimizations", False)
    found = jax.jit(as_floats)({"image": x})["image"]
    jax.config.update("jax_disable_most_optimizations", True)
    assert found.dtype == np.float32 and found[0] == -1 and found[255] == 1
    np.testing.assert_allclose(found, (2 * x.astype(np.float64) - 255) / 255, atol=1.2e-7)
    np.testing.assert_allclose(found, transforms.to_float(x), atol=1.2e-7)


def test_latents_become_float32_and_all_else_stays():
    latents = np.array([0.1, -3], np.float16)
    batch = {"mask": np.ones((2, 4, 4, 1), np.float32), "label": np.array([255, 3], np.int32)}
    found = as_floats(batch | {"latent_mean": latents})
    assert all(found[name] is x for name, x in batch.items())
    assert found["latent_mean"].dtype == np.float32
    np.testing.assert_array_equal(found["latent_mean"], latents)


def test_training_reads_compact_batches():
    """As the benchmark takes them for granted."""
    config = program_files.load("configs/ldm_superres.py").get_config("smoke")
    batch = next(loading.open_stream(config))
    assert batch["image"].dtype == batch["low_res"].dtype == np.uint8
    expected = work.shapes_of(config, config.training.batch_size, compact=True)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        name: (x.shape, x.dtype) for name, x in expected.items()}
