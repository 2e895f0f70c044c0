"""The only loop: data -> step -> log -> evaluate -> checkpoint, for both stages."""

import collections
import contextlib
import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from clu import metrics as clu_metrics
from clu import parameter_overview
from etils import epath
from tqdm import tqdm

from latent_diffusion import checkpoint, conditions, images, parallel, request
from latent_diffusion import config as config_lib
from latent_diffusion.data import sources
from latent_diffusion.errors import UserError
from latent_diffusion.training import first_stage, interrupts, optimizer, progress, setup
from latent_diffusion.training.writer import Writer

MAX_STEPS_IN_FLIGHT = 2  # how far the host may run ahead of the devices
STAGES = {"autoencoder": setup.autoencoder, "diffusion": setup.diffusion}
FINAL = "evaluation.json"  # in the workdir: scores after the last step; written when all is done


def run(config: Any, workdir: str) -> int:
    """Trains the stage that `config` describes, or goes on where the workdir's last checkpoint stopped.

    Args:
      config: an unlocked or locked ConfigDict as the files in configs/ give it; what follows from the data and from the
        first stage is filled in.
      workdir: directory or bucket path for the config, checkpoints, TensorBoard events and pictures.

    Returns:
      0 when the last step was reached; 128 + the number of the signal (SIGINT, SIGTERM) that stopped the run, after
      saving.

    Raises:
      UserError: a mistake in the config, the data or the workdir, found before anything is compiled; or a loss that
        is no longer finite.
    """
    path = request.absolute(workdir)
    with config.unlocked():
        splits, vocabulary = check(config, path)
        if (done := already_done(config, path)) is not None:
            say(f"{path} has been trained to step {done['step']} of {config.training.num_steps} ({done['summary']}); "
                "nothing to do")
            return 0
        make_workdir(path)
        ready = STAGES[config.stage](config, path, splits, vocabulary)
        ready.shapes()  # networks that do not fit the config say so before anything is written
        manager = checkpoint.open_manager(path, keep=config.checkpoint.keep)
        write_workdir(config, path, vocabulary, splits["train"])
        with contextlib.closing(manager), open_writer(path) as writer, interrupts.catch() as caught:
            return train(ready, config, path, manager, writer, caught)


# --- before anything is compiled -------------------------------------------------------------------------------------


def check(config: Any, path: epath.Path) -> tuple[setup.Splits, conditions.Tokenizer | None]:
    """Completes the config, opens the data and finds the user's mistakes; returns the opened sets and vocabulary."""
    if (path / checkpoint.IMPORTED).exists():
        raise UserError(f"--workdir {path} holds imported weights, which no run goes on in; begin another with them: "
                        f"--config configs/finetune.py:from={path} --workdir ANOTHER")
    first_stage.complete_config(config, path)
    config_lib.validate(config, num_devices=jax.device_count(), num_processes=jax.process_count())
    sources.prepare(config)
    fields = (*request.condition_fields(config), *request.map_fields(config)) if config.stage == "diffusion" else ()
    splits = {split: sources.open_source(config, split, fields=fields) for split in ("train", "eval")}
    number = len(splits["train"].source)
    if number < config.training.batch_size:
        raise UserError(f"{splits['train'].where} has {number} images, fewer than one batch "
                        f"(training.batch_size={config.training.batch_size})")
    if not len(splits["eval"].source):
        raise UserError(f"{splits['eval'].where} has no images to evaluate on")
    vocabulary = setup.complete_conditioning(config, path, splits["train"])
    check_workdir(config, path)
    return splits, vocabulary


def check_workdir(config: Any, path: epath.Path) -> None:
    """Refuses a workdir that holds a run with another config."""
    saved = path / "config.json"
    trained = checkpoint.latest_step(path) is not None
    if saved.exists():
        there = first_stage.read_saved(saved)
        if there.stage != config.stage:
            raise UserError(f"--workdir {path} holds a run of stage {there.stage!r}, and this is stage "
                            f"{config.stage!r}; each stage needs a workdir of its own")
        try:
            config_lib.check_same(config, there, str(path))
        except UserError as error:
            hint = "" if trained else " (nothing has been saved there yet; the folder may be removed)"
            raise UserError(f"{error}{hint}") from None
    elif trained:
        raise UserError(f"--workdir {path} holds checkpoints but no config.json; choose another workdir")


