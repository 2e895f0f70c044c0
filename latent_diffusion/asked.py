"""What the flags of sample.py ask for: prompts, pictures and maps read from files, and all of it checked before a model
is loaded. Of the flags' values, as argparse has them; `plan` is the way in."""

import argparse
import csv
import io
import json
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from latent_diffusion import editing, images, layouts, request
from latent_diffusion import settings as settings_lib
from latent_diffusion.data import transforms
from latent_diffusion.errors import UserError, read_text

PICTURES = ("segmentation", "low_res", "image", "mask", "upsample")  # flags that take files of pictures
SETTINGS = ("sampler", "steps", "guidance_scale", "eta", "spacing", "temperature", "threshold", "quantize_x0",
            "guidance_interval", "guidance_rescale", "two_passes", "seed", "tile", "overlap", "decode_tile", "strength")
OTHERS = ("upsample_scale", "variation_seed", "same_noise")  # more that `sample_batches` of the pipeline takes
COLUMNS = ("prompt", "label", "negative_prompt", "guidance_scale")  # of a CSV file
REQUEST = "request"  # the chunk of a PNG's metadata that recreates it


def plan(args: argparse.Namespace, config: Any) -> dict[str, Any]:
    """Everything that is going to be drawn, checked.

    Returns:
      prompts, labels, negative_prompts, layouts: one for each picture in turn, or None. titles: of the parts of the
      grid that they belong to. number: of pictures; conditions: how many they share; each: pictures of each. names,
      object_names: of classes. given: pictures and maps. options: arguments of
      `pipeline.LatentDiffusion.sample_batches`. files: names of files by flag. settings: `settings.Settings`.

    Raises:
      UserError: whatever cannot be drawn.
    """
    names, object_names = request.read_names(args.workdir), request.read_names(args.workdir, "objects")
    table = read_prompts(args)
    given, objects = read_pictures(args, config), None
    if args.layout:
        request.resolve_layouts(config, layouts.NOTHING)  # does the model take any?
        objects = [layouts.read(path, object_names) for path in args.layout]
    vectors = request.resolve_vectors(config, args.vectors and read_vectors(args.vectors))
    asked = bool(table["prompt"] or table["label"] or args.labels is not None or given or objects
                 or vectors is not None)
    prompts, labels = request.resolve_conditions(config, *_texts_and_labels(args, config, table, asked), names)
    each = args.samples_per_label or 1
    per_picture = dict(prompts=prompts, labels=labels, negative_prompts=table["negative_prompt"] or None,
                       layouts=objects, titles=table["title"])
    per_picture = {name: [x for x in values or [] for _ in range(each)] or None for name, values in per_picture.items()}
    vectors = None if vectors is None else np.repeat(vectors, each, axis=0)
    given = {name: np.repeat(x, each, axis=0) if len(x) > 1 else x for name, x in given.items()}
    lengths = [len(x) for x in (*per_picture.values(), *given.values(), vectors) if x is not None]
    scales = len(args.guidance_scale or ())
    count = max([1, *lengths, scales * each if scales > 1 else 1])
    exact = args.interpolate or (max(count, each) if each > 1 else 0)
    number = _number(args, count if asked or scales > 1 else 0, exact)
    if len(per_picture["titles"] or ()) != count:
        per_picture["titles"] = [""] * count
    options, settings = _options(args, config, given, table)
    options |= given | {name: per_picture[name] for name in ("negative_prompts", "layouts")} | {"vectors": vectors}
    files = {flag: [x for x in getattr(args, flag) for _ in range(each)] for flag in ("layout", *PICTURES)
             if getattr(args, flag)}
    files |= {"vectors": [args.vectors]} if args.vectors else {}
    shown = given | ({"layouts": per_picture["layouts"]} if objects else {})
    return per_picture | dict(number=number, names=names, object_names=object_names, given=shown, options=options,
                              files=files, settings=settings, conditions=count, each=each)


def _number(args: argparse.Namespace, asked: int, exact: int) -> int:
    """How many pictures. asked: the number of conditions, 0 if none were; exact: if it is given by other flags, or
    0."""
    for flag in ("num_samples", "batch_size", "columns", "samples_per_label", "interpolate", "progressive"):
        if (value := getattr(args, flag)) is not None and value < 1:
            raise UserError(f"--{flag} {value} must be 1 or more")
    number = args.num_samples if args.num_samples is not None else exact or asked or 16
    if number < asked and args.index is None:  # of --from_png, picture `index` alone
        raise UserError(f"--num_samples {number} is less than the {asked} conditions that are given")
    if args.interpolate and number != args.interpolate:
        raise UserError("--interpolate says how many pictures there are; leave --num_samples out")
    return number


