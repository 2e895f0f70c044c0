"""The cache of latents: what comes back, resuming, refusals, and its use by the loader."""

import itertools
import json
import os
import pickle

import jax
import numpy as np
import pytest
from etils import epath

from latent_diffusion.data import latents, loader, sources
from latent_diffusion.errors import UserError


def _encode(images):
    """A stand-in for an encoder with a known answer: 4x4 means, and a deviation that depends on the image."""
    mean = images.reshape(len(images), 4, 4, 4, 4, 3).mean(axis=(2, 4)) * 3
    return mean, 0.25 + 0.1 * np.abs(mean)


def _write(config, path, *, encode=_encode, fields=("image", "label", "caption"), flips=True, **options):
    source = sources.open_source(config, "train")
    batches = loader.batches(config, "train_once", source=source, fields=fields)
    metadata = {"digest": "abc", "label_names": source.label_names}
    return latents.write_cache(path, batches, encode, metadata, flips=flips, batches_per_shard=2, **options)


@pytest.fixture
def config(make_config):
    return make_config(num_examples=22)  # 6 batches of 4, the last half empty


def test_round_trip(config, tmp_path):
    path = tmp_path / "new" / "cache"
    assert not latents.is_complete(path)
    metadata = _write(config, path)
    assert latents.is_complete(path)
    assert metadata["num_examples"] == 22 and metadata["flips"] is True
    cache, images = latents.open_cache(path, expected={"digest": "abc"}), sources.open_source(config, "train")
    assert cache.label_names == images.label_names
    assert list(cache.captions) == list(images.captions)
    for i in range(22):
        example, original = cache.source[i], images.source[i]
        assert (example["label"], example["caption"]) == (original["label"], original["caption"])
        pixels = original["image"].astype(np.float32) / 127.5 - 1
        for mirrored, image in enumerate((pixels, pixels[:, ::-1])):
            mean, std = _encode(image[None])
            # float16 has 11 bits: relative error 2^-11
            np.testing.assert_allclose(example["image"]["latent_mean"][mirrored], mean[0], rtol=5e-4, atol=1e-6)
            np.testing.assert_allclose(example["image"]["latent_std"][mirrored], std[0], rtol=5e-4, atol=1e-6)


def test_the_scale_factor_is_one_over_the_std_of_samples(config, tmp_path):
    metadata = _write(config, tmp_path)
    images = sources.open_source(config, "train").source
    pixels = np.stack([images[i]["image"] for i in range(22)]).astype(np.float64) / 127.5 - 1
    mean, std = _encode(np.concatenate([pixels, pixels[:, :, ::-1]]))
    samples = mean + std * np.random.default_rng(0).standard_normal((200, *mean.shape))
    np.testing.assert_allclose(metadata["latents_std"], samples.std(), rtol=2e-3)
    np.testing.assert_allclose(metadata["latents_mean"], mean.mean(), rtol=1e-4)
    np.testing.assert_allclose(metadata["scale_factor"], 1 / metadata["latents_std"], rtol=1e-6)


def test_a_given_scale_factor_is_kept(config, tmp_path):
    batches = loader.batches(config, "train_once")
    metadata = latents.write_cache(tmp_path, batches, _encode, {"scale_factor": 0.18215}, flips=False)
    assert metadata["scale_factor"] == 0.18215


def test_batches_of_latents(config, tmp_path):
    _write(config, tmp_path)
    cache = latents.open_cache(tmp_path)
    config.data.flip = True
    batches = list(itertools.islice(loader.batches(config, "train", source=cache, fields=("image", "label")), 110))
    images = sources.open_source(config, "train").source
    mirrored = 0
    for batch in batches:
        assert batch["latent_mean"].shape == batch["latent_std"].shape == (4, 4, 4, 3)
        assert batch["latent_mean"].dtype == np.float32
    means = np.concatenate([batch["latent_mean"] for batch in batches])
    pixels = np.stack([images[i]["image"] for i in range(22)]).astype(np.float32) / 127.5 - 1
    plain, flipped = _encode(pixels)[0], _encode(pixels[:, :, ::-1])[0]
    seen = []
    for mean in means:
        distances = np.abs(np.concatenate([plain, flipped]) - mean).max(axis=(1, 2, 3))
        assert distances.min() < 2e-3
        seen.append(int(distances.argmin()) % 22)
        mirrored += distances[22:].min() < distances[:22].min()
    for epoch in np.array(seen).reshape(20, 22):
        assert sorted(epoch) == list(range(22))  # the same order as with images, every example once
    assert abs(mirrored - 220) < 4 * np.sqrt(110)

    stored = next(loader.batches(config, "train", source=cache, compact=True))
    assert stored["latent_mean"].dtype == stored["latent_std"].dtype == np.float16
    np.testing.assert_array_equal(stored["latent_mean"], batches[0]["latent_mean"])
    resumed = next(loader.batches(config, "train", source=cache, fields=("image", "label"), start_step=37))
    np.testing.assert_array_equal(resumed["latent_mean"], batches[37]["latent_mean"])
    config.data.flip = False
    for batch in itertools.islice(loader.batches(config, "train", source=cache), 6):
        assert all(np.abs(plain - mean).max(axis=(1, 2, 3)).min() < 2e-3 for mean in batch["latent_mean"])


