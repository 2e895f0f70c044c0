"""Tokens of layouts, against numbers worked out by hand from the reference's rules, and every complaint."""

import collections
import json
import math
import re

import numpy as np
import pytest

from latent_diffusion import defaults, layouts
from latent_diffusion.errors import UserError

CROP = (0.1, 0.2, 0.5, 0.6)  # left, top, width, height
NAMES = ("dog", "cat", "red apple")


def _options(**changes):
    options = defaults.diffusion().conditioning.layout
    options.update(dict(num_classes=5, max_objects=3, crop=False, flags="none") | changes)
    if "max_length" not in changes:
        options.max_length = {"boxes": 3, "centers": 2}[options.form] * options.max_objects + 2 * options.crop
    return options


def _objects(*boxes, labels=None, flags=None):
    labels = range(len(boxes)) if labels is None else labels
    return layouts.Objects(np.array(labels, int), np.array(boxes, float).reshape(-1, 4), flags)


def _place(x, y, side=90):
    return round(y * (side - 1)) * side + round(x * (side - 1))


def _random_boxes(rng, count, step=None):
    corners = np.sort(rng.choice(90, (count, 2, 2)) / 89 if step else rng.random((count, 2, 2)), axis=1)
    corners[:, 1] = np.maximum(corners[:, 1], corners[:, 0] + 1 / 89)
    keep = np.all(corners[:, 1] <= 1, axis=1)
    return np.concatenate([corners[:, 0], corners[:, 1] - corners[:, 0]], axis=1)[keep]


# --- places -----------------------------------------------------------------------------------------------------------


def test_the_example_of_the_reference():
    # taming, objects_center_points.py: of a 4x4 grid, the point in column 2 and row 1 is token 6, the last corner 15
    tokens = layouts.to_tokens(_objects((2 / 3, 1 / 3, 1 / 3, 2 / 3), labels=[3]), _options(vocab_size=16))
    np.testing.assert_array_equal(tokens[:3], [3, 6, 15])
    around = (2 / 3 - 0.1, 1 / 3 - 0.2, 0.2, 0.4)
    tokens = layouts.to_tokens(_objects(around, labels=[4]), _options(vocab_size=16, form="centers"))
    np.testing.assert_array_equal(tokens, [4, 6, 15, 15, 15, 15])


def test_the_grid_of_the_paper_has_90_sides():
    tokens = layouts.to_tokens(_objects((0, 0, 1, 1), (0.1, 0.2, 0.5, 0.7)), _options())
    np.testing.assert_array_equal(tokens, [0, 0, 8099, 1, 18 * 90 + 9, 80 * 90 + 53, 8191, 8191, 8191])
    assert tokens.dtype == np.int32


def test_halves_are_rounded_to_even():
    # 0.5 x 89 = 44.5, which Python's round takes to 44
    tokens = layouts.to_tokens(_objects((0.25, 0.25, 0.5, 0.5)), _options(form="centers"))
    assert tokens[1] == 44 * 90 + 44
    assert layouts.to_tokens(_objects((0.5, 0.5, 0.5, 0.5)), _options())[1] == 44 * 90 + 44


@pytest.mark.parametrize("vocab_size", [16, 100, 8192])
def test_both_forms_of_many_boxes(vocab_size):
    boxes, side = _random_boxes(np.random.default_rng(0), 40), math.isqrt(vocab_size)
    count = len(boxes)
    corners, centers = [], []
    for i, (left, top, width, height) in enumerate(boxes.tolist()):
        corners += [i % 5, _place(left, top, side), _place(left + width, top + height, side)]
        centers += [i % 5, _place(left + width / 2, top + height / 2, side)]
    objects = _objects(*boxes, labels=np.arange(count) % 5)
    for form, expected in (("boxes", corners), ("centers", centers)):
        options = _options(form=form, max_objects=count, vocab_size=vocab_size)
        np.testing.assert_array_equal(layouts.to_tokens(objects, options), expected)


