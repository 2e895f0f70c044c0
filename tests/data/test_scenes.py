"""Scenes of emoji: maps, boxes, visible parts and captions say what is drawn; the set is read back as it was made."""

import itertools

import numpy as np
import pytest
from PIL import Image

from latent_diffusion.data import loader, sources
from latent_diffusion.data.emoji import EmojiScenes, scenes

COUNT, SIZE = 60, 64
FIRST_THING = len(scenes.SKIES) + len(scenes.GROUNDS)


@pytest.fixture(scope="module")
def sprites():
    return scenes.Sprites()


@pytest.fixture(scope="module")
def many(sprites):
    return [scenes.make_scene(number, SIZE, sprites) for number in range(COUNT)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("scenes")
    sources._build(EmojiScenes(config="32", limit=6, data_dir=path))
    return str(path)


def _pixels(box, size=SIZE):
    """A box as slices of rows and columns."""
    left, top, right, bottom = (round(side * size) for side in box)
    return slice(top, bottom), slice(left, right)


def _single(scene):
    return len(scene.labels) == 1


# --- a scene ----------------------------------------------------------------------------------------------------------


def test_what_a_scene_holds(many):
    counts = [len(scene.labels) for scene in many]
    assert set(counts) == {1, 2, 3, 4}
    for scene in many:
        assert scene.image.shape == (SIZE, SIZE, 3) and scene.image.dtype == np.uint8
        assert scene.segmentation.shape == (SIZE, SIZE)
        assert len(scene.labels) == len(scene.boxes) == len(scene.visible)
        assert all(0 <= left < right <= 1 and 0 <= top < bottom <= 1 for left, top, right, bottom in scene.boxes)
    assert {label for scene in many for label in scene.labels} == set(range(len(scenes.THINGS)))


def test_the_map_holds_one_sky_one_ground_and_the_things(many):
    for scene in many:
        found = set(np.unique(scene.segmentation).tolist())
        names = {scenes.MAP_NAMES[i] for i in found}
        assert names - set(scenes.SKIES) - set(scenes.GROUNDS) == {scenes.THINGS[i] for i in scene.labels}
        assert len(names & set(scenes.SKIES)) == 1 and len(names & set(scenes.GROUNDS)) <= 1
        sky = scene.segmentation < len(scenes.SKIES)
        ground = (scene.segmentation < FIRST_THING) & ~sky
        assert np.nonzero(sky)[0].max() < np.nonzero(ground)[0].min()  # one horizon


def test_boxes_are_tight_around_what_is_fully_visible(many):
    checked = 0
    for scene in many:
        for label, box, visible in zip(scene.labels, scene.boxes, scene.visible, strict=True):
            if visible == 1 and scene.labels.count(label) == 1:
                rows, columns = np.nonzero(scene.segmentation == FIRST_THING + label)
                expected = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
                np.testing.assert_allclose(np.array(box) * SIZE, expected)
                checked += 1
    assert checked > COUNT


def test_boxes_hold_what_can_be_seen_of_their_things(many):
    for scene in many:
        inside = np.zeros((SIZE, SIZE), bool)
        for box in scene.boxes:
            inside[_pixels(box)] = True
        assert not np.any((scene.segmentation >= FIRST_THING) & ~inside)
        for box in scene.boxes:
            width, height = (box[i + 2] - box[i] for i in (0, 1))
            assert 0.15 < max(width, height) <= 0.5 + 1e-9


def test_visible_parts(many):
    for scene in many:
        assert all(scenes.MIN_VISIBLE <= part <= 1 for part in scene.visible)
        assert scene.visible[-1] == 1  # the last lies on top
    assert 0.05 < np.mean([part < scenes.OCCLUDED for scene in many for part in scene.visible]) < 0.6


def test_visible_parts_are_what_is_left_of_a_thing(sprites):
    """Of two things, the first alone covers as much as it shows plus what the second hides of it."""
    checked = 0
    for number in range(80):
        scene = scenes.make_scene(number, SIZE, sprites)
        if len(scene.labels) != 2 or scene.labels[0] == scene.labels[1] or scene.visible[0] == 1:
            continue
        left, top, right, bottom = (round(side * SIZE) for side in scene.boxes[0])
        # The sprite whose solid part has the box's size, anywhere near it
        for side in range(16, 33):
            solid = sprites.draw(scene.labels[0], side)[..., 3] >= 128
            rows, columns = np.nonzero(solid)
            if (np.ptp(rows) + 1, np.ptp(columns) + 1) == (bottom - top, right - left):
                break
        seen = np.sum(scene.segmentation == FIRST_THING + scene.labels[0])
        assert abs(seen / solid.sum() - scene.visible[0]) < 0.03
        checked += 1
    assert checked >= 3


def test_captions_name_all_there_is(many):
    for scene in many:
        things, _, place = scene.caption.rpartition(" on ")
        ground, _, sky = place.partition(" under ")
        named = [part for group in things.split(" and ") for part in group.split(", ")]
        expected = [scenes.THINGS[i] for i in scene.labels]
        assert [name.split(" ", 1)[1] for name in named] == expected
        for name in (*named, sky):
            article, noun = name.split(" ", 1)
            assert article == ("an" if noun[0] in "aeiou" else "a")
        present = {scenes.MAP_NAMES[i] for i in np.unique(scene.segmentation)}
        assert sky.split(" ", 1)[1] in present and ground in scenes.GROUNDS
        assert present & set(scenes.GROUNDS) <= {ground}


def test_an_example_of_a_caption():
    assert scenes._caption(["banana"], "day sky", "grass") == "a banana on grass under a day sky"
    assert scenes._caption(["banana", "automobile", "ghost"], "evening sky", "snow") == (
        "a banana, an automobile and a ghost on snow under an evening sky")


def test_the_landscape_runs_between_its_colors(many):
    for scene in many:
        for colors, classes in ((scenes.SKIES, range(len(scenes.SKIES))),
                                (scenes.GROUNDS, range(len(scenes.SKIES), FIRST_THING))):
            for number, pair in zip(classes, colors.values(), strict=True):
                rows, columns = np.nonzero(scene.segmentation == number)
                far = np.ones(len(rows), bool)  # half covered pixels have the color of things
                for box in scene.boxes:
                    y, x = _pixels(box)
                    far &= ~((rows >= y.start - 2) & (rows < y.stop + 2) & (columns >= x.start - 2) &
                             (columns < x.stop + 2))
                found = scene.image[rows[far], columns[far]]
                low, high = np.min(pair, axis=0), np.max(pair, axis=0)
                assert np.all(found >= low) and np.all(found <= high)


def test_things_look_like_their_emoji(many, sprites):
    """What the map marks is nearest, of all 28 things, to the drawing of its class."""
    tight = []
    for thing in range(len(scenes.THINGS)):
        sprite = sprites.draw(thing, 72)
        rows, columns = np.nonzero(sprite[..., 3] >= 128)
        tight.append(Image.fromarray(sprite[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]))
    checked = 0
    for scene in filter(_single, many):
        (label,), (box,) = scene.labels, scene.boxes
        cut, marked = scene.image[_pixels(box)].astype(float), scene.segmentation[_pixels(box)] == FIRST_THING + label
        distances = []
        for sprite in tight:
            small = np.asarray(sprite.resize(cut.shape[1::-1], Image.BOX), float)
            shown = np.where(small[..., 3:] >= 128, small[..., :3], -255)  # far from all colors
            distances.append(np.abs(cut - shown)[marked].mean())
        assert np.argmin(distances) == label
        checked += 1
    assert checked >= 5


# --- numbers and sizes ------------------------------------------------------------------------------------------------


def test_the_number_decides(sprites):
    for number in range(5):
        one, other = scenes.make_scene(number, 32, sprites), scenes.make_scene(number, 32, scenes.Sprites())
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.segmentation, other.segmentation)
        assert (one.labels, one.boxes, one.visible, one.caption) == (
            other.labels, other.boxes, other.visible, other.caption)
    pictures = {scenes.make_scene(number, 32, sprites).image.tobytes() for number in range(30)}
    assert len(pictures) == 30


