"""Pictures for people and for files: conversion to bytes, grids, labelled grids, PNG and NPZ. NumPy and Pillow only."""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int, Num, UInt8
from PIL import Image, ImageColor, ImageDraw, ImageFont, PngImagePlugin

from latent_diffusion import files, layouts

TEXT_SIZE = 13  # pixels
TITLE_SIZE = 16
MAX_LINES = 4  # of text under one picture
MARGIN = 6  # pixels around each picture
INK, PAPER = (40, 40, 40), (255, 255, 255)


def to_uint8(x: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """[-1, 1] -> 0..255, clipped and rounded to the nearest.

    CompVis latent-diffusion truncates instead, which darkens a picture by half a level and costs the autoencoder's
    reconstructions some accuracy; compare scores that were computed from files with this in mind.
    """
    return np.clip(np.round((np.asarray(x, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)


def psnr(x: UInt8[np.ndarray, "n h w c"], y: UInt8[np.ndarray, "n h w c"]) -> float:
    """Peak signal-to-noise ratio in dB, the mean over pictures (at most 100 for equal ones)."""
    error = np.mean((x.astype(np.float32) - y) ** 2, axis=(1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / np.maximum(error, 255**2 * 1e-10))))


# --- conditions as pictures ------------------------------------------------------------------------------------------


def enlarge(image: UInt8[np.ndarray, "h w c"], size: tuple[int, int], *, smooth: bool) -> UInt8[np.ndarray, "h2 w2 c"]:
    """The picture at another height and width, bicubic or each pixel a rectangle."""
    how = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return np.asarray(_to_pil(image).resize(size[::-1], how)).reshape(*size, image.shape[2])


def fill(image: UInt8[np.ndarray, "h w c"], mask: Num[np.ndarray, "h w 1"]) -> UInt8[np.ndarray, "h w c"]:
    """The picture with the mean of its known pixels where the mask is 1."""
    known = mask[..., 0] < 0.5
    mean = image[known].mean(axis=0) if known.any() else np.full(image.shape[2], 127.5)
    return np.where(known[..., None], image, np.rint(mean).astype(np.uint8))


def class_color(number: int) -> tuple[int, int, int]:
    """A color for a class: hues a golden section apart, so that neighbors differ; 0 is white."""
    if number == 0:
        return PAPER
    return ImageColor.getrgb(f"hsv({number * 222.5 % 360:.0f}, {90 - number // 3 % 3 * 20}%, {85 - number % 3 * 15}%)")


def color_map(classes: Int[np.ndarray, "h w"], channels: int = 3) -> UInt8[np.ndarray, "h w c"]:
    """A semantic map in colors (greys for one channel)."""
    palette = np.array([class_color(number) for number in range(int(classes.max(initial=0)) + 1)], np.uint8)
    return palette[classes] if channels == 3 else palette[classes].mean(axis=-1, keepdims=True).astype(np.uint8)


def draw_boxes(
    boxes: Float[np.ndarray, "n 4"], names: Sequence[str], picture: UInt8[np.ndarray, "h w c"]
) -> UInt8[np.ndarray, "h w c"]:
    """A picture with boxes (left, top, width, height in [0, 1]) and their names on it; of size 0, they are points."""
    height, width, channels = picture.shape
    canvas = _to_pil(picture).convert("RGB")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(max(8, min(TEXT_SIZE, width // 10)))
    for number, (box, name) in enumerate(zip(boxes, names, strict=True), start=1):
        left, top, right, bottom = (round(x * side) for x, side in zip(
            (box[0], box[1], box[0] + box[2], box[1] + box[3]), (width - 1, height - 1) * 2, strict=True))
        if (left, top) == (right, bottom):
            draw.ellipse((left - 2, top - 2, left + 2, top + 2), fill=class_color(number))
        else:
            draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=class_color(number))
        draw.text((left + 2, top + 1), name, class_color(number), font)
    pixels = np.asarray(canvas)
    return pixels if channels == 3 else pixels.mean(axis=-1, keepdims=True).astype(np.uint8)


def condition(
    given: Mapping[str, Sequence[Any]], number: int, shape: tuple[int, ...], object_names: Sequence[str] = ()
) -> UInt8[np.ndarray, "h w c"]:
    """What picture `number` was made from, as a picture of that shape (h, w, c).

    Args:
      given: what `pipeline.LatentDiffusion.sample` was given; the rows of each are used in turn.
    """
    row = {name: rows[number % len(rows)] for name, rows in given.items()}
    if "low_res" in row:
        return enlarge(row["low_res"], shape[:2], smooth=False)
    if "mask" in row:
        return fill(row["image"], is_white(row["mask"].reshape(*shape[:2], 1)))
    if "image" in row:
        return row["image"]
    if "segmentation" in row:
        return color_map(row["segmentation"], shape[2])
    return draw_objects(row["layouts"], object_names, np.full(shape, 255, np.uint8))


def draw_objects(
    objects: layouts.Objects, object_names: Sequence[str], picture: UInt8[np.ndarray, "h w c"]
) -> UInt8[np.ndarray, "h w c"]:
    """A picture with the boxes, names and flags of objects on it."""
    flags = objects.flags if objects.flags is not None else np.zeros((len(objects), len(layouts.FLAGS)), bool)
    known = [object_names[label] if label < len(object_names) else str(label) for label in objects.labels]
    told = [[flag for flag, on in zip(layouts.FLAGS, row, strict=True) if on] for row in flags]
    names = [", ".join([name, *more]) for name, more in zip(known, told, strict=True)]
    return draw_boxes(objects.boxes, names, picture)


def is_white(mask: Num[np.ndarray, "..."] | Bool[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """A mask as a user gives it - True, 1, or a picture's white - as float32: 1 = to be painted, 0 = known."""
    picture = mask.dtype == np.uint8 and mask.max(initial=0) > 1
    return (mask > (127 if picture else 0.5)).astype(np.float32)


# --- grids -----------------------------------------------------------------------------------------------------------


def grid(images: UInt8[np.ndarray, "n h w c"], columns: int, *, gap: int = 2) -> UInt8[np.ndarray, "h2 w2 c"]:
    """Images row by row, `columns` in a row, with white gaps between them and white where the last row is short."""
    n, height, width, channels = images.shape
    columns = min(columns, n)
    rows = math.ceil(n / columns)
    out = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        out[top : top + height, left : left + width] = image
    return out


# --- labelled grid ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Block:
    """Rows of a labelled grid under one title ("" for none): images (N, H, W, C) uint8 and a text for each."""

    images: UInt8[np.ndarray, "n h w c"]
    texts: Sequence[str]
    title: str = ""


def labelled_grid(blocks: Sequence[Block], columns: int, *, min_width: int = 112) -> Image.Image:
    """Blocks one below the other, each picture with its text under it.

    Args:
      blocks: images of all blocks have the same size.
      columns: pictures in a row.
      min_width: narrower pictures are enlarged by a whole factor (each pixel becomes a square), so that words fit.

    Returns:
      An RGB picture. Texts are wrapped to the width of the pictures; what exceeds four lines is cut.
    """
    font, title_font = ImageFont.load_default(TEXT_SIZE), ImageFont.load_default(TITLE_SIZE)
    height, width = blocks[0].images.shape[1:3]
    factor = max(1, math.ceil(min_width / width))
    height, width = height * factor, width * factor
    columns = max(1, min(columns, max(len(block.images) for block in blocks)))
    line = sum(font.getmetrics())
    step = width + 2 * MARGIN

    placed, y = [], 0  # (draw function's arguments), top of the next row
    for block in blocks:
        if block.title:
            lines = _wrap(block.title, title_font, columns * step - 2 * MARGIN)
            placed.append((MARGIN, y + MARGIN, None, lines, title_font))
            y += 2 * MARGIN + len(lines) * sum(title_font.getmetrics())
        wrapped = [_wrap(text, font, width) for text in block.texts]
        for first in range(0, len(block.images), columns):
            row = range(first, min(first + columns, len(block.images)))
            for column, i in enumerate(row):
                placed.append((column * step + MARGIN, y + MARGIN, block.images[i], wrapped[i], font))
            y += height + 2 * MARGIN + line * max(len(wrapped[i]) for i in row)

    canvas = Image.new("RGB", (columns * step, y + MARGIN), PAPER)
    draw = ImageDraw.Draw(canvas)
    for x, top, image, lines, face in placed:
        if image is not None:
            canvas.paste(_to_pil(image).resize((width, height), Image.Resampling.NEAREST), (x, top))
            top += height
        for number, text in enumerate(lines):
            draw.text((x, top + number * sum(face.getmetrics())), text, INK, face)
    return canvas


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Breaks a text into at most MAX_LINES lines no wider than `width` pixels; words that are wider are broken, too."""
    lines, line = [], ""
    for word in text.split():
        joined = f"{line} {word}" if line else word
        if font.getlength(joined) <= width:
            line = joined
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width and len(word) > 1:
            fits = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines.append(word[:fits])
            word = word[fits:]
        line = word
    lines += [line] if line else []
    if len(lines) > MAX_LINES:
        last = lines[MAX_LINES - 1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        lines = [*lines[: MAX_LINES - 1], last + "..."]
    return lines


def _to_pil(image: UInt8[np.ndarray, "h w c"]) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


# --- files -----------------------------------------------------------------------------------------------------------


def save_png(path: epath.PathLike, image: np.ndarray | Image.Image, metadata: Mapping[str, Any] | None = None) -> None:
    """Writes a PNG, locally or to a bucket.

    Args:
      path: where.
      image: uint8 (H, W, 1 or 3), or a Pillow image.
      metadata: becomes tEXt chunks, one for each entry (iTXt where Latin-1 does not suffice), readable with
        ``PIL.Image.open(path).text`` or ``exiftool``.
    """
    chunks = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        chunks.add_text(key, str(value))
    data = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else _to_pil(image)
    picture.save(data, "png", pnginfo=chunks)
    files.write_whole(epath.Path(path), data.getvalue())


def save_npz(
    path: epath.PathLike, images: UInt8[np.ndarray, "n h w c"], labels: Sequence[int] | np.ndarray | None = None
) -> None:
    """Writes the layout that the evaluators of guided-diffusion (ADM) read: ``arr_0`` uint8 (N, H, W, 3), grey repeated
    over the channels, and ``arr_1`` the class numbers (N,) int64 if there are any."""
    if images.shape[-1] == 1:
        images = np.repeat(images, 3, axis=-1)
    arrays = [images] if labels is None else [images, np.asarray(labels, np.int64)]
    data = io.BytesIO()
    np.savez(data, *arrays)
    epath.Path(path).write_bytes(data.getbuffer())
