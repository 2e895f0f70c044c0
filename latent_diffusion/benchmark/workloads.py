"""What is timed: a pmapped call with its arguments, made for a config from random weights and random inputs."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from latent_diffusion import drawing, models, parallel, pipeline, programs, settings
from latent_diffusion.benchmark import work as work_lib
from latent_diffusion.diffusion import schedule as schedule_lib
from latent_diffusion.models.perceptual import LPIPS
from latent_diffusion.training import autoencoder as stage1
from latent_diffusion.training import diffusion as stage2
from latent_diffusion.training import optimizer
from latent_diffusion.training.batch import as_floats


@dataclasses.dataclass(frozen=True)
class Workload:
    """A call, again and again.

    call: of `parallel`, not compiled yet. arguments: of the first time. following: (arguments, result) -> those of the
    next time, because some are given away. watched: what of a result shows that the devices are done. images, flops:
    of one call, over all devices of all processes. parameters: how many are trained or used. waited: grows by the
    seconds that `following` waited for data.
    """

    call: Callable
    arguments: tuple
    following: Callable[[tuple, Any], tuple]
    watched: Callable[[Any], Any]
    images: int
    flops: int
    parameters: int
    waited: list[float] = dataclasses.field(default_factory=list)


def inputs(config: Any, batch_size: int, *, cached: bool = False, compact: bool = False) -> dict[str, np.ndarray]:
    """This process's part of a random batch of `batch_size`, cached and compact as in `work.shapes_of`: images in
    [-1, 1] or bytes, numbers of classes and tokens."""
    rng, number = np.random.default_rng(jax.process_index()), batch_size // jax.process_count()
    classes = {"label": lambda: config.conditioning.num_classes, "tokens": lambda: config.conditioning.text.vocab_size,
               "layout": lambda: config.conditioning.layout.vocab_size,
               "segmentation": lambda: config.conditioning.segmentation.num_classes}

    def draw(name: str, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        if name == "index":
            return number * jax.process_index() + np.arange(number, dtype=np.int32)
        if name in classes:
            return rng.integers(classes[name](), size=shape.shape, dtype=np.int32)
        if name == "mask":
            return (rng.random(shape.shape) > 0.5).astype(np.float32)
        if shape.dtype == np.uint8:
            return rng.integers(256, size=shape.shape, dtype=np.uint8)
        x = rng.uniform(-1, 1, shape.shape).astype(shape.dtype)
        return np.abs(x) if name == "latent_std" else x

    shapes = work_lib.shapes_of(config, number, cached=cached, compact=compact)
    return {name: draw(name, shape) for name, shape in shapes.items()}


def train(config: Any, batch_size: int, *, cached: bool) -> Workload:
    """A training step of either stage; of stage 2 on cached latents, or on pictures that it encodes."""
    work = work_lib.of(config)
    step, state, frozen = (_stage1 if config.stage == "autoencoder" else _stage2)(config, cached, batch_size)
    batch, key = parallel.shard(inputs(config, batch_size, cached=cached, compact=True)), jax.random.key(0)
    return Workload(
        step, (state, frozen, batch, key), lambda arguments, result: (result[0], *arguments[1:]),
        lambda result: result[1], batch_size, batch_size * work_lib.of_step(config, work, cached=cached),
        work.parameters)


def _stage1(config: Any, cached: bool, batch_size: int) -> tuple[Callable, Any, Any]:
    networks, key = models.build(config), jax.random.key(0)
    tx = (optimizer.create(config), optimizer.create(config, rate_factor=config.optimizer.disc_factor))
    batch, frozen = inputs(config, batch_size), {}
    if config.training.loss.perceptual != "none":
        lpips = LPIPS(net=config.training.loss.perceptual)
        frozen["lpips"] = jax.jit(lpips.init)(key, batch["image"][:1], batch["image"][:1])["params"]
    frozen = parallel.replicate(frozen)
    create = parallel.pmap_step(stage1.create_state, models=networks, tx=tx, config=config)
    state, _ = create(None, frozen, parallel.shard(batch), key)
    return (parallel.pmap_step(stage1.train_step, models=networks, schedule=None, tx=tx, config=config), state, frozen)


def _stage2(config: Any, cached: bool, batch_size: int) -> tuple[Callable, Any, Any]:
    networks, schedule, tx = models.build(config), schedule_lib.from_config(config.diffusion), optimizer.create(config)
    create = jax.jit(functools.partial(stage2.create_state, models=networks, tx=tx, config=config))
    null = {name: x[0] for name, x in inputs(config, jax.process_count()).items() if name in stage2.OWN_DROPOUT}
    needed = not cached or config.conditioning.concat == "inpainting"
    frozen = {"first_stage": _first_stage(config, networks) if needed else {}, "null": null,
              "conditioner": jax.jit(lambda: work_lib.frozen_text(config, networks))()}
    step = parallel.pmap_step(stage2.train_step, models=networks, schedule=schedule, tx=tx, config=config)
    return step, parallel.replicate(create(jax.random.key(0))), parallel.replicate(frozen)


def _first_stage(config: Any, networks: models.Models) -> dict:
    size, channels = config.data.image_size, config.data.channels
    return jax.jit(lambda x: work_lib.first_stage_params(networks, x))(jnp.zeros((1, size, size, channels)))


def code(config: Any, batch_size: int, *, decode: bool) -> Workload:
    """The first stage's encoder, from bytes as it writes a cache of latents, or its decoder, to pictures of 8 bits; on
    this process's devices, as each process does."""
    networks, work, x = models.build(config), work_lib.of(config), inputs(config, batch_size, compact=True)["image"]
    params = parallel.replicate(_first_stage(config, networks))

    def encode(params: Any, batch: dict) -> Any:
        return stage2.posterior(networks, params, as_floats(batch)["x"])

    def to_pictures(params: Any, batch: dict) -> Any:
        return programs.to_uint8(networks.first_stage.apply({"params": params}, batch["x"], method="decode"))

    if decode:
        side, channels = config.data.image_size // networks.first_stage.factor, networks.first_stage.latent_channels
        x = np.random.default_rng(0).normal(size=(len(x), side, side, channels)).astype(np.float32)
    return Workload(
        parallel.pmap_local(to_pictures if decode else encode), (params, parallel.shard({"x": x})),
        lambda arguments, result: arguments, lambda result: result, batch_size,
        batch_size * (work.decoder if decode else work.encoder), sum(p.size for p in jax.tree.leaves(params)))


