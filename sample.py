"""Draws pictures with a trained latent diffusion model.

    python sample.py --workdir DIR --prompt "red apple" --prompt "flag of japan" --num_samples 8 --guidance_scale 3
    python sample.py --workdir DIR --labels 3,7 --samples_per_label 4 --sampler dpmpp_2m --spacing karras --steps 20
    python sample.py --workdir DIR --low_res small.png
    python sample.py --workdir DIR --image picture.png --mask mask.png --num_samples 4
    python sample.py --workdir DIR --image picture.png --strength 0.6 --prompt "green apple"
    python sample.py --workdir DIR --num_samples 50000 --batch_size 250 --resume
    python sample.py --from_png 000003.png --steps 100 --output again

Writes one PNG for each picture (000000.png ...), with all settings in its text chunks; samples.png, a labelled grid;
and samples.npz, in the layout of the guided-diffusion (ADM) evaluators. What is not given is taken from the config.
The same seed gives the same pictures for any batch size and number of devices. docs/sampling.md tells more.
"""

import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # nothing to tidy up while the imports run

import argparse  # noqa: E402
import concurrent.futures  # noqa: E402
import contextlib  # noqa: E402
import functools  # noqa: E402
import logging  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Iterator, Sequence  # noqa: E402
from typing import Any, NoReturn  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
from etils import epath  # noqa: E402
from tqdm import tqdm  # noqa: E402

from latent_diffusion import (  # noqa: E402
    asked,
    checkpoint,
    drawing,
    images,
    outputs,
    parallel,
    pipeline,
    programs,
    request,
)
from latent_diffusion.diffusion.grids import SPACINGS  # noqa: E402
from latent_diffusion.diffusion.samplers import METHODS  # noqa: E402
from latent_diffusion.errors import UserError  # noqa: E402

