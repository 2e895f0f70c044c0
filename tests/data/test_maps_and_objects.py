"""Semantic maps and objects as sets hold them: lines of captions.jsonl in folders, features of TFDS sets."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from latent_diffusion.data import loader, records, sources
from latent_diffusion.data.emoji import EmojiScenes
from latent_diffusion.errors import UserError


def _config(make_config, **data):
    config = make_config(**data)
    config.conditioning.layout.num_classes = 4
    return config


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
        ([CAT, {"label": "cat"}], "line 2, object 1: it has no 'box', only 'label'"),
        ([CAT | {"group": "yes"}], "line 2, object 0: group, occluded, depiction, inside must be true or false"),
        ([CAT | {"box": [False, False, True, True]}], r"object 0: box \[False.*\] is not \[left"),
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
    assert f"the map {tmp_path}/maps/a.png has another size than {tmp_path}/a.png" in _error(config)
    Image.fromarray(np.zeros((9, 12), np.uint8)).save(tmp_path / "maps" / "a.png", "JPEG")
    assert "JPEG changes numbers; save it as PNG" in _error(config)


def test_maps_that_nobody_asks_for_are_not_read(make_config, tmp_path):
    _fill(tmp_path, [{"file": "a.png", "map": "maps/a.png", "objects": "nothing"}])
    source = sources.open_source(_folder(make_config, tmp_path), "train", fields=("label",))
    assert source.map_names == source.object_names == () and set(source.source[0]) == {"image", "name"}


def test_numbers_of_objects_stay_what_they_are(make_config, tmp_path):
    _fill(tmp_path, [{"file": "a.png", "objects": [{"label": number, "box": [0, 0, 1, 1]} for number in (10, 2)]}])
    source = sources.open_source(_folder(make_config, tmp_path), "train")
    assert source.object_names == tuple(map(str, range(11))) and source.source[0]["objects"].labels.tolist() == [10, 2]


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
