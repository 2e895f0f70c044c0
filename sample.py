"""Draws pictures with a trained latent diffusion model.

    python sample.py --workdir DIR --prompt "red apple" --prompt "flag of japan" --num_samples 8 --guidance_scale 3
    python sample.py --workdir DIR --labels 3,7 --steps 100 --sampler ddim --eta 1
    python sample.py --workdir DIR --low_res small.png
    python sample.py --workdir DIR --image picture.png --mask mask.png --num_samples 4
    python sample.py --workdir DIR --num_samples 50000 --batch_size 250

Writes one PNG for each picture (000000.png ...), with all settings in its text chunks; samples.png, a labelled grid;
and samples.npz, in the layout of the guided-diffusion (ADM) evaluators. What is not given is taken from the config.
The same seed gives the same pictures for any batch size and number of devices.
"""

import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # nothing to tidy up while the imports run

import argparse  # noqa: E402
import concurrent.futures  # noqa: E402
import logging  # noqa: E402
import math  # noqa: E402
import re  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from typing import Any, NoReturn  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
from etils import epath  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

from latent_diffusion import checkpoint, images, layouts, parallel, pipeline, request  # noqa: E402
from latent_diffusion import settings as settings_lib  # noqa: E402
from latent_diffusion.data import transforms  # noqa: E402
from latent_diffusion.errors import UserError, read_text  # noqa: E402

