"""How pictures are drawn, checked against a model's config before anything is loaded or compiled."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from latent_diffusion import request, sizes
from latent_diffusion.diffusion import grids, samplers, tiles
from latent_diffusion.diffusion import schedule as schedule_lib
from latent_diffusion.errors import UserError, choose


@dataclasses.dataclass(frozen=True)
class Settings:
    """How pictures are drawn. What is not given comes from ``config.sampling``, or is what stands here.

    Only sampler, steps, spacing, size, clip_x0, threshold, quantize_x0, two_passes, tiles and strength compile anew
    when changed, and guidance and an interval where there was none.
    """

    sampler: str  # a name of `diffusion.samplers.METHODS`
    steps: int  # of it, 1 .. T
    guidance_scale: tuple[float, ...]  # 1 = none, above 1 = closer to the condition; one for each picture in turn
    guided: bool  # False: without the unconditional pass, which halves the work
    eta: float  # noise of ddim, from 0 (none) to 1 (as much as ddpm); the others do not use it
    seed: int  # 0 .. 2^32 - 1; picture k depends on the seed and k only
    size: tuple[int, int]  # height, width in pixels; that of the map, or else of the training images by default
    canvas: tuple[int, int]  # what is drawn, and `size` cut from its middle, where the UNet does not divide that
    spacing: str = "clean"  # of the timesteps, see `diffusion.grids.make`
    temperature: float = 1.0  # of the noise that the steps add
    clip_x0: bool = False  # clip the predicted data to [-1, 1] at each step; for pixels
    threshold: float = 0.0  # dynamic thresholding instead, by this quantile (0.995)
    quantize_x0: bool = False  # of a VQ model: the predicted latents become those of the codebook at each step
    guidance_interval: tuple[float, ...] = ()  # (low, high): guide at noise levels sigma / alpha in it only
    guidance_rescale: float = 0.0  # 0 .. 1: give guided predictions the deviation of unguided ones
    two_passes: bool = False  # guidance in two passes, one after the other, with less memory
    tile: int = 0  # side of the patches that big pictures are computed in, in pixels; 0 = as a whole
    overlap: int = 0  # of neighboring patches (a quarter)
    decode_tile: int = 0  # as `tile`, of the decoder and encoder alone
    first: int = 0  # the step to begin with, which follows from `strength`
    from_image: bool = False  # begin with the picture, noised to the level of that step, as `strength` asks for


FROM_CONFIG = ("sampler", "steps", "eta", "spacing", "temperature", "clip_x0", "threshold", "quantize_x0",
               "guidance_interval", "guidance_rescale", "two_passes")


def resolve(
    config: Any,
    *,
    guidance_scale: float | Sequence[float] | None = None,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    tile: int | None = None,
    overlap: int | None = None,
    decode_tile: int | None = None,
    strength: float | None = None,
    weak: bool = False,
    **given: Any,
) -> Settings:
    """Fills in what is not given (or None) from ``config.sampling`` and checks it, before anything is compiled.

    Args:
      strength: of image-to-image, 0 (the picture stays) .. 1 (little of it does): the share of the steps that is run.
      weak: guidance is away from a weaker model, not from the null condition.
      given: other fields of `Settings`.

    Raises:
      UserError: an unknown name, impossible numbers, a size or tile that the networks do not divide (with the nearest
        one that they do), or guidance by a model that was never trained without its condition.
    """
    if unknown := sorted(set(given) - set(FROM_CONFIG)):
        raise UserError(f"unknown setting {unknown[0]}; there are {', '.join(FROM_CONFIG)}")
    options = config.sampling
    values = {name: options[name] if given.get(name) is None else given[name] for name in FROM_CONFIG}
    scale = options.guidance_scale if guidance_scale is None else guidance_scale
    scales = tuple(float(x) for x in np.atleast_1d(np.asarray(scale, np.float64)))
    guided = guidance_scale is not None or scales != (1.0,)
    if weak and not guided:
        raise UserError("weak: say how far to move away from the weaker model, by guidance_scale")
    _check_numbers(config, values, seed)
    grid = grids.make(values["sampler"], schedule_lib.from_config(config.diffusion), values["steps"], values["spacing"])
    _check_guidance(config, scales, weak)
    size = check_size(config, size)
    tile, overlap = _check_tile(config, tile, overlap)
    if decode_tile:
        check_size(config, (decode_tile, decode_tile), "decode_tile")
    return Settings(
        **values, guidance_scale=scales, guided=guided and (weak or bool(request.condition_fields(config))),
        seed=int(seed), size=size, canvas=canvas(config, size), tile=tile, overlap=overlap,
        decode_tile=int(decode_tile or 0), first=_first_step(grid.steps, strength), from_image=strength is not None)


def _check_numbers(config: Any, values: dict[str, Any], seed: int) -> None:
    """Checks and converts, in place, what is a number of its own."""
    choose(samplers.METHODS, values["sampler"], "sampler")
    steps, total = values["steps"], config.diffusion.timesteps
    if not 1 <= steps <= total:
        raise UserError(f"steps={steps} must lie between 1 and {total}, the number of steps the model was trained with")
    for name, low, high in (("eta", 0, math.inf), ("temperature", 0, math.inf), ("threshold", 0, 1),
                            ("guidance_rescale", 0, 1)):
        number = values[name] = float(values[name])
        if not (math.isfinite(number) and low <= number <= high):
            most = "or above" if high == math.inf else f"to {high}"
            raise UserError(f"{name}={number} must be a finite number, {low} {most}")
    interval = values["guidance_interval"] = tuple(float(x) for x in values["guidance_interval"])
    if interval and (len(interval) != 2 or not 0 <= interval[0] < interval[1]):
        raise UserError(f"guidance_interval={interval} must be two noise levels, low < high, or nothing")
    request.check_seed(seed)
    if values["quantize_x0"] and config.first_stage.model.kind != "vq":
        raise UserError("quantize_x0 is for models with a VQ first stage, which has a codebook")
    for name in ("clip_x0", "quantize_x0", "two_passes"):
        values[name] = bool(values[name])
    values["steps"] = int(steps)


def _check_guidance(config: Any, scales: tuple[float, ...], weak: bool) -> None:
    fields = request.condition_fields(config)
    for scale in scales:
        if not math.isfinite(scale):
            raise UserError(f"guidance_scale={scale} must be a finite number")
        if scale != 1 and not fields and not weak:
            raise UserError(f"guidance_scale={scale:g}, but this model has no condition that could be left out, so "
                            "there is nothing to guide; use 1")
        if scale != 1 and not weak and not all(request.null_is_trained(config, name) for name in fields):
            raise UserError(f"guidance_scale={scale:g}, but this model was trained without conditioning dropout and "
                            "cannot be guided; use guidance_scale 1")


def _first_step(steps: int, strength: float | None) -> int:
    """Image-to-image runs the last int(strength * steps) of the steps, as the reference (its img2img.py), but at least
    one."""
    if strength is None:
        return 0
    if not 0 < strength <= 1:
        raise UserError(f"strength={strength} must be above 0 and at most 1")
    return steps - max(1, int(strength * steps + 1e-9))


# --- sizes -----------------------------------------------------------------------------------------------------------


def canvas(config: Any, size: tuple[int, int]) -> tuple[int, int]:
    """The smallest size that the UNet divides and `size` fits into."""
    multiple = sizes.factor(config.first_stage.model) * sizes.unet_factor(config)
    return tuple(-(-side // multiple) * multiple for side in size)


def check_size(
    config: Any, size: tuple[int, int] | None, name: str = "size", per: int = 1
) -> tuple[int, int]:
    """`size`, or the default one, if the networks divide it; `per` pixels are one of what the message speaks of.

    The first stage must divide pictures; the UNet must, too, where there is no canvas: tiles, and models of layouts,
    whose boxes are relative to the picture.
    """
    size = size or (config.data.image_size,) * 2
    factor, down = sizes.factor(config.first_stage.model), sizes.unet_factor(config)
    strict = name.endswith("tile") or config.conditioning.crossattn == "layout"
    multiple = factor * down if strict else factor
    if any(side <= 0 or side % multiple for side in size):
        nearest = ",".join(str(max(1, round(side / multiple)) * multiple // per) for side in size)
        of_both = f" ({factor} of the first stage x {down} of the UNet)" if strict else " (of the first stage)"
        raise UserError(f"{name}={','.join(str(side // per) for side in size)}: height and width must be multiples of "
                        f"{multiple // per}{of_both}; the nearest size is {nearest}")
    return int(size[0]), int(size[1])


def _check_tile(config: Any, tile: int | None, overlap: int | None) -> tuple[int, int]:
    if not tile:
        if overlap:
            raise UserError(f"overlap={overlap} is that of tiles; give tile as well")
        return 0, 0
    check_size(config, (tile, tile), "tile")
    factor = sizes.factor(config.first_stage.model)
    overlap = quarter(tile, factor) if overlap is None else overlap
    if overlap % factor or not 0 <= overlap < tile:
        raise UserError(f"overlap={overlap} must be a multiple of {factor} from 0 to {tile - factor}, less than tile")
    return int(tile), int(overlap)


def quarter(tile: int, factor: int) -> int:
    """A quarter of a tile's side, as a multiple of the first stage's factor: how far tiles overlap by default."""
    return tile // 4 // factor * factor


def patches(config: Any, asked: Settings) -> list[tuple[float, ...]]:
    """Where the patches of the UNet lie: (left, top, width, height) relative to the picture; [] if it is not tiled."""
    if not asked.tile:
        return []
    factor = sizes.factor(config.first_stage.model)
    height, width = asked.size
    places = factor * tiles.corners(*(n // factor for n in (height, width, asked.tile, asked.overlap)))
    tall, wide = min(asked.tile, height), min(asked.tile, width)
    return [(left / width, top / height, wide / width, tall / height) for top, left in places.tolist()]


def size_of_maps(
    config: Any, maps: Mapping[str, np.ndarray], size: tuple[int, int] | None = None
) -> tuple[int, int] | None:
    """Height and width of the pictures that the arrays of `resolve_maps` ask for; without any, `size`.

    Raises UserError where `size` is something else.
    """
    for name, x in maps.items():
        factor = config.conditioning.low_res.factor if name == "low_res" else 1
        found = x.shape[1] * factor, x.shape[2] * factor
        if size is not None and tuple(size) != found:
            raise UserError(f"size={size[0]},{size[1]}, but {name} makes a picture of {found[0]},{found[1]}; leave "
                            "size out")
        return check_size(config, found, f"size (of {name})", factor)
    return size