def test_larger_scenes_show_the_same(many, sprites):
    for number, small in enumerate(many[:30]):
        large = scenes.make_scene(number, 2 * SIZE, sprites)
        assert large.caption.partition(" on ")[2] == small.caption.partition(" on ")[2]
        assert large.labels[0] == small.labels[0]
        np.testing.assert_allclose(large.boxes[0], small.boxes[0], atol=3 / SIZE)
        if not _single(small):
            continue
        assert large.labels == small.labels
        shrunk = large.image.reshape(SIZE, 2, SIZE, 2, 3).mean(axis=(1, 3))
        assert np.abs(shrunk - small.image).mean() < 6
        assert np.mean(large.segmentation[::2, ::2] == small.segmentation) > 0.95


def test_all_things_are_at_the_same_places_in_all_sizes(many, sprites):
    for number, small in enumerate(many):
        large = scenes.make_scene(number, 2 * SIZE, sprites)
        assert large.labels == small.labels
        np.testing.assert_allclose(large.boxes, small.boxes, atol=3 / SIZE)


# --- the set ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split, name", [("train", "train"), ("eval", "validation")])
def test_reading_back_what_was_made(make_config, directory, sprites, split, name):
    config = make_config(source="emoji_scenes", data_dir=directory, image_size=32)
    source = sources.open_source(config, split)
    start = dict(zip(scenes.SPLITS, itertools.accumulate(scenes.SPLITS.values(), initial=0), strict=False))[name]
    made = {scene.caption: scene for scene in (scenes.make_scene(start + i, 32, sprites) for i in range(6))}
    assert len(source.source) == len(made) == 6
    assert source.label_names == () and set(source.captions) == set(made)
    assert source.map_names == scenes.MAP_NAMES and source.object_names == scenes.THINGS
    for i, caption in enumerate(source.captions):
        example, scene = source.source[i], made[caption]
        assert example["caption"] == caption
        np.testing.assert_array_equal(example["image"], scene.image)
        np.testing.assert_array_equal(example["segmentation"], scene.segmentation)
        objects = example["objects"]
        assert objects.labels.tolist() == scene.labels
        corners = np.concatenate([objects.boxes[:, :2], objects.boxes[:, :2] + objects.boxes[:, 2:]], axis=1)
        np.testing.assert_allclose(corners, scene.boxes, atol=1e-6)
        np.testing.assert_array_equal(objects.flags[:, 1], np.array(scene.visible) < scenes.OCCLUDED)
        assert not objects.flags[:, [0, 2, 3]].any()