MAX_IN_GRID = 100  # pictures; all of them are in the single files
OURS = re.compile(r"\d{6,}\.png|samples\.png|samples\.npz")  # what an earlier run may have left
SOFTWARE = {"Software": "latent_diffusion"}  # in the metadata of our pictures
COMPILE_CACHE = "~/.cache/latent_diffusion/jax"  # unless JAX_COMPILATION_CACHE_DIR is set; set it empty for no cache


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    summary, details = __doc__.split("\n", 1)
    parser = Parser("sample.py", description=summary, epilog=details, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--workdir", required=True, help="of a stage-2 training run, local or a bucket")
    add("--step", type=int, help="which checkpoint (default: the latest)")
    add("--prompt", action="append", default=[], metavar="TEXT", help="what to draw; repeatable")
    add("--prompts_file", metavar="FILE",
        help="one prompt per line, or 'PROMPT | CLASS'; lines '# TITLE' start titled parts of the grid")
    add("--labels", metavar="3,7,NAME", help="classes to draw, numbers or names; paired with prompts if both are given")
    add("--layout", action="append", default=[], metavar="FILE",
        help='objects, a JSON list of {"label": "dog", "box": [left, top, right, bottom]} in [0, 1]; repeatable')
    add("--vectors", metavar="FILE", help="a .npy file (n, width) or (n, l, width), for a model conditioned on vectors")
    add("--segmentation", action="append", default=[], metavar="FILE",
        help="semantic map, a grey or palette image of class numbers; repeatable")
    add("--low_res", action="append", default=[], metavar="FILE", help="picture to enlarge; repeatable")
    add("--image", action="append", default=[], metavar="FILE", help="picture to be painted into; repeatable")
    add("--mask", action="append", default=[], metavar="FILE",
        help="where to paint: white; one for each --image, or one for all")
    add("--num_samples", type=int, metavar="N",
        help="pictures in all; conditions are repeated in turn (default: one for each condition, 16 without any)")
    add("--steps", type=int, help="of the sampler")
    add("--sampler", help="ddim, ddpm or plms")
    add("--guidance_scale", type=float, help="1 = no guidance, above 1 = closer to the condition")
    add("--eta", type=float, help="noise of ddim: 0 = none, 1 = as much as ddpm")
    add("--seed", type=int, default=0)
    add("--size", type=_size, metavar="H,W", help="in pixels (default: that of the training images)")
    add("--tile", type=int, metavar="PIXELS", help="compute big pictures in overlapping patches of this side")
    add("--overlap", type=int, metavar="PIXELS", help="of the patches (default: a quarter of --tile)")
    add("--batch_size", type=int, metavar="N", help="pictures at once, over all devices (default: up to 16)")
    add("--output", metavar="DIR", help="folder for the pictures (default: WORKDIR/samples)")
    add("--overwrite", action="store_true", help="write into a folder that is not empty; earlier samples are removed")
    add("--columns", type=int, metavar="N", help="of the grid")
    add("--npz", action=argparse.BooleanOptionalAction, default=True, help="write samples.npz")
    add("--debug", action="store_true", help="show where an error arose")
    return parser.parse_args(argv)


def _size(text: str) -> tuple[int, int]:
    numbers = text.replace("x", ",").split(",")
    if len(numbers) not in (1, 2) or not all(number.strip().isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not H,W in pixels")
    return int(numbers[0]), int(numbers[-1])


# --- what to draw ----------------------------------------------------------------------------------------------------


def read_prompts(args: argparse.Namespace) -> tuple[list[str], list[str], list[str]]:
    """All prompts of the flags and the file, the title of the part that each belongs to, and the file's classes."""
    prompts, titles, classes, title = list(args.prompt), [""] * len(args.prompt), [], ""
    if args.prompts_file:
        path = epath.Path(args.prompts_file)
        if not path.is_file():
            raise UserError(f"--prompts_file {path} {'is a folder' if path.exists() else 'does not exist'}")
        for line in map(str.strip, read_text(path).splitlines()):
            if line.startswith("#"):
                title = line.lstrip("# ")
            elif line:
                prompt, bar, name = map(str.strip, line.partition("|"))
                prompts.append(prompt)
                titles.append(title)
                classes += [name] if bar else []
        if not titles:
            raise UserError(f"--prompts_file {path} holds no prompts")
        if classes and (len(classes) != len(prompts) or args.labels is not None):
            raise UserError(f"--prompts_file {path}: give every prompt a class (PROMPT | CLASS) or none, and not "
                            "--labels or --prompt as well")
    return prompts, titles, classes


def plan(args: argparse.Namespace, config: Any) -> dict[str, Any]:
    """Everything that is going to be drawn, checked: prompts, labels, titles, number and label names."""
    names, object_names = request.read_names(args.workdir), request.read_names(args.workdir, "objects")
    prompts, titles, classes = read_prompts(args)
    (maps, size), objects = read_maps(args, config), None
    if args.layout:
        request.resolve_layouts(config, layouts.NOTHING)  # does the model take any?
        objects = [layouts.read(path, object_names) for path in args.layout]
    vectors = request.resolve_vectors(config, args.vectors and read_vectors(args.vectors))
    asked = bool(prompts or args.labels is not None or maps or objects or vectors is not None)
    given = dict(prompts=prompts or None, labels=classes or (None if args.labels is None else [args.labels]))
    fields = request.condition_fields(config)
    if not asked:
        given = dict(prompts=tuple(config.sampling.prompts) or None, labels=tuple(config.sampling.labels) or None)
        given = {key: value for key, value in given.items() if {"prompts": "tokens", "labels": "label"}[key] in fields}
        if fields == ("label",) and not given["labels"]:
            given["labels"] = range(config.conditioning.num_classes)  # as evaluations do
    prompts, labels = request.resolve_conditions(
        config, given.get("prompts"), given.get("labels"), names)
    conditions = max(map(len, (prompts or (), labels or (), objects or (), () if vectors is None else vectors,
                             *maps.values())))
    number = args.num_samples if args.num_samples is not None else conditions if asked else 16
    if number < 1:
        raise UserError(f"--num_samples {number} must be 1 or more")
    if asked and number < conditions:
        raise UserError(f"--num_samples {number} is less than the {conditions} conditions that are given")
    for flag in ("batch_size", "columns"):
        if (value := getattr(args, flag)) is not None and value < 1:
            raise UserError(f"--{flag} {value} must be 1 or more")
    titles = titles if titles and len(titles) == conditions else [""] * max(1, conditions)
    given = maps | ({"layouts": objects} if objects else {})
    files = {flag: getattr(args, flag) for flag in ("layout", "segmentation", "low_res", "image", "mask")
             if getattr(args, flag)} | ({"vectors": [args.vectors]} if args.vectors else {})
    return dict(prompts=prompts, labels=labels, titles=titles, number=number, names=names, given=given, size=size,
                object_names=object_names, vectors=vectors, files=files)


def read_maps(args: argparse.Namespace, config: Any) -> tuple[dict[str, np.ndarray], tuple[int, int] | None]:
    """The pictures and maps of the flags, checked, (n, H, W, ...) as `pipeline.sample` takes them; and the size of what
    is drawn, that of the maps or else --size."""
    given = {}
    for name in ("segmentation", "low_res", "image", "mask"):
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
    return given, settings_lib.size_of_maps(config, request.resolve_maps(config, **given), args.size)


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


def claim_output(args: argparse.Namespace) -> epath.Path:
    """The output folder, which exists, can be written to and is empty unless --overwrite."""
    output = request.absolute(args.output or epath.Path(args.workdir) / "samples")
    try:
        there = [path.name for path in output.iterdir()] if output.exists() else []
        if there and not args.overwrite:
            raise UserError(f"--output {output} is not empty (it holds {there[0]}); give another, or --overwrite")
        output.mkdir(parents=True, exist_ok=True)
        if not os.access(output, os.W_OK) and "://" not in str(output):
            raise UserError(f"--output {output} cannot be written to")
    except OSError as error:
        raise UserError(f"--output {output} cannot be used: {error.strerror or error}") from error
    return output


def is_ours(path: epath.Path) -> bool:
    """Whether a file was written by an earlier run of this program, as its name and its metadata say."""
    if not OURS.fullmatch(path.name) or path.suffix != ".png":
        return path.name == "samples.npz"
    try:
        with path.open("rb") as file, Image.open(file) as image:
            return getattr(image, "text", {}).get("Software") == SOFTWARE["Software"]
    except OSError:  # no picture, so none of ours
        return False


# --- drawing ---------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    config = request.read_config(args.workdir)
    override_sampling(config, args)
    wanted = plan(args, config)
    settings = settings_lib.resolve(
        config, seed=args.seed, size=wanted["size"], tile=args.tile, overlap=args.overlap)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(COMPILE_CACHE))
    parallel.initialize()
    first = parallel.is_first_process()  # every process draws all pictures with its own devices; one writes them
    checkpoint.choose_step(args.workdir, args.step)
    output = claim_output(args) if first else None
    model = pipeline.LatentDiffusion.from_workdir(args.workdir, args.step)
    override_sampling(model.config, args)
    batches = model.sample_batches(
        wanted["prompts"], wanted["labels"], **wanted["given"], vectors=wanted["vectors"],
        num_samples=wanted["number"], batch_size=args.batch_size, seed=args.seed, size=args.size, tile=args.tile,
        overlap=args.overlap)

    if first and args.overwrite:
        for path in output.iterdir():
            if is_ours(path):
                path.unlink()
    common = dict(
        workdir=args.workdir, step=model.step, seed=settings.seed, sampler=settings.sampler, steps=settings.steps,
        guidance_scale=settings.guidance_scale[0], eta=settings.eta, size=",".join(map(str, settings.size)))
    common |= {"tile": settings.tile, "overlap": settings.overlap} if settings.tile else {}
    kept, number = [], 0
    try:
        bar = tqdm(total=wanted["number"], desc=f"{settings.sampler}, {settings.steps} steps", unit="picture",
                   dynamic_ncols=True, disable=not first)
        with bar:
            for batch in batches:
                for image in batch.images if first else ():
                    metadata = SOFTWARE | describe(wanted, number) | common | {"index": number}
                    images.save_png(output / f"{number:06d}.png", image, metadata)
                    if args.npz or number < MAX_IN_GRID:
                        kept.append(image)
                    number += 1
                bar.update(len(batch.images))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError("the device is out of memory; lower --batch_size or --size") from error
    if first:
        save_together(args, wanted, output, np.stack(kept), common)
    return 0


def override_sampling(config: Any, args: argparse.Namespace) -> None:
    """What the flags say takes the place of the config's `sampling`."""
    with config.unlocked():
        for key in ("sampler", "steps", "guidance_scale", "eta"):
            if getattr(args, key) is not None:
                config.sampling[key] = getattr(args, key)


def describe(wanted: dict[str, Any], number: int) -> dict[str, Any]:
    """Files, prompt, class number and class name of one picture, as far as it has them."""
    found = {name: files[number % len(files)] for name, files in wanted["files"].items()}
    if wanted["prompts"]:
        found["prompt"] = wanted["prompts"][number % len(wanted["prompts"])]
    if wanted["labels"]:
        found["label"] = label = wanted["labels"][number % len(wanted["labels"])]
        if label < len(wanted["names"]):
            found["label_name"] = wanted["names"][label]
    return found


def save_together(
    args: argparse.Namespace, wanted: dict[str, Any], output: epath.Path, pictures: np.ndarray, common: dict[str, Any]
) -> None:
    """The grid and the .npz, and a line that says where everything is."""
    shown, conditions = min(len(pictures), MAX_IN_GRID), len(wanted["titles"])
    texts, parts = [], {}
    for number in range(shown):
        about = describe(wanted, number)
        label = about.get("label_name", about.get("label"))
        texts.append(str(about["prompt"] if "prompt" in about else "" if label is None else label))
        parts.setdefault(wanted["titles"][number % conditions], []).append(number)
    seen = pictures[:shown]
    if wanted["given"]:  # each picture beside its condition
        seen = np.concatenate([np.stack([images.condition(wanted["given"], i, seen.shape[1:], wanted["object_names"])
                                         for i in range(shown)]), seen], axis=2)
    blocks = [images.Block(seen[part], [texts[i] for i in part], title) for title, part in parts.items()]
    columns = args.columns or (
        conditions if 1 < conditions <= 8 and len(parts) == 1 else
        min(8, max(map(len, parts.values()))) if len(parts) > 1 else math.ceil(math.sqrt(shown)))
    images.save_png(output / "samples.png", images.labelled_grid(blocks, columns), SOFTWARE | common)
    files = f"{output / '000000.png'}" + (f" to {wanted['number'] - 1:06d}.png" if wanted["number"] > 1 else "")
    if args.npz:
        labels = wanted["labels"] and np.resize(wanted["labels"], len(pictures))
        images.save_npz(output / "samples.npz", pictures, labels)
    also = f"; as an array: {output / 'samples.npz'}" if args.npz else ""
    count = f"{wanted['number']} picture" + "s" * (wanted["number"] != 1)
    print(f"{count}: {files}; together: {output / 'samples.png'}{also}; peak memory "
          f"{parallel.peak_memory() / 2**30:.1f} GiB")


# --- the program -----------------------------------------------------------------------------------------------------


def interruptible(function: Callable, *args: Any) -> Any:
    """``function(*args)`` in a thread. Compiled code cannot be interrupted, waiting for it can: Ctrl-C ends at once."""
    executor = concurrent.futures.ThreadPoolExecutor(1)
    try:
        future = executor.submit(function, *args)
        while not future.done():  # wakes up now and then, since the system may hand the signal to another thread
            concurrent.futures.wait([future], timeout=0.2)
        return future.result()
    except KeyboardInterrupt:
        print("\nsample.py: interrupted", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(130)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s", force=True)
    try:
        return interruptible(run, args)
    except UserError as error:
        if args.debug:
            raise
        print(f"sample.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
