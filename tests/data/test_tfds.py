"""TFDS sets by name: read without TensorFlow, and a clear line for whatever is wrong."""

import json
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from latent_diffusion.data import loader, records, sources
from latent_diffusion.errors import UserError


@pytest.mark.parametrize(
    "name, classes, channels",
    [("cifar10", 10, 3), ("mnist", 10, 1), ("imagenet2012", 1000, 3), ("lsun/church_outdoor", 0, 3)],
)
def test_any_set_by_name(make_config, name, classes, channels):
    with tfds.testing.mock_data(num_examples=16):
        config = make_config(source="tfds", name=name, crop="random")
        source = sources.open_source(config, "train")
        assert len(source.source) == 16
        assert len(source.label_names) == classes
        assert source.captions is None
        assert source.source[0]["image"].shape[-1] == channels
        fields = ("image", "label") if classes else ("image",)
        batch = next(loader.batches(config, "train", source=source, fields=fields))
        assert batch["image"].shape == (4, 16, 16, 3)
        if classes:
            assert batch["label"].max() < classes


def test_splits_and_keys_are_the_configs(emoji_dir, make_config):
    config = make_config(
        source="tfds", name="emoji/32", data_dir=emoji_dir, split="train[:50%]", eval_split="train[50%:]",
        label_key="style", caption_key="base",
    )
    halves = [sources.open_source(config, split) for split in ("train", "eval")]
    config.data.split = "train"
    whole = sources.open_source(config, "train")
    captions = [list(source.captions) for source in (*halves, whole)]
    assert captions[0] + captions[1] == captions[2]
    assert whole.label_names == ("twemoji", "openmoji")
    assert whole.captions[:2] == captions[2][:2] and whole.captions[-1] == captions[2][-1]
    assert [whole.source[i]["caption"] for i in range(5)] == captions[2][:5]
    # the same picture as through TFDS's own decoding
    records = tfds.builder("emoji/32", data_dir=emoji_dir).as_data_source(split="train")
    np.testing.assert_array_equal(whole.source[7]["image"], records[7]["image"])
    assert whole.source[7]["label"] == records[7]["style"]


def test_several_captions_and_missing_ones():
    record = {"captions": {"text": np.array([b"one", "zw\u00f6lf".encode()], object)}, "caption": "three"}
    assert records.captions_of(record, ("captions", "text")) == ("one", "zw\u00f6lf")
    assert records.captions_of(record, ("caption",)) == "three"


def _error(config):
    with pytest.raises(UserError) as caught:
        sources.open_source(config, "train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sets_that_are_not_prepared(make_config, tmp_path):
    error = _error(make_config(source="tfds", name="cifar10", data_dir=str(tmp_path)))
    assert f"cifar10 is not prepared in {tmp_path}/cifar10" in error
    assert f"tfds.builder('cifar10', data_dir='{tmp_path}').download_and_prepare(file_format='array_record')" in error
    error = _error(make_config(source="tfds", name="imagenet2012", data_dir=str(tmp_path)))
    assert f"needs a manual download into {tmp_path}/downloads/manual" in error
    assert "ILSVRC2012_img_train.tar" in error and "download_and_prepare" in error


def test_sets_prepared_as_tfrecord(make_config, emoji_dir, tmp_path):
    folder = tmp_path / "emoji" / "32" / "1.0.0"
    shutil.copytree(f"{emoji_dir}/emoji/32/1.0.0", folder)
    info = json.loads((folder / "dataset_info.json").read_text())
    assert info["fileFormat"] == "array_record"
    info["fileFormat"] = "tfrecord"  # what TFDS writes by default
    for split in info["splits"]:
        split["filepathTemplate"] = split["filepathTemplate"].replace("array_record", "tfrecord")
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for file in folder.glob("*.array_record*"):
        file.rename(folder / file.name.replace("array_record", "tfrecord"))
    error = _error(make_config(source="tfds", name="emoji/32", data_dir=str(tmp_path)))
    assert "is prepared as tfrecord, which has no random access" in error
    assert "download_and_prepare(file_format='array_record')" in error


def test_wrong_names(make_config, emoji_dir):
    error = _error(make_config(source="tfds", name="cifr10", data_dir=emoji_dir))
    assert "knows no such set" in error and "similar: cifar10" in error
    assert "needs data.name" in _error(make_config(source="tfds"))
    error = _error(make_config(source="tfds", name="lsun/churches"))
    assert "lsun has no config 'churches'; choose from classroom" in error and "church_outdoor" in error
    options = dict(source="tfds", name="emoji/32", data_dir=emoji_dir)
    error = _error(make_config(**options, split="trein"))
    assert "has no split 'trein'; choose from test, train, validation" in error
    error = _error(make_config(**options, image_key="img"))
    assert "data.image_key='img'" in error and "image, label, sublabel, style" in error


def test_buckets_need_a_mount(make_config):
    for source in ("tfds", "emoji"):
        assert "mount" in _error(make_config(source=source, name="cifar10", data_dir="gs://bucket/data"))


def test_keys_that_a_set_lacks_matter_only_when_asked_for(make_config, emoji_dir):
    config = make_config(source="tfds", name="emoji/32", data_dir=emoji_dir, label_key="kind", caption_key="text")
    next(loader.batches(config, "train"))
    missing = {"label": "no labels: set data.label_key", "caption": "no captions: set data.caption_key"}
    for field, message in missing.items():
        with pytest.raises(UserError, match=message) as caught:
            loader.batches(config, "train", fields=(field,))
        assert "features: image, label, sublabel" in str(caught.value)
