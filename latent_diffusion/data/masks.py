"""Random inpainting masks, as LaMa trains and tests with (Suvorov et al., WACV 2022; paper section 4.5).

A mask is a set of brush strokes or a set of boxes. The numbers are those of LaMa's configs: `narrow`, `medium` and
`wide` of its test sets random_thin_256, random_medium_256 and random_thick_256; `mixed` of its training. They are
pixels of a 256-pixel picture and scale with the picture.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from latent_diffusion.errors import choose

REFERENCE_SIZE = 256  # pixels; what all lengths below refer to
MAX_ANGLE = 4  # a stroke's direction is 0.01 plus a whole number of radians below this
MAX_TURNS = 5  # of one stroke
TRIES = 100  # for a mask that covers no more than is allowed; the last is taken if none does


@dataclass(frozen=True)
class Strokes:
    """Between `fewest` and `most` + 1 polylines, each part up to 10 + `length` long and 5 + `width` wide."""

    fewest: int
    most: int
    length: int
    width: int


@dataclass(frozen=True)
class Boxes:
    """Between one and `most` boxes with sides from `smallest` to `largest`, `margin` away from the border."""

    most: int
    smallest: int
    largest: int
    margin: int


@dataclass(frozen=True)
class Preset:
    """strokes, or boxes with probability `box_share`; `max_area`: the largest part of the picture that is masked."""

    strokes: Strokes | None
    boxes: Boxes | None = None
    box_share: float = 0.0
    max_area: float = 1.0


PRESETS = {
    "narrow": Preset(Strokes(4, 50, 40, 10), max_area=0.5),
    "medium": Preset(Strokes(4, 5, 100, 50), Boxes(5, 10, 50, 0), 0.3 / 1.3, 0.5),
    "wide": Preset(Strokes(1, 5, 200, 100), Boxes(3, 30, 150, 10), 0.3 / 1.3, 0.5),
    "boxes": Preset(None, Boxes(4, 30, 150, 10), 1.0),
    "mixed": Preset(Strokes(1, 5, 200, 100), Boxes(4, 30, 150, 10), 0.5),
}


def random_mask(size: int, preset: str, rng: np.random.Generator) -> UInt8[np.ndarray, "size size 1"]:
    """A mask of 0 and 1, 1 = to be painted. Never empty. Raises UserError for an unknown preset."""
    options = choose(PRESETS, preset, "conditioning.inpainting.masks")
    for _ in range(TRIES):
        canvas = Image.new("L", (size, size))
        if options.strokes is None or rng.random() < options.box_share:
            _draw_boxes(ImageDraw.Draw(canvas), size, options.boxes, rng)
        else:
            _draw_strokes(ImageDraw.Draw(canvas), size, options.strokes, rng)
        mask = np.array(canvas)[..., None]
        if 0 < mask.mean() <= options.max_area:
            break
    return mask


def _draw_strokes(draw: ImageDraw.ImageDraw, size: int, options: Strokes, rng: np.random.Generator) -> None:
    unit = size / REFERENCE_SIZE
    for number in range(rng.integers(options.fewest, options.most + 2)):  # LaMa's code draws one more than its configs
        x, y = rng.uniform(0, size, 2)
        for _ in range(1 + rng.integers(MAX_TURNS)):
            angle = 0.01 + rng.integers(MAX_ANGLE)
            angle = 2 * np.pi - angle if number % 2 == 0 else angle
            length = (10 + rng.integers(options.length)) * unit
            radius = (5 + rng.integers(options.width)) * unit / 2
            x2, y2 = np.clip((x + length * np.sin(angle), y + length * np.cos(angle)), 0, size)
            draw.line((x, y, x2, y2), fill=1, width=max(1, round(2 * radius)))
            for cx, cy in ((x, y), (x2, y2)):
                draw.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=1)
            x, y = x2, y2


def _draw_boxes(draw: ImageDraw.ImageDraw, size: int, options: Boxes, rng: np.random.Generator) -> None:
    unit = size / REFERENCE_SIZE
    margin = options.margin * unit
    for _ in range(rng.integers(1, options.most + 1)):
        width, height = rng.uniform(options.smallest * unit, options.largest * unit, 2)
        left, top = (rng.uniform(margin, size - margin - side) for side in (width, height))
        right, bottom = (max(start + 1, round(end)) for start, end in (
            (round(left), left + width), (round(top), top + height)))
        draw.rectangle((round(left), round(top), right - 1, bottom - 1), fill=1)
