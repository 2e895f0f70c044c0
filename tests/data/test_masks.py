"""Inpainting masks: what LaMa's configs say of them, measured on many."""

import math

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from latent_diffusion.data import masks
from latent_diffusion.errors import UserError

PRESETS = ("narrow", "medium", "wide", "boxes", "mixed")


def _masks(preset, count, size=256):
    return np.stack([masks.random_mask(size, preset, np.random.default_rng(seed))[..., 0] for seed in range(count)])


def _drawn(draw, options, rng, size=256):
    canvas = Image.new("L", (size, size))
    draw(ImageDraw.Draw(canvas), size, options, rng)
    return np.array(canvas)


def _extent(mask):
    """First and last masked row and column."""
    rows, columns = np.nonzero(mask)
    return rows.min(), rows.max(), columns.min(), columns.max()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [32, 64, 256])
def test_masks_are_zeros_and_ones_and_never_empty(preset, size):
    for seed in range(20):
        mask = masks.random_mask(size, preset, np.random.default_rng(seed))
        assert mask.shape == (size, size, 1) and mask.dtype == np.uint8
        assert set(np.unique(mask).tolist()) in ({0, 1}, {1}) and mask.any()


@pytest.mark.parametrize("preset", PRESETS)
def test_the_seed_decides(preset):
    first, again = _masks(preset, 8, 64), _masks(preset, 8, 64)
    np.testing.assert_array_equal(first, again)
    assert len({mask.tobytes() for mask in first}) == 8


@pytest.mark.parametrize("preset", ["wide", "boxes", "mixed"])
def test_masks_scale_with_the_picture(preset):
    large, small = _masks(preset, 20), _masks(preset, 20, 64)
    shrunk = large.reshape(20, 64, 4, 64, 4).mean(axis=(2, 4))
    # Only at borders of the masks may they differ: a pixel or two at each of the few edges.
    assert np.abs(shrunk - small).mean() < 0.03
    assert np.abs(large.mean(axis=(1, 2)) - small.mean(axis=(1, 2))).max() < 0.04


@pytest.mark.parametrize("preset, largest", [("narrow", 0.5), ("medium", 0.5), ("wide", 0.5), ("mixed", 1.0)])
def test_no_more_than_the_largest_area_is_masked(preset, largest):
    areas = _masks(preset, 150, 128).mean(axis=(1, 2))
    assert 0 < areas.min() and areas.max() <= largest
    assert areas.max() > (0.5 if preset == "mixed" else 0.3)  # the limit is not idle


def test_strokes_get_wider_from_preset_to_preset():
    def half_width(mask):  # the mean distance to the border of the mask is a quarter of a stroke's width
        return ndimage.distance_transform_edt(mask)[mask > 0].mean()

    means, errors = [], []
    for preset in ("narrow", "medium", "wide"):
        strokes = masks.PRESETS[preset].strokes
        widths = [half_width(_drawn(masks._draw_strokes, strokes, np.random.default_rng(seed))) for seed in range(40)]
        means.append(np.mean(widths))
        errors.append(np.std(widths) / math.sqrt(len(widths)))
    assert means[0] + 4 * math.hypot(*errors[:2]) < means[1]
    assert means[1] + 4 * math.hypot(*errors[1:]) < means[2]


@pytest.mark.parametrize("size", [128, 256])
def test_a_stroke_is_as_long_and_wide_as_it_may_be(size):
    # One part, 10 long and 5 wide with round ends (in 256 pixels): 10 x 5 + pi 2.5^2 pixels, less at the border
    unit, areas = size / 256, []
    for seed in range(300):
        mask = _drawn(masks._draw_strokes, masks.Strokes(1, 0, 1, 1), np.random.default_rng(seed), size)
        top, bottom, left, right = _extent(mask)
        assert max(bottom - top, right - left) <= 5 * 10 * unit + 5 * unit + 2  # five turns at most
        areas.append(mask.sum())
    one = (10 * 5 + math.pi * 2.5**2) * unit**2
    assert 0.3 * one < min(areas) < 1.35 * one
    # Parts: 1 to 5, each 10 x 5 more; those that turn back cover each other, ends are drawn to whole pixels.
    assert one < np.mean(areas) < (3 * 10 * 5 + math.pi * 2.5**2) * unit**2 * 1.4


