"""What a task adds to a batch belongs to the picture it came with, and its randomness to the position."""

import itertools

import numpy as np
import pytest
from PIL import Image

from latent_diffusion import layouts
from latent_diffusion.data import loader, sources, tasks, transforms
from latent_diffusion.errors import UserError

FIELDS = ("image", "low_res", "mask", "segmentation", "layout")
AUGMENTED = dict(flip=True, crop="random", min_crop_scale=0.5)
HEIGHT, WIDTH, BATCH = 16, 40, 4
GRID = 89  # steps of the layout's grid


class _Pictures:
    """Wide pictures: red tells the class of each pixel, green its column, blue the one object."""

    def __init__(self, count):
        self._count = count

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        classes = rng.integers(0, 6, (HEIGHT, WIDTH))
        left, top, right, bottom = self.box(index)
        image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        image[..., 0], image[..., 1] = classes * 40, np.arange(WIDTH) * 6
        image[top:bottom, left:right, 2] = 255
        box = np.array([[left / WIDTH, top / HEIGHT, (right - left) / WIDTH, (bottom - top) / HEIGHT]])
        return {"image": image, "name": str(index), "segmentation": classes.astype(np.int32),
                "objects": layouts.Objects(np.array([index % 3]), box)}

    @staticmethod
    def box(index):
        rng = np.random.default_rng((1, index))
        left, top = rng.integers(0, WIDTH - 6), rng.integers(0, HEIGHT - 6)
        return left, top, left + rng.integers(2, 6), top + rng.integers(2, 6)


def _pictures(count=12):
    return sources.Source(_Pictures(count), where="wide pictures", map_names=tuple("abcdef"), object_names=tuple("xyz"))


def _config(make_config, **data):
    config = make_config(**data)
    config.conditioning.layout.num_classes = 4
    return config


def _take(config, steps, split="train", **options):
    return list(itertools.islice(loader.batches(config, split, **{"fields": FIELDS, **options}), steps))


def _pixels(images):
    return np.rint((images + 1) * 127.5).astype(np.uint8)


