"""What a model is asked to draw, its conditions, checked against its config before anything is loaded or compiled."""

import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from latent_diffusion import conditions as conditions_lib
from latent_diffusion import images, layouts
from latent_diffusion.errors import UserError

Labels = int | str | Sequence[int | str] | np.ndarray


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


def null_is_trained(config: Any, name: str) -> bool:
    """Whether one of `condition_fields` was dropped in training, so that the model can do without it."""
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
        labels = [number for label in labels for number in _label_numbers(label, names)]
        if not labels:
            raise UserError("no label given; leave labels out or name at least one")
    for name, given in (("tokens", prompts), ("label", labels)):
        if name in fields and given is None and not null_is_trained(config, name):
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


def _label_numbers(label: str | int, names: Sequence[str]) -> list[int]:
    """A number, whatever the names are (which may be other numbers); a text: one label, or several with commas between
    them; but there are names that have commas."""
    if not isinstance(label, str):
        if not 0 <= label < len(names):
            raise UserError(f"label {label}: this model has the classes 0 to {len(names) - 1}")
        return [int(label)]
    exact = [i for i, name in enumerate(names) if name.lower() == label.strip().lower()]
    return exact[:1] or conditions_lib.parse_labels(label, names).tolist()


def check_seed(seed: int, name: str = "seed") -> None:
    """Raises UserError unless it is one that keys are made of."""
    if not 0 <= seed < 2**32:
        raise UserError(f"{name}={seed} must lie between 0 and {2**32 - 1}")


# --- layouts and maps ------------------------------------------------------------------------------------------------


def resolve_layouts(
    config: Any, given: Sequence[layouts.Objects] | layouts.Objects | None
) -> list[layouts.Objects] | None:
    """Checks layouts against the model. Raises UserError: a model without layouts, or one that cannot do without."""
    wanted = "layout" in condition_fields(config)
    if given is not None and not wanted:
        raise UserError(f"this model takes no layouts; {takes(config)}")
    if given is None and wanted and not null_is_trained(config, "layout"):
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
        if wanted and not null_is_trained(config, "vectors"):
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
            arrays[name] = mask_rows(x[..., 0] if x.ndim == 4 else x)
        else:
            arrays[name] = picture_rows(x, config.data.channels, name)
    if "mask" in arrays:
        check_mask(arrays["mask"], arrays["image"])
    return arrays


def picture_rows(x: np.ndarray, channels: int, name: str) -> np.ndarray:
    """Pictures uint8 (h, w, c) or (n, h, w, c) -> float32 (n, h, w, c) in [-1, 1]. Raises UserError for others."""
    x = np.asarray(x)
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or x.shape[-1] != channels or not x.size:
        raise UserError(f"{name} must be a picture of 8 bits with {channels} channels, uint8 (h, w, {channels}) or "
                        "one axis more")
    return x.reshape(-1, *x.shape[-3:]).astype(np.float32) / 127.5 - 1


def mask_rows(mask: np.ndarray) -> np.ndarray:
    """Masks (h, w) or (n, h, w) as a user gives them, see `images.is_white` -> float32 (n, h, w, 1), 1 = paint here."""
    return np.stack([images.is_white(part)[..., None] for part in mask.reshape(-1, *mask.shape[-2:])])


def check_mask(masks: np.ndarray, pictures: np.ndarray) -> None:
    """Raises UserError unless masks (n, h, w, 1) and pictures (n, h, w, c) have the same size, and there is one mask or
    one for each picture."""
    if masks.shape[1:3] != pictures.shape[1:3]:
        mask, picture = (f"{array.shape[1]}x{array.shape[2]}" for array in (masks, pictures))
        raise UserError(f"the mask has {mask} pixels, the picture {picture}; make them equal")
    if len(masks) not in (1, len(pictures)):
        raise UserError(f"{len(pictures)} pictures and {len(masks)} masks: give one mask, or one for each")


def check_classes(classes: np.ndarray, config: Any, where: str = "the semantic map") -> np.ndarray:
    """Class numbers of a map. Raises UserError for some that the model does not have; `where` begins the message."""
    number = config.conditioning.segmentation.num_classes
    if unknown := sorted(set(np.unique(classes).tolist()) - set(range(number))):
        raise UserError(f"{where} has the class numbers {', '.join(map(str, unknown[:5]))}"
                        f"{' ...' if len(unknown) > 5 else ''}, but this model has 0 to {number - 1} "
                        "(map_classes.txt of its workdir)")
    return classes


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
