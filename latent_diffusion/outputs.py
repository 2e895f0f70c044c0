"""The files that sample.py writes: single pictures that say how they were made, a labelled grid, strips, an
animation."""

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from latent_diffusion import images, request
from latent_diffusion.asked import REQUEST
from latent_diffusion.errors import UserError

MAX_IN_GRID = 100  # pictures; all of them are in the single files
MAX_IN_MOTION = 16  # pictures whose denoising is shown
NUMBERED = re.compile(r"\d{6,}\.png")
OURS = re.compile(NUMBERED.pattern + r"|(samples|progressive)\.png|samples\.(npz|gif|webp)")  # of an earlier run
SOFTWARE = {"Software": "latent_diffusion"}  # in the metadata of our pictures


def claim(output: epath.Path, *, overwrite: bool, resume: bool) -> None:
    """Makes the output folder. Raises UserError unless it can be written to, and is empty or may hold earlier
    pictures."""
    try:
        there = [path.name for path in output.iterdir()] if output.exists() else []
        if there and not (overwrite or resume):
            raise UserError(f"--output {output} is not empty (it holds {there[0]}); give another, or --overwrite, or "
                            "--resume to go on")
        output.mkdir(parents=True, exist_ok=True)
        if not os.access(output, os.W_OK) and "://" not in str(output):
            raise UserError(f"--output {output} cannot be written to")
    except OSError as error:
        raise UserError(f"--output {output} cannot be used: {error.strerror or error}") from error


def remove_earlier(output: epath.Path) -> None:
    """Removes what an earlier run wrote, as names and metadata say, and nothing else."""
    for path in output.iterdir():
        if OURS.fullmatch(path.name) and (path.suffix != ".png" or _text(path).get("Software") == SOFTWARE["Software"]):
            path.unlink()


def file_of(output: epath.Path, number: int) -> epath.Path:
    """Where picture `number` is written."""
    return output / f"{number:06d}.png"


def missing(
    output: epath.Path, numbers: Sequence[int], metadata: Callable[[int], Mapping[str, Any]]
) -> list[int]:
    """Those of the pictures `numbers` that are not there yet.

    metadata: of a picture, by its number. A picture of ours that was cut off while it was written is missing. Raises
    UserError where a picture is there with other metadata, or is no picture of ours.
    """
    found_missing = []
    for number in numbers:
        path = file_of(output, number)
        if not path.exists():
            found_missing.append(number)
            continue
        if (found := _text(path)).get(REQUEST) == (wanted := metadata(number))[REQUEST]:
            found_missing += [] if _is_whole(path) else [number]
        else:
            ours, theirs = (json.loads(x.get(REQUEST, "{}")) for x in (wanted, found))
            differing = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
            raise UserError(f"--resume: {path} was made with other settings or is damaged (it differs in "
                            f"{', '.join(differing) or 'its metadata'}); give another --output, or --overwrite")
    return found_missing


def next_number(output: epath.Path, least: int) -> int:
    """The number after those of all pictures that are there, at least `least`."""
    return max([least, *(int(path.stem) + 1 for path in output.iterdir() if NUMBERED.fullmatch(path.name))])


def _text(path: epath.Path) -> dict[str, str]:
    """Metadata of a PNG, even of one that was cut off; {} if it is none."""
    try:
        with path.open("rb") as file, Image.open(file) as image:
            return {key: value for key, value in image.info.items() if isinstance(value, str)}  # what precedes pixels
    except (OSError, SyntaxError, ValueError):
        return {}


