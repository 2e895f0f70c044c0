"""What a task adds to a batch belongs to the picture it came with, and its randomness to the position."""

import itertools
import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from latent_diffusion import layouts
from latent_diffusion.data import loader, records, sources, tasks, transforms
from latent_diffusion.data.emoji import EmojiScenes
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


# --- folders ----------------------------------------------------------------------------------------------------------


def _fill(root, rows, size=(12, 9)):
    """Grey pictures a.png ..., and captions.jsonl."""
    for number, row in enumerate(rows):
        path = root / row["file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (number, 9, 9)).save(path)
    (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _map(path, classes, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(classes, np.uint8))
    if mode == "P":
        image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200] * 85 + [0, 0, 0])
    image.save(path)


def _folder(make_config, root, **data):
    return _config(make_config, source="folder", path=str(root), holdout=0.0, **data)


def _error(config):
    with pytest.raises(UserError) as caught:
        sources.open_source(config, "train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


DOG = {"label": "dog", "box": [0.0, 0.0, 0.5, 1.0], "occluded": True}
CAT = {"label": "cat", "box": [0.5, 0.25, 1.0, 1.0]}


def test_maps_and_objects_of_a_folder(make_config, tmp_path):
    rng = np.random.default_rng(0)
    maps = [rng.integers(0, top, (9, 12)) for top in (3, 7, 2, 5)]
    maps[1][0, 0] = 6
    things = ([DOG], [], [CAT, DOG], [CAT])
    _fill(tmp_path, [{"file": f"{name}.png", "map": f"maps/{name}.png", "objects": list(objects)}
                     for name, objects in zip("abcd", things, strict=True)])
    for name, classes, mode in zip("abcd", maps, "LPLP", strict=True):
        _map(tmp_path / "maps" / f"{name}.png", classes, mode)
    source = sources.open_source(_folder(make_config, tmp_path), "train")
    assert source.map_names == ("0", "1", "2", "3", "4", "5", "6")
    assert source.object_names == ("cat", "dog")
    assert [source.source[i]["name"] for i in range(len(source.source))] == ["a.png", "b.png", "c.png", "d.png"]
    for i, (classes, objects) in enumerate(zip(maps, things, strict=True)):
        example = source.source[i]
        np.testing.assert_array_equal(example["segmentation"], classes)
        assert [source.object_names[label] for label in example["objects"].labels] == [o["label"] for o in objects]
    np.testing.assert_allclose(source.source[2]["objects"].boxes, [[0.5, 0.25, 0.5, 0.75], [0, 0, 0.5, 1]])
    np.testing.assert_array_equal(source.source[2]["objects"].flags, [[False] * 4, [False, True, False, False]])

    config = _folder(make_config, tmp_path, image_size=9)
    config.conditioning.layout.num_classes = 2
    (batch,) = loader.batches(config, "eval", source=source, fields=("segmentation", "layout"))
    # The middle nine of twelve columns: the second to the tenth.
    np.testing.assert_array_equal(batch["segmentation"], [classes[:, 1:10] for classes in maps])
    kinds = np.sort(batch["layout"][:, :6:3], axis=1).tolist()  # 0: cat; 1 + 2 classes x "occluded": dog; 8191: none
    assert kinds == [[5, 8191], [8191, 8191], [0, 5], [0, 8191]]


def test_maps_of_a_folder_that_cannot_be_used(make_config, tmp_path):
    config = _folder(make_config, tmp_path)
    _fill(tmp_path, [{"file": "a.png", "map": "maps/a.png"}, {"file": "b.png"}])
    _map(tmp_path / "maps" / "a.png", np.zeros((9, 12)))
    assert "1 of 2 images lack a map; the first is b.png" in _error(config)
    _fill(tmp_path, [{"file": "a.png", "map": "maps/a.png"}, {"file": "b.png", "map": "maps/b.png"}])
    assert f"the map {tmp_path}/maps/b.png cannot be read" in _error(config)
    Image.new("RGB", (12, 9)).save(tmp_path / "maps" / "b.png")
    assert f"{tmp_path}/maps/b.png: a semantic map must be a grey or palette image" in _error(config)


def test_objects_of_a_folder_that_cannot_be_used(make_config, tmp_path):
    config = _folder(make_config, tmp_path)
    wrong = {**CAT, "box": [0.5, 0.25, 1.5, 1.0]}
    for objects, message in (
        ([wrong], r"captions.jsonl, line 2, object 0: box \[0.5, 0.25, 1.5, 1.0\] must have"),
        ([CAT, {"label": "cat"}], r"line 2, object 1: box None is not \[left"),
        ("cat", "line 2: a layout is a list"),
        (None, "1 of 2 images lack objects; the first is b.png"),
    ):
        _fill(tmp_path, [{"file": "a.png", "objects": [DOG]}, {"file": "b.png", "objects": objects}])
        with pytest.raises(UserError, match=message):
            sources.open_source(config, "train")


def test_objects_without_a_label(make_config, tmp_path):
    _fill(tmp_path, [{"file": "a.png", "objects": [{"box": [0, 0, 1, 1]}]}])
    assert "line 1, object 0" in _error(_folder(make_config, tmp_path))


def test_maps_of_another_shape(make_config, tmp_path):
    _fill(tmp_path, [{"file": "a.png", "map": "maps/a.png"}])
    _map(tmp_path / "maps" / "a.png", np.zeros((20, 5)))
    config = _folder(make_config, tmp_path, on_corrupt="error")
    with pytest.raises(UserError, match="maps/a.png"):
        sources.open_source(config, "train").source[0]


def test_classes_are_those_of_both_parts(make_config, tmp_path):
    _fill(tmp_path, [
        {"file": "train/a.png", "objects": [CAT], "label": "small", "map": "maps/a.png"},
        {"file": "train/b.png", "objects": [DOG], "label": "large", "map": "maps/b.png"},
        {"file": "validation/c.png", "objects": [DOG], "label": "small", "map": "maps/a.png"},
    ])
    _map(tmp_path / "maps" / "a.png", np.zeros((9, 12)))
    _map(tmp_path / "maps" / "b.png", np.full((9, 12), 3))
    parts = [sources.open_source(_folder(make_config, tmp_path), split) for split in ("train", "eval")]
    assert parts[1].object_names == parts[0].object_names
    assert parts[1].label_names == parts[0].label_names
    assert parts[1].map_names == parts[0].map_names


def test_maps_are_not_held_out(make_config, tmp_path):
    for number in range(4):
        root = tmp_path / str(number)
        rows = [{"file": f"{number}{i}.png", "map": f"maps/{number}{i}.png"} for i in range(3)]
        _fill(root, rows)
        for row in rows:
            _map(root / row["map"], np.zeros((9, 12)))
        config = _folder(make_config, root)
        config.data.holdout = 1e-6
        assert [len(sources.open_source(config, split).source) for split in ("train", "eval")] == [2, 1]


# --- TFDS -------------------------------------------------------------------------------------------------------------


def test_objects_as_tfds_calls_them():
    # (top, left, bottom, right)
    record = {"bbox": np.array([[0.1, 0.2, 0.5, 0.9], [0, 0, 1, 0.25]], np.float32), "label": np.array([7, 2])}
    objects = records.objects_of(record)
    np.testing.assert_allclose(objects.boxes, [[0.2, 0.1, 0.7, 0.4], [0, 0, 0.25, 1]], atol=1e-6)
    assert objects.labels.tolist() == [7, 2] and not objects.flags.any()
    coco = records.objects_of({**record, "is_crowd": np.array([False, True])})
    assert coco.flags.tolist() == [[False] * 4, [True, False, False, False]]
    open_images = {"is_group_of": [1, 0], "is_occluded": [-1, 1], "is_depiction": [0, 1], "is_inside": [1, -1]}
    flags = records.objects_of({**record, **{key: np.array(value) for key, value in open_images.items()}}).flags
    assert flags.tolist() == [[True, False, False, True], [False, True, True, False]]
    assert len(records.objects_of({"bbox": np.zeros((0, 4), np.float32), "label": np.zeros(0, int)})) == 0


def test_objects_of_a_set_by_name(make_config):
    with tfds.testing.mock_data(num_examples=4):
        source = sources.open_source(_config(make_config, source="tfds", name="voc/2007"), "train")
        assert len(source.object_names) == 20 and source.object_names[11] == "dog"  # Pascal VOC's order
        record = source.source.facts(1)["objects"]
        example = source.source[1]
    top, left, bottom, right = record["bbox"].T
    expected = np.stack([left, top, right - left, bottom - top], axis=1)
    np.testing.assert_allclose(example["objects"].boxes, expected, atol=1e-6)
    np.testing.assert_array_equal(example["objects"].labels, record["label"])


@pytest.fixture(scope="module")
def scenes_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("scenes")
    sources._build(EmojiScenes(config="32", limit=5, data_dir=path))
    return str(path)


def test_maps_and_objects_are_the_configs_keys(make_config, scenes_dir):
    options = dict(source="tfds", name="emoji_scenes/32", data_dir=scenes_dir, image_size=32)
    source = sources.open_source(_config(make_config, **options), "train")
    records = tfds.builder("emoji_scenes/32", data_dir=scenes_dir).as_data_source(split="train")
    for i in range(5):  # as TFDS's own decoding has them
        np.testing.assert_array_equal(source.source[i]["segmentation"], records[i]["segmentation"][..., 0])
        np.testing.assert_array_equal(source.source[i]["objects"].labels, records[i]["objects"]["label"])
    assert len(source.map_names) == 35 and len(source.object_names) == 28
    bare = sources.open_source(_config(make_config, **options, map_key="maps", objects_key="things"), "train")
    assert bare.map_names == bare.object_names == ()
    assert not {"segmentation", "objects"} & set(bare.source[0])
    with pytest.raises(UserError, match="no semantic maps: set data.map_key"):
        loader.batches(_config(make_config, **options), "train", source=bare, fields=("segmentation",))


@pytest.mark.parametrize("name", ["kitti", "clevr", "open_images_v4"])
def test_other_objects_do_not_matter(make_config, name):
    with tfds.testing.mock_data(num_examples=4):
        source = sources.open_source(_config(make_config, source="tfds", name=name), "train")
        assert source.object_names == () and source.source[0]["image"].ndim == 3


def test_a_class_that_the_model_does_not_have_is_named(make_config):
    config = make_config(image_size=16)
    config.conditioning.segmentation.num_classes = 2
    with pytest.raises(UserError, match="has class [2-4], but conditioning.segmentation.num_classes=2"):
        next(loader.batches(config, "eval", fields=("segmentation",)))
