"""SVG -> square RGBA pictures at any size, drawn at that size (package resvg-py), with openmoji's wide margins cut."""

import dataclasses
import hashlib
import io
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

from latent_diffusion.errors import UserError

PROBE = 72  # pixels; the size at which pictures are compared, whatever size is built
# Side of the centered square that is kept, as a part of the canvas. Openmoji's drawings fill 11..61 of 72 at the median
# and stay within 4..68 but for some (eye, bat): those keep what they need.
KEPT = {"twemoji": 1.0, "openmoji": 64 / 72}

_VIEW_BOX = re.compile(r'viewBox="([^"]*)"')


@dataclass(frozen=True)
class Drawing:
    """One SVG with the square part of its canvas to draw: (left, top, side) in its own units."""

    svg: str
    square: tuple[float, float, float]

    def png(self, size: int) -> bytes:
        """A PNG file, RGBA, size x size."""
        try:
            import resvg_py
        except ImportError as error:
            raise UserError("resvg-py, which draws the emoji, is missing: pip install resvg-py==0.5.0") from error
        left, top, side = self.square
        svg = _VIEW_BOX.sub(f'viewBox="{left:g} {top:g} {side:g} {side:g}"', self.svg, count=1)
        # No drawing holds text; without its fonts the same machine-independent pixels come out, and sooner.
        return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True))

    def pixels(self, size: int) -> np.ndarray:
        """uint8 (size, size, 4)."""
        return np.asarray(Image.open(io.BytesIO(self.png(size))).convert("RGBA"))


def probe(svg: str, style: str) -> tuple[Drawing, bytes]:
    """Draws the whole canvas once: returns the drawing, cropped as its style needs, and a digest of its pixels."""
    left, top, width, height = (float(value) for value in _VIEW_BOX.search(svg).group(1).split())
    side = max(width, height)
    whole = Drawing(svg, (left + (width - side) / 2, top + (height - side) / 2, side))
    pixels = whole.pixels(PROBE)
    digest = hashlib.sha256(pixels.tobytes()).digest()
    inked = np.nonzero(pixels[..., 3])
    reach = max((max(PROBE / 2 - axis.min(), axis.max() + 1 - PROBE / 2) for axis in inked if axis.size), default=0)
    kept = side * min(1.0, max(KEPT[style], 2 * reach / PROBE))
    left, top, _ = whole.square
    return dataclasses.replace(whole, square=(left + (side - kept) / 2, top + (side - kept) / 2, kept)), digest