def already_done(config: Any, path: epath.Path) -> dict | None:
    """What a run that is complete wrote at its end."""
    step, file = checkpoint.latest_step(path), path / FINAL
    if step is None or step < config.training.num_steps or not file.exists():
        return None
    final = json.loads(file.read_text())
    return final if final["step"] == step else None


def make_workdir(path: epath.Path) -> None:
    """Makes the workdir; one that cannot be written to is a `UserError`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if "://" not in str(path) and not os.access(path, os.W_OK):
            raise PermissionError("it cannot be written to")
    except OSError as error:
        raise UserError(f"--workdir {path} cannot be used: {error.strerror or error}") from error


def write_workdir(config: Any, path: epath.Path, vocabulary: Any, source: Any) -> None:
    """Writes what makes the workdir readable without flags: the tokenizer, the names of classes and config.json."""
    if not parallel.is_first_process():
        return
    if vocabulary is not None:
        vocabulary.save(path)
    used = {"labels": source.label_names}
    if config.stage == "diffusion":
        used["objects"] = source.object_names if config.conditioning.crossattn == "layout" else ()
        used["map_classes"] = source.map_names if config.conditioning.concat == "segmentation" else ()
    for kind, names in used.items():
        if names:
            conditions.save_labels(path / f"{kind}.txt", names)
    saved, text = path / "config.json", config_lib.to_json(config)
    if not saved.exists() or saved.read_text() != text:
        saved.write_text(text)


# --- the loop --------------------------------------------------------------------------------------------------------


def train(run: setup.Setup, config: Any, path: epath.Path, manager: Any, writer: Writer | None, caught: list) -> int:
    """Steps from the latest checkpoint (or 0) to ``training.num_steps``; returns the exit code, see `run`."""
    options, key, last = config.training, jax.random.key(config.seed), config.training.num_steps
    state, start = restore_or_start(run, config, manager)
    describe(run, state, config, start, writer)
    stream, rate, meter = run.data.train(start), optimizer.schedule(config), Meter()
    in_flight: collections.deque[InFlight] = collections.deque()
    with progress.bar(last, min(start, last), config.stage, show=parallel.is_first_process()) as bar:
        for step in range(start + 1, last + 1):
            batch, waited = timed_next(stream)
            state, metrics = run.step(state, run.frozen, parallel.shard(batch), key)
            meter.add(metrics, waited, options.batch_size)
            window = None
            if step % options.log_every == 0 or step in (start + 1, last):
                window = meter.take(step, rate(step - 1))
            in_flight.append(InFlight(metrics, parallel.any_process(lambda: bool(caught)), window))
            stop = reached_preemption(manager, step)
            while len(in_flight) >= (1 if stop or step == last else MAX_STEPS_IN_FLIGHT):
                stop = complete(in_flight.popleft(), bar, writer, path) or stop
            if step == start + 1:
                bar.unpause()  # compilation is no measure of the time left
            bar.update()
            if step % config.checkpoint.every == 0 or step == last or stop:
                save(manager, step, state, config, metrics, path, len(run.data.splits["train"].source))
                if writer:
                    writer.flush()
            if stop:
                manager.wait_until_finished()
                say(f"stopped and saved at step {step} in {path}; the same command goes on from there")
                return 128 + (caught[0] if caught else signal.SIGTERM)
            if config.evaluation.every and step % config.evaluation.every == 0 and step < last:
                evaluate(run, state, step, writer)
            if options.image_every and step % options.image_every == 0 and step < last:
                draw(run, state, step, writer, path)
    return finish(run, state, max(start, last), path, writer, caught)


def finish(run: setup.Setup, state: Any, step: int, path: epath.Path, writer: Writer | None, caught: list) -> int:
    """Scores and pictures of the last step. Interrupted, it is done when the command is given again."""
    result = evaluate(run, state, step, writer)
    if not caught:
        draw(run, state, step, writer, path)
    if caught:
        return 128 + caught[0]
    if writer:
        final = {"step": step, "summary": run.summary(result), "scores": result}
        (path / FINAL).write_text(json.dumps(final, indent=1))
    return 0


@dataclasses.dataclass(frozen=True)
class InFlight:
    """A step that the devices may still be busy with: its metrics, whether to stop after it, and what to report."""

    metrics: dict
    stop: Callable[[], bool]
    window: "Window | None"


def complete(flying: InFlight, bar: tqdm, writer: Writer | None, path: epath.Path) -> bool:
    """Waits for a step, reports it if that was planned, and says whether the run must stop."""
    jax.block_until_ready(flying.metrics)
    if flying.window:
        report(flying.window, bar, writer, path)
    return flying.stop()


def restore_or_start(run: setup.Setup, config: Any, manager: Any) -> tuple[Any, int]:
    """The latest checkpoint's state on all devices and its step; else the first state and 0."""
    if manager.latest_step() is None:
        return run.create(), 0
    restored, metadata = checkpoint.restore(manager, items_of(run.shapes()))
    images_then, images_now = metadata.get("images"), len(run.data.splits["train"].source)
    if images_then not in (None, images_now):
        raise UserError(f"the run in this workdir was trained on {images_then} images, and the data now has "
                        f"{images_now}; give it the same data, or another workdir")
    state = restored.pop("optimizer").replace(**{FIELDS[name]: tree for name, tree in restored.items()})
    return parallel.replicate(state), metadata["step"]


