"""Preparation of pictures, against Pillow's own functions and closed forms."""

import io

import numpy as np
import pytest
from PIL import Image

from latent_diffusion.data import transforms
from latent_diffusion.data.transforms import CENTER, ImageTransform, View
from latent_diffusion.errors import UserError


@pytest.fixture
def photo():
    """Smooth random colors, 40 high and 60 wide."""
    small = np.random.default_rng(0).integers(0, 256, (5, 8, 3), np.uint8)
    return np.array(Image.fromarray(small).resize((60, 40), Image.Resampling.BICUBIC))


def _train(transform, image, rng):
    return transform.apply(image, transform.draw(rng))


def _file(image: Image.Image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_the_range_is_the_references():
    values = transforms.to_float(np.array([0, 51, 255], np.uint8))
    np.testing.assert_allclose(values, [-1.0, -0.6, 1.0], atol=1e-7)  # x / 127.5 - 1
    assert values.dtype == np.float32


@pytest.mark.parametrize("size", [16, 40, 64])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (40, 43), (41, 40)])
def test_center_crop_then_pillows_resize_as_the_references_lsun(photo, size, shape):
    image = np.array(Image.fromarray(photo).resize(shape[::-1]))
    height, width = shape
    side = min(shape)
    square = image[(height - side) // 2 :, (width - side) // 2 :][:side, :side]
    expected = Image.fromarray(square).resize((size, size), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(ImageTransform(size).apply(image, CENTER), np.asarray(expected))


def test_a_map_is_seen_like_its_picture():
    """A picture whose pixels say where they are, and a map that says the same."""
    y, x = np.mgrid[:48, :60]
    image = np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8)
    for view in (CENTER, View(0.5, 0.0, 1.0), View(1.0, 1.0, 0.3, flip=True)):
        transform = ImageTransform(view.square(48, 60)[2])
        np.testing.assert_array_equal(transform.apply_to_map(100 * y + x, view), (
            transform.apply(image, view).astype(int) @ [1, 100, 0]))
    half = ImageTransform(24).apply_to_map(x, CENTER)  # every other pixel
    np.testing.assert_array_equal(half[0], 6 + 1 + 2 * np.arange(24))


def test_crop_of_a_view_is_its_square():
    left, top, width, height = View(0.5, 1.0, 0.0).crop(40, 60)
    np.testing.assert_allclose((left, top, width, height), (40 / 60, 0, 20 / 60, 0.5))


def test_maps_are_read_as_numbers():
    numbers = np.arange(12, dtype=np.uint8).reshape(3, 4)
    palette = Image.fromarray(numbers, "P")
    palette.putpalette([7] * 768)
    for image in (Image.fromarray(numbers), palette):
        np.testing.assert_array_equal(transforms.decode_map(_file(image)), numbers)
    with pytest.raises(UserError, match="RGB"):
        transforms.decode_map(_file(Image.new("RGB", (2, 2))))


def test_alpha_over_a_color_as_pillows_composite():
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (12, 9, 4), np.uint8)
    color = (10, 200, 90)
    base = Image.new("RGBA", (9, 12), (*color, 255))
    base.alpha_composite(Image.fromarray(image))
    ours = transforms.flatten(image, color).astype(int)
    assert np.abs(ours - np.asarray(base)[..., :3].astype(int)).max() <= 1  # Pillow rounds twice
    image[..., 3] = 255
    np.testing.assert_array_equal(transforms.flatten(image), image[..., :3])
    image[..., 3] = 0
    assert np.all(transforms.flatten(image) == 255)


def test_random_backgrounds_are_plain_and_cover_the_colors():
    transform = ImageTransform(4, background="random")
    empty = np.zeros((4, 4, 4), np.uint8)
    colors = np.array([_train(transform, empty, np.random.default_rng(i))[0, 0] for i in range(500)])
    one = _train(transform, empty, np.random.default_rng(0))
    assert np.all(one == one[0, 0])
    # uniform on 0..255: mean 127.5, standard deviation 73.9
    assert np.all(np.abs(colors.mean(0) - 127.5) < 4 * 73.9 / np.sqrt(500))
    assert np.all(transform.apply(empty, CENTER) == 255)


def test_flips_half_of_the_training_images(photo):
    transform = ImageTransform(40, flip=True)
    center = transform.apply(photo, CENTER)
    flipped = 0
    for i in range(400):
        image = _train(transform, photo, np.random.default_rng(i))
        if not np.array_equal(image, center):
            np.testing.assert_array_equal(image, center[:, ::-1])
            flipped += 1
    assert abs(flipped - 200) < 4 * 10  # binomial, standard deviation 10