# --- crop and flip ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flip, box, crop",
    [
        (False, [27 * 90 + 18, 53 * 90 + 53], [18 * 90 + 9, 71 * 90 + 53]),
        (True, [27 * 90 + 36, 53 * 90 + 71], [18 * 90 + 36, 71 * 90 + 80]),
    ],
)
def test_with_crop_tokens_boxes_stay_relative_to_the_picture(flip, box, crop):
    # x: 0.1 -> 9, 0.2 -> 18, 0.4 -> 36, 0.6 -> 53, 0.8 -> 71, 0.9 -> 80; y: 0.2 -> 18, 0.3 -> 27, 0.6 -> 53, 0.8 -> 71
    objects = _objects((0.2, 0.3, 0.4, 0.3), labels=[2])
    tokens = layouts.to_tokens(objects, _options(crop=True), crop=CROP, flip=flip)
    np.testing.assert_array_equal(tokens, [2, *box, *[8191] * 6, *crop])


@pytest.mark.parametrize("flip, left, right", [(False, 18, 53), (True, 36, 71)])
def test_without_crop_tokens_boxes_are_relative_to_the_crop(flip, left, right):
    # x: (0.2 - 0.1) / 0.5 = 0.2 to 0.6, mirrored 0.4 to 0.8; y: 1/6 -> 15, 2/3 -> 59
    objects = _objects((0.2, 0.3, 0.2, 0.3), labels=[2])
    tokens = layouts.to_tokens(objects, _options(), crop=CROP, flip=flip)
    np.testing.assert_array_equal(tokens[:3], [2, 15 * 90 + left, 59 * 90 + right])
    assert set(tokens[3:].tolist()) == {8191}


def test_boxes_that_stick_out_of_the_crop_are_cut():
    # The reference's rescale_bbox keeps the whole width of what sticks out at the left: right = 0.7, bottom = 0.8333.
    objects = _objects((0.0, 0.0, 0.35, 0.5), (0.4, 0.56, 0.5, 0.4))
    tokens = layouts.to_tokens(objects, _options(), crop=CROP)
    np.testing.assert_array_equal(tokens[:6], [0, 0, 44 * 90 + 44, 1, 53 * 90 + 53, 8099])


def test_what_a_crop_shows():
    objects = layouts.within(_objects((0.0, 0.0, 0.35, 0.5), (0.7, 0.3, 0.2, 0.2), (0.2, 0.3, 0.2, 0.3)), CROP)
    np.testing.assert_allclose(objects.boxes, [[0, 0, 0.5, 0.5], [0.2, 1 / 6, 0.4, 0.5]], atol=1e-12)
    assert objects.labels.tolist() == [0, 2]


@pytest.mark.parametrize("crop", [False, True])
def test_boxes_outside_the_crop_are_left_out(crop):
    outside = [(0.7, 0.3, 0.2, 0.2), (0.2, 0.85, 0.2, 0.1), (0.0, 0.3, 0.1, 0.2)]  # the last touches the border only
    objects = _objects(*outside, (0.05, 0.1, 0.1, 0.2), labels=[1, 2, 3, 4])
    tokens = layouts.to_tokens(objects, _options(crop=crop, max_objects=4), crop=CROP)
    assert tokens[:12:3].tolist() == [4, 8191, 8191, 8191]


def test_objects_beyond_the_maximum_go_before_those_outside():
    objects = _objects((0.7, 0.3, 0.2, 0.2), (0.2, 0.3, 0.2, 0.2), (0.2, 0.4, 0.2, 0.2))
    tokens = layouts.to_tokens(objects, _options(max_objects=2), crop=CROP)
    assert tokens[::3].tolist() == [1, 8191]


# --- order, flags, padding --------------------------------------------------------------------------------------------


def test_shuffling_takes_the_first_objects_in_every_order():
    rng = np.random.default_rng(0)
    objects, options = _objects(*_random_boxes(rng, 20)[:8]), _options()
    plain = layouts.to_tokens(objects, options).reshape(3, 3)
    orders = collections.Counter()
    for _ in range(600):
        rows = layouts.to_tokens(objects, options, rng=rng).reshape(3, 3)
        np.testing.assert_array_equal(rows[np.argsort(rows[:, 0])], plain)
        orders[tuple(rows[:, 0].tolist())] += 1
    assert len(orders) == 6
    assert max(abs(count - 100) for count in orders.values()) < 4 * math.sqrt(600 * 5 / 36)


