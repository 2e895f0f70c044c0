"""Layouts: objects with boxes <-> tokens (paper section 4.3.2 and Table 17; taming's conditional builders). NumPy only.

An object becomes its class and a place: two corners (form "boxes") or its center (form "centers"). Places lie on a grid
of sqrt(vocab_size) x sqrt(vocab_size) points; classes, places and "none" share one vocabulary.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int

from latent_diffusion.errors import UserError, choose, read_text

FORMS = {"boxes": 3, "centers": 2}  # tokens of an object
FLAGS = ("group", "occluded", "depiction", "inside")  # bit k multiplies the number of classes by 2^k
FLAG_SETS = {"none": 0, "group": 1, "all": len(FLAGS)}  # conditioning.layout.flags -> how many of these tokens tell
WHOLE = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Objects:
    """What is where in a picture. boxes: (left, top, width, height) relative to the picture, in [0, 1]."""

    labels: Int[np.ndarray, " n"]
    boxes: Float[np.ndarray, "n 4"]
    flags: Bool[np.ndarray, "n 4"] | None = None  # FLAGS; None = none is set

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Any) -> "Objects":
        return Objects(self.labels[chosen], self.boxes[chosen], None if self.flags is None else self.flags[chosen])


NOTHING = Objects(np.zeros(0, int), np.zeros((0, 4)))


def check_options(options: Any) -> list[str]:
    """The mistakes in a ``conditioning.layout`` section, [] if there are none."""
    length = FORMS.get(options.form, 0) * options.max_objects + 2 * bool(options.crop)
    if options.flags not in FLAG_SETS:
        return [f"conditioning.layout.flags={options.flags!r} is not one of {', '.join(FLAG_SETS)}"]
    variants = 2 ** FLAG_SETS[options.flags]
    classes, mistakes = options.num_classes * variants, []
    if options.form not in FORMS:
        mistakes.append(f"conditioning.layout.form={options.form!r} is not one of {', '.join(FORMS)}")
    elif options.max_length != length:
        mistakes.append(f"conditioning.layout.max_length={options.max_length} must be {length}, the tokens of "
                        f"{options.max_objects} objects" + (" and of the crop" if options.crop else ""))
    if math.isqrt(options.vocab_size) ** 2 >= options.vocab_size:
        mistakes.append(f"conditioning.layout.vocab_size={options.vocab_size} is a square, so that its last place "
                        f"would be \"none\"; take {options.vocab_size + 1}")
    if classes >= options.vocab_size:
        mistakes.append(f"conditioning.layout.vocab_size={options.vocab_size} must be above {classes}, the number of "
                        "object classes" + (f" times {variants} for their flags (flags='none' does without)"
                                            if variants > 1 else ""))
    return mistakes


def to_tokens(
    objects: Objects, options: Mapping[str, Any], *, crop: Sequence[float] = WHOLE, flip: bool = False,
    rng: np.random.Generator | None = None,
) -> Int[np.ndarray, " l"]:
    """The tokens of a picture's layout, int32 (max_length,), padded with "none" (``vocab_size - 1``).

    Args:
      objects: in the whole picture. Those beyond ``max_objects``, then those outside the crop are left out.
      options: ``conditioning.layout``.
      crop: (left, top, width, height) of what is seen of the picture. With ``crop=True`` in the options the boxes stay
        relative to the whole picture and the crop becomes the last two tokens; else they are relative to the crop.
      flip: the crop is mirrored.
      rng: shuffles the objects; None keeps their order.
    """
    side, none = math.isqrt(options["vocab_size"]), options["vocab_size"] - 1
    objects = objects[: options["max_objects"]]
    if rng is not None:
        objects = objects[rng.permutation(len(objects))]
    objects = objects[_is_seen(objects.boxes, crop)]
    boxes = _cut(objects.boxes, WHOLE if options["crop"] else crop)
    if flip:
        boxes = np.concatenate([1 - boxes[:, :1] - boxes[:, 2:3], boxes[:, 1:]], axis=1)
    kinds = objects.labels.astype(np.int64)
    told = FLAG_SETS[options["flags"]]
    if told and objects.flags is not None:
        kinds = kinds + options["num_classes"] * (objects.flags[:, :told] @ (1 << np.arange(told)))
    corners = [boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]
    points = corners if choose(FORMS, options["form"], "conditioning.layout.form") == 3 else [sum(corners) / 2]
    rows = np.stack([kinds, *(_places(point, side) for point in points)], axis=1)
    tokens = np.full(options["max_length"], none, np.int32)
    tokens[: rows.size] = rows.ravel()
    if options["crop"]:
        left, top, width, height = crop
        seen = np.array([[1 - left - width if flip else left, top, width, height]])
        tokens[-2:] = [_places(point, side)[0] for point in (seen[:, :2], seen[:, :2] + seen[:, 2:])]
    return tokens


def from_tokens(tokens: Int[np.ndarray, " l"], options: Mapping[str, Any]) -> tuple[Objects, tuple[float, ...]]:
    """The objects and the crop that `to_tokens` wrote, as exactly as the grid tells. Centers become boxes of size 0."""
    side, none, length = math.isqrt(options["vocab_size"]), options["vocab_size"] - 1, FORMS[options["form"]]
    rows = np.asarray(tokens)[: options["max_objects"] * length].reshape(-1, length)
    rows = rows[rows[:, 0] != none]
    flags = (rows[:, :1] // max(1, options["num_classes"]) >> np.arange(len(FLAGS)) & 1).astype(bool)
    first, last = (np.stack([rows[:, i] % side, rows[:, i] // side], axis=1) / (side - 1) for i in (1, length - 1))
    crop = WHOLE
    if options["crop"]:
        (x, y), (x2, y2) = ((token % side / (side - 1), token // side / (side - 1)) for token in tokens[-2:].tolist())
        crop = (x, y, x2 - x, y2 - y)
    labels = rows[:, 0] % options["num_classes"] if options["num_classes"] else rows[:, 0]
    return Objects(labels, np.concatenate([first, last - first], axis=1), flags), crop


def null_tokens(options: Mapping[str, Any]) -> Int[np.ndarray, " l"]:
    """The layout without objects, which stands for "no condition": int32 (max_length,)."""
    return to_tokens(NOTHING, options)


def within(objects: Objects, crop: Sequence[float]) -> Objects:
    """What a crop (left, top, width, height) of the picture shows of its objects, relative to the crop."""
    return Objects(objects.labels, _cut(objects.boxes, crop), objects.flags)[_is_seen(objects.boxes, crop)]


def _is_seen(boxes: Float[np.ndarray, "n 4"], crop: Sequence[float]) -> Bool[np.ndarray, " n"]:
    """Which boxes, of whatever size, reach into a crop."""
    offset, scale = np.asarray(crop[:2]), np.asarray(crop[2:])
    return np.all((boxes[:, :2] < offset + scale) & (boxes[:, :2] + boxes[:, 2:] > offset), axis=1)


def _cut(boxes: Float[np.ndarray, "n 4"], crop: Sequence[float]) -> Float[np.ndarray, "n 4"]:
    """The parts of boxes in a crop, relative to it."""
    offset, scale = np.asarray(crop[:2]), np.asarray(crop[2:])
    start = np.clip((boxes[:, :2] - offset) / scale, 0, 1)
    end = np.clip((boxes[:, :2] + boxes[:, 2:] - offset) / scale, 0, 1)
    return np.concatenate([start, end - start], axis=1)


def _places(points: Float[np.ndarray, "n 2"], side: int) -> Int[np.ndarray, " n"]:
    x, y = np.rint(points * (side - 1)).astype(np.int64).T  # halves to even, as Python's round
    return y * side + x


# --- what a user gives -----------------------------------------------------------------------------------------------


def read(path: epath.PathLike, names: Sequence[str]) -> Objects:
    """Reads a JSON list ``[{"label": "dog", "box": [left, top, right, bottom], "group": true}, ...]``, coordinates in
    [0, 1], label a name or a number; or that list as the "objects" of a dict.

    Raises UserError for a file that is missing or something else, naming the object.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise UserError(f"layout {path} {'is a folder' if path.exists() else 'does not exist'}")
    try:
        rows = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"layout {path} is no JSON file: {error}") from error
    return from_rows(rows["objects"] if isinstance(rows, dict) and "objects" in rows else rows, names, str(path))