def test_scenes_of_the_splits_differ(make_config, directory):
    config = make_config(source="emoji_scenes", data_dir=directory, image_size=32, eval_split="test")
    parts = [sources.open_source(config, split).source for split in ("train", "eval")]
    pictures = [{part[i]["image"].tobytes() for i in range(len(part))} for part in parts]
    assert len(pictures[0]) == len(pictures[1]) == 6 and pictures[0].isdisjoint(pictures[1])


def test_batches_of_scenes(make_config, directory):
    config = make_config(source="emoji_scenes", data_dir=directory, image_size=32)
    layout = config.conditioning.layout
    layout.num_classes = len(scenes.THINGS)
    batch = next(loader.batches(config, "train", fields=("image", "caption", "segmentation", "layout")))
    assert batch["segmentation"].shape == (4, 32, 32) and batch["layout"].shape == (4, layout.max_length)
    for caption, classes, tokens in zip(batch["caption"], batch["segmentation"], batch["layout"], strict=True):
        kinds = tokens[: 3 * layout.max_objects : 3]
        kinds = kinds[kinds != layout.vocab_size - 1]
        names = [scenes.THINGS[kind % len(scenes.THINGS)] for kind in kinds]
        assert sorted(names) == sorted(
            name.split(" ", 1)[1] for group in caption.rpartition(" on ")[0].split(" and ")
            for name in group.split(", "))
        assert {scenes.MAP_NAMES[i] for i in np.unique(classes) if i >= FIRST_THING} == set(names)