def test_flags_multiply_the_classes():
    # group 1, occluded 2, depiction 4, inside 8
    flags = np.array([[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 1, 0, 1]], bool)
    objects = _objects(*[(0, 0, 1, 1)] * 6, labels=[3] * 6, flags=flags)
    expected = [3, 3 + 5, 3 + 10, 3 + 20, 3 + 40, 3 + 5 * 11]
    tokens = layouts.to_tokens(objects, _options(max_objects=6, flags="all"))
    assert tokens[::3].tolist() == expected
    assert layouts.to_tokens(objects, _options(max_objects=6))[::3].tolist() == [3] * 6
    tokens = layouts.to_tokens(objects, _options(max_objects=6, flags="group"))
    assert tokens[::3].tolist() == [3, 3 + 5, 3, 3, 3, 3 + 5]
    unmarked = _objects((0, 0, 1, 1), labels=[3])
    assert layouts.to_tokens(unmarked, _options(flags="all"))[0] == 3


def test_no_condition_is_a_layout_without_objects():
    np.testing.assert_array_equal(layouts.null_tokens(_options()), [8191] * 9)
    np.testing.assert_array_equal(layouts.null_tokens(_options(crop=True, form="centers")), [8191] * 6 + [0, 8099])
    assert layouts.null_tokens(_options()).dtype == np.int32


def test_an_unknown_form_is_named():
    with pytest.raises(UserError, match="conditioning.layout.form: unknown value 'masks'; choose from boxes, centers"):
        layouts.to_tokens(_objects((0, 0, 1, 1)), _options(form="masks", max_length=9))


# --- back -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", [False, True])
def test_boxes_on_the_grid_come_back_exactly(crop):
    rng = np.random.default_rng(1)
    boxes = _random_boxes(rng, 30, step=1 / 89)
    count, seen = len(boxes), (9 / 89, 0.0, 80 / 89, 1.0)
    flags = rng.random((count, 4)) < 0.5
    objects = _objects(*boxes, labels=rng.integers(0, 5, count), flags=flags)
    options = _options(max_objects=count + 4, flags="all", crop=crop)
    if not crop:
        seen = layouts.WHOLE
    inside = boxes[:, 0] + boxes[:, 2] > seen[0] + 1e-9
    found, found_crop = layouts.from_tokens(layouts.to_tokens(objects, options, crop=seen), options)
    assert len(found) == inside.sum() > 20
    np.testing.assert_array_equal(found.labels, objects.labels[inside])
    np.testing.assert_array_equal(found.flags, flags[inside])
    np.testing.assert_allclose(found.boxes, boxes[inside], atol=1e-12)
    np.testing.assert_allclose(found_crop, seen, atol=1e-12)


def test_other_boxes_come_back_to_half_a_step():
    boxes = _random_boxes(np.random.default_rng(2), 30)
    options = _options(max_objects=len(boxes))
    found, _ = layouts.from_tokens(layouts.to_tokens(_objects(*boxes, labels=[0] * len(boxes)), options), options)
    start, end = found.boxes[:, :2], found.boxes[:, :2] + found.boxes[:, 2:]
    error = np.abs(np.concatenate([start - boxes[:, :2], end - boxes[:, :2] - boxes[:, 2:]]))
    assert 0.25 / 89 < error.max() <= 0.5 / 89 + 1e-12


