"""What is asked of a model when it is sampled, checked against its config before anything is loaded or compiled."""

import dataclasses
import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from latent_diffusion import conditions as conditions_lib
from latent_diffusion import images, layouts, sizes
from latent_diffusion.diffusion import samplers, tiles
from latent_diffusion.diffusion import schedule as schedule_lib
from latent_diffusion.errors import UserError, choose

Labels = int | str | Sequence[int | str] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Settings:
    """How pictures are drawn; see `pipeline.LatentDiffusion.sample`. Not `guided`: without the unconditional pass."""

    sampler: str
    steps: int
    guidance_scale: float
    guided: bool
    eta: float
    seed: int
    size: tuple[int, int]  # height, width in pixels
    spacing: str = "clean"  # of the timesteps, and clip_x0: see `diffusion.samplers.sample`
    clip_x0: bool = False
    tile: int = 0  # side of the patches that big pictures are computed in, in pixels; 0 = as a whole
    overlap: int = 0  # of neighboring patches


def resolve_settings(
    config: Any,
    *,
    sampler: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    eta: float | None = None,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    tile: int | None = None,
    overlap: int | None = None,
) -> Settings:
    """Fills in what is not given from ``config.sampling`` and checks it, before anything is compiled.

    Raises:
      UserError: an unknown sampler, impossible numbers, a size or tile that the networks do not divide (with the
        nearest one that they do), or guidance by a model that was never trained without its condition.
    """
    options = config.sampling
    guided, fields = guidance_scale is not None or options.guidance_scale != 1.0, condition_fields(config)
    sampler = options.sampler if sampler is None else sampler
    steps = options.steps if steps is None else steps
    scale = float(options.guidance_scale if guidance_scale is None else guidance_scale)
    eta = float(options.eta if eta is None else eta)
    choose(samplers.METHODS, sampler, "sampler")
    total = config.diffusion.timesteps
    if not 1 <= steps <= total:
        raise UserError(f"steps={steps} must lie between 1 and {total}, the number of steps the model was trained with")
    if not math.isfinite(scale):
        raise UserError(f"guidance_scale={scale} must be a finite number")
    if not (math.isfinite(eta) and eta >= 0):
        raise UserError(f"eta={eta} must be a finite number, 0 or above")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} must lie between 0 and {2**32 - 1}")
    if scale != 1 and not fields:
        raise UserError(f"guidance_scale={scale:g}, but this model has no condition that could be left out, so there "
                        "is nothing to guide; use 1")
    if scale != 1 and not all(_null_is_trained(config, name) for name in fields):
        raise UserError(f"guidance_scale={scale:g}, but this model was trained without conditioning dropout and "
                        "cannot be guided; use guidance_scale 1")
    samplers.timesteps(sampler, schedule_lib.from_config(config.diffusion), steps, options.spacing)
    tile, overlap = _check_tile(config, tile, overlap)
    return Settings(sampler, int(steps), scale, guided and bool(fields), eta, int(seed), _check_size(config, size),
                    options.spacing, bool(options.clip_x0), tile, overlap)


