"""Pictures: conversion to bytes, grids, text under pictures, PNG metadata and the evaluators' file layout."""

import zipfile

import numpy as np
import pytest
from PIL import Image

from latent_diffusion import images, layouts


def test_to_uint8_inverts_the_usual_preprocessing_exactly():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    as_trained = levels.astype(np.float32) / 127.5 - 1
    np.testing.assert_array_equal(images.to_uint8(as_trained), levels)


def test_to_uint8_rounds_and_clips():
    x = np.float32([-3.0, -1.0, -0.999, 0.0035, 0.0118, 1.0, 7.0])  # 0.0035 -> 127.95, 0.0118 -> 129.0045
    np.testing.assert_array_equal(images.to_uint8(x), [0, 0, 0, 128, 129, 255, 255])


def test_grid_places_pictures_row_by_row():
    pictures = np.stack([np.full((2, 3, 3), 10 * i, np.uint8) for i in range(5)])
    out = images.grid(pictures, 2, gap=1)
    assert out.shape == (3 * 3 - 1, 2 * 4 - 1, 3)
    for i in range(5):
        top, left = i // 2 * 3, i % 2 * 4
        assert (out[top : top + 2, left : left + 3] == 10 * i).all()
    assert (out[6:, 3:] == 255).all() and (out[2] == 255).all() and (out[:, 3] == 255).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_labelled_grid_enlarges_pixels_to_squares_and_writes_below(channels):
    pictures = np.random.default_rng(0).integers(0, 255, (3, 8, 8, channels), np.uint8)
    block = images.Block(pictures, ["apple", "", "a flag"])
    out = np.asarray(images.labelled_grid([block], columns=2, min_width=64))
    m, step = images.MARGIN, 64 + 2 * images.MARGIN
    assert out.shape[1:] == (2 * step, 3)
    enlarged = np.kron(pictures[0], np.ones((8, 8, 1), np.uint8))
    np.testing.assert_array_equal(out[m : m + 64, m : m + 64], np.broadcast_to(enlarged, (64, 64, 3)))
    below = out[m + 64 : m + 64 + 12]
    assert below[:, :step].min() < 100, "no text under the first picture"
    assert below[:, step:].min() == 255, "text where there is none"


def test_labelled_grid_puts_each_block_under_its_title():
    pictures = np.zeros((2, 64, 64, 3), np.uint8)
    plain = images.labelled_grid([images.Block(pictures, ["a", "b"])], 2)
    titled = images.labelled_grid([images.Block(pictures, ["a", "b"], "Seen"), images.Block(pictures, ["c", "d"])], 2)
    assert titled.width == plain.width
    top = np.asarray(titled)[: titled.height - 2 * plain.height + images.MARGIN]
    assert top.min() < 100 and len(top) >= images.TITLE_SIZE


def test_long_texts_are_wrapped_within_the_width_and_cut():
    font = images.ImageFont.load_default(images.TEXT_SIZE)
    text = "grinning face with tears of joy and Donaudampfschifffahrtsgesellschaftskapitaen " * 3
    lines = images._wrap(text, font, 100)
    assert len(lines) == images.MAX_LINES and lines[-1].endswith("...")
    assert max(font.getlength(line) for line in lines) <= 100
    assert images._wrap("a red apple", font, 300) == ["a red apple"]
    assert images._wrap("", font, 300) == []


def test_png_metadata_is_plain_text_in_the_file(tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (4, 6, 3), np.uint8)
    metadata = {"prompt": "crème brûlée", "seed": 3, "guidance_scale": 2.5, "japanese": "りんご"}
    images.save_png(tmp_path / "x.png", picture, metadata)
    with Image.open(tmp_path / "x.png") as read:
        assert read.text == {"prompt": "crème brûlée", "seed": "3", "guidance_scale": "2.5", "japanese": "りんご"}
        np.testing.assert_array_equal(np.asarray(read), picture)
    assert b"tEXtseed\x003" in (tmp_path / "x.png").read_bytes()  # PNG specification, 11.3.4.3


def test_grey_png(tmp_path):
    images.save_png(tmp_path / "x.png", np.arange(16, dtype=np.uint8).reshape(4, 4, 1))
    with Image.open(tmp_path / "x.png") as read:
        assert read.mode == "L"
        np.testing.assert_array_equal(np.asarray(read), np.arange(16).reshape(4, 4))


def test_npz_has_the_layout_that_the_adm_evaluator_reads(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 255, (5, 4, 4, 3), np.uint8)
    images.save_npz(tmp_path / "x.npz", pictures, [0, 1, 2, 0, 1])
    # its reader looks for the member arr_0.npy, shape (N, H, W, 3), uint8
    assert zipfile.ZipFile(tmp_path / "x.npz").namelist() == ["arr_0.npy", "arr_1.npy"]
    read = np.load(tmp_path / "x.npz")
    np.testing.assert_array_equal(read["arr_0"], pictures)
    np.testing.assert_array_equal(read["arr_1"], [0, 1, 2, 0, 1])
    assert read["arr_0"].dtype == np.uint8
    images.save_npz(tmp_path / "grey.npz", pictures[..., :1])
    read = np.load(tmp_path / "grey.npz")
    assert read.files == ["arr_0"]
    np.testing.assert_array_equal(read["arr_0"], np.repeat(pictures[..., :1], 3, -1))


def test_objects_are_drawn_on_the_picture():
    picture = np.full((40, 60, 3), 200, np.uint8)
    objects = layouts.Objects(np.array([1, 0]), np.array([[0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.0, 0.0]]),
                              np.array([[False, True, False, False], [False] * 4]))
    drawn = images.draw_objects(objects, ("cat", "dog"), picture)
    assert (drawn[0] == images.class_color(1)).all() and (drawn[:, -1] == images.class_color(1)).all()
    assert (drawn[20, 30] == images.class_color(2)).all()  # a point
    assert (drawn[30, 5] == 200).all() and (picture == 200).all()
    plain = images.draw_objects(layouts.Objects(objects.labels, objects.boxes), ("cat", "dog"), picture)
    assert (drawn != plain).any()  # "dog, occluded" is more than "dog"