def test_centers_come_back_without_a_size():
    options = _options(form="centers")
    found, crop = layouts.from_tokens(layouts.to_tokens(_objects((0.2, 0.4, 0.4, 0.2)), options), options)
    np.testing.assert_allclose(found.boxes, [[36 / 89, 44 / 89, 0, 0]], atol=1e-12)
    assert crop == (0, 0, 1, 1)


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_options_that_fit():
    assert layouts.check_options(_options()) == []
    # Table 17: OpenImages, 30 objects with boxes and a crop are 92 tokens
    assert layouts.check_options(_options(max_objects=30, max_length=92, crop=True, flags="all")) == []
    assert layouts.check_options(_options(num_classes=8191)) == []
    assert layouts.check_options(_options(num_classes=511, flags="all")) == []


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(form="masks", max_length=9), "form='masks' is not one of boxes, centers"),
        (dict(max_length=10), "max_length=10 must be 9, the tokens of 3 objects"),
        (dict(max_length=9, crop=True), "max_length=9 must be 11, the tokens of 3 objects and of the crop"),
        (dict(form="centers", max_length=9), "max_length=9 must be 6"),
        (dict(num_classes=8192), "vocab_size=8192 must be above 8192, the number of object classes"),
        (dict(num_classes=4096, flags="group"), "vocab_size=8192 must be above 8192, .*times 2 for their flags"),
        (dict(flags="some"), "flags='some' is not one of none, group, all"),
        (dict(num_classes=512, flags="all"), "vocab_size=8192 must be above 8192, .*times 16 for their flags"),
    ],
)
def test_options_that_do_not_fit(changes, message):
    (mistake,) = layouts.check_options(_options(**changes))
    assert re.match(f"conditioning.layout.{message}", mistake), mistake


def test_reading_a_file(tmp_path):
    rows = [
        {"label": "CAT", "box": [0.1, 0.2, 0.5, 0.9], "group": True, "inside": True},
        {"label": 2, "box": [0, 0, 1, 1], "occluded": True, "depiction": False},
    ]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "dict.json").write_text(json.dumps({"objects": rows, "caption": "a cat"}))
    for name in ("list.json", "dict.json"):
        objects = layouts.read(tmp_path / name, NAMES)
        assert objects.labels.tolist() == [1, 2]
        np.testing.assert_allclose(objects.boxes, [[0.1, 0.2, 0.4, 0.7], [0, 0, 1, 1]], atol=1e-12)
        assert objects.flags.tolist() == [[True, False, False, True], [False, True, False, False]]
    (tmp_path / "empty.json").write_text("[]")
    np.testing.assert_array_equal(
        layouts.to_tokens(layouts.read(tmp_path / "empty.json", NAMES), _options(flags="all")), [8191] * 9)


def test_files_that_are_no_layouts(tmp_path):
    with pytest.raises(UserError, match="none.json does not exist"):
        layouts.read(tmp_path / "none.json", NAMES)
    for content in (b"dog at 1, 2", b"\xff\xfe"):
        (tmp_path / "text.json").write_bytes(content)
        with pytest.raises(UserError, match="text.json is (no JSON file|not UTF-8)"):
            layouts.read(tmp_path / "text.json", NAMES)
    for content in ('"dog"', "[1, 2]", '{"things": []}'):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(UserError, match='other.json: a layout is a list like .*"label": "dog"'):
            layouts.read(tmp_path / "other.json", NAMES)


@pytest.mark.parametrize("box", [
    [-0.1, 0, 0.5, 1], [0, -1, 1, 1], [0, 0, 1.2, 1], [0, 0, 0.5, 1.01], [0.5, 0, 0.5, 1], [0, 0.6, 1, 0.5],
    [0, 0, 400, 300]])
def test_boxes_outside_the_picture(box):
    with pytest.raises(UserError, match=r"line 3, object 1: box \[.*must have 0 <= left < right <= 1"):
        layouts.from_rows([{"label": "dog", "box": [0, 0, 1, 1]}, {"label": "dog", "box": box}], NAMES, "line 3")


@pytest.mark.parametrize("box", [None, [0, 0, 1], "0 0 1 1", [0, 0, "1", 1], {"left": 0}])
def test_boxes_of_another_shape(box):
    with pytest.raises(UserError, match=r"it, object 0: box .* is not \[left, top, right, bottom\]"):
        layouts.from_rows([{"label": "dog", "box": box}], NAMES, "it")


def test_unknown_labels():
    for label, suggestion in (("red aple", " (perhaps 'red apple')"), ("3", ""), (None, "")):
        with pytest.raises(UserError) as caught:
            layouts.from_rows([{"label": label, "box": [0, 0, 1, 1]}], NAMES, "it")
        assert str(caught.value) == (
            f"it, object 0: unknown label {str(label)!r}{suggestion}; choose from: 0 dog, 1 cat, 2 red apple")