def _options(
    args: argparse.Namespace, config: Any, given: Mapping[str, np.ndarray], table: Mapping[str, list]
) -> tuple[dict[str, Any], settings_lib.Settings]:
    """Arguments of `sample_batches` but for conditions and pictures, and the settings that they make."""
    settings = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    if scales := table["guidance_scale"] or args.guidance_scale:
        settings["guidance_scale"] = [scale for scale in scales for _ in range(args.samples_per_label or 1)]
    others = {name: getattr(args, name) for name in OTHERS if getattr(args, name) is not None}
    variation = args.variation
    if args.interpolate:
        if args.variation_seed is None or variation is not None:
            raise UserError("--interpolate goes from the noise of --seed to that of --variation_seed; give that, and "
                            "not --variation")
        variation, others["same_noise"] = np.linspace(0, 1, args.interpolate), True
    editing.resolve_variation(variation, args.variation_seed)
    maps, edit = editing.resolve_all(
        config, args.strength, **{name: x for name, x in given.items() if name != "upsample"})
    size = settings_lib.size_of_maps(config, maps | edit, args.size)
    weak = args.weak_workdir is not None or args.weak_step is not None
    resolved = settings_lib.resolve(config, size=size, weak=weak, **settings)
    editing.resolve_small(config, given.get("upsample"), resolved.size)
    most = resolved.steps - resolved.first
    frames = args.progressive or (min(most, 24) if args.animate else 0)
    if frames > most:
        raise UserError(f"--progressive {frames} is more than the {most} steps of the sampler")
    rest = dict(size=args.size, variation=variation, frames=frames, report=bool(args.progress))
    return settings | others | rest, resolved


def _texts_and_labels(args: argparse.Namespace, config: Any, table: Mapping[str, list], asked: bool) -> tuple[Any, Any]:
    """Prompts and labels as given, or those of the config, or all classes of a class-conditional model."""
    if asked:
        return table["prompt"] or None, table["label"] or (None if args.labels is None else [args.labels])
    fields, sampling = request.condition_fields(config), config.sampling
    labels = tuple(sampling.labels) if "label" in fields else ()
    if fields == ("label",) and not labels:
        labels = range(config.conditioning.num_classes)  # as evaluations do
    return (tuple(sampling.prompts) if "tokens" in fields else ()) or None, labels or None


# --- files -----------------------------------------------------------------------------------------------------------


def read_prompts(args: argparse.Namespace) -> dict[str, list]:
    """Columns, one entry for each prompt of the flags and the file: prompt, title (of the part of the grid it belongs
    to), and label, negative_prompt, guidance_scale, which are empty lists where the file has none."""
    table = {"prompt": list(args.prompt), "title": [""] * len(args.prompt), "label": [], "guidance_scale": [],
             "negative_prompt": list(args.negative_prompt)}
    if not args.prompts_file:
        return table
    path, title = epath.Path(args.prompts_file), ""
    if not path.is_file():
        raise UserError(f"--prompts_file {path} {'is a folder' if path.exists() else 'does not exist'}")
    if path.suffix.lower() == ".csv":
        return _read_csv(args, path, table)
    for line in map(str.strip, read_text(path).splitlines()):
        if line.startswith("#"):
            title = line.lstrip("# ")
        elif line:
            prompt, bar, name = map(str.strip, line.partition("|"))
            table["prompt"].append(prompt)
            table["title"].append(title)
            table["label"] += [name] if bar else []
    if not table["prompt"]:
        raise UserError(f"--prompts_file {path} holds no prompts")
    if table["label"] and (len(table["label"]) != len(table["prompt"]) or args.labels is not None):
        raise UserError(f"--prompts_file {path}: give every prompt a class (PROMPT | CLASS) or none, and not "
                        "--labels or --prompt as well")
    return table


