"""Pictures of any kind -> uint8 squares of one size, and those -> float32 in [-1, 1]. NumPy and Pillow only."""

import io
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from latent_diffusion.errors import UserError

CROPS = ("center", "random")
BACKGROUNDS = ("white", "random")


@dataclass(frozen=True)
class View:
    """How one picture is seen: the square that is cut out, the mirror, and what lies behind transparent parts.

    side: of the square, relative to the shorter side. left, top: in [0, 1], how the rest is divided; 0.5 is the center.
    """

    side: float = 1.0
    left: float = 0.5
    top: float = 0.5
    flip: bool = False
    background: tuple[int, int, int] = (255, 255, 255)

    def square(self, height: int, width: int) -> tuple[int, int, int]:
        """The square in a picture of this size: (x, y, side) in pixels."""
        length = max(1, round(self.side * min(height, width)))
        x, y = (max(0, math.ceil(part * (rest + 1)) - 1) for part, rest in (
            (self.left, width - length), (self.top, height - length)))  # all places alike; rest // 2 for the center
        return x, y, length

    def crop(self, height: int, width: int) -> tuple[float, float, float, float]:
        """The square relative to the picture: (x, y, width, height) in [0, 1]."""
        x, y, length = self.square(height, width)
        return x / width, y / height, length / width, length / height


CENTER = View()


@dataclass(frozen=True)
class ImageTransform:
    """How a picture becomes a training image: the keys of the config's `data` section of the same names."""

    image_size: int
    channels: int = 3
    crop: str = "center"
    min_crop_scale: float = 1.0
    flip: bool = False
    background: str = "white"

    def __post_init__(self):
        for key, value, choices in (
            ("crop", self.crop, CROPS),
            ("background", self.background, BACKGROUNDS),
            ("channels", self.channels, (1, 3)),
        ):
            if value not in choices:
                raise UserError(f"data.{key}={value!r}: choose from {', '.join(map(str, choices))}")
        if self.image_size < 1:
            raise UserError(f"data.image_size={self.image_size}: must be at least 1")
        if not 0.0 < self.min_crop_scale <= 1.0:
            raise UserError(f"data.min_crop_scale={self.min_crop_scale}: must be in (0, 1]")

    @classmethod
    def from_config(cls, data) -> "ImageTransform":
        """From a config's `data` section."""
        return cls(
            data.image_size, data.channels, data.crop, float(data.min_crop_scale), bool(data.flip), data.background
        )

    def draw(self, rng: np.random.Generator) -> View:
        """Random background, crop and flip, as configured. The draws do not depend on the picture."""
        color = tuple(map(int, rng.integers(0, 256, 3))) if self.background == "random" else (255, 255, 255)
        side, left, top = (1.0, 0.5, 0.5)
        if self.crop == "random":
            side, left, top = rng.uniform(self.min_crop_scale, 1.0), rng.random(), rng.random()
        return View(side, left, top, bool(self.flip and rng.random() < 0.5), color)

    def apply(self, image: UInt8[np.ndarray, "h w c"], view: View) -> UInt8[np.ndarray, "s s d"]:
        """The picture as seen by `view`; by ``View()``, which is for evaluation, the center square on white."""
        image = resize(flatten(image, view.background), self.image_size, view)
        return set_channels(image[:, ::-1] if view.flip else image, self.channels)

    def apply_to_map(self, classes: Int[np.ndarray, "h w"], view: View) -> Int[np.ndarray, "s s"]:
        """The same square of a map of class numbers, each pixel the nearest (with half-pixel centers)."""
        x, y, length = view.square(*classes.shape)
        steps = ((np.arange(self.image_size) + 0.5) * (length / self.image_size)).astype(int)
        classes = classes[y + steps][:, x + steps]
        return classes[:, ::-1] if view.flip else classes


def decode(content: bytes) -> UInt8[np.ndarray, "h w c"]:
    """Decodes an image file to uint8 (H, W, C): C = 1 grey, 3 RGB, 4 RGB with alpha.

    16-bit greys keep their upper 8 bits; a camera's orientation tag is obeyed; palettes and CMYK become RGB.
    Raises what Pillow raises (OSError, SyntaxError, ValueError ...) where the file is no image or is damaged.
    """
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            pixels = np.asarray(image)
            return np.clip(pixels // 257 if pixels.max(initial=0) > 255 else pixels, 0, 255).astype(np.uint8)[..., None]
        if image.mode in ("L", "1"):
            return np.array(image.convert("L"))[..., None]
        alpha = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
        return np.array(image.convert("RGBA" if alpha else "RGB"))


def decode_map(content: bytes) -> Int[np.ndarray, "h w"]:
    """Decodes a semantic map to int32 class numbers: a grey or palette image, whose values or palette indices they are.

    Raises UserError for a color image or a JPEG, and what Pillow raises where the file is no image or is damaged.
    """
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        if image.format == "JPEG":
            raise UserError("a semantic map must be exact, and JPEG changes numbers; save it as PNG")
        if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
            raise UserError(f"a semantic map must be a grey or palette image of class numbers, this is {image.mode}")
        return np.array(image).astype(np.int32)


def why(error: Exception) -> str:
    """What Pillow says is wrong with a file, without the file."""
    known = {UnidentifiedImageError: "not an image", FileNotFoundError: "no such file"}
    return known.get(type(error)) or str(error) or type(error).__name__


def flatten(image: UInt8[np.ndarray, "h w c"], color=(255, 255, 255)) -> UInt8[np.ndarray, "h w d"]:
    """Lays a picture with alpha (4 channels) over a plain RGB color; returns others unchanged."""
    if image.shape[-1] != 4:
        return image
    alpha = image[..., 3:].astype(np.float32) / 255
    return np.rint(image[..., :3] * alpha + np.float32(color) * (1 - alpha)).astype(np.uint8)


def resize(
    image: UInt8[np.ndarray, "h w c"], size: int, view: View = CENTER
) -> UInt8[np.ndarray, "size size c"]:
    """Cuts the square of `view`, then resizes it to `size` (Pillow bicubic, which widens its filter when it shrinks).

    A picture that has the size already is returned as it is.
    """
    height, width, channels = image.shape
    x, y, length = view.square(height, width)
    square = image[y : y + length, x : x + length]
    if length == size:
        return square
    picture = Image.fromarray(square[..., 0] if channels == 1 else square)
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)).reshape(size, size, channels)


def set_channels(image: UInt8[np.ndarray, "h w c"], channels: int) -> UInt8[np.ndarray, "h w channels"]:
    """Grey <-> RGB. Grey is Pillow's "L": ITU-R 601-2, 0.299 R + 0.587 G + 0.114 B."""
    if image.shape[-1] == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=-1)
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).convert("L"))[..., None]


def to_float(image: UInt8[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """uint8 -> float32 in [-1, 1]: x / 127.5 - 1, as the reference."""
    return image.astype(np.float32) / 127.5 - 1.0
