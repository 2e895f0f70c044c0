"""The order of the data, shares of processes, exact resume, and what is in a batch."""

import itertools

import numpy as np
import pytest

from latent_diffusion import conditions
from latent_diffusion.data import loader, shapes, sources
from latent_diffusion.errors import UserError

AUGMENTED = dict(flip=True, crop="random", min_crop_scale=0.5)
COUNT, BATCH = 12, 4


def _take(config, steps, **options):
    return list(itertools.islice(loader.batches(config, "train", **options), steps))


def _assert_equal(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


class _Numbered:
    """Examples whose picture is their number, in an odd size."""

    def __init__(self, count):
        self._count = count

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        return {"image": np.full((3, 5, 3), index, np.uint8), "name": str(index), "caption": ("one", "two")}


def _numbered(count):
    return sources.Source(_Numbered(count), captions=["one"] * count, where="numbers")


def _numbers(batches):
    return np.concatenate([np.rint((batch["image"][:, 0, 0, 0] + 1) * 127.5).astype(int) for batch in batches])


def test_every_epoch_is_another_permutation(make_config):
    batches = _take(make_config(), 9, source=_numbered(COUNT))
    epochs = _numbers(batches).reshape(3, COUNT)
    for epoch in epochs:
        assert sorted(epoch) == list(range(COUNT))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert tuple(epochs[0]) != tuple(range(COUNT))


def test_epochs_that_batches_do_not_divide_lose_nothing(make_config):
    numbers = _numbers(_take(make_config(), 15, source=_numbered(10)))
    for epoch in numbers.reshape(6, 10):
        assert sorted(epoch) == list(range(10))


def test_index_is_the_position_in_the_global_stream(make_config):
    index = np.concatenate([batch["index"] for batch in _take(make_config(), 5)])
    np.testing.assert_array_equal(index, np.arange(20))
    assert index.dtype == np.int32


def test_the_seed_decides(make_config):
    same = [_numbers(_take(make_config(seed=seed), 3, source=_numbered(COUNT))) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(same[0], same[1])
    assert not np.array_equal(same[0], same[2])


def test_two_processes_together_see_what_one_sees(make_config):
    config = make_config(**AUGMENTED)
    fields = ("image", "label", "caption")
    one = _take(config, 6, fields=fields)
    two = [_take(config, 6, fields=fields, process_index=p, process_count=2) for p in range(2)]
    for step in range(6):
        assert set(two[0][step]["index"]).isdisjoint(two[1][step]["index"])
        for key in one[step]:
            joined = np.stack([two[0][step][key], two[1][step][key]], axis=1).reshape(one[step][key].shape)
            np.testing.assert_array_equal(joined, one[step][key], err_msg=key)


def test_threads_change_nothing(make_config):
    _assert_equal(_take(make_config(threads=1, **AUGMENTED), 6), _take(make_config(threads=6, **AUGMENTED), 6))


@pytest.mark.parametrize("step", [0, 1, 3, 7])  # within, at the end of, and after an epoch
def test_resume_is_exact_with_augmentation(make_config, step):
    config = make_config(**AUGMENTED)
    whole = _take(config, 9)
    _assert_equal(_take(config, 9 - step, start_step=step), whole[step:])

    stream = loader.batches(config, "train")
    for _ in range(step):
        next(stream)
    state = stream.get_state()
    assert state == {"next_index": step}
    again = loader.batches(config, "train")
    next(again)
    again.set_state(state)
    _assert_equal(list(itertools.islice(again, 9 - step)), whole[step:])


@pytest.mark.slow
def test_workers_change_nothing(make_config):
    expected = _take(make_config(**AUGMENTED), 6)
    config = make_config(workers=2, **AUGMENTED)
    _assert_equal(_take(config, 6), expected)
    _assert_equal(_take(config, 4, start_step=2), expected[2:])


def test_augmentation_differs_between_epochs_and_examples(make_config):
    clear = [{"image": np.zeros((4, 4, 4), np.uint8), "name": str(i)} for i in range(4)]
    source = sources.Source(clear, where="clear pictures")
    config = make_config(background="random")
    colors = np.concatenate([batch["image"][:, 0, 0] for batch in _take(config, 5, source=source)])
    assert len(np.unique(colors, axis=0)) == 20


def test_evaluation_is_one_pass_in_order_with_a_mask(make_config):
    batches = list(loader.batches(make_config(**AUGMENTED), "eval", source=_numbered(10)))
    assert len(batches) == 3
    np.testing.assert_array_equal(_numbers(batches), [*range(10), 0, 1])
    np.testing.assert_array_equal(np.concatenate([batch["valid"] for batch in batches]), [1] * 10 + [0] * 2)
    np.testing.assert_array_equal(np.concatenate([batch["index"] for batch in batches]), range(12))
    assert batches[0]["valid"].dtype == np.float32
    _assert_equal(batches, list(loader.batches(make_config(**AUGMENTED), "eval", source=_numbered(10))))


def test_evaluation_sets_smaller_than_a_batch(make_config):
    (batch,) = loader.batches(make_config(batch_size=8), "eval", source=_numbered(3))
    np.testing.assert_array_equal(_numbers([batch]), [0, 1, 2, 0, 1, 2, 0, 1])
    assert batch["valid"].sum() == 3


def test_processes_share_the_evaluation(make_config):
    parts = [
        list(loader.batches(make_config(), "eval", source=_numbered(9), process_index=p, process_count=2))
        for p in range(2)
    ]
    assert len(parts[0]) == len(parts[1]) == 3  # as many steps in each, or collectives would wait for ever
    real = [_numbers(part)[np.concatenate([batch["valid"] for batch in part]) == 1] for part in parts]
    assert sorted(np.concatenate(real)) == list(range(9))


def test_one_pass_over_the_training_part(make_config):
    config = make_config(num_examples=6)
    batches = list(loader.batches(config, "train_once", fields=("image", "caption")))
    real = np.concatenate([batch["caption"][batch["valid"] == 1] for batch in batches])
    assert list(real) == list(sources.open_source(config, "train").captions)


def test_what_is_in_a_batch(make_config):
    config = make_config()
    source = sources.open_source(config, "train")
    vocabulary = conditions.train_vocabulary(source.captions, 100)
    batches = _take(config, 3, vocabulary=vocabulary, fields=("image", "label", "tokens", "caption"))
    for batch in batches:
        assert batch["image"].shape == (BATCH, 16, 16, 3) and batch["image"].dtype == np.float32
        assert -1 <= batch["image"].min() < batch["image"].max() <= 1
        assert batch["label"].dtype == batch["tokens"].dtype == np.int32
        np.testing.assert_array_equal(batch["tokens"], vocabulary.encode(list(batch["caption"]), 12))
        for image, label, caption in zip(batch["image"], batch["label"], batch["caption"], strict=True):
            _, color, shape = caption.split()
            assert source.label_names[label] == shape
            inside = np.rint((image[8, 8] + 1) * 127.5)  # all shapes cover the center
            nearest = min(shapes.COLORS, key=lambda name: np.abs(np.array(shapes.COLORS[name]) - inside).sum())
            assert nearest == color
    assert "label" not in _take(config, 1)[0]


def test_one_of_several_captions_is_drawn_in_training_and_the_first_in_evaluation(make_config):
    drawn = [batch["caption"] for batch in _take(make_config(), 25, source=_numbered(8), fields=("caption",))]
    share = np.mean(np.concatenate(drawn) == "two")
    assert abs(share - 0.5) < 4 * 0.05  # 100 draws
    for batch in loader.batches(make_config(), "eval", source=_numbered(8), fields=("caption",)):
        assert set(batch["caption"]) == {"one"}


def test_grey_images(make_config):
    (batch,) = _take(make_config(channels=1), 1)
    assert batch["image"].shape == (BATCH, 16, 16, 1)


def test_held_out_shapes_are_others(make_config):
    config = make_config()
    train, held_out = (sources.open_source(config, split).source for split in ("train", "eval"))
    assert {train[i]["name"] for i in range(len(train))}.isdisjoint(
        {held_out[i]["name"] for i in range(len(held_out))}
    )


def test_errors(make_config):
    with pytest.raises(UserError, match="batch_size=4 does not divide among 3 processes"):
        loader.batches(make_config(), "train", process_count=3)
    with pytest.raises(UserError, match="has 3 images, fewer than one batch"):
        loader.batches(make_config(), "train", source=_numbered(3))
    with pytest.raises(UserError, match="numbers has no labels"):
        loader.batches(make_config(), "train", source=_numbered(9), fields=("image", "label"))
    bare = sources.Source(_Numbered(9), where="numbers")
    with pytest.raises(UserError, match="numbers has no captions"):
        loader.batches(make_config(), "train", source=bare, fields=("caption",))
    with pytest.raises(UserError, match="choose from emoji, emoji_scenes, tfds"):
        loader.batches(make_config(source="web"), "train")
