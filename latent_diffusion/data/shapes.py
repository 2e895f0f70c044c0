"""A few drawn shapes, made in memory: what the smoke variants train on. No file is read or written."""

import numpy as np
from PIL import Image, ImageDraw

from latent_diffusion.layouts import Objects

SHAPES = ("circle", "square", "triangle", "cross")
MAP_NAMES = ("background", *SHAPES)  # classes of the semantic map
COLORS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 119, 180), "yellow": (240, 200, 30)}


class Shapes:
    """`count` pictures, from number `start` on; the number decides all of a picture. Captions: "a red circle"."""

    def __init__(self, start: int, count: int, size: int):
        self._start, self._count, self._size = start, count, size

    def __len__(self) -> int:
        return self._count

    def label(self, index: int) -> int:
        return (self._start + index) % len(SHAPES)

    def color(self, index: int) -> str:
        return list(COLORS)[(self._start + index) // len(SHAPES) % len(COLORS)]

    def caption(self, index: int) -> str:
        return f"a {self.color(index)} {SHAPES[self.label(index)]}"

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self._count:
            raise IndexError(index)
        number = self._start + index
        label = self.label(index)
        cover = _draw(SHAPES[label], self._size, np.random.default_rng(number))
        weight = cover[..., None].astype(np.float32) / 255
        image = np.rint(weight * COLORS[self.color(index)] + (1 - weight) * 255).astype(np.uint8)
        rows, columns = np.nonzero(cover >= 128)
        box = np.array([[columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]]) / self._size
        return {"image": image, "label": label, "caption": self.caption(index), "name": f"shape-{number}",
                "segmentation": np.where(cover >= 128, label + 1, 0), "objects": Objects(np.array([label]), box)}


def _draw(shape: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """How much of each pixel the shape covers, 0..255."""
    scale, color = 4, 255  # drawn larger and shrunk, for smooth edges
    canvas = Image.new("L", (size * scale, size * scale))
    draw = ImageDraw.Draw(canvas)
    r = rng.uniform(0.2, 0.35) * size * scale
    x, y = rng.uniform(0.4, 0.6, 2) * size * scale
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=color)
    elif shape == "square":
        draw.rectangle((x - r, y - r, x + r, y + r), fill=color)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=color)
    else:
        draw.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=color)
        draw.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=color)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX))