def test_the_order_is_that_of_the_images(config, tmp_path):
    _write(config, tmp_path)
    cache = latents.open_cache(tmp_path)
    for one, other in zip(
        itertools.islice(loader.batches(config, "train", source=cache, fields=("caption", "label")), 8),
        loader.batches(config, "train", fields=("caption", "label")),
        strict=False,
    ):
        np.testing.assert_array_equal(one["caption"], other["caption"])
        np.testing.assert_array_equal(one["label"], other["label"])


def test_an_interrupted_cache_is_incomplete_and_is_finished(config, tmp_path):
    whole = tmp_path / "whole"
    _write(config, whole)
    path, calls = tmp_path / "cache", []

    def interrupted(images):
        calls.append(len(images))
        if len(calls) > 7:  # each batch is encoded twice: in the middle of the second shard
            raise KeyboardInterrupt
        return _encode(images)

    with pytest.raises(KeyboardInterrupt):
        _write(config, path, encode=interrupted)
    assert not latents.is_complete(path)
    with pytest.raises(UserError, match="no complete latents cache"):
        latents.open_cache(path)
    calls.clear()

    def counted(images):
        calls.append(len(images))
        return _encode(images)

    _write(config, path, encode=counted)
    assert len(calls) == 8  # the first shard, two batches, is not encoded again
    for file in sorted(file.name for file in whole.iterdir()):
        assert (path / file).read_bytes() == (whole / file).read_bytes(), file


def test_shards_of_another_first_stage_are_not_used(config, tmp_path):
    class Stop(Exception):
        pass

    def stops(images):
        if len(list(tmp_path.glob("shard-*.json"))) == 1:
            raise Stop
        return _encode(images)

    with pytest.raises(Stop):
        _write(config, tmp_path, encode=stops)
    batches = loader.batches(config, "train_once")
    latents.write_cache(tmp_path, batches, lambda x: (_encode(x)[0] + 1, None), {"digest": "new"}, flips=False)
    cache = latents.open_cache(tmp_path, expected={"digest": "new"})
    example = cache.source[0]
    assert example["image"]["latent_mean"].shape == (1, 4, 4, 3)
    assert np.all(example["image"]["latent_std"] == 0)
    assert cache.captions is None and "label" not in example


def test_two_processes_write_one_cache(config, tmp_path):
    _write(config, tmp_path / "one")
    one = latents.open_cache(tmp_path / "one").source
    source = sources.open_source(config, "train")
    parts = [
        loader.batches(
            config, "train_once", source=source, fields=("image", "label", "caption"), process_index=p, process_count=2
        )
        for p in range(2)
    ]
    metadata = {"digest": "abc", "label_names": source.label_names}
    waits = 0

    def barrier():  # the first process waits here for what the second does
        nonlocal waits
        waits += 1
        if waits == 2:
            latents._write_shards(epath.Path(tmp_path / "two"), parts[1], _encode, True, 1, 16)

    options = dict(flips=True, process_index=0, process_count=2, barrier=barrier)
    latents.write_cache(tmp_path / "two", parts[0], _encode, metadata, **options)
    two = latents.open_cache(tmp_path / "two").source
    assert len(two) == len(one) == 22
    for i in range(22):
        assert two[i]["caption"] == one[i]["caption"]
        np.testing.assert_array_equal(two[i]["image"]["latent_mean"], one[i]["image"]["latent_mean"])