FIELDS = {"params": "params", "ema": "ema_params"}  # checkpoint item -> field of the state; "optimizer" has the rest


def items_of(state: Any) -> dict[str, Any]:
    """The state as separate checkpoint items, so that sampling and stage 2 read only the weights."""
    fields = {item: field for item, field in FIELDS.items() if hasattr(state, field)}
    items = {item: getattr(state, field) for item, field in fields.items()}
    return items | {"optimizer": state.replace(**{field: None for field in fields.values()})}


def save(
    manager: Any, step: int, state: Any, config: Any, metrics: dict, path: epath.Path, number_of_images: int
) -> None:
    """Starts an asynchronous checkpoint, unless the step diverged; every process calls it."""
    check_finite(step, {name: float(value) for name, value in parallel.to_host(metrics).items()}, path)
    host = parallel.to_host(state)
    metadata = {"step": step, "stage": config.stage, "data": {"next_index": step}, "images": number_of_images,
                "config": config_lib.to_json(config)}
    if config.stage == "diffusion":
        metadata["scale_factor"] = float(host.scale_factor)
    checkpoint.save(manager, step, items_of(host), metadata)


def reached_preemption(manager: Any, step: int) -> bool:
    """Whether the cluster announced preemption; all processes agree on the step."""
    return jax.process_count() > 1 and manager.reached_preemption(step)


# --- logs ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Window:
    """The steps since the last report: their metrics (device arrays on their way to the host) and speed."""

    step: int
    values: list[dict]
    learning_rate: Any
    speed: dict[str, float]


class Meter:
    """Collects what the next report averages, without waiting for any of it."""

    def __init__(self):
        self._reset()

    def _reset(self) -> None:
        self._values, self._waited, self._images, self._since = [], 0.0, 0, time.perf_counter()

    def add(self, metrics: dict, waited: float, images_in_batch: int) -> None:
        for value in metrics.values():
            value.copy_to_host_async()
        self._values.append(metrics)
        self._waited += waited
        self._images += images_in_batch

    def take(self, step: int, learning_rate: Any) -> Window:
        """Closes the window; the next one begins."""
        seconds = time.perf_counter() - self._since
        speed = {"images_per_second": self._images / seconds, "data_wait_share": self._waited / seconds}
        window = Window(step, self._values, learning_rate, speed)
        self._reset()
        return window


