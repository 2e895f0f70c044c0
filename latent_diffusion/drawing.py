"""Batches of pictures: what the compiled programs are given, and what comes back. For `pipeline.LatentDiffusion`."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from latent_diffusion import parallel, programs
from latent_diffusion import settings as settings_lib
from latent_diffusion.diffusion import samplers
from latent_diffusion.errors import UserError

BATCH_SIZE = 16  # pictures that are drawn at once, where the caller does not say


@dataclasses.dataclass(frozen=True)
class Samples:
    """images (N, H, W, C) uint8, the scaled latents (N, h, w, c) float32 that they were decoded from, and if asked
    for what was predicted on the way, frames (N, f, H, W, C) uint8."""

    images: UInt8[np.ndarray, "n h w c"]
    latents: Float[np.ndarray, "n h2 w2 d"]
    frames: UInt8[np.ndarray, "n f h w c"] | None = None


@dataclasses.dataclass(frozen=True)
class Job:
    """What is drawn beside the conditions: arrays of a batch, by name, one row for each picture in turn; and what
    `pipeline.LatentDiffusion.sample_batches` was given of those names. masked: whether their ``mask`` says what
    stays."""

    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    masked: bool = False
    variation_seed: int | None = None
    same_noise: bool = False
    upsample_scale: float = 1.0
    weak: Any = None
    correction: Any = None
    frames: int = 0
    report: bool = False


def joined(batches: Iterator[Samples]) -> Samples:
    """All batches in one. Raises UserError if there are none."""
    if not (parts := list(batches)):
        raise UserError("only: no picture is asked for; name at least one number")
    frames = None if parts[0].frames is None else np.concatenate([part.frames for part in parts])
    return Samples(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "latents")), frames)


def given_noise(model: Any, asked: settings_lib.Settings, noise: np.ndarray | None) -> dict[str, np.ndarray]:
    """Checks the noise that is started from, instead of that of the seed, as an array of a batch; {} if none."""
    if noise is None:
        return {}
    if noise.shape[1:] != _latent_shape(model, asked) or not len(noise):
        wanted = ", ".join(map(str, _latent_shape(model, asked)))
        raise UserError(f"noise has the shape {noise.shape}; it must be (n, {wanted})")
    if asked.from_image:
        raise UserError("noise: image-to-image starts from the picture; leave noise or strength out")
    return {"noise": np.asarray(noise, np.float32)}


def check_weak(model: Any, weak: Any) -> None:
    """Raises UserError unless `weak` is a model that `model` can be guided away from."""
    if weak is None:
        return
    one, other = ({
        "schedule": x.schedule, "parameterization": x.config.diffusion.parameterization, "conditions": x.conditioning,
        "first stage": (x.models.first_stage.factor, x.models.first_stage.latent_channels),
        "classes": (x.config.conditioning.num_classes, tuple(x.label_names)),
        "vocabulary": getattr(x.vocabulary, "tokens", None),
        "length of the text": x.config.conditioning.text.max_length,
    } for x in (model, weak))
    differing = [name for name in one if one[name] != other[name]]
    if not math.isclose(model.scale_factor, weak.scale_factor, rel_tol=0.05):  # each measured its own on a batch
        differing.append("scale factor")
    if differing:
        raise UserError(f"weak: autoguidance needs a model of the same latents, conditions, schedule and "
                        f"parameterization; this one differs in its {', '.join(differing)}")


def batches(
    model: Any, asked: settings_lib.Settings, conditions: Mapping[str, np.ndarray], positions: np.ndarray,
    batch_size: int | None, job: Job,
) -> Iterator[Samples]:
    """Draws the pictures with the numbers `positions`, `batch_size` at once.

    conditions: arrays with rows for the pictures in turn, picture k having row k modulo their number.
    Raises UserError where latents are not finite.
    """
    if not len(positions):
        return
    devices = jax.local_device_count()
    batch_size = math.ceil((batch_size or min(len(positions), BATCH_SIZE)) / devices) * devices
    start, draw = programs.compiled(program(model, asked, job))
    shared = parallel.replicate(shared_arguments(model, asked, job))
    arrays = {**conditions, **job.arrays, "guidance_scale": np.asarray(asked.guidance_scale, np.float32)}
    for first in range(0, len(positions), batch_size):
        here = positions[first : first + batch_size]
        rows = np.pad(here, (0, batch_size - len(here)), mode="edge")  # the last batch is filled up
        batch = {name: x[rows % len(x)] for name, x in arrays.items()}
        batch["index"] = (0 * rows if job.same_noise else rows).astype(np.int32)
        batch = parallel.shard(batch)
        noise = batch.pop("noise", None)
        z_T = start(shared, batch) if noise is None else noise
        found = {name: x[: len(here)] for name, x in parallel.gather(draw(shared, z_T, batch)).items()}
        if not found["finite"].all():
            raise UserError(
                f"the latents of picture {here[np.argmin(found['finite'])]} are not finite: the training diverged "
                f"before step {model.step}, or guidance_scale={max(asked.guidance_scale):g} is far too large")
        yield Samples(found["images"], found["latents"], found.get("frames"))


def shared_arguments(model: Any, asked: settings_lib.Settings, job: Job) -> dict[str, Any]:
    """What all pictures have in common, as `programs.start` and `programs.draw` want it."""
    alpha, sigma = samplers.first_level(asked.sampler, model.schedule, asked.steps, asked.spacing, asked.first)
    numbers = dict(scale_factor=model.scale_factor, eta=asked.eta, temperature=asked.temperature, alpha=alpha,
                   sigma=sigma, rescale=asked.guidance_rescale, interval=asked.guidance_interval,
                   upsample_scale=job.upsample_scale)
    shared = {"params": dict(model.params), "key": jax.random.key(asked.seed)} | {
        name: np.asarray(value, np.float32) for name, value in numbers.items()}
    if asked.guided and job.weak is None:
        shared["null"] = model.conditions(None, None, 1, patches=settings_lib.patches(model.config, asked))
    if job.weak is not None:
        shared["weak"] = {**job.weak.params, "first_stage": model.params["first_stage"]}
    if job.variation_seed is not None:
        shared["variation_key"] = jax.random.key(job.variation_seed)
    if job.correction is not None:
        shared["correction"] = job.correction[1]
    return shared


def _latent_shape(model: Any, asked: settings_lib.Settings) -> tuple[int, int, int]:
    first_stage = model.models.first_stage
    return (*(side // first_stage.factor for side in asked.canvas), first_stage.latent_channels)


def program(model: Any, asked: settings_lib.Settings, job: Job) -> programs.Program:
    """What has to be compiled to draw with `model`."""
    factor = model.models.first_stage.factor

    def tile(side: int, overlap: int) -> programs.Tile | None:
        return programs.Tile(side // factor, overlap // factor, factor) if side else None

    return programs.Program(
        models=model.models, schedule=model.schedule, conditioning=model.conditioning,
        parameterization=model.config.diffusion.parameterization, sampler=asked.sampler, steps=asked.steps,
        spacing=asked.spacing, latent_shape=_latent_shape(model, asked), size=asked.size, clip_x0=asked.clip_x0,
        threshold=asked.threshold, quantize_x0=asked.quantize_x0,
        guidance="none" if not asked.guided else "classifier_free" if job.weak is None else "weak",
        two_passes=asked.two_passes, interval=bool(asked.guidance_interval) and asked.guided,
        weak=job.weak and job.weak.models, correction=job.correction and job.correction[0],
        upsample="small" in job.arrays, masked=job.masked, first=asked.first, from_image=asked.from_image,
        varied=job.variation_seed is not None, frames=job.frames, report=job.report,
        tile=tile(asked.tile, asked.overlap),
        decode_tile=tile(asked.decode_tile, settings_lib.quarter(asked.decode_tile, factor)))
