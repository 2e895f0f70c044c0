"""Pictures made smaller: bicubic against Pillow, the steps of BSRGAN against SciPy, Pillow and closed forms."""

import collections
import dataclasses
import io
import math
import sys

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats

from latent_diffusion.data import degradations
from latent_diffusion.errors import UserError

FULL, LIGHT = degradations.STRENGTHS["bsrgan"], degradations.STRENGTHS["bsrgan_light"]


@pytest.fixture
def cv2():
    return pytest.importorskip("cv2")


def _picture(height, width, channels=3, seed=0):
    """Blurred noise, as rough as a photograph."""
    noise = np.random.default_rng(seed).normal(size=(height, width, channels))
    smooth = sum(ndimage.gaussian_filter(noise, (s, s, 0), mode="mirror") * s for s in (1, 3, 8))
    return np.clip(128 + 60 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def _rngs(count, start=0):
    return [np.random.default_rng(seed) for seed in range(start, start + count)]


def _psnr(some, other):
    return 10 * math.log10(255**2 / np.mean((some.astype(float) - other) ** 2))


# --- all kinds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("channels", [1, 3])
def test_bicubic_is_pillows(factor, channels):
    image = _picture(32, 48, channels)
    small = degradations.degrade(image, factor, "bicubic", np.random.default_rng(0))
    assert small.shape == (32 // factor, 48 // factor, channels) and small.dtype == np.uint8
    for channel in range(channels):
        expected = Image.fromarray(image[..., channel]).resize((48 // factor, 32 // factor), Image.BICUBIC)
        np.testing.assert_array_equal(small[..., channel], np.asarray(expected))


@pytest.mark.parametrize("kind", ["bicubic", "bsrgan"])
@pytest.mark.parametrize("height, width", [(30, 32), (32, 30)])
def test_sides_that_the_factor_does_not_divide(kind, height, width):
    with pytest.raises(UserError, match=f"of {height}x{width} pixels cannot become 4 times smaller"):
        degradations.degrade(_picture(height, width), 4, kind, np.random.default_rng(0))


def test_an_unknown_kind_is_named():
    with pytest.raises(UserError, match="low_res.degradation: unknown value 'area'; choose from bicubic, bsrgan, bsr"):
        degradations.degrade(_picture(8, 8), 4, "area", np.random.default_rng(0))


def test_a_missing_opencv_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match="need OpenCV: pip install opencv-python-headless"):
        degradations.degrade(_picture(16, 16), 4, "bsrgan_light", np.random.default_rng(0))


@pytest.mark.parametrize("kind", ["bsrgan", "bsrgan_light", "bsrgan_plus"])
@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_shapes(cv2, kind, factor):
    for channels in (1, 3):
        image = _picture(6 * factor, 9 * factor, channels)
        for rng in _rngs(12):
            small = degradations.degrade(image, factor, kind, rng)
            assert small.shape == (6, 9, channels) and small.dtype == np.uint8


@pytest.mark.parametrize("kind", ["bsrgan", "bsrgan_light", "bsrgan_plus"])
def test_the_seed_decides(cv2, kind):
    image = _picture(32, 32)
    first, again = ([degradations.degrade(image, 4, kind, rng) for rng in _rngs(10)] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert len({small.tobytes() for small in first}) == 10


def test_light_hurts_less(cv2):
    image = _picture(96, 96)
    clean = np.asarray(Image.fromarray(image).resize((24, 24), Image.BICUBIC))
    full, light = (np.array([_psnr(degradations.degrade(image, 4, kind, rng), clean) for rng in _rngs(40, 100)])
                   for kind in ("bsrgan", "bsrgan_light"))
    error = math.hypot(full.std(), light.std()) / math.sqrt(40)
    assert light.mean() - full.mean() > 4 * error
    assert full.mean() > _psnr(clean, clean[::-1]) + 3  # and both still show the picture


def test_pictures_stay_in_place(cv2):
    # The center of a blob: pixel p of the large picture lies at (p + 0.5) / 4 - 0.5 in the small one.
    y, x = np.mgrid[:64, :64]
    blob = np.exp(-((y - 26.3) ** 2 + (x - 36.7) ** 2) / (2 * 6**2)).astype(np.float32)[..., None]
    calm = dataclasses.replace(FULL, blurs=0, noise=(0, 0), quality=(95, 95))
    found = []
    for rng in _rngs(60):
        small = np.maximum(degradations._bsrgan(blob, 4, calm, rng)[..., 0] - 0.1, 0)
        found.append([np.sum(small * axis) / small.sum() for axis in np.mgrid[:16, :16]])
    offset = np.mean(found, axis=0) - ((np.array([26.3, 36.7]) + 0.5) / 4 - 0.5)
    assert np.abs(offset).max() < 0.06  # a kernel shifted the wrong way would move a quarter of them by 0.75


# --- blur -------------------------------------------------------------------------------------------------------------


def _moments(kernel):
    y, x = np.mgrid[: len(kernel), : len(kernel)]
    mean = np.array([np.sum(kernel * x), np.sum(kernel * y)])
    dx, dy = x - mean[0], y - mean[1]
    mixed = np.sum(kernel * dx * dy)
    return mean, np.array([[np.sum(kernel * dx**2), mixed], [mixed, np.sum(kernel * dy**2)]])


@pytest.mark.parametrize("side", [24, 25])
@pytest.mark.parametrize("std, center", [(1.0, None), (2.0, None), (1.5, 10.5)])
def test_isotropic_kernels(side, std, center):
    kernel = degradations.gaussian_kernel(side, std, center)
    mean, covariance = _moments(kernel)
    assert kernel.shape == (side, side) and abs(kernel.sum() - 1) < 1e-12
    np.testing.assert_allclose(mean, (side - 1) / 2 if center is None else center, atol=1e-6)
    np.testing.assert_allclose(covariance, std**2 * np.eye(2), atol=1e-4)


@pytest.mark.parametrize("side", [24, 25])
@pytest.mark.parametrize("angle", [0.0, 0.5, 2.0])
def test_anisotropic_kernels(side, angle):
    kernel = degradations.anisotropic_kernel(side, angle, 5.0, 1.5)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    expected = turn @ np.diag([5.0, 1.5]) @ turn.T
    mean, covariance = _moments(kernel)
    assert abs(kernel.sum() - 1) < 1e-12
    np.testing.assert_allclose(mean, (side - 1) / 2, atol=1e-9)
    np.testing.assert_allclose(covariance, expected, atol=2e-3)
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    density = stats.multivariate_normal.pdf(np.stack([x, y], axis=-1), cov=expected)
    np.testing.assert_allclose(kernel, density / density.sum(), atol=1e-12)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_narrow_kernels_of_even_sides():
    # The four middle pixels share everything, as in the limit.
    kernel = degradations.gaussian_kernel(6, 0.005)
    np.testing.assert_allclose(kernel[2:4, 2:4], 0.25)
    assert abs(kernel.sum() - 1) < 1e-12


def test_kernels_without_width_change_nothing(cv2):
    for kernel in (degradations.gaussian_kernel(7, 0.0), degradations.anisotropic_kernel(7, 1.0, 1e-3, 1e-3)):
        image = _picture(16, 20).astype(np.float32) / 255
        np.testing.assert_allclose(degradations._convolve(image, kernel), image, atol=1e-6)


@pytest.mark.parametrize("side", [4, 5, 14, 25])
@pytest.mark.parametrize("shape", [(32, 20, 3), (6, 9, 1)])
def test_convolution_is_scipys(cv2, side, shape):
    rng = np.random.default_rng(0)
    image, kernel = rng.random(shape, np.float32), rng.random((side, side))
    expected = ndimage.convolve(image.astype(float), kernel[..., None], mode="mirror")
    np.testing.assert_allclose(degradations._convolve(image, kernel), expected, rtol=1e-4)


@pytest.mark.parametrize("strength, scale", [(FULL, 1), (LIGHT, 1 / 4)])
def test_how_wide_the_blurs_are(cv2, strength, scale):
    """The variance that a blur gives a single point, over many draws: half of the blurs are isotropic with a standard
    deviation U(0, 2.8), 2.8^2 / 3 on average; half have two variances U(0, 8), 4 on average. Light: a quarter of each.
    """
    point = np.zeros((61, 61, 1), np.float32)
    point[30, 30] = 1
    strength = dataclasses.replace(strength, anisotropic_sides=(25,), isotropic_sides=(25,))  # so that little is cut
    found = [np.trace(_moments(degradations._blur(point, 4, strength, rng)[..., 0])[1]) / 2 for rng in _rngs(400)]
    expected = ((scale * 2.8) ** 2 / 3 + scale * 4) / 2
    assert abs(np.mean(found) - expected) < 4 * np.std(found) / 20


@pytest.mark.parametrize(
    "strength, sides", [(FULL, set(range(7, 26, 2))), (LIGHT, set(range(5, 15)))], ids=["bsrgan", "light"])
def test_sides_of_kernels(monkeypatch, strength, sides):
    drawn = []
    monkeypatch.setattr(degradations, "_convolve", lambda x, kernel: drawn.append(len(kernel)) or x)
    for rng in _rngs(400):
        degradations._blur(np.zeros((4, 4, 1), np.float32), 4, strength, rng)
    assert set(drawn) == sides
    if strength is LIGHT:  # half of 5 to 14, half of 5 to 7
        assert abs(np.mean(np.array(drawn) <= 7) - 0.65) < 4 * math.sqrt(0.65 * 0.35 / 400)


@pytest.mark.parametrize("strength, blurs", [(FULL, 2), (LIGHT, 1)], ids=["bsrgan", "light"])
def test_how_often_each_step_is_taken(cv2, monkeypatch, strength, blurs):
    taken = collections.Counter()
    for name in ("_blur", "_jpeg", "_add_noise", "_shrink"):
        monkeypatch.setattr(degradations, name, lambda x, *rest, name=name: taken.update([name]) or x)
    count, sizes = 400, []
    monkeypatch.setattr(degradations, "_resize", lambda x, height, width, rng: sizes.append(height) or np.zeros(
        (height, width, 1), np.float32))
    monkeypatch.setattr(degradations, "_shrink_smoothly", lambda x, height, width: sizes.append(-height) or x)
    for rng in _rngs(count):
        degradations._bsrgan(np.zeros((16, 16, 1), np.float32), 4, strength, rng)
    assert (taken["_blur"], taken["_add_noise"], taken["_shrink"]) == (blurs * count, count, count)
    assert abs(taken["_jpeg"] / count - 1.9) < 4 * math.sqrt(0.09 / count)
    assert sizes.count(4) == count
    for half in (8, -8):  # a quarter is halved first, half of those with antialiasing
        assert abs(sizes.count(half) / count - 0.125) < 4 * math.sqrt(0.125 * 0.875 / count)


# --- shrinking --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_picking_takes_the_middle_of_each_block(cv2, factor):
    picks = dataclasses.replace(FULL, resize_chance=0.0)
    y, x = np.mgrid[:96, :96].astype(np.float32)
    for rng in _rngs(10):
        small = degradations._shrink(np.stack([x, y], axis=-1) / 100, factor, picks, rng)
        inner = slice(30 // factor, 60 // factor)  # away from the mirrored border
        middle = np.arange(96 // factor)[inner] * factor + (factor - 1) / 2
        np.testing.assert_allclose(100 * small[inner, inner, 0] - middle[None], 0, atol=0.02)
        np.testing.assert_allclose(100 * small[inner, inner, 1] - middle[:, None], 0, atol=0.02)


@pytest.mark.parametrize("strength, chance", [(FULL, 0.75), (LIGHT, 0.8)], ids=["bsrgan", "light"])
def test_how_small_pictures_get_in_between(cv2, strength, chance):
    # 1 / U(1, 2 factor) of the side, or exactly 1 / factor where they are picked
    image = np.zeros((400, 400, 1), np.float32)
    sides = np.array([len(degradations._shrink(image, 2, strength, rng)) for rng in _rngs(200)])
    assert sides.min() >= 100 and sides.max() <= 400
    resized = sides[sides != 200]
    assert abs(len(resized) / 200 - chance) < 4 * math.sqrt(chance * (1 - chance) / 200)
    assert abs(np.mean(400 / resized) - 2.5) < 4 * (3 / math.sqrt(12)) / math.sqrt(len(resized))


# --- noise and JPEG ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength, lowest, highest", [(FULL, 2, 25), (LIGHT, 1, 2)])
def test_levels_and_kinds_of_noise(strength, lowest, highest):
    grey, draws, kinds, levels = np.full((64, 64, 3), 0.5, np.float32), 300, collections.Counter(), []
    for rng in _rngs(draws):
        noise = (degradations._add_noise(grey, strength, rng) - 0.5).reshape(-1, 3) * 255
        stds = noise.std(axis=0)
        level = math.sqrt(np.mean(stds**2))
        whole = abs(level - round(level)) < 5 / 90 * level
        correlations = np.corrcoef(noise.T)[np.triu_indices(3, 1)]
        assert np.all(np.abs(noise.mean(axis=0)) < 5 * stds / 64)
        if np.ptp(noise, axis=1).max() == 0:
            kind = "alike"
        # standard errors from 4096 pixels: 1/64 of a correlation, 1/90 of a standard deviation
        elif np.abs(correlations).max() < 5 / 64 and np.ptp(stds) < 6 / 90 * stds.mean() and whole:
            kind = "of each channel"
        else:
            kind = "correlated"
            assert stds.max() < highest * 1.1
        kinds[kind] += 1
        if kind != "correlated":
            assert whole
            levels.append(level)
    for kind, share in (("alike", 0.4), ("of each channel", 0.4), ("correlated", 0.2)):
        assert abs(kinds[kind] / draws - share) < 4 * math.sqrt(share * (1 - share) / draws)
    assert round(min(levels)) == lowest and round(max(levels)) == highest
    error = math.sqrt(((highest - lowest + 1) ** 2 - 1) / 12 / len(levels))
    assert abs(np.mean(levels) - (lowest + highest) / 2) < 4 * error


def test_noise_of_grey_pictures():
    levels = [degradations._add_noise(np.full((32, 32, 1), 0.5, np.float32), LIGHT, rng).std() * 255
              for rng in _rngs(40)]
    assert {round(float(level)) for level in levels} == {1, 2}


def test_noise_stays_in_range():
    for value in (0, 1):
        noisy = degradations._add_noise(np.full((16, 16, 3), value, np.float32), FULL, np.random.default_rng(0))
        assert 0 <= noisy.min() < noisy.max() <= 1 and noisy.dtype == np.float32


def test_poisson_noise_counts_photons():
    """Mean x and variance x / photons; photons from 100 to 10,000, uniform in the exponent; half the time alike."""
    value, draws, alike, exponents = 153 / 255, 300, 0, []
    for rng in _rngs(draws):
        noisy = degradations._add_poisson_noise(np.full((48, 48, 3), value, np.float32), rng)
        of_one = noisy[..., 0].astype(float)
        assert abs(of_one.mean() - value) < 5 * of_one.std() / 48
        exponents.append(math.log10(value / of_one.var()))
        alike += np.ptp(noisy - value, axis=2).max() < 1e-6
    assert abs(alike / draws - 0.5) < 4 * 0.5 / math.sqrt(draws)
    # the variance of 2304 pixels is known to 3 %, 0.013 of the exponent
    assert 1.93 < min(exponents) < 2.1 and 3.9 < max(exponents) < 4.07
    assert abs(np.mean(exponents) - 3) < 4 * (2 / math.sqrt(12)) / math.sqrt(draws)


def test_speckle_noise_is_in_proportion():
    picture = np.zeros((64, 64, 3), np.float32)
    picture[:, 32:], picture[:32, 32:] = 0.5, 0.25
    level25 = dataclasses.replace(FULL, noise=(25, 25))
    ratios = []
    for rng in _rngs(20):
        noise = degradations._add_speckle_noise(picture, level25, rng) - picture
        assert np.all(noise[:, :32] == 0)
        ratios.append(noise[32:, 32:].std() / noise[:32, 32:].std())
        assert noise[32:, 32:].std() < 0.5 * 25 / 255 * 1.1
    assert abs(np.mean(ratios) - 2) < 0.05  # standard error 2 / sqrt(2 * 1024) / sqrt(20) or less


def test_steps_of_the_longer_chain(monkeypatch):
    """Twice each step, but one JPEG before the last; in its own order half of the time."""
    orders, count = [], 600
    short = {"_blur": "b", "_rescale": "r", "_add_noise": "n", "_add_poisson_noise": "p", "_add_speckle_noise": "s",
             "_jpeg": "j", "_resize": "f"}
    for name, letter in short.items():
        monkeypatch.setattr(degradations, name, lambda x, *rest, letter=letter: orders.append(letter) or x)
    texts = []
    for rng in _rngs(count):
        orders.clear()
        degradations._bsrgan_plus(np.zeros((8, 8, 1), np.float32), 4, FULL, rng)
        texts.append("".join(orders))
    assert all(text.endswith("fj") and sorted(text.translate({112: None, 115: None})) == sorted("bbrrnnfjj")
               for text in texts)
    for letter in "ps":
        rare = sum(text.count(letter) for text in texts) / (2 * count)
        assert abs(rare - 0.1) < 4 * math.sqrt(0.09 / (2 * count))
    plain = sum(text.translate({112: None, 115: None}) == "brnjbrnfj" for text in texts) / count
    expected = 0.5 + 0.5 / (math.factorial(7) / 8)  # or by chance: 7 steps, three kinds of them twice
    assert abs(plain - expected) < 4 * 0.5 / math.sqrt(count)


def test_rescaling_of_the_longer_chain(cv2):
    sides = np.array([len(degradations._rescale(np.zeros((400, 400, 1), np.float32), 4, rng)) for rng in _rngs(400)])
    shares = [np.mean(sides < 400), np.mean(sides == 400), np.mean(sides > 400)]
    np.testing.assert_allclose(shares, [0.7, 0.1, 0.2], atol=4 * math.sqrt(0.21 / 400))
    assert 50 <= sides.min() < 65 and 780 < sides.max() < 800


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("quality", [30, 95])
def test_jpeg_is_pillows(cv2, channels, quality):
    image = _picture(48, 64, channels)
    strength = dataclasses.replace(FULL, quality=(quality, quality))
    found = degradations._jpeg(image.astype(np.float32) / 255, strength, np.random.default_rng(0)) * 255
    file = io.BytesIO()
    Image.fromarray(image if channels == 3 else image[..., 0]).save(file, "jpeg", quality=quality, subsampling="4:2:0")
    expected = np.asarray(Image.open(file), float).reshape(image.shape)
    assert np.abs(found - expected).mean() < 0.2 < 0.8 < np.abs(image - expected).mean()
    assert found.shape == image.shape


def test_jpeg_qualities(cv2, monkeypatch):
    """Those of the reference, both ends included."""
    asked, encode = [], cv2.imencode
    monkeypatch.setattr(cv2, "imencode", lambda suffix, pixels, options: asked.append(options[1]) or encode(
        suffix, pixels, options))
    for strength, ends in ((FULL, (30, 95)), (LIGHT, (80, 95))):
        asked.clear()
        for rng in _rngs(600):
            degradations._jpeg(np.zeros((8, 8, 1), np.float32), strength, rng)
        assert (min(asked), max(asked)) == ends