def _is_whole(path: epath.Path) -> bool:
    """Whether a picture can be read to its end."""
    try:
        _pixels(path)
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def about(wanted: Mapping[str, Any], common: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The metadata of one picture: what it is made from, for people, and the flags that make it again, for
    `--from_png`.

    wanted: of `asked.plan`. common: flags and their values that all pictures share.
    """
    found = describe(wanted, number)
    flags = dict(common) | {name: [x] if name != "vectors" else x for name, x in found.items()
                            if name in (*wanted["files"], "prompt", "negative_prompt")}
    if "label" in found:
        flags["labels"] = str(found.get("label_name", found["label"]))
    if "vectors" in found:  # its row follows from the number of the picture and this
        flags["samples_per_label"] = wanted["each"]
    scales, variation = wanted["settings"].guidance_scale, wanted["options"]["variation"]
    flags["guidance_scale"] = [scales[number % len(scales)]] if wanted["settings"].guided else None
    if variation is not None:
        flags["variation"] = float(np.atleast_1d(variation)[number % np.size(variation)])
    flags |= {"index": number}
    readable = {name: value for name, value in common.items() if value is not None} | {
        "guidance_scale": scales[number % len(scales)], "size": ",".join(map(str, wanted["settings"].size))}
    return SOFTWARE | found | readable | {"index": number, REQUEST: json.dumps(
        {name: value for name, value in flags.items() if value is not None}, sort_keys=True)}


def describe(wanted: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Files, prompts, class number and class name of one picture, as far as it has them."""
    found = {name: files[number % len(files)] for name, files in wanted["files"].items()}
    for name, key in (("prompt", "prompts"), ("negative_prompt", "negative_prompts"), ("label", "labels")):
        if wanted[key]:
            found[name] = wanted[key][number % len(wanted[key])]
    if "label" in found and found["label"] < len(wanted["names"]):
        found["label_name"] = wanted["names"][found["label"]]
    return found


def save_together(
    output: epath.Path, wanted: Mapping[str, Any], number: int, common: Mapping[str, Any], *, columns: int | None,
    npz: bool, each: int,
) -> None:
    """The grid of the first pictures, and the .npz of all, both from the single files."""
    shown = min(number, MAX_IN_GRID)
    pictures = np.stack([_pixels(file_of(output, i)) for i in range(number if npz else shown)])
    texts, parts = [], {}
    for i in range(shown):
        found = describe(wanted, i)
        label = found.get("label_name", found.get("label"))
        texts.append(str(found["prompt"] if "prompt" in found else "" if label is None else label))
        parts.setdefault(wanted["titles"][i % len(wanted["titles"])], []).append(i)
    seen, given = pictures[:shown], {name: x for name, x in wanted["given"].items() if name != "upsample"}
    if given:  # each picture beside its condition
        seen = np.concatenate([np.stack([images.condition(given, i, seen.shape[1:], wanted["object_names"])
                                         for i in range(shown)]), seen], axis=2)
    blocks = [images.Block(seen[part], [texts[i] for i in part], title) for title, part in parts.items()]
    conditions = wanted["conditions"]
    columns = columns or (
        each if each > 1 else conditions if 1 < conditions <= 8 and len(parts) == 1 else
        min(8, max(map(len, parts.values()))) if len(parts) > 1 else math.ceil(math.sqrt(shown)))
    images.save_png(output / "samples.png", images.labelled_grid(blocks, columns), SOFTWARE | {
        name: value for name, value in common.items() if value is not None})
    if npz:
        labels = wanted["labels"] and np.resize(wanted["labels"], len(pictures))
        images.save_npz(output / "samples.npz", pictures, labels)


def _pixels(path: epath.Path) -> np.ndarray:
    with path.open("rb") as file, Image.open(file) as image:
        x = np.asarray(image)
    return x[..., None] if x.ndim == 2 else x


def save_motion(output: epath.Path, frames: np.ndarray, *, strip: bool, animation: str | None) -> list[str]:
    """What was predicted on the way, uint8 (n, f, h, w, c): progressive.png with one row for each picture, and/or an
    animation ("gif" or "webp") of all pictures beside each other. Returns the names of the files."""
    names = []
    if strip:
        count = frames.shape[1]
        rows = images.Block(frames.reshape(-1, *frames.shape[2:]), [""] * (len(frames) * count))
        images.save_png(output / "progressive.png", images.labelled_grid([rows], count), SOFTWARE)
        names.append("progressive.png")
    if animation:
        columns = math.ceil(math.sqrt(len(frames)))
        pages = [Image.fromarray(np.squeeze(images.grid(frames[:, i], columns))) for i in range(frames.shape[1])]
        durations = [80] * (len(pages) - 1) + [2000]  # ms; the result is held
        with (output / f"samples.{animation}").open("wb") as file:
            pages[0].save(file, format=animation, save_all=True, append_images=pages[1:], duration=durations, loop=0)
        names.append(f"samples.{animation}")
    return names


def folder(path: str | None, workdir: str) -> epath.Path:
    """The output folder."""
    return request.absolute(path or epath.Path(workdir) / "samples")