def report(window: Window, bar: tqdm, writer: Writer | None, path: epath.Path) -> None:
    """Logs the averages of a window; stops the run if the loss is not finite."""
    fetched = [parallel.to_host(values) for values in window.values]
    means = {name: float(clu_metrics.Average.from_model_output(np.stack([m[name] for m in fetched])).compute())
             for name in fetched[0]}
    bar.set_postfix(loss=f"{means['loss']:.4g}", refresh=False)
    if writer:
        scalars = means | window.speed | {"learning_rate": float(window.learning_rate)}
        writer.write_scalars(window.step, {f"train/{name}": value for name, value in scalars.items()})
    check_finite(window.step, means, path)


def check_finite(step: int, metrics: dict[str, float], path: epath.Path) -> None:
    """A loss or gradient that is not finite is a `UserError`."""
    if not np.isfinite([metrics["loss"], metrics["grad_norm"]]).all():
        raise UserError(f"the loss is {metrics['loss']:g} at step {step} (gradient norm {metrics['grad_norm']:g}): "
                        "lower optimizer.learning_rate or set optimizer.clip_norm; earlier checkpoints in "
                        f"{path} are kept")


def describe(run: setup.Setup, state: Any, config: Any, start: int, writer: Writer | None) -> None:
    """Prints what is trained on what; logs the config and the table of parameters."""
    if not parallel.is_first_process():
        return
    trees = dict(state.params) | dict(getattr(state, "disc_params", {}))
    sizes = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in trees.items() if name != "logvar"}
    device, images_in = jax.devices()[0], {name: len(split.source) for name, split in run.data.splits.items()}
    for note in run.notes:
        say(note)
    say(f"{config.stage}: " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()) + " parameters; "
        f"{images_in['train']:,} images, {images_in['eval']:,} held out; {jax.device_count()} {device.platform} "
        f"device(s), batch {config.training.batch_size}, effective learning rate "
        f"{optimizer.effective_learning_rate(config):.3g}"
        + (f"; latents scaled by {float(parallel.to_host(state.scale_factor)):.4f}" if config.stage == "diffusion"
           else "") + (f"; resuming after step {start}" if start else ""))
    if writer and not start:
        writer.write_hparams(config.to_dict())
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(state.params))
        table = parameter_overview.get_parameter_overview(shapes, include_stats=False)
        writer.write_texts(0, {"parameters": "\n".join("    " + line for line in table.splitlines())})


def evaluate(run: setup.Setup, state: Any, step: int, writer: Writer | None) -> dict[str, float]:
    """Scores on the held-out set, printed and logged; every process calls it."""
    result = run.evaluate(state)
    say(f"step {step}: {run.summary(result)}")
    if writer:
        writer.write_scalars(step, {f"eval/{name}": value for name, value in result.items()})
    return result


def draw(run: setup.Setup, state: Any, step: int, writer: Writer | None, path: epath.Path) -> None:
    """Grids of pictures, to TensorBoard and as NAME.png in the workdir, by the first process alone."""
    if not writer:
        return
    for name, pictures in run.pictures(state).items():
        writer.write_images(step, {name: pictures.images})
        writer.write_scalars(step, {f"{name}/{key}": value for key, value in pictures.scores.items()})
        writer.flush()
        file, number = path / f"{name}.png", len(pictures.images)
        images.save_png(file, images.grid(pictures.images, 8 if number > 16 else 4), {"step": step})
        scores = ", ".join(f"{key} {value:.2f}" for key, value in pictures.scores.items())
        say(f"step {step}: {name} in {file}" + (f"; of these {number}: {scores}" if scores else ""))


# --- helpers ---------------------------------------------------------------------------------------------------------


def say(message: str) -> None:
    """Prints in the first process."""
    if parallel.is_first_process():
        progress.say(message)


def open_writer(path: epath.Path) -> Any:
    """A TensorBoard writer in the first process, else a context that gives None."""
    return Writer(path) if parallel.is_first_process() else contextlib.nullcontext()


def timed_next(stream: Iterator[dict]) -> tuple[dict, float]:
    """The next batch and the seconds it took."""
    before = time.perf_counter()
    return next(stream), time.perf_counter() - before