def from_rows(rows: Any, names: Sequence[str], where: str) -> Objects:
    """`read` for a list that is in memory already; `where` begins the messages."""
    from latent_diffusion import conditions

    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f'{where}: a layout is a list like [{{"label": "dog", "box": [0.1, 0.2, 0.5, 0.9]}}]')
    labels, boxes, flags = [], [], []
    for number, row in enumerate(rows):
        for key in ("label", "box"):
            if key not in row:
                raise UserError(f"{where}, object {number}: it has no {key!r}, only {', '.join(map(repr, row))}")
        box = row["box"]
        if not (isinstance(box, list) and len(box) == 4 and all(type(x) in (int, float) for x in box)):
            raise UserError(f"{where}, object {number}: box {box!r} is not [left, top, right, bottom]")
        left, top, right, bottom = map(float, box)
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise UserError(f"{where}, object {number}: box {box} must have 0 <= left < right <= 1 and 0 <= top < "
                            "bottom <= 1, relative to the picture (pixels divided by its width and height)")
        labels.append(conditions.parse_label(str(row.get("label")), names, f"{where}, object {number}: "))
        boxes.append((left, top, right - left, bottom - top))
        flags.append([row.get(flag, False) for flag in FLAGS])
        if not all(isinstance(flag, bool) for flag in flags[-1]):
            raise UserError(f"{where}, object {number}: {', '.join(FLAGS)} must be true or false")
    return Objects(np.asarray(labels, int), np.asarray(boxes, float).reshape(-1, 4),
                   np.asarray(flags, bool).reshape(-1, len(FLAGS)))