@dataclasses.dataclass(frozen=True)
class _NoVocabulary:
    """Stands in for the tokenizer of a text model, of which sampling asks the empty text alone."""

    def null(self, length: int) -> np.ndarray:
        return np.zeros(length, np.int32)


def sample(config: Any, batch_size: int, **asked: Any) -> Workload:
    """The whole sampler with the decoder, to pictures of 8 bits: on this process's devices, as each process does.

    asked: of `settings.resolve`: steps, sampler, ... The guidance scale is the config's, where 1 is half the work.
    """
    networks, schedule, work = models.build(config), schedule_lib.from_config(config.diffusion), work_lib.of(config)
    found = settings.resolve(config, **asked)
    params = jax.jit(lambda: stage2.create_state(
        jax.random.key(0), models=networks, tx=optax.identity(), config=config).params)()
    params = stage2.with_frozen(params, {"conditioner": jax.jit(lambda: work_lib.frozen_text(config, networks))()})
    params = {name: params[name] for name in ("unet", "conditioner") if name in params}
    model = pipeline.LatentDiffusion(
        config=config, models=networks, schedule=schedule, scale_factor=1.0, vocabulary=_NoVocabulary(),
        params=parallel.replicate(params | {"first_stage": _first_stage(config, networks)}))
    start, draw = programs.compiled(drawing.program(model, found, drawing.Job()))
    shared = parallel.replicate(drawing.shared_arguments(model, found, drawing.Job()))
    batch = inputs(config, batch_size) | {
        "guidance_scale": np.full(batch_size // jax.process_count(), found.guidance_scale[0], np.float32)}
    if config.conditioning.concat != "inpainting":
        batch.pop("image")
    batch = parallel.shard(batch)
    calls = work_lib.calls_of(found.sampler, schedule, found.steps, found.spacing)
    return Workload(
        draw, (shared, start(shared, batch), batch),
        lambda arguments, result: (shared, start(shared, batch), batch), lambda result: result["images"], batch_size,
        batch_size * work_lib.of_sample(config, work, calls=calls, guided=found.guided), work.parameters)


def on_data(workload: Workload, stream: Iterator[dict]) -> Workload:
    """The training step `workload` with a batch of the stream in each step."""
    waited: list[float] = []

    def following(arguments: tuple, result: Any) -> tuple:
        started = time.perf_counter()
        batch = next(stream)
        waited.append(time.perf_counter() - started)
        state, frozen, _, key = workload.following(arguments, result)
        return state, frozen, parallel.shard(batch), key

    state, frozen, _, key = workload.arguments
    return dataclasses.replace(workload, arguments=(state, frozen, parallel.shard(next(stream)), key),
                               following=following, waited=waited)