def test_boxes_keep_to_the_margin_and_to_their_sizes():
    # One box with sides U(30, 150): area 90^2 on average, with variance (90^2 + 120^2 / 12)^2 - 90^4
    rng, areas, starts = np.random.default_rng(0), [], []
    for _ in range(400):
        mask = _drawn(masks._draw_boxes, masks.Boxes(1, 30, 150, 10), rng)
        top, bottom, left, right = _extent(mask)
        assert 10 <= min(top, left) and max(bottom, right) <= 245
        assert 30 <= bottom - top + 1 <= 150 and 30 <= right - left + 1 <= 150
        assert mask.sum() == (bottom - top + 1) * (right - left + 1)
        areas.append(mask.sum())
        starts.append((left + right + 1) / 2)
    error = math.sqrt((90**2 + 120**2 / 12) ** 2 - 90**4) / 20
    assert abs(np.mean(areas) - 90**2) < 4 * error
    assert abs(np.mean(starts) - 128) < 4 * np.std(starts) / 20
    for mask in _masks("boxes", 40):
        assert not (mask[:10].any() or mask[246:].any() or mask[:, :10].any() or mask[:, 246:].any())


def test_the_number_of_boxes():
    # Small ones, hardly ever joined: 1, 2, 3 or 4, each for a quarter of the masks
    rng, count = np.random.default_rng(0), 400
    found = [ndimage.label(_drawn(masks._draw_boxes, masks.Boxes(4, 3, 4, 0), rng))[1] for _ in range(count)]
    for number in (1, 2, 3, 4):
        assert abs(np.mean(np.array(found) == number) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / count) + 0.01


def test_half_of_the_mixed_masks_are_boxes():
    # Up to four boxes have up to nine kinds of rows and of columns; the round ends of a stroke have many more.
    kinds = [[len({line.tobytes() for line in lines}) for lines in (mask, mask.T)] for mask in _masks("mixed", 300)]
    assert abs(np.mean(np.max(kinds, axis=1) <= 9) - 0.5) < 4 * math.sqrt(0.25 / 300)


def test_places_are_the_same_on_all_sides():
    share = _masks("mixed", 300, 64).mean(axis=0)
    quarters = [share[a : a + 32, b : b + 32].mean() for a in (0, 32) for b in (0, 32)]
    # The standard error of a mask's part that falls into one quarter, at most: sqrt(p (1 - p) / 300)
    assert max(quarters) - min(quarters) < 4 * math.sqrt(0.25 / 300)


def test_the_numbers_of_lamas_configs():
    # configs/data_gen/random_{thin,medium,thick}_256.yaml (max_tamper_area 0.5); training: abl-04-256-mh-dist.yaml
    numbers = {  # min_times, max_times, max_len, max_width; max_times, bbox_min_size, bbox_max_size, margin; box_proba
        "narrow": ((4, 50, 40, 10), None, 0), "medium": ((4, 5, 100, 50), (5, 10, 50, 0), 0.3),
        "wide": ((1, 5, 200, 100), (3, 30, 150, 10), 0.3), "mixed": ((1, 5, 200, 100), (4, 30, 150, 10), 1)}
    for name, (strokes, boxes, weight) in numbers.items():
        preset = masks.PRESETS[name]
        assert preset.strokes == masks.Strokes(*strokes)
        assert preset.boxes == (boxes and masks.Boxes(*boxes))
        assert preset.box_share == pytest.approx(weight / (1 + weight))  # irregular_proba is 1
        assert preset.max_area == (1 if name == "mixed" else 0.5)


def test_an_unknown_preset_is_named():
    with pytest.raises(UserError, match="conditioning.inpainting.masks: unknown value 'thin'; choose from narrow, "):
        masks.random_mask(32, "thin", np.random.default_rng(0))


def test_tiny_pictures():
    for preset in PRESETS:
        for seed in range(60):
            assert masks.random_mask(16, preset, np.random.default_rng(seed)).any()