def test_no_augmentation_by_default(photo):
    transform = ImageTransform(40)
    np.testing.assert_array_equal(_train(transform, photo, np.random.default_rng(0)), transform.apply(photo, CENTER))


def test_random_crops_take_every_place_at_full_scale():
    ramp = np.tile(np.arange(60, dtype=np.uint8)[None, :, None], (40, 1, 3))  # the value is the column
    transform = ImageTransform(40, crop="random")
    lefts = {int(_train(transform, ramp, np.random.default_rng(i))[0, 0, 0]) for i in range(500)}
    assert lefts == set(range(21))  # 60 - 40 = 20 places to the right of the first


def test_random_crops_have_a_side_between_min_crop_scale_and_one():
    ramp = np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (200, 1, 3))
    transform = ImageTransform(50, crop="random", min_crop_scale=0.5)
    spans = []
    for i in range(300):
        image = _train(transform, ramp, np.random.default_rng(i)).astype(float)
        spans.append((image[0, 40, 0] - image[0, 10, 0]) * 50 / 30)  # slope, away from the borders
    assert 0.5 * 200 - 4 < min(spans) < 0.55 * 200 and 0.95 * 200 < max(spans) < 200 + 4
    assert abs(np.mean(spans) - 150) < 4 * 28.9 / np.sqrt(300) + 1  # U(100, 200)


def test_grey_as_itu_601(photo):
    grey = ImageTransform(40, channels=1).apply(photo, CENTER)
    color = ImageTransform(40).apply(photo, CENTER).astype(float)
    assert grey.shape == (40, 40, 1)
    assert np.abs(grey[..., 0] - color @ [0.299, 0.587, 0.114]).max() <= 1
    three = ImageTransform(40).apply(photo[..., :1], CENTER)
    assert three.shape == (40, 40, 3) and np.all(three[..., 0] == three[..., 2])
    assert ImageTransform(20, channels=1).apply(photo[..., :1], CENTER).shape == (20, 20, 1)


def test_one_pixel_pictures_survive():
    for channels in (1, 3, 4):
        image = _train(ImageTransform(8, crop="random", min_crop_scale=0.1), np.full((1, 3, channels), 255, np.uint8),
                       np.random.default_rng(0))
        assert image.shape == (8, 8, 3)


def test_decoding_every_kind_of_file(photo):
    picture = Image.fromarray(photo)
    np.testing.assert_array_equal(transforms.decode(_file(picture)), photo)
    np.testing.assert_array_equal(transforms.decode(_file(picture, "BMP")), photo)
    np.testing.assert_array_equal(transforms.decode(_file(picture, "TIFF")), photo)
    np.testing.assert_array_equal(transforms.decode(_file(picture, "WEBP", lossless=True)), photo)
    np.testing.assert_array_equal(
        transforms.decode(_file(picture.convert("L"))), np.asarray(picture.convert("L"))[..., None]
    )
    assert transforms.decode(_file(picture.convert("CMYK"), "JPEG")).shape == (40, 60, 3)
    assert transforms.decode(_file(picture.convert("1"))).shape == (40, 60, 1)
    palette = picture.quantize(16)
    np.testing.assert_array_equal(transforms.decode(_file(palette)), np.asarray(palette.convert("RGB")))
    assert transforms.decode(_file(palette, transparency=3)).shape == (40, 60, 4)
    with_alpha = picture.convert("LA")
    assert transforms.decode(_file(with_alpha)).shape == (40, 60, 4)


def test_16_bit_greys_keep_their_upper_bits():
    values = np.array([[0, 257, 32896, 65535]], np.uint16)  # 257 * (0, 1, 128, 255)
    np.testing.assert_array_equal(transforms.decode(_file(Image.fromarray(values)))[..., 0], [[0, 1, 128, 255]])


def test_orientation_tags_are_obeyed(photo):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to view
    turned = transforms.decode(_file(Image.fromarray(photo), exif=exif))
    np.testing.assert_array_equal(turned, np.rot90(photo, -1))


def test_unknown_options_list_the_choices():
    with pytest.raises(UserError, match="data.crop='middle': choose from center, random"):
        ImageTransform(8, crop="middle")
    with pytest.raises(UserError, match="data.background='blue': choose from white, random"):
        ImageTransform(8, background="blue")
    with pytest.raises(UserError, match="data.channels=2: choose from 1, 3"):
        ImageTransform(8, channels=2)
    with pytest.raises(UserError, match="min_crop_scale"):
        ImageTransform(8, min_crop_scale=0.0)
    with pytest.raises(UserError, match="image_size"):
        ImageTransform(0)