def test_refusals(config, tmp_path):
    path = tmp_path / "cache"
    _write(config, path, flips=False)
    with pytest.raises(UserError, match="was made by another first stage"):
        latents.open_cache(path, expected={"digest": "other"})
    with pytest.raises(UserError, match=r"was made with image_size=None, not 16"):
        latents.open_cache(path, expected={"digest": "abc", "image_size": 16})
    with pytest.raises(UserError, match="complete cache already"):
        _write(config, path)
    config.data.flip = True
    with pytest.raises(UserError, match="holds no mirrored latents"):
        loader.batches(config, "train", source=latents.open_cache(path))
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(UserError, match="a folder with other files"):
        _write(config, tmp_path)
    for broken in (np.nan, 1e6):
        with pytest.raises(UserError, match="not finite in float16"):
            _write(config, tmp_path / str(broken), encode=lambda x, value=broken: (_encode(x)[0] * value, None))


@pytest.mark.parametrize("lost", ["shard-0000-000001.json", "shard-0000-000000-std.npy"])
@pytest.mark.parametrize("cut", [False, True])
def test_a_cache_that_was_copied_in_part_is_refused_and_can_be_finished(config, tmp_path, lost, cut):
    _write(config, tmp_path)
    whole = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    if cut:
        (tmp_path / lost).write_bytes(whole[lost][:-1])
    else:
        (tmp_path / lost).unlink()
    with pytest.raises(UserError, match="is not whole, .* is missing or cut off; copy all of it again, or"):
        latents.open_cache(tmp_path)
    (tmp_path / latents.METADATA).unlink()
    encoded = []
    _write(config, tmp_path, encode=lambda images: encoded.append(images) or _encode(images))
    assert len(encoded) == 4  # one shard: two batches, and their mirror images
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == whole


def test_a_large_cache_keeps_no_files_open(config, tmp_path):
    _write(config, tmp_path)
    cache = latents.open_cache(tmp_path).source
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no list of open files")
    before = len(os.listdir("/proc/self/fd"))
    examples = [cache[i] for i in range(len(cache))]
    assert len(os.listdir("/proc/self/fd")) == before and len(examples) == 22


def test_a_process_may_have_a_shard_of_padding_only(make_config, tmp_path):
    config = make_config(num_examples=9)  # batches of 4: the last example is the first process's
    source = sources.open_source(config, "train")
    for p in range(2):
        batches = loader.batches(config, "train_once", source=source, process_index=p, process_count=2)
        latents._write_shards(epath.Path(tmp_path), batches, _encode, False, p, 2)
    assert json.loads((tmp_path / "shard-0001-000001.json").read_text())["index"] == []
    found = latents._summary(epath.Path(tmp_path), {"flips": False, "metadata": {}})
    (tmp_path / latents.METADATA).write_text(json.dumps(found))
    assert [example["name"] for example in latents.open_cache(tmp_path).source] == [str(i) for i in range(9)]


@pytest.mark.parametrize("encode", [_encode, lambda images: (_encode(images)[0], None)])
def test_latents_in_a_bucket_are_the_same(config, tmp_path, monkeypatch, encode):
    _write(config, tmp_path, flips=False, encode=encode)
    source = latents.open_cache(tmp_path).source
    local = [source[i]["image"] for i in range(22)]
    monkeypatch.setattr(latents, "_is_local", lambda path: False)
    source = pickle.loads(pickle.dumps(latents.open_cache(tmp_path).source))
    jax.tree.map(np.testing.assert_array_equal, [source[i]["image"] for i in range(22)], local)
    assert len(source._loaded) == len(list(tmp_path.glob("*.npy"))) == (6 if encode is _encode else 3)  # read once


def test_caches_can_be_pickled(config, tmp_path):
    _write(config, tmp_path)
    cache = latents.open_cache(tmp_path).source
    expected = cache[5]["image"]["latent_mean"]
    again = pickle.loads(pickle.dumps(cache))
    np.testing.assert_array_equal(again[5]["image"]["latent_mean"], expected)
    assert len(pickle.dumps(cache)) < 20_000  # no latents inside


def test_the_files_hold_half_precision(config, tmp_path):
    _write(config, tmp_path)
    array = np.load(min(tmp_path.glob("shard-*-mean.npy")))
    assert array.dtype == np.float16 and array.shape == (8, 2, 4, 4, 3)
    assert json.loads((tmp_path / latents.METADATA).read_text())["digest"] == "abc"