DEFAULTS = {"seed": 0} | {name: [] for name in ("prompt", "negative_prompt", "layout", *asked.PICTURES)}
HOW = (  # recorded with each picture
    *asked.SETTINGS, *asked.OTHERS, "size", "outpaint", "dtype", "weak_workdir", "weak_step")


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags. What is not given is None until `complete` fills it in."""
    summary, details = __doc__.split("\n", 1)
    parser = Parser("sample.py", description=summary, epilog=details, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_conditions(parser.add_argument_group("what to draw").add_argument)
    _add_settings(parser.add_argument_group("how (default: the config's sampling section)").add_argument)
    add = parser.add_argument
    add("--workdir", help="of a stage-2 training run, local or a bucket")
    add("--step", type=int, help="which checkpoint (default: the latest)")
    add("--from_png", metavar="FILE", help="make a picture of this program again; flags beside it change what they say")
    add("--batch_size", type=int, metavar="N", help="pictures at once, over all devices (default: up to 16)")
    add("--output", metavar="DIR", help="folder for the pictures (default: WORKDIR/samples)")
    add("--overwrite", action="store_true", help="write into a folder that is not empty; earlier samples are removed")
    add("--resume", action="store_true", help="draw what is missing of a run that was stopped")
    add("--columns", type=int, metavar="N", help="of the grid")
    add("--npz", action=argparse.BooleanOptionalAction, default=True, help="write samples.npz")
    add("--progressive", type=int, metavar="K", help="also write progressive.png: K predictions on the way to each")
    add("--animate", choices=("gif", "webp"), help="also write an animation of the denoising")
    add("--interactive", action="store_true", help="then ask for the next prompt or label, again and again")
    add("--progress", action="store_true", help="show a bar for the steps of each batch")
    add("--verbose", action="store_true", help="tell what is loaded, compiled and how long it takes")
    add("--debug", action="store_true", help="show where an error arose")
    args = parser.parse_args(argv)
    if args.from_png is not None:
        return args  # `run` completes it
    if args.workdir is None:
        parser.error("the following arguments are required: --workdir")
    return complete(args, {})


def _add_conditions(add: Callable) -> None:
    add("--prompt", action="append", metavar="TEXT", help="what to draw; repeatable")
    add("--prompts_file", metavar="FILE",
        help="one prompt per line, or 'PROMPT | CLASS', and '# TITLE' above parts of the grid; or a .csv with "
             f"columns {', '.join(asked.COLUMNS)}")
    add("--negative_prompt", action="append", metavar="TEXT", help="what guidance moves away from; repeatable")
    add("--labels", metavar="3,7,NAME", help="classes to draw, numbers or names; paired with prompts if both given")
    add("--samples_per_label", type=int, metavar="N", help="pictures of each label or prompt, in a row")
    add("--layout", action="append", metavar="FILE",
        help='objects, a JSON list of {"label": "dog", "box": [left, top, right, bottom]} in [0, 1]; repeatable')
    add("--vectors", metavar="FILE", help="a .npy file (n, width) or (n, l, width), if the model takes vectors")
    add("--segmentation", action="append", metavar="FILE",
        help="semantic map, a grey or palette image of class numbers; repeatable")
    add("--low_res", action="append", metavar="FILE", help="picture to enlarge (super-resolution); repeatable")
    add("--image", action="append", metavar="FILE", help="picture to be changed: give --mask, --strength or --outpaint")
    add("--mask", action="append", metavar="FILE",
        help="where to paint: white; one for each --image, or one for all; with any model")
    add("--strength", type=float, help="of image-to-image: 0 = the picture stays, 1 = little of it does")
    add("--outpaint", type=_numbers(int, 4), metavar="T,R,B,L", help="pixels to add to --image at each side")
    add("--upsample", action="append", metavar="FILE", help="small picture that any model's samples are guided to")
    add("--upsample_scale", type=float, help="of that guidance (default: 1)")
    add("--num_samples", type=int, metavar="N",
        help="pictures in all; conditions are repeated in turn (default: one for each condition, 16 without any)")
    add("--size", type=_size, metavar="H,W", help="in pixels (default: that of the training images)")


def _add_settings(add: Callable) -> None:
    add("--seed", type=int, help="of the noise (default: 0)")
    add("--steps", type=int, help="of the sampler")
    add("--sampler", help=", ".join(METHODS))
    add("--spacing", help="of the timesteps: " + ", ".join(SPACINGS))
    add("--guidance_scale", type=_numbers(float), metavar="S",
        help="1 = no guidance, above 1 = closer to the condition; several, with commas: one for each picture in turn")
    add("--guidance_interval", type=_numbers(float, 2), metavar="LOW,HIGH", help="guide at these noise levels only")
    add("--guidance_rescale", type=float, help="0 .. 1, against pictures that guidance makes too bright")
    add("--two_passes", action="store_true", default=None, help="guidance with less memory")
    add("--weak_workdir", metavar="DIR", help="autoguidance: move away from the model of this workdir")
    add("--weak_step", type=int, help="autoguidance: which checkpoint (of --weak_workdir, or else of --workdir)")
    add("--eta", type=float, help="noise of ddim: 0 = none, 1 = as much as ddpm")
    add("--temperature", type=float, help="of the noise that steps add (default: 1)")
    add("--threshold", type=float, help="dynamic thresholding by this quantile (0.995), for pixel models")
    add("--quantize_x0", action="store_true", default=None, help="predicted latents become codes at each step (VQ)")
    add("--same_noise", action="store_true", default=None, help="all pictures start from the noise of picture 0")
    add("--variation", type=float, help="0 .. 1, how far the noise is turned toward that of --variation_seed")
    add("--variation_seed", type=int)
    add("--interpolate", type=int, metavar="N", help="N pictures from the noise of --seed to that of --variation_seed")
    add("--tile", type=int, metavar="PIXELS", help="compute big pictures in overlapping patches of this side")
    add("--overlap", type=int, metavar="PIXELS", help="of the patches (default: a quarter of --tile)")
    add("--decode_tile", type=int, metavar="PIXELS", help="decode big pictures in patches of this side")
    add("--dtype", choices=("float32", "bfloat16"), help="compute in this type (default: as in training)")


def _size(text: str) -> tuple[int, int]:
    numbers = text.split(",")
    if len(numbers) not in (1, 2) or not all(number.strip().isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not H,W in pixels")
    return int(numbers[0]), int(numbers[-1])


def _numbers(kind: type, count: int = 0) -> Callable[[str], list]:
    def parse_numbers(text: str) -> list:
        try:
            numbers = [kind(part) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
        if count and len(numbers) != count:
            raise argparse.ArgumentTypeError(f"{text!r} is not {count} numbers with commas between them")
        return numbers
    return parse_numbers


def complete(args: argparse.Namespace, earlier: dict[str, Any]) -> argparse.Namespace:
    """Fills in what was not given, from the flags of an `earlier` picture or with defaults."""
    for name, value in (DEFAULTS | earlier).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.index = earlier.get("index")
    if args.index is not None and args.num_samples is None:
        args.num_samples = args.index + 1
    return args


# --- drawing ---------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    if args.from_png is not None:
        args = complete(args, asked.read_request(args.from_png))
    config = request.read_config(args.workdir)
    wanted = asked.plan(args, config)
    if args.interactive and not {"tokens", "label"} & set(request.condition_fields(config)):
        raise UserError(f"--interactive asks for prompts or labels, but of this model: {request.takes(config)}")
    parallel.keep_compiled()
    parallel.initialize()
    step = checkpoint.choose_step(args.workdir, args.step)
    output = outputs.folder(args.output, args.workdir)
    parallel.in_first_process(  # the others write into it, too
        functools.partial(outputs.claim, output, overwrite=args.overwrite, resume=args.resume))
    settings = wanted["settings"]
    common = {name: getattr(args, name) for name in HOW} | {
        name: getattr(settings, name) for name in ("sampler", "steps", "eta", "seed", "spacing")} | {
        "workdir": args.workdir, "step": step, "tile": settings.tile or None, "overlap": settings.overlap or None}
    metadata = functools.partial(outputs.about, wanted, common)
    numbers = every = range(wanted["number"]) if args.index is None else [args.index]
    if args.resume:
        numbers = outputs.missing(output, every, metadata)
        print(f"{len(every) - len(numbers)} of {len(every)} pictures are there already")
    numbers = numbers[jax.process_index() :: jax.process_count()]  # each process draws its share

    logging.info("loading %s, step %s", args.workdir, step)
    model = load(args, args.workdir, args.step)
    options = wanted["options"] | dict(batch_size=args.batch_size, num_samples=wanted["number"], weak=weak_model(args))
    batches = model.sample_batches(wanted["prompts"], wanted["labels"], **options, only=numbers)
    if args.overwrite and parallel.is_first_process():
        outputs.remove_earlier(output)
    parallel.barrier()
    draw(args, output, batches, numbers, metadata, settings)
    parallel.barrier()
    if parallel.is_first_process() and args.index is None:
        outputs.save_together(output, wanted, wanted["number"], common, columns=args.columns, npz=args.npz,
                              each=args.samples_per_label or 1)
        print(f"together: {output / 'samples.png'}" + (f"; as an array: {output / 'samples.npz'}" if args.npz else ""))
    if args.interactive:
        converse(args, model, output, wanted, options, common)
    return 0


def weak_model(args: argparse.Namespace) -> pipeline.LatentDiffusion | None:
    """The model that guidance moves away from, of --weak_workdir and --weak_step."""
    if args.weak_workdir is None and args.weak_step is None:
        return None
    return load(args, args.weak_workdir or args.workdir, args.weak_step)


def load(args: argparse.Namespace, workdir: str, step: int | None) -> pipeline.LatentDiffusion:
    """A model, computing in --dtype."""
    model = pipeline.LatentDiffusion.from_workdir(workdir, step)
    return model.computing_in(args.dtype) if args.dtype else model


def draw(
    args: argparse.Namespace, output: epath.Path, batches: Iterator, numbers: Sequence[int],
    metadata: Callable[[int], dict[str, Any]], settings: Any,
) -> None:
    """Draws and writes pictures, and says how fast. metadata: of a picture, by its number."""
    began, first_done, at_once, frames, done = time.monotonic(), None, 0, [], 0
    bar = tqdm(total=len(numbers), desc=f"{settings.sampler}, {settings.steps} steps", unit="picture",
               dynamic_ncols=True, disable=not parallel.is_first_process() or not numbers)
    try:
        with bar, steps_bar(args, settings):
            for batch in batches:
                for number, image in zip(numbers[done:], batch.images, strict=False):
                    images.save_png(outputs.file_of(output, number), image, metadata(number))
                if batch.frames is not None and len(frames) < outputs.MAX_IN_MOTION:
                    frames += list(batch.frames)
                done += len(batch.images)
                bar.update(len(batch.images))
                if first_done is None:
                    first_done, at_once = time.monotonic(), done
                    logging.info("first batch after %.1f s, compiling included", first_done - began)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError("the device is out of memory; lower --batch_size or --size") from error
    logging.info("compiled %d program%s of a sampler", count := programs.TRACES["draw"], "s" * (count != 1))
    if frames and parallel.is_first_process():
        names = outputs.save_motion(output, np.stack(frames[: outputs.MAX_IN_MOTION]), strip=bool(args.progressive),
                                    animation=args.animate)
        print(f"the way there: {', '.join(str(output / name) for name in names)}")
    if numbers:
        print(summary(output, numbers, time.monotonic() - began, first_done - began, done - at_once))


def summary(output: epath.Path, numbers: Sequence[int], seconds: float, first: float, later: int) -> str:
    """What was drawn, where, and how fast; `first`: seconds until the first batch, `later`: pictures after it."""
    files = str(outputs.file_of(output, numbers[0])) + (f" to {numbers[-1]:06d}.png" if len(numbers) > 1 else "")
    rate = f", then {later / (seconds - first):.2f} pictures/s" if later else ""
    count = f"{len(numbers)} picture" + "s" * (len(numbers) != 1)
    return (f"{count}: {files}; {seconds:.1f} s (first batch, compiling included: {first:.1f} s{rate}); peak memory "
            f"{parallel.peak_memory() / 2**30:.1f} GiB")


@contextlib.contextmanager
def steps_bar(args: argparse.Namespace, settings: Any) -> Iterator[None]:
    """With --progress, a bar for the steps of the batch that is being drawn."""
    if not args.progress:
        yield
        return
    with tqdm(desc="step", total=settings.steps - settings.first, leave=False, position=1, dynamic_ncols=True) as bar:
        def listener(number: int) -> None:
            bar.n = number
            bar.refresh()

        with programs.listening(listener):
            yield


def converse(
    args: argparse.Namespace, model: pipeline.LatentDiffusion, output: epath.Path, wanted: dict[str, Any],
    options: dict[str, Any], common: dict[str, Any],
) -> None:
    """Asks for prompts (or labels), and draws as many pictures of each as before, with the program that is there."""
    number = outputs.next_number(output, wanted["number"])
    each = 1 if args.index is not None else min(wanted["number"], args.batch_size or drawing.BATCH_SIZE)
    beside = None if args.labels is None else wanted["labels"]  # classes that prompts go with
    kind = "prompts" if "tokens" in request.condition_fields(model.config) else "labels"
    while True:
        print(f"{kind[:-1]} > ", end="", flush=True)
        if not (line := sys.stdin.readline().strip()):
            return
        try:
            prompts, labels = request.resolve_conditions(
                model.config, *((line, beside) if kind == "prompts" else (None, line)), model.label_names)
        except UserError as error:
            print(error, file=sys.stderr)
            continue
        numbers = range(number, number + max(each, len(labels or ())))
        prompts, labels = (x and [x[(i - number) % len(x)] for i in range(len(x))] for x in (prompts, labels))
        now = wanted | {"prompts": prompts, "labels": labels}
        metadata = functools.partial(outputs.about, now, common)
        changed = options | {"num_samples": numbers[-1] + 1, "batch_size": each}
        batches = model.sample_batches(prompts, labels, **changed, only=numbers)
        draw(args, output, batches, numbers, metadata, wanted["settings"])
        number += len(numbers)


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
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
    logging.addLevelName(logging.WARNING, "warning")
    if args.verbose:
        logging.getLogger().setLevel(logging.INFO)
        logging.getLogger("absl").setLevel(logging.WARNING)  # orbax tells of every file
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
