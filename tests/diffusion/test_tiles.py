"""Patches with overlap: they cover everything, and what needs no neighbors is the same in pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.diffusion import tiles
from latent_diffusion.models import layers


@pytest.mark.parametrize("length,tile,overlap", [(64, 16, 4), (65, 16, 4), (17, 16, 15), (16, 16, 4), (31, 16, 0)])
def test_patches_reach_both_ends_and_leave_no_gap(length, tile, overlap):
    found = tiles.starts(length, tile, overlap)
    assert found[0] == 0 and found[-1] == length - tile
    assert all(0 < b - a <= tile - overlap for a, b in zip(found, found[1:], strict=False))


def test_weights_are_the_clipped_distance_from_the_border():
    found = tiles.weights(4, 8)
    np.testing.assert_allclose(found[:, 4], [0.125, 0.375, 0.375, 0.125])
    np.testing.assert_allclose(found[1], [0.0625, 0.1875, 0.3125, 0.375, 0.375, 0.3125, 0.1875, 0.0625])
    assert tiles.weights(200, 200).min() == np.float32(0.01) and tiles.weights(1, 1).max() == 0.5


@pytest.mark.parametrize("size", [(40, 40), (41, 29), (16, 50), (9, 40)])
def test_a_function_of_single_pixels_is_the_same_in_pieces(size):
    x = jax.random.normal(jax.random.key(0), (2, *size, 3))
    found = tiles.tiled(lambda patch: jnp.sin(patch), x, 16, 4)
    np.testing.assert_allclose(found, np.sin(x), atol=1e-6)


def test_enlarging_and_shrinking_functions():
    x = jax.random.normal(jax.random.key(1), (1, 24, 40, 2))
    grown = tiles.tiled(lambda patch: jnp.repeat(jnp.repeat(patch, 4, 1), 4, 2), x, 8, 4)
    np.testing.assert_allclose(grown, np.repeat(np.repeat(x, 4, 1), 4, 2), atol=1e-6)
    back = tiles.tiled(lambda patch: patch[:, ::4, ::4], grown, 32, 16)
    np.testing.assert_allclose(back, x, atol=1e-6)


def test_patches_with_something_of_their_own():
    own = jnp.asarray([1.0, 2.0, 4.0])
    assert tiles.corners(4, 12, 4, 0).tolist() == [[0, 0], [0, 4], [0, 8]]
    found = tiles.tiled(lambda patch, number: patch + number, jnp.zeros((1, 4, 12, 1)), 4, 0, each=(own,))
    np.testing.assert_allclose(found[0, 0, :, 0], np.repeat(own, 4))
    only = tiles.tiled(lambda patch, number: patch + number, jnp.zeros((1, 4, 4, 1)), 4, 0, each=(own[2:],))
    np.testing.assert_allclose(only, np.full((1, 4, 4, 1), 4.0))


def test_no_seams_where_patches_disagree():
    """Each patch is shifted by its own mean; the blend moves from one to the next in small steps."""
    x = jnp.tile(jnp.linspace(0, 1, 64)[None, None, :, None], (1, 16, 1, 1))

    def mean(patch):
        return jnp.broadcast_to(patch.mean((1, 2), keepdims=True), patch.shape)

    found = np.asarray(tiles.tiled(mean, x, 16, 8))
    assert np.abs(np.diff(found[0, 8, :, 0])).max() < 0.05  # the means are 0.127 apart


def test_patches_are_normalized_alike():
    """Groups that are normalized by the moments of all patches, which do not overlap here, are those of the whole."""
    norm = layers.GroupNorm(groups=2, epsilon=1e-5)
    x = jax.random.normal(jax.random.key(0), (2, 8, 16, 4)) * jnp.linspace(0, 3, 16)[:, None] + jnp.arange(4)
    params = {"params": {"scale": jnp.arange(1.0, 5), "bias": jnp.arange(4.0)}}

    def function(patch, moments):
        return norm.apply(params | ({"moments": moments} if moments else {}), patch)

    def moments(patch):
        return norm.apply(params, patch, mutable=["moments"])[1]["moments"]

    whole = norm.apply(params, x)
    np.testing.assert_allclose(tiles.alike(function, moments, x, 4, 0), whole, atol=1e-5)
    np.testing.assert_allclose(tiles.alike(function, moments, x, 16, 4), whole, atol=1e-5)  # one patch
    assert np.abs(tiles.tiled(lambda patch: norm.apply(params, patch), x, 4, 0) - whole).max() > 1
    assert set(norm.init(jax.random.key(0), x)) == {"params"}
