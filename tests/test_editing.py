"""What is drawn around, on top of, or away from something else: closed forms of a model that predicts a constant."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion import editing, images
from latent_diffusion.diffusion import samplers
from latent_diffusion.diffusion import schedule as schedule_lib
from latent_diffusion.errors import UserError
from tests import tiny_models

SCALE = 0.5
PICTURE = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)


def constant_model(eps=0.0, **options):
    model = tiny_models.constant_pixels(eps=eps, **options)
    with model.config.unlocked():
        model.config.sampling.steps = 4
    return model


@pytest.fixture(scope="module")
def zero():
    return constant_model()


def scaled(picture):
    return SCALE * (picture.astype(np.float32) / 127.5 - 1)


def noise(seed, indices):
    return np.asarray(samplers.initial_noise(jax.random.key(seed), jnp.asarray(indices), (len(indices), 8, 8, 3)))


def alphas():
    return np.sqrt(np.cumprod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 20) ** 2))


def test_nothing_to_paint(zero):
    got = zero.sample(image=PICTURE, mask=np.zeros((8, 8)), num_samples=2, eta=1.0)
    np.testing.assert_array_equal(got.images, np.stack([PICTURE] * 2))
    np.testing.assert_array_equal(got.latents, np.asarray(zero.encode(np.stack([PICTURE] * 2) / np.float32(127.5) - 1)))


def test_known_pixels_stay(zero):
    mask = np.zeros((8, 8), np.uint8)
    mask[2:5, 3:] = 255
    got = zero.sample(image=PICTURE, mask=mask, num_samples=2, eta=1.0)
    np.testing.assert_array_equal(got.images[:, mask == 0], np.stack([PICTURE[mask == 0]] * 2))
    assert (got.images[:, mask > 0] != PICTURE[mask > 0]).mean() > 0.9


@pytest.mark.parametrize("strength, level", [(0.5, 9), (1.0, 19)])
def test_image_to_image_begins_on_the_way(zero, strength, level):
    """eps = 0: DDIM divides by alpha, so that z_0 = (alpha x + sigma noise) / alpha at the level that is begun at."""
    got = zero.sample(image=PICTURE, strength=strength, num_samples=2, seed=3).latents
    alpha = alphas()[level]  # clean spacing of 20: steps at 4, 9, 14, 19; the last two of them, or all
    expected = scaled(PICTURE) + np.sqrt(1 - alpha**2) / alpha * noise(3, [0, 1])
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_noise_between_two_seeds(zero):
    amounts = [0.0, 0.5, 1.0]
    got = zero.sample(variation=amounts, variation_seed=9, seed=3, same_noise=True).latents
    got = got * alphas()[-1]
    one, other = noise(3, [0])[0], noise(9, [0])[0]
    np.testing.assert_allclose(got[0], one, atol=1e-5)
    np.testing.assert_allclose(got[2], other, atol=1e-5)
    angle = np.arccos(np.sum(one * other) / np.linalg.norm(one) / np.linalg.norm(other))
    np.testing.assert_allclose(got[1], (one + other) / (2 * np.cos(angle / 2)), atol=1e-5)


def test_some_of_the_pictures_and_the_way_there(zero):
    whole = zero.sample(num_samples=4, eta=1.0, frames=2)
    some = zero.sample(num_samples=4, eta=1.0, frames=2, only=[3, 1], batch_size=4)
    np.testing.assert_allclose(some.latents, whole.latents[[3, 1]], atol=1e-6)
    assert whole.frames.shape == (4, 2, 8, 8, 3)
    np.testing.assert_array_equal(whole.frames[:, -1], whole.images)  # the last step is the prediction itself


def test_given_noise(zero):
    z = np.random.default_rng(1).standard_normal((2, 8, 8, 3)).astype(np.float32)
    np.testing.assert_allclose(zero.sample(noise=z, num_samples=2).latents, z / alphas()[-1], atol=1e-5)


def test_away_from_a_weaker_model(zero):
    """Strong eps 0, weak eps 0.1: guidance of scale 3 predicts 0.1 + 3 (0 - 0.1)."""
    got = zero.sample(weak=constant_model(0.1), guidance_scale=3.0, num_samples=1)
    same = constant_model(-0.2).sample(num_samples=1)
    np.testing.assert_allclose(got.latents, same.latents, atol=1e-5)
    never = zero.sample(weak=constant_model(0.1), guidance_scale=3.0, guidance_interval=(100, 200), num_samples=1)
    np.testing.assert_allclose(never.latents, zero.sample(num_samples=1).latents, atol=1e-5)
    with pytest.raises(UserError, match="guidance_scale"):
        zero.sample(weak=zero)
    other = dataclasses.replace(zero, schedule=schedule_lib.make_schedule("linear", 20))
    with pytest.raises(UserError, match="same latents.* differs in its schedule"):
        zero.sample(weak=other, guidance_scale=2.0)
    with pytest.raises(UserError, match="differs in its scale factor"):
        zero.sample(weak=dataclasses.replace(zero, scale_factor=3.0), guidance_scale=2.0)


def correction(eps, z_t, t, shift):
    return eps + shift


def test_a_correction_of_the_user(zero):
    got = zero.sample(correction=(correction, np.float32(-0.2)), num_samples=1)
    np.testing.assert_allclose(got.latents, constant_model(-0.2).sample(num_samples=1).latents, atol=1e-5)


def test_samples_are_guided_to_a_small_picture(zero):
    small = PICTURE[::4, ::4]

    def distance(scale):
        x = zero.sample(upsample=small, upsample_scale=scale, num_samples=1).latents / SCALE
        low = np.asarray(jax.image.resize(x, (1, 2, 2, 3), "cubic"))
        return np.square(low - (small / 127.5 - 1)).mean()

    assert distance(80.0) < 0.1 * distance(0.0)


def test_sizes_that_the_unet_does_not_divide():
    """The middle of a larger picture: 9 x 7 of 10 x 8."""
    got = constant_model(channel_mult=(1, 1)).sample(size=(9, 7), num_samples=1, steps=1)
    whole = np.asarray(samplers.initial_noise(jax.random.key(0), jnp.arange(1), (1, 10, 8, 3))) / alphas()[-1]
    assert got.images.shape == (1, 9, 7, 3) and got.latents.shape == (1, 9, 7, 3)
    np.testing.assert_allclose(got.latents, whole[:, :9, :7], atol=1e-5)


def test_outpaint():
    larger, mask = editing.outpaint(PICTURE, (1, 2, 3, 4))
    assert larger.shape == (12, 14, 3) and mask.shape == (12, 14)
    np.testing.assert_array_equal(larger[1:9, 4:12], PICTURE)
    assert mask[1:9, 4:12].max() == 0 and (mask == 255).sum() == 12 * 14 - 64
    assert images.is_white(mask).sum() == 12 * 14 - 64


@pytest.mark.parametrize("options, message", [
    (dict(image=PICTURE), "say what to do with it"),
    (dict(strength=0.5), "strength needs an image"),
    (dict(mask=np.zeros((8, 8))), "mask needs an image"),
    (dict(image=PICTURE, strength=0.0), "strength=0.0 must be above 0"),
    (dict(image=PICTURE, mask=np.zeros((4, 8))), "the mask has 4x8 pixels, the picture 8x8"),
    (dict(image=PICTURE[..., :1], strength=0.5), "3 channels"),
    (dict(upsample=PICTURE[:3]), "do not go into 8x8"),
    (dict(variation=0.5), "must be given together"),
    (dict(variation=1.5, variation_seed=1), "between 0 and 1"),
    (dict(variation=0.5, variation_seed=2**32), "variation_seed=4294967296 must lie between 0 and 4294967295"),
    (dict(variation=0.5, variation_seed=1, noise=np.zeros((1, 8, 8, 3))), "leave noise or variation out"),
    (dict(noise=np.zeros((1, 4, 4, 3))), r"it must be \(n, 8, 8, 3\)"),
    (dict(negative_prompts="red"), "takes no negative_prompts"),
    (dict(quantize_x0=True), "VQ first stage"),
    (dict(guidance_interval=(2, 1)), "low < high"),
    (dict(threshold=2.0), "threshold=2.0 must be a finite number, 0 to 1"),
    (dict(only=[]), "name at least one number"),
    (dict(colour=1), "unknown setting colour"),
])
def test_mistakes(zero, options, message):
    with pytest.raises(UserError, match=message):
        zero.sample(**options)
