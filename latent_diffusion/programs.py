"""What is compiled to draw pictures: the whole sampler with its decoder, and single calls of the networks."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from latent_diffusion import models, parallel
from latent_diffusion.diffusion import guidance, samplers, tiles
from latent_diffusion.diffusion import schedule as schedule_lib
from latent_diffusion.training import diffusion as stage2


class Conditioning(NamedTuple):
    """The part of ``config.conditioning`` that the networks' inputs depend on, hashable."""

    crossattn: str
    label: bool
    concat: str


class Tile(NamedTuple):
    """Patches in which big pictures are computed: side and overlap in latents, and how much larger pixels are."""

    side: int
    overlap: int
    factor: int


@dataclasses.dataclass(frozen=True)
class Program:
    """All that a compiled sampler depends on; whatever else there is, weights above all, is an argument of it."""

    models: models.Models
    schedule: schedule_lib.NoiseSchedule
    conditioning: Conditioning
    parameterization: str
    sampler: str
    steps: int
    spacing: str
    clip_x0: bool
    guided: bool
    latent_shape: tuple[int, int, int]
    tile: Tile | None


def draw(shared: Mapping[str, Any], batch: Mapping[str, Array], *, program: Program) -> tuple[Array, Array]:
    """The whole sampler and the decoder, for one device's part of a batch.

    Args:
      shared: ``params``, ``null`` (the null conditions, one row), ``scale_factor``, ``key``, ``guidance_scale``,
        ``eta``.
      batch: ``index`` (b,), the numbers of the pictures, and the conditions of `training.diffusion.condition` and
        `condition_map`. ``layout`` may be (b, p, l): one layout for each patch of the tiles.
      program: static.

    Returns:
      Scaled latents (b, h, w, c) and images (b, H, W, C) as the decoder gives them, about [-1, 1].
    """
    params, index = shared["params"], batch["index"]
    unet = functools.partial(predict, program.models, params, tile=program.tile)
    spatial = _condition_map(params, batch, program)
    inputs = _tau(params, batch, program) | spatial
    if program.guided:
        null = _tau(params, shared["null"], program) | spatial
        denoise_fn = guidance.classifier_free(unet, inputs, null, shared["guidance_scale"])
    else:
        denoise_fn = functools.partial(unet, inputs=inputs)
    z_0 = samplers.sample(
        denoise_fn, program.schedule, shared["key"], (index.shape[0], *program.latent_shape), method=program.sampler,
        steps=program.steps, spacing=program.spacing, clip_x0=program.clip_x0, eta=shared["eta"],
        parameterization=program.parameterization, indices=index)
    decoder = functools.partial(_decode, params, scale_factor=shared["scale_factor"], models=program.models)
    return z_0, decoder(z_0) if program.tile is None else tiles.tiled(decoder, z_0, *program.tile[:2])


@functools.lru_cache(maxsize=16)
def compiled(program: Program) -> Any:
    """`draw`, on all local devices."""
    return parallel.pmap_local(draw, program=program)


def predict(
    networks: models.Models, params: Any, z_t: Array, t: Array, inputs: Mapping[str, Array], tile: Tile | None = None
) -> Array:
    """The UNet's prediction, as a whole or in patches, each of which may have a context of its own: (b, p, t, d)."""
    def predict_patch(joined: Array, *context: Array) -> Array:  # z_t and the map in its channels
        z, spatial = joined[..., : z_t.shape[-1]], joined[..., z_t.shape[-1] :]
        own = ({"concat": spatial} if "concat" in inputs else {}) | ({"context": context[0]} if context else {})
        return networks.unet.apply({"params": params["unet"]}, z, t, **{**inputs, **own}).astype(jnp.float32)

    joined = jnp.concatenate([z_t, inputs["concat"]], axis=-1) if "concat" in inputs else z_t
    if tile is None:
        return predict_patch(joined)
    of_patches = "context" in inputs and inputs["context"].ndim == 4
    each = (jnp.moveaxis(inputs["context"], 1, 0),) if of_patches else ()
    return tiles.tiled(predict_patch, joined, *tile[:2], each=each)


def _tau(params: Any, conditions: Mapping[str, Array], program: Program) -> dict[str, Array]:
    """`training.diffusion.condition`; of layouts (b, p, l), a context (b, p, t, d)."""
    tau = functools.partial(stage2.condition, program.models, params, options=program.conditioning)
    if program.conditioning.crossattn != "layout" or conditions["layout"].ndim == 2:
        return tau(conditions)
    layout = conditions["layout"]
    inputs = tau({**conditions, "layout": layout.reshape(-1, layout.shape[-1])})
    return inputs | {"context": inputs["context"].reshape(*layout.shape[:2], *inputs["context"].shape[1:])}


def _condition_map(params: Any, batch: Mapping[str, Array], program: Program) -> dict[str, Array]:
    """`training.diffusion.condition_map`, in pieces where there are tiles and the first stage encodes."""
    options, tile = program.conditioning, program.tile
    if tile is None or options.concat != "inpainting":
        return stage2.condition_map(program.models, params, params["first_stage"], batch, options)

    def encode(joined: Array) -> Array:
        pieces = {"image": joined[..., :-1], "mask": joined[..., -1:]}
        return stage2.condition_map(program.models, params, params["first_stage"], pieces, options)["concat"]

    joined = jnp.concatenate([batch["image"], batch["mask"]], axis=-1)
    return {"concat": tiles.tiled(encode, joined, tile.side * tile.factor, tile.overlap * tile.factor)}


def _decode(params: Any, z: Array, scale_factor: Array, *, models: models.Models) -> Array:
    decoded = models.first_stage.apply({"params": params["first_stage"]}, z / scale_factor, method="decode")
    return decoded.astype(jnp.float32)


def _encode(params: Any, x: Array, scale_factor: Array, *, models: models.Models) -> Array:
    mean, _ = stage2.posterior(models, params["first_stage"], x)
    return scale_factor * mean


def _denoise(
    params: Any, z_t: Array, t: Array, conditions: Mapping[str, Array], *, models: models.Models, options: Conditioning
) -> Array:
    t = jnp.broadcast_to(t, z_t.shape[:1])
    inputs = stage2.condition(models, params, conditions, options) | stage2.condition_map(
        models, params, params["first_stage"], conditions, options)
    return predict(models, params, z_t, t, inputs)


decode = jax.jit(_decode, static_argnames="models")
encode = jax.jit(_encode, static_argnames="models")
denoise = jax.jit(_denoise, static_argnames=("models", "options"))
