"""Pictures that drawing begins with or keeps parts of: checked against a model, padded, extended. NumPy only.

Models for inpainting see picture and mask in their channels, see `request.resolve_maps`; with all others they are known
to the sampler alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from latent_diffusion import request, sizes
from latent_diffusion.errors import UserError


def resolve_all(
    config: Any, strength: float | None, **given: np.ndarray | None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Maps that the model sees and pictures that it does not: what `request.resolve_maps` and `resolve` return, of
    segmentation, low_res, image and mask."""
    own = request.map_fields(config)
    edited = {} if "image" in own else {name: given.pop(name, None) for name in ("image", "mask")}
    maps = request.resolve_maps(config, **given)
    return maps, resolve(config, **edited, strength=strength) if edited else {}


def resolve(
    config: Any, image: np.ndarray | None, mask: np.ndarray | None, strength: float | None
) -> dict[str, Float[np.ndarray, "n h w c"]]:
    """Checks a picture to begin with and a mask of what to paint, and turns them into arrays of a batch.

    Args:
      image: uint8 (H, W, c) or (n, H, W, c).
      mask: (H, W) or (n, H, W); 1, True or white is to be painted. None: everything, which needs a `strength`.

    Returns:
      {} without a picture; image float32 (n, H, W, c) in [-1, 1], and mask float32 (n, H, W, 1) if there is one.

    Raises:
      UserError: one without the other, another number of channels than the model has, sizes that differ.
    """
    if image is None:
        if mask is not None or strength is not None:
            raise UserError(f"{'mask' if mask is not None else 'strength'} needs an image")
        return {}
    if mask is None and strength is None:
        raise UserError("image: say what to do with it, by a mask of what to paint, or a strength (0 .. 1) of "
                        "change")
    pictures = request.picture_rows(image, config.data.channels, "image")
    if mask is None:
        return {"image": pictures}
    mask = np.asarray(mask)
    if mask.ndim not in (2, 3):
        raise UserError(f"mask has the shape {mask.shape}; it must be (h, w) or (n, h, w)")
    masks = request.mask_rows(mask)
    request.check_mask(masks, pictures)
    return {"image": pictures, "mask": masks}


def resolve_small(
    config: Any, small: np.ndarray | None, size: tuple[int, int] | None
) -> dict[str, Float[np.ndarray, "n h w c"]]:
    """Checks small pictures that an unconditional model is to draw enlarged (paper, appendix C): uint8 (h, w, c) or (n,
    h, w, c); the picture's size must be a multiple. Raises UserError."""
    if small is None:
        return {}
    pictures = request.picture_rows(small, config.data.channels, "upsample")
    size = size or (config.data.image_size,) * 2
    h, w = pictures.shape[1:3]
    if size[0] % h or size[1] % w or size[0] // h != size[1] // w:
        raise UserError(f"upsample: {h}x{w} pixels do not go into {size[0]}x{size[1]} a whole number of times, the "
                        "same for both sides")
    return {"small": pictures}


def resolve_variation(
    variation: float | Sequence[float] | None, variation_seed: int | None
) -> dict[str, Float[np.ndarray, "n"]]:
    """How far the noise is turned toward that of `variation_seed`, as an array of a batch; {} if it is not. Raises
    UserError: one without the other, or not in 0 .. 1."""
    if (variation is None) != (variation_seed is None):
        raise UserError("variation and variation_seed must be given together")
    if variation is None:
        return {}
    request.check_seed(variation_seed, "variation_seed")
    amount = np.atleast_1d(np.asarray(variation, np.float32))
    if not np.all((amount >= 0) & (amount <= 1)):
        raise UserError(f"variation={variation} must lie between 0 and 1")
    return {"amount": amount}


def outpaint(
    image: UInt8[np.ndarray, "h w c"], margins: Sequence[int]
) -> tuple[UInt8[np.ndarray, "h2 w2 c"], UInt8[np.ndarray, "h2 w2"]]:
    """A larger picture, and the mask of what is new in it, to be drawn with `image` and `mask` of
    `pipeline.LatentDiffusion.sample`.

    Args:
      margins: pixels to add at the top, right, bottom and left.

    Raises:
      UserError: unless these are four numbers, 0 or above.
    """
    if len(margins) != 4 or min(margins) < 0:
        raise UserError(f"outpaint={tuple(margins)} must be four numbers of pixels: top, right, bottom, left")
    top, right, bottom, left = margins
    around = ((top, bottom), (left, right))
    mask = np.pad(np.zeros(image.shape[:2], np.uint8), around, constant_values=255)
    return np.pad(image, (*around, (0, 0)), mode="edge"), mask


def pad(
    config: Any, arrays: Mapping[str, np.ndarray], size: tuple[int, int], canvas: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Pictures and maps (n, h, w, ...) of a picture of `size`, continued by their borders to that of the `canvas`
    around it."""
    factor, padded = sizes.factor(config.first_stage.model), {}
    for name, x in arrays.items():
        around = []
        for side, whole, length in zip(size, canvas, x.shape[1:3], strict=True):
            more, per = (whole - side) // factor, length * factor // side  # in latents; pixels of x for each
            around.append((more // 2 * per, (more - more // 2) * per))
        padded[name] = np.pad(x, ((0, 0), *around, *[(0, 0)] * (x.ndim - 3)), mode="edge")
    return padded
