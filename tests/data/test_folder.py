"""A folder of images: what is found, what is held out, labels, captions, and every complaint."""

import json
import zlib

import numpy as np
import pytest
from PIL import Image

from latent_diffusion.data import loader, sources
from latent_diffusion.errors import UserError


def _image(number):
    return Image.fromarray(np.full((9, 12, 3), number, np.uint8))


def _fill(root, names):
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _image(number).save(path)


def _names(config, split):
    examples = sources.open_source(config, split).source
    return [examples[i]["name"] for i in range(len(examples))]


def _error(config, split="train"):
    with pytest.raises(UserError) as caught:
        sources.open_source(config, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _captions(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def config(make_config, tmp_path):
    return make_config(source="folder", path=str(tmp_path))


def test_images_are_found_at_any_depth(config, tmp_path):
    names = ["a.png", "b.JPG", "c/d.jpeg", "c/e/f.webp", "g.bmp", "h.tif"]
    _fill(tmp_path, names)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    _image(0).save(tmp_path / ".hidden" / "x.png")
    config.data.holdout = 0.0
    assert _names(config, "train") == sorted(names)
    assert sources.open_source(config, "train").label_names == ()  # not all are in sub-folders


def test_the_hash_of_the_name_decides_what_is_held_out(config, tmp_path):
    names = [f"{i:03d}.png" for i in range(60)]
    _fill(tmp_path, names)
    train, held_out = _names(config, "train"), _names(config, "eval")
    assert sorted(train + held_out) == names
    assert held_out == [name for name in names if zlib.crc32(name.encode()) / 2**32 < 0.25]
    _fill(tmp_path, ["new1.png", "new2.png"])
    assert set(held_out) <= set(_names(config, "eval")) and set(train) <= set(_names(config, "train"))


def test_at_least_one_image_is_held_out(config, tmp_path):
    _fill(tmp_path, ["a.png", "b.png", "c.png"])
    config.data.holdout = 1e-6
    assert len(_names(config, "eval")) == 1 and len(_names(config, "train")) == 2
    config.data.holdout = 0.0
    assert len(_names(config, "train")) == 3
    assert "set data.holdout above 0" in _error(config, "eval")


@pytest.mark.parametrize("held_out", ["validation", "val", "test"])
def test_folders_named_after_splits(config, tmp_path, held_out):
    _fill(tmp_path, ["train/cat/a.png", "train/dog/b.png", f"{held_out}/cat/c.png", "other.png"])
    assert _names(config, "train") == ["cat/a.png", "dog/b.png"]
    assert _names(config, "eval") == ["cat/c.png"]
    source = sources.open_source(config, "eval")
    assert source.label_names == ("cat", "dog")  # of both parts, or numbers would differ
    assert source.source[0]["label"] == 0


def test_subfolders_are_classes(config, tmp_path):
    _fill(tmp_path, [f"{kind}/{i}.png" for kind in ("dog", "cat", "bird") for i in range(5)])
    source = sources.open_source(config, "train")
    assert source.label_names == ("bird", "cat", "dog")
    for i in range(len(source.source)):
        example = source.source[i]
        assert source.label_names[example["label"]] == example["name"].split("/")[0]


def test_captions_and_labels_from_the_table(config, tmp_path):
    names = ["a.png", "sub/b.png", "c.png"]
    _fill(tmp_path, names)
    config.data.holdout = 0.0
    rows = [
        {"file": name, "caption": f"picture {name}", "label": label}
        for name, label in zip(names, "zyz", strict=True)
    ]
    _captions(tmp_path / "captions.jsonl", rows)
    source = sources.open_source(config, "train")
    assert source.label_names == ("y", "z")
    assert list(source.captions) == ["picture a.png", "picture c.png", "picture sub/b.png"]
    assert [source.source[i]["label"] for i in range(3)] == [1, 1, 0]
    assert source.source[2]["caption"] == "picture sub/b.png"
    _captions(tmp_path / "captions.jsonl", [{**row, "label": i} for i, row in enumerate(rows)])
    source = sources.open_source(config, "train")
    assert source.label_names == ("0", "1", "2")
    assert [source.source[i]["label"] for i in range(3)] == [0, 2, 1]


def test_the_table_may_lie_in_either_folder(config, tmp_path):
    _fill(tmp_path, ["train/a.png", "val/b.png"])
    rows = [{"file": "train/a.png", "caption": "A"}, {"file": "val/b.png", "caption": "B"}]
    _captions(tmp_path / "captions.jsonl", rows)
    assert list(sources.open_source(config, "train").captions) == ["A"]
    assert list(sources.open_source(config, "eval").captions) == ["B"]
    (tmp_path / "captions.jsonl").unlink()
    _captions(tmp_path / "train" / "captions.jsonl", [{"file": "a.png", "caption": "C"}])
    assert list(sources.open_source(config, "train").captions) == ["C"]
    assert sources.open_source(config, "eval").captions is None


def test_mistakes_in_the_table(config, tmp_path):
    _fill(tmp_path, ["a.png", "b.png"])
    config.data.holdout = 0.0
    table = tmp_path / "captions.jsonl"
    table.write_text('{"file": "a.png", "caption": "A"}\n{"file": "b.png", caption}\n')
    assert "captions.jsonl, line 2: not like" in _error(config)
    table.write_text('{"name": "a.png"}\n')
    assert "captions.jsonl, line 1: not like" in _error(config)
    table.write_text('{"file": "a.png", "caption": 3}\n')
    assert "line 1: file and caption must be strings" in _error(config)
    _captions(table, [{"file": "a.png", "caption": "A"}])
    assert "1 of 2 images" in (error := _error(config)) and "have no caption; the first is b.png" in error
    _captions(table, [{"file": "a.png", "label": "x"}])
    assert "1 of 2 images lack a label, first b.png" in _error(config)
    _captions(table, [{"file": name, "label": -1} for name in ("a.png", "b.png")])
    assert "label -1 is negative" in _error(config)


def test_folders_that_are_missing_or_empty(config, tmp_path):
    assert f"no images in {tmp_path} (looked for .png" in _error(config)
    (tmp_path / "file.txt").write_text("x")
    config.data.path = str(tmp_path / "file.txt")
    assert "is a file, not a folder" in _error(config)
    config.data.path = str(tmp_path / "none")
    assert "no such folder" in _error(config)
    config.data.path = ""
    assert "data.path='': no such folder" in _error(config)
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    config.data.path = str(tmp_path)
    assert f"no images in {tmp_path}/train" in _error(config)


def test_wrong_options(config, tmp_path):
    _fill(tmp_path, ["a.png", "b.png"])
    config.data.on_corrupt = "ignore"
    assert "choose from error, skip" in _error(config)
    config.data.on_corrupt, config.data.holdout = "error", 1.0
    assert "data.holdout=1.0: must be in [0, 1)" in _error(config)


def _corrupt_files(root):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
    made = []
    for kind in ("png", "jpg", "webp", "bmp", "tif"):
        path = root / f"short.{kind}"
        noise.save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        made.append(path.name)
    (root / "empty.png").write_bytes(b"")
    (root / "text.jpg").write_text("not an image")
    noise.save(root / "flipped.png")
    content = bytearray((root / "flipped.png").read_bytes())
    content[len(content) // 2] ^= 255
    (root / "flipped.png").write_bytes(bytes(content))
    return sorted([*made, "empty.png", "text.jpg", "flipped.png"])


def test_corrupt_images_are_named(config, tmp_path):
    config.data.holdout = 0.0
    good = tmp_path / "good.png"
    _image(3).save(good)
    bad = tmp_path / ".bad"
    bad.mkdir()
    for name in _corrupt_files(bad):
        target = tmp_path / name
        (bad / name).rename(target)
        error = _error(config)
        assert f"corrupt image {target}" in error and "data.on_corrupt=skip" in error
        target.unlink()
    assert _names(config, "train") == ["good.png"]


def test_corrupt_images_are_skipped_and_counted(config, tmp_path, caplog):
    config.data.holdout, config.data.on_corrupt = 0.0, "skip"
    corrupt = _corrupt_files(tmp_path)
    assert "all 8 images" in _error(config)
    good = ["good1.png", "good2.png"]
    _fill(tmp_path, good)
    source = sources.open_source(config, "train")
    assert _names(config, "train") == good
    assert source.source.corrupt == corrupt
    assert "skipping 8 corrupt images of 10" in caplog.text


def test_damage_that_only_decoding_finds(config, tmp_path, monkeypatch):
    _fill(tmp_path, ["a.png", "b.png", "c.png"])
    config.data.holdout = 0.0
    source = sources.open_source(config, "train")
    (tmp_path / "b.png").write_bytes(b"damaged after the check")
    with pytest.raises(UserError, match="corrupt image .*b.png: not an image"):
        source.source[1]
    config.data.on_corrupt = "skip"
    _image(1).save(tmp_path / "b.png")
    source = sources.open_source(config, "train")
    (tmp_path / "b.png").write_bytes(b"damaged after the check")
    assert source.source[1]["name"] == "c.png"  # the next one stands in
    (tmp_path / "c.png").write_bytes(b"this too")
    assert source.source[1]["name"] == source.source[2]["name"] == "a.png"


def test_batches_from_a_folder(config, tmp_path):
    names = [f"{kind}/{i}.png" for kind in ("one", "two") for i in range(8)]
    _fill(tmp_path, names)
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(tmp_path / "one" / "grey.png")
    Image.fromarray(np.zeros((5, 5, 4), np.uint8)).save(tmp_path / "two" / "clear.png")
    config.data.holdout = 0.0
    stream = loader.batches(config, "train", fields=("image", "label"))
    seen = {}
    for _ in range(9):
        batch = next(stream)
        assert batch["image"].shape == (4, 16, 16, 3)
        for image, label in zip(batch["image"], batch["label"], strict=True):
            seen.setdefault(round((float(image[0, 0, 0]) + 1) * 127.5), set()).add(int(label))
    # file number k is filled with k; the grey is black, the clear one lies on white
    assert seen == {0: {0}, **{k: {0} for k in range(1, 8)}, **{k: {1} for k in range(8, 16)}, 255: {1}}
    config.training.batch_size = 32
    with pytest.raises(UserError, match=f"folder {tmp_path} has 18 images, fewer than one batch"):
        loader.batches(config, "train")