def _check_size(config: Any, size: tuple[int, int] | None, name: str = "size", per: int = 1) -> tuple[int, int]:
    """`size`, or the default one, if the networks divide it; `per` pixels are one of what the message speaks of."""
    size = size or (config.data.image_size,) * 2
    factor, down = sizes.factor(config.first_stage.model), sizes.unet_factor(config)
    multiple = factor * down
    if any(side <= 0 or side % multiple for side in size):
        nearest = ",".join(str(max(1, round(side / multiple)) * multiple // per) for side in size)
        of_both = f" ({factor} of the first stage x {down} of the UNet)" if per == 1 else " (of the UNet)"
        raise UserError(f"{name}={','.join(str(side // per) for side in size)}: height and width must be multiples of "
                        f"{multiple // per}{of_both}; the nearest size is {nearest}")
    return int(size[0]), int(size[1])


def _check_tile(config: Any, tile: int | None, overlap: int | None) -> tuple[int, int]:
    if not tile:
        if overlap:
            raise UserError(f"overlap={overlap} is that of tiles; give tile as well")
        return 0, 0
    _check_size(config, (tile, tile), "tile")
    factor = sizes.factor(config.first_stage.model)
    overlap = tile // 4 // factor * factor if overlap is None else overlap
    if overlap % factor or not 0 <= overlap < tile:
        raise UserError(f"overlap={overlap} must be a multiple of {factor} from 0 to {tile - factor}, less than tile")
    return int(tile), int(overlap)


def patches(config: Any, asked: Settings) -> list[tuple[float, ...]]:
    """Where the patches of the UNet lie: (left, top, width, height) relative to the picture; [] if it is not tiled."""
    if not asked.tile:
        return []
    factor = sizes.factor(config.first_stage.model)
    height, width = asked.size
    places = factor * tiles.corners(*(n // factor for n in (height, width, asked.tile, asked.overlap)))
    tall, wide = min(asked.tile, height), min(asked.tile, width)
    return [(left / width, top / height, wide / width, tall / height) for top, left in places.tolist()]


def condition_fields(config: Any) -> tuple[str, ...]:
    """Which conditions with a null value the model takes: "tokens" (text), "layout", "vectors", "label" (a class)."""
    options = config.conditioning
    sequence = conditions_lib.SEQUENCES.get(options.crossattn, "label")
    return ((sequence,) if sequence != "label" else ()) + (
        ("label",) if options.label or options.crossattn == "class" else ())


def null_conditions(config: Any, vocabulary: conditions_lib.Tokenizer | None) -> dict[str, np.ndarray]:
    """The value of each of the model's `condition_fields` that stands for "no condition", without an axis for examples:
    the tokens of the empty text or layout, zeros, the class after the last. A class table may lack it, see
    `sizes.label_rows`.
    """
    options = config.conditioning
    made = {
        "tokens": lambda: np.asarray(vocabulary.null(options.text.max_length)).reshape(-1),
        "layout": lambda: layouts.null_tokens(options.layout),
        "vectors": lambda: np.zeros((1, options.width), np.float32),
        "label": lambda: np.asarray(options.num_classes, np.int32),
    }
    return {name: made[name]() for name in condition_fields(config)}


def takes(config: Any) -> str:
    """What the model can be given, in words, for messages."""
    words = {"tokens": "prompts", "layout": "layouts", "label": "labels"}
    given = [words.get(name, name) for name in (*condition_fields(config), *map_fields(config))]
    return f"it takes {' and '.join(given)}" if given else "it takes no condition"


def map_fields(config: Any) -> tuple[str, ...]:
    """Which maps the model must have: ("segmentation",), ("low_res",), ("image", "mask") or none."""
    return conditions_lib.MAPS[config.conditioning.concat]


def _null_is_trained(config: Any, name: str) -> bool:
    options = config.conditioning
    own = {"tokens": options.text_dropout, "label": options.label_dropout}
    if name == "label" and not options.null_class:
        return False
    return options.dropout > 0 or own.get(name, 0.0) > 0


def resolve_conditions(
    config: Any,
    prompts: str | Sequence[str] | None,
    labels: Labels | None,
    label_names: Sequence[str] = (),
) -> tuple[list[str] | None, list[int] | None]:
    """Checks prompts and labels against the model; if both are given they become equally long (one may be single).

    Raises:
      UserError: a condition that this model does not take, or needs and did not get; an empty prompt; an unknown label;
        prompts and labels of different number.
    """
    fields, classes = condition_fields(config), config.conditioning.num_classes
    if prompts is not None:
        if "tokens" not in fields:
            raise UserError(f"this model takes no prompts; {takes(config)}")
        prompts = conditions_lib.check_prompts([prompts] if isinstance(prompts, str) else list(prompts))
    if labels is not None:
        if "label" not in fields:
            raise UserError(f"this model takes no labels; {takes(config)}")
        names = (*label_names, *map(str, range(len(label_names), classes)))
        labels = [labels] if isinstance(labels, int | str | np.integer) else list(labels)
        labels = [number for label in labels for number in _label_numbers(str(label), names)]
        if not labels:
            raise UserError("no label given; leave labels out or name at least one")
    for name, given in (("tokens", prompts), ("label", labels)):
        if name in fields and given is None and not _null_is_trained(config, name):
            kind = "prompts" if name == "tokens" else "labels"
            raise UserError(f"this model cannot do without {kind}: it was trained without conditioning dropout")
    if prompts and labels:
        number = max(len(prompts), len(labels))
        if {len(prompts), len(labels)} - {1, number}:
            raise UserError(f"{len(prompts)} prompts and {len(labels)} labels: give as many of both, or one of either")
        prompts, labels = ((x * number)[:number] for x in (prompts, labels))
    return prompts, labels


def warn_of_untrained(config: Any, prompts: Sequence[str] | None, labels: Sequence[int] | None) -> None:
    """Logs a warning where one of two conditions is given alone, which never happened in training."""
    for name, given, other, option in (("tokens", prompts, labels, "text"), ("label", labels, prompts, "label")):
        untrained = not config.conditioning[f"{option}_dropout"]
        if name in condition_fields(config) and given is None and other is not None and untrained:
            logging.warning("this model was never trained with %s alone (conditioning.%s_dropout=0); give both",
                            "labels" if name == "tokens" else "prompts", option)


def _label_numbers(label: str, names: Sequence[str]) -> list[int]:
    """One label, or several with commas between them; but there are names that have commas."""
    exact = [i for i, name in enumerate(names) if name.lower() == label.strip().lower()]
    return exact[:1] or conditions_lib.parse_labels(label, names).tolist()


# --- layouts and maps ------------------------------------------------------------------------------------------------


def resolve_layouts(
    config: Any, given: Sequence[layouts.Objects] | layouts.Objects | None
) -> list[layouts.Objects] | None:
    """Checks layouts against the model. Raises UserError: a model without layouts, or one that cannot do without."""
    wanted = "layout" in condition_fields(config)
    if given is not None and not wanted:
        raise UserError(f"this model takes no layouts; {takes(config)}")
    if given is None and wanted and not _null_is_trained(config, "layout"):
        raise UserError("this model cannot do without a layout: it was trained without conditioning dropout")
    if given is None:
        return None
    chosen = [given] if isinstance(given, layouts.Objects) else list(given)
    if not chosen:
        raise UserError("no layout given; leave layouts out or give at least one")
    options = config.conditioning.layout
    for number, objects in enumerate(chosen):
        boxes = np.asarray(objects.boxes)
        if not (np.all(boxes >= 0) and np.all(boxes[:, :2] + boxes[:, 2:] <= 1 + 1e-6)):  # NaN is neither
            raise UserError(f"layout {number}: boxes are (left, top, width, height) in [0, 1]")
        if np.any(objects.labels < 0) or np.any(objects.labels >= options.num_classes):
            raise UserError(f"layout {number}: this model has the object classes 0 to {options.num_classes - 1}")
        if len(objects) > options.max_objects:
            logging.warning("layout %d has %d objects, of which this model takes the first %d", number, len(objects),
                            options.max_objects)
    return chosen


def resolve_vectors(config: Any, given: np.ndarray | None) -> np.ndarray | None:
    """Vectors as a batch has them, float32 (n, l, width), from (n, l, width) or (n, width).

    Raises UserError: a model that takes none, one that cannot do without, another width.
    """
    wanted, width = "vectors" in condition_fields(config), config.conditioning.width
    if given is None:
        if wanted and not _null_is_trained(config, "vectors"):
            raise UserError("this model cannot do without vectors: it was trained without conditioning dropout")
        return None
    if not wanted:
        raise UserError(f"this model takes no vectors; {takes(config)}")
    vectors = np.asarray(given, np.float32)
    vectors = vectors[:, None] if vectors.ndim == 2 else vectors
    if vectors.ndim != 3 or vectors.shape[-1] != width or not vectors.size:
        raise UserError(f"vectors have the shape {np.shape(given)}; this model takes (n, {width}) or (n, l, {width})")
    return vectors


def resolve_maps(config: Any, **given: np.ndarray | None) -> dict[str, np.ndarray]:
    """Checks pictures and maps against the model and turns them into the arrays of a batch.

    Args:
      given: ``segmentation`` int (H, W); ``low_res`` uint8 (h, w, c); ``image`` uint8 (H, W, c) with ``mask`` (H, W),
        where 1, True or white is to be painted. All may have a leading axis (n, ...); None is as good as left out.

    Returns:
      segmentation int32 (n, H, W); low_res, image float32 (n, h, w, c) in [-1, 1]; mask float32 (n, H, W, 1).

    Raises:
      UserError: something that the model does not take, or needs and did not get; class numbers that it does not have;
        a mask of another size than its picture; another number of channels than the model has.
    """
    wanted, given = map_fields(config), {name: x for name, x in given.items() if x is not None}
    for name in (*wanted, *given):
        if name not in wanted:
            raise UserError(f"this model takes no {name}; {takes(config)}")
        if name not in given:
            raise UserError(f"this model needs {' and '.join(wanted)}; {name} is missing")
    arrays = {}
    for name, x in given.items():
        x, least = np.asarray(x), 3 if name in ("image", "low_res") else 2
        if not (least <= x.ndim <= least + 1 + (name == "mask")) or not x.size:
            raise UserError(f"{name} has the shape {x.shape}; it must be ({'h, w, c' if least == 3 else 'h, w'}), or "
                            "one axis more")
        if name == "segmentation":
            arrays[name] = check_classes(x.reshape(-1, *x.shape[-2:]).astype(np.int32), config)
        elif name == "mask":
            x = x[..., 0] if x.ndim == 4 else x
            arrays[name] = np.stack([images.is_white(part)[..., None] for part in x.reshape(-1, *x.shape[-2:])])
        else:
            if x.dtype != np.uint8 or x.ndim not in (3, 4) or x.shape[-1] != config.data.channels:
                raise UserError(f"{name} must be a picture of 8 bits with {config.data.channels} channels")
            arrays[name] = x.reshape(-1, *x.shape[-3:]).astype(np.float32) / 127.5 - 1
    if "mask" in arrays and arrays["mask"].shape[1:3] != arrays["image"].shape[1:3]:
        sizes = (f"{array.shape[1]}x{array.shape[2]}" for array in (arrays["mask"], arrays["image"]))
        raise UserError("the mask has {} pixels, the picture {}; make them equal".format(*sizes))
    if "mask" in arrays and len(arrays["mask"]) not in (1, len(arrays["image"])):
        raise UserError(f"{len(arrays['image'])} pictures and {len(arrays['mask'])} masks: give one mask, or one "
                        "for each")
    return arrays


def check_classes(classes: np.ndarray, config: Any, where: str = "the semantic map") -> np.ndarray:
    """Class numbers of a map. Raises UserError for some that the model does not have; `where` begins the message."""
    number = config.conditioning.segmentation.num_classes
    if unknown := sorted(set(np.unique(classes).tolist()) - set(range(number))):
        raise UserError(f"{where} has the class numbers {', '.join(map(str, unknown[:5]))}"
                        f"{' ...' if len(unknown) > 5 else ''}, but this model has 0 to {number - 1} "
                        "(map_classes.txt of its workdir)")
    return classes


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
        return _check_size(config, found, f"size (of {name})", factor)
    return size


# --- reading a workdir -----------------------------------------------------------------------------------------------


def absolute(path: epath.PathLike) -> epath.Path:
    """The path with ~ expanded, unless it is a bucket's."""
    return epath.Path(path) if "://" in str(path) else epath.Path(path).expanduser()


def read_config(workdir: epath.PathLike) -> Any:
    """The config of a stage-2 workdir; reads nothing else.

    Raises:
      UserError: no such workdir, no or an unreadable config.json, or a run of stage 1.
    """
    from latent_diffusion import config as config_lib  # needs ml_collections, which nothing else here does

    path = absolute(workdir)
    if not path.exists():
        raise UserError(f"workdir {path} does not exist")
    saved = path / "config.json"
    if not saved.exists():
        raise UserError(f"{path} is not a workdir of a training run: it has no config.json")
    try:
        config = config_lib.from_json(saved.read_text())
        stage = config.stage
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise UserError(f"{saved} cannot be read: {error}") from error
    if stage != "diffusion":
        raise UserError(f"workdir {path} holds an autoencoder (stage 1); give the workdir of a stage-2 run")
    return config


def read_names(workdir: epath.PathLike, kind: str = "labels") -> tuple[str, ...]:
    """The names of a workdir's classes, () if it has none. kind: "labels", "objects" or "map_classes"."""
    path = absolute(workdir) / f"{kind}.txt"
    return conditions_lib.load_labels(path) if path.exists() else ()