def _assert_equal(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


# --- what is in a batch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "eval"])
def test_types_shapes_and_ranges(make_config, split):
    config = _config(make_config, image_size=32, **AUGMENTED)
    for batch in _take(config, 2, split):
        shapes = {"low_res": (BATCH, 8, 8, 3), "mask": (BATCH, 32, 32, 1), "segmentation": (BATCH, 32, 32),
                  "layout": (BATCH, 92)}
        types = {"low_res": np.float32, "mask": np.float32, "segmentation": np.int32, "layout": np.int32}
        for field, shape in shapes.items():
            assert batch[field].shape == shape and batch[field].dtype == types[field], field
        assert -1 <= batch["low_res"].min() < batch["low_res"].max() <= 1
        assert set(np.unique(batch["mask"]).tolist()) == {0.0, 1.0}
        assert 0 <= batch["segmentation"].min() < batch["segmentation"].max() <= 4
        assert 0 <= batch["layout"].min() < batch["layout"].max() == 8191
    bare = _take(config, 1, split, fields=("image",))[0]
    assert not set(bare) & set(tasks.FIELDS)


def test_compact_batches_hold_the_same_bytes(make_config):
    config = _config(make_config, **AUGMENTED)
    for compact, floats in zip(_take(config, 2, compact=True), _take(config, 2), strict=True):
        assert compact["image"].dtype == compact["low_res"].dtype == np.uint8
        _assert_equal([compact | {name: transforms.to_float(compact[name]) for name in ("image", "low_res")}], [floats])


@pytest.mark.parametrize("factor, channels", [(2, 3), (4, 1)])
def test_the_small_picture_is_the_large_one_made_smaller(make_config, factor, channels):
    config = _config(make_config, channels=channels, **AUGMENTED)
    config.conditioning.low_res.factor = factor
    for batch in (*_take(config, 4), *_take(config, 3, "eval")):
        for image, small in zip(_pixels(batch["image"]), _pixels(batch["low_res"]), strict=True):
            for channel in range(channels):
                expected = Image.fromarray(image[..., channel]).resize((16 // factor,) * 2, Image.BICUBIC)
                np.testing.assert_array_equal(small[..., channel], expected)


def test_the_map_follows_crop_and_flip(make_config):
    config = _config(make_config, flip=True, crop="random")  # squares of 16 pixels, which stay as they are
    flipped, starts = 0, set()
    for batch in _take(config, 20, source=_pictures()):
        pixels = _pixels(batch["image"]).astype(int)
        np.testing.assert_array_equal(batch["segmentation"], pixels[..., 0] // 40)
        columns = pixels[:, 0, :, 1] // 6
        flipped += np.sum(columns[:, 0] > columns[:, -1])
        starts |= set(columns.min(axis=1).tolist())
    assert abs(flipped / 80 - 0.5) < 4 * np.sqrt(0.25 / 80)
    assert min(starts) < 3 and max(starts) > 21  # of 0 to 24
    for batch in _take(config, 3, "eval", source=_pictures()):
        pixels = _pixels(batch["image"]).astype(int)
        np.testing.assert_array_equal(batch["segmentation"], pixels[..., 0] // 40)
        np.testing.assert_array_equal(pixels[:, 0, :, 1] // 6, np.tile(np.arange(12, 28), (BATCH, 1)))


def test_the_map_follows_a_resized_crop(make_config):
    # The shapes' maps mark what is not white; after resizing, all but border pixels must agree.
    config = _config(make_config, image_size=32, **AUGMENTED)
    for batch in _take(config, 5):
        colored = np.any(_pixels(batch["image"]) < 128, axis=-1)
        assert np.mean(colored == (batch["segmentation"] > 0)) > 0.93
        assert 0.03 < np.mean(colored) < 0.9


def test_boxes_follow_crop_and_flip(make_config):
    config = _config(make_config, flip=True, crop="random")
    options = config.conditioning.layout
    options.crop, options.max_length = False, 90
    checked, absent = 0, 0
    for batch in _take(config, 25, source=_pictures()):
        for pixels, tokens in zip(_pixels(batch["image"]), batch["layout"], strict=True):
            objects, _ = layouts.from_tokens(tokens, options)
            rows, columns = np.nonzero(pixels[..., 2])
            assert len(objects) == bool(len(rows))
            absent += not len(rows)
            if len(rows) and columns.min() > 0 and columns.max() < HEIGHT - 1:  # all of it is in the picture
                left, top, width, height = objects.boxes[0] * HEIGHT
                found = np.array([left, top, left + width, top + height])
                expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                np.testing.assert_allclose(found, expected, atol=0.51 * HEIGHT / GRID)
                checked += 1
    assert checked > 20 and absent > 10


def test_crop_tokens_follow_crop_and_flip(make_config):
    """Boxes stay where they are in the whole picture, which is mirrored where the crop is."""
    config = _config(make_config, flip=True, crop="random")
    options = config.conditioning.layout
    source, seen = _pictures(), set()
    boxes = {(i % 3, *_Pictures.box(i)): i for i in range(12)}
    for batch in _take(config, 15, source=source):
        for pixels, tokens in zip(_pixels(batch["image"]).astype(int), batch["layout"], strict=True):
            columns, half = pixels[0, :, 1] // 6, 0.51 / GRID
            flip = columns[0] > columns[-1]
            left = 1 - (columns[0] + 1) / WIDTH if flip else columns[0] / WIDTH
            objects, crop = layouts.from_tokens(tokens, options)
            np.testing.assert_allclose(crop, [left, 0, HEIGHT / WIDTH, 1], atol=2 * half)
            for label, box in zip(objects.labels, objects.boxes, strict=True):
                if flip:
                    box = box * [-1, 1, 1, 1] + [1 - box[2], 0, 0, 0]
                corners = [*box[:2], *(box[:2] + box[2:])] * np.array([WIDTH, HEIGHT, WIDTH, HEIGHT])
                near = [i for (kind, *place), i in boxes.items()
                        if kind == label and np.allclose(corners, place, rtol=0, atol=WIDTH * half)]
                assert near
                seen.update((flip, i) for i in near)
    assert len({flip for flip, _ in seen}) == 2 and len({i for _, i in seen}) > 8


# --- randomness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degradation", ["bicubic", "bsrgan_light"])
def test_randomness_depends_on_the_position_alone(make_config, degradation):
    if degradation != "bicubic":
        pytest.importorskip("cv2")
    config = _config(make_config, **AUGMENTED)
    config.conditioning.low_res.degradation = degradation
    whole = _take(config, 6)
    _assert_equal(_take(config, 4, start_step=2), whole[2:])
    two = [_take(config, 6, process_index=p, process_count=2) for p in range(2)]
    for step, one in enumerate(whole):
        for key in one:
            joined = np.stack([two[0][step][key], two[1][step][key]], axis=1).reshape(one[key].shape)
            np.testing.assert_array_equal(joined, one[key], err_msg=key)
    stream = loader.batches(config, "train", fields=FIELDS)
    stream.set_state({"next_index": 3})
    _assert_equal(list(itertools.islice(stream, 3)), whole[3:])


def test_every_epoch_has_other_masks_and_orders(make_config):
    config = _config(make_config)
    batches = _take(config, 9)
    every = np.concatenate([batch["mask"] for batch in batches])
    assert len({mask.tobytes() for mask in every}) == 36
    crowded = [{"image": np.zeros((16, 16, 3), np.uint8), "name": str(i), "objects": layouts.Objects(
        np.arange(4), np.array([[0, 0, 1, 1]] * 4, float))} for i in range(4)]
    source = sources.Source(crowded, where="crowds", object_names=tuple("abcd"))
    orders = np.concatenate([batch["layout"][:, :12:3] for batch in _take(config, 30, source=source,
                                                                         fields=("layout",))])
    assert len({tuple(order) for order in orders.tolist()}) > 20  # of 24
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(4), (120, 1)))


def test_evaluation_is_the_same_each_time(make_config):
    config = _config(make_config, num_examples=40, **AUGMENTED)
    batches = _take(config, 9, "eval")
    _assert_equal(batches, _take(config, 9, "eval"))
    masks = np.concatenate([batch["mask"] for batch in batches])
    assert len({mask.tobytes() for mask in masks}) == len(masks) == 12
    config.seed = 1
    others = np.concatenate([batch["mask"] for batch in _take(config, 9, "eval")])
    assert all(np.any(one != other) for one, other in zip(masks, others, strict=True))
    config.seed = 0
    parts = [_take(config, 9, "eval", process_index=p, process_count=2) for p in range(2)]
    for one, first, second in zip(batches, *parts, strict=True):
        np.testing.assert_array_equal(one["mask"], np.stack([first["mask"], second["mask"]], 1).reshape(4, 16, 16, 1))


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_sets_without_maps_or_objects(make_config):
    bare = sources.Source(_Pictures(8), where="plain pictures")
    messages = {"segmentation": "plain pictures has no semantic maps: set data.map_key",
                "layout": "plain pictures has no objects with boxes: set data.objects_key"}
    for field, message in messages.items():
        with pytest.raises(UserError, match=message):
            loader.batches(_config(make_config), "train", fields=("image", field), source=bare)
    for options in ({"masks": "thin"}, {"degradation": "area"}):
        config = _config(make_config)
        section = "inpainting" if "masks" in options else "low_res"
        config.conditioning[section].update(options)
        with pytest.raises(UserError, match=f"conditioning.{section}"):
            _take(config, 1)


def test_a_factor_that_the_picture_does_not_allow(make_config):
    config = _config(make_config, image_size=18)
    with pytest.raises(UserError, match="18x18 pixels cannot become 4 times smaller"):
        _take(config, 1, fields=("low_res",))


def test_latents_have_no_pictures_to_make_conditions_of(make_config):
    config = _config(make_config)
    assert tasks.make_task(config, ("image", "label"), None) is None
    with pytest.raises(ValueError, match="latents cache has no pictures.*low_res"):
        tasks.make_task(config, ("image", "low_res"), object())
    made = tasks.make_task(config, ("image", "mask"), transforms.ImageTransform.from_config(config.data))
    assert made.fields == ("mask",)


def test_a_class_that_the_model_does_not_have_is_named(make_config):
    config = make_config(image_size=16)
    config.conditioning.segmentation.num_classes = 2
    with pytest.raises(UserError, match="has class [2-4], but conditioning.segmentation.num_classes=2"):
        next(loader.batches(config, "eval", fields=("segmentation",)))