def _read_csv(args: argparse.Namespace, path: epath.Path, table: dict[str, list]) -> dict[str, list]:
    if table["prompt"]:
        raise UserError(f"--prompts_file {path}: a CSV file has all prompts; leave --prompt out")
    rows = list(csv.DictReader(io.StringIO(read_text(path), newline=""), skipinitialspace=True))
    columns = [name for name in rows[0] if name is not None] if rows else []
    if unknown := [str(name) for name in columns if name not in COLUMNS]:
        raise UserError(f"--prompts_file {path}: unknown column {unknown[0]!r}; a header names some of "
                        f"{', '.join(COLUMNS)}")
    if not rows:
        raise UserError(f"--prompts_file {path} holds a header and no rows")
    for number, row in enumerate(rows):
        if None in row:
            raise UserError(f"--prompts_file {path}, row {number + 1}: more cells than the header has columns; put "
                            'quotes around text with commas: "red apple, yellow banana"')
    for name, given in (("label", args.labels is not None), ("guidance_scale", args.guidance_scale is not None),
                        ("negative_prompt", bool(args.negative_prompt))):
        if name in columns and given:
            flag = "labels" if name == "label" else name
            raise UserError(f"--prompts_file {path} has a column {name}; leave --{flag} out")
    for name in columns:
        values = [(row[name] or "").strip() for row in rows]
        if not all(values) and name != "negative_prompt":
            raise UserError(f"--prompts_file {path}, line {values.index('') + 2}: {name} is empty")
        table[name] = values
    try:
        table["guidance_scale"] = [float(x) for x in table["guidance_scale"]]
    except ValueError as error:
        raise UserError(f"--prompts_file {path}: guidance_scale: {error}") from error
    return table | {"title": [""] * len(rows)}


def read_pictures(args: argparse.Namespace, config: Any) -> dict[str, np.ndarray]:
    """The pictures and maps of the flags, (n, H, W, ...) as `pipeline.LatentDiffusion.sample_batches` takes them."""
    given = {}
    for name in PICTURES:
        pictures = [read_picture(path, name, config.data.channels) for path in getattr(args, name)]
        if pictures:
            if len({picture.shape for picture in pictures}) > 1:
                raise UserError(f"--{name}: all pictures must have the same size; sample those of another size apart")
            given[name] = np.stack(pictures)
    for path, classes in zip(args.segmentation, given.get("segmentation", ()), strict=True):
        if "segmentation" in request.map_fields(config):
            request.check_classes(classes, config, f"--segmentation {path}")
    for path, mask in zip(args.mask, given.get("mask", ()), strict=True):
        if not images.is_white(mask).any():
            logging.warning("--mask %s has no white, so nothing is painted", path)
    if args.outpaint is not None:
        if "image" not in given or "mask" in given:
            raise UserError("--outpaint extends an --image, and makes the mask itself")
        pairs = [editing.outpaint(picture, args.outpaint) for picture in given["image"]]
        given |= {name: np.stack([pair[i] for pair in pairs]) for i, name in enumerate(("image", "mask"))}
    return given


def read_vectors(path: str) -> np.ndarray:
    """The array of a .npy file."""
    file = epath.Path(path)
    if not file.is_file():
        raise UserError(f"--vectors {path} does not exist")
    try:
        with file.open("rb") as opened:
            return np.lib.format.read_array(opened, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"--vectors {path} is no .npy file of numbers: {error}") from error


def read_picture(path: str, name: str, channels: int) -> np.ndarray:
    """A picture (H, W, channels), a mask (H, W), or a map of class numbers (H, W)."""
    file = epath.Path(path)
    if not file.is_file():
        raise UserError(f"--{name} {path} {'is a folder' if file.exists() else 'does not exist'}")
    try:
        if name == "segmentation":
            return transforms.decode_map(file.read_bytes())
        background = (0, 0, 0) if name == "mask" else (255, 255, 255)  # what is transparent is not painted
        pixels = transforms.flatten(transforms.decode(file.read_bytes()), background)
        grey = transforms.set_channels(pixels, 1)[..., 0]
        return grey if name == "mask" else transforms.set_channels(pixels, channels)
    except UserError as error:
        raise UserError(f"--{name} {path}: {error}") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"--{name} {path} is no image that can be read: {transforms.why(error)}") from error


def read_request(path: str) -> dict[str, Any]:
    """The flags that recreate a picture of sample.py, from its metadata. Raises UserError where there are none."""
    file = epath.Path(path)
    if not file.is_file():
        raise UserError(f"--from_png {path} {'is a folder' if file.exists() else 'does not exist'}")
    try:
        with file.open("rb") as opened, Image.open(opened) as image:
            return json.loads(image.text[REQUEST])
    except (OSError, AttributeError, KeyError, ValueError) as error:
        raise UserError(f"--from_png {path} is no single picture that sample.py wrote: it does not say how") from error
