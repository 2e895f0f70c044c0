"""What is compiled to draw pictures: from noise and conditions to pictures of 8 bits in one program, and single calls
of the networks."""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from latent_diffusion import models, parallel
from latent_diffusion.diffusion import guidance, process, samplers, tiles
from latent_diffusion.diffusion import schedule as schedule_lib
from latent_diffusion.models import layers
from latent_diffusion.training import diffusion as stage2

TRACES: collections.Counter = collections.Counter()  # how often each program was traced, which is how often it compiled


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
    """All that a compiled sampler depends on; whatever else there is, weights above all, is an argument of it.

    guidance: "none", "classifier_free" or "weak" (autoguidance, by `weak`).
    first: the step that is begun with, above 0 for image-to-image.
    masked: ``image`` and ``mask`` of the batch say what stays, though the network does not see them.
    upsample: toward small pictures.
    size: of the pictures, which are cut from the middle of `latent_shape`.
    frames: how many predictions to decode.
    report: call the listeners of `listening` at each step.
    The rest: `settings.Settings`.
    """

    models: models.Models
    schedule: schedule_lib.NoiseSchedule
    conditioning: Conditioning
    parameterization: str
    sampler: str
    steps: int
    spacing: str
    latent_shape: tuple[int, int, int]
    size: tuple[int, int]
    clip_x0: bool = False
    threshold: float = 0.0
    quantize_x0: bool = False
    guidance: str = "none"
    two_passes: bool = False
    interval: bool = False
    weak: models.Models | None = None
    correction: Callable | None = None
    upsample: bool = False
    masked: bool = False
    first: int = 0
    from_image: bool = False
    varied: bool = False
    frames: int = 0
    report: bool = False
    tile: Tile | None = None
    decode_tile: Tile | None = None

    @property
    def coder_tile(self) -> Tile | None:
        """Patches of the encoder and the decoder."""
        return self.tile or self.decode_tile


# --- the two programs of a sampler -----------------------------------------------------------------------------------


def start(
    shared: Mapping[str, Any], batch: Mapping[str, Array], *, latent_shape: tuple[int, int, int], varied: bool,
    encoder: tuple[models.Models, Tile | None] | None,
) -> Array:
    """Where the sampler starts, (b, h, w, c): noise of `shared` ``key`` and the pictures' numbers; turned by ``amount``
    toward that of ``variation_key``, if varied; with an encoder (image-to-image), on top of the encoded ``image``
    (``alpha``, ``sigma``)."""
    shape = (batch["index"].shape[0], *latent_shape)
    noise = samplers.initial_noise(shared["key"], batch["index"], shape)
    if varied:
        other = samplers.initial_noise(shared["variation_key"], batch["index"], shape)
        noise = process.slerp(noise, other, batch["amount"])
    if encoder is None:
        return noise
    networks, tile = encoder
    z_0 = _encode(shared["params"], batch["image"], shared["scale_factor"], models=networks, tile=tile)
    return shared["alpha"] * z_0 + shared["sigma"] * noise


def draw(
    shared: Mapping[str, Any], z_T: Array, batch: Mapping[str, Array], *, program: Program
) -> dict[str, Array]:
    """The whole sampler and the decoder, for one device's part of a batch.

    Args:
      shared: ``params``, ``scale_factor``, ``key``, ``eta``, ``temperature``, and as far as the program asks for them
        ``null`` (the null conditions, one row), ``rescale``, ``interval``, ``weak`` (parameters), ``correction`` (the
        function's last argument), ``upsample_scale``.
      z_T: (b, h, w, c), of `start` or the user's.
      batch: ``index`` (b,), the numbers of the pictures; ``guidance_scale`` (b,); the conditions of
        `training.diffusion.condition` and `condition_map`, where ``layout`` may be (b, p, l): one layout for each patch
        of the tiles; ``negative_tokens`` instead of the null ones; ``image``, ``mask``; ``small`` pictures to upsample.
      program: static.

    Returns:
      images (b, H, W, C) uint8, scaled latents (b, h, w, c), finite (b,), and frames (b, frames, H, W, C) uint8.
    """
    TRACES["draw"] += 1
    shared = {**shared} | {name: in_compute_dtype(shared[name], networks) for name, networks in (
        ("params", program.models), ("weak", program.weak)) if name in shared}
    params, known = shared["params"], None
    if program.masked:
        z_known = _encode(
            params, batch["image"], shared["scale_factor"], models=program.models, tile=program.coder_tile)
        known = samplers.Known(z_known, _kept(batch["mask"], program))
    z_0, frames = samplers.trajectory(
        _denoise_fn(shared, batch, program), program.schedule, shared["key"], z_T.shape, method=program.sampler,
        steps=program.steps, spacing=program.spacing, clip_x0=program.clip_x0, threshold=program.threshold,
        x0_fn=functools.partial(_quantized, shared, program) if program.quantize_x0 else None, eta=shared["eta"],
        temperature=shared["temperature"], parameterization=program.parameterization, indices=batch["index"], z_T=z_T,
        first=program.first, known=known, frames=program.frames, on_call=_report if program.report else None)

    decode = functools.partial(_decoded, params, shared["scale_factor"], program)
    x = decode(z_0)
    pictures = to_uint8(x)
    if "mask" in batch:  # what is known stays as it is, to the last bit
        cut = functools.partial(_middle, program)
        pictures = jnp.where(cut(batch["mask"]) > 0.5, pictures, to_uint8(cut(batch["image"])))
    found = {"images": pictures, "latents": _middle(program, z_0),
             "finite": jnp.isfinite(z_0).all((1, 2, 3)) & jnp.isfinite(x).all((1, 2, 3))}
    if program.frames:
        found["frames"] = jnp.moveaxis(jax.lax.map(lambda z: to_uint8(decode(z)), frames), 0, 1)
    return found


@functools.lru_cache(maxsize=16)
def compiled(program: Program) -> tuple[Callable, Callable]:
    """`start` and `draw`, on all local devices."""
    encoder = (program.models, program.coder_tile) if program.from_image else None
    whole = program.size == tuple(side * program.models.first_stage.factor for side in program.latent_shape[:2])
    return (_compiled_start(program.latent_shape, program.varied, encoder),
            parallel.pmap_draw(draw, donate=whole, program=program))


@functools.lru_cache(maxsize=16)
def _compiled_start(latent_shape: tuple[int, int, int], varied: bool, encoder: Any) -> Callable:
    return parallel.pmap_local(start, latent_shape=latent_shape, varied=varied, encoder=encoder)


def to_uint8(x: Array) -> Array:
    """`images.to_uint8` on the device."""
    return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)


# --- progress --------------------------------------------------------------------------------------------------------

_LISTENERS: list[Callable[[int], None]] = []


@contextlib.contextmanager
def listening(listener: Callable[[int], None]) -> Iterator[None]:
    """Within it, programs with `report` call ``listener(number)`` after each call of the network, 1, 2, .., on every
    device."""
    _LISTENERS.append(listener)
    try:
        yield
    finally:
        _LISTENERS.remove(listener)


def _report(number: Any) -> None:
    for listener in _LISTENERS:
        listener(int(number))


# --- parts -----------------------------------------------------------------------------------------------------------


def _denoise_fn(shared: Mapping[str, Any], batch: Mapping[str, Array], program: Program) -> samplers.DenoiseFn:
    params = shared["params"]
    unet = functools.partial(predict, program.models, params, tile=program.tile)
    spatial = _condition_map(params, batch, program)
    inputs = _tau(program.models, params, batch, program) | spatial
    denoise_fn = functools.partial(unet, inputs=inputs)
    options = {"rescale": shared["rescale"], "schedule": program.schedule} if program.guidance != "none" else {}
    if program.interval:
        options["interval"] = shared["interval"]
    if program.guidance == "classifier_free":
        null = dict(shared["null"]) | ({"tokens": batch["negative_tokens"]} if "negative_tokens" in batch else {})
        null_inputs = _tau(program.models, params, null, program) | spatial
        denoise_fn = guidance.classifier_free(
            unet, inputs, null_inputs, batch["guidance_scale"], two_passes=program.two_passes, **options)
    elif program.guidance == "weak":
        weak = shared["weak"]
        own = _tau(program.weak, weak, batch, program) | _condition_map(weak, batch, program, program.weak)
        weak_fn = functools.partial(predict, program.weak, weak, inputs=own, tile=program.tile)
        denoise_fn = guidance.autoguidance(denoise_fn, weak_fn, batch["guidance_scale"], **options)
    if program.upsample:
        def distance(z: Array) -> Array:  # paper, appendix C: |y - T(D(x0))|^2 / 2 with bicubic T
            x, small = _decoded(params, shared["scale_factor"], program, z), batch["small"]
            return jnp.sum((small - jax.image.resize(x, small.shape, "cubic")) ** 2, (1, 2, 3)) / 2

        denoise_fn = guidance.toward(
            denoise_fn, distance, shared["upsample_scale"], program.schedule, program.parameterization)
    if program.correction is not None:
        denoise_fn = guidance.corrected(
            denoise_fn, lambda eps, z_t, t: program.correction(eps, z_t, t, shared["correction"]), program.schedule,
            program.parameterization)
    return denoise_fn


def _kept(mask: Array, program: Program) -> Array:
    """(b, h, w, 1), 1 where no pixel of a latent's block is to be painted."""
    b, height, width, _ = mask.shape
    h, w = program.latent_shape[:2]
    blocks = mask.reshape(b, h, height // h, w, width // w, 1)
    return 1.0 - (blocks > 0.5).any((2, 4)).astype(jnp.float32)


def _quantized(shared: Mapping[str, Any], program: Program, z: Array) -> Array:
    scale, params = shared["scale_factor"], shared["params"]["first_stage"]
    return scale * program.models.first_stage.apply({"params": params}, z / scale, method="quantize")[0]


def _decoded(params: Any, scale_factor: Array, program: Program, z: Array) -> Array:
    """Pictures, cut to the program's size."""
    return _middle(program, _decode(params, z, scale_factor, models=program.models, tile=program.coder_tile))


def _middle(program: Program, x: Array) -> Array:
    """The middle of latents (b, h, w, c), or pictures of their size, that belongs to the program's `size`."""
    (h, w), factor = program.latent_shape[:2], program.models.first_stage.factor
    per = x.shape[1] // h  # pixels for each latent: 1 or `factor`
    tall, wide = (side // factor for side in program.size)
    top, left = ((whole - part) // 2 * per for whole, part in ((h, tall), (w, wide)))
    return x[:, top : top + tall * per, left : left + wide * per]


def predict(
    networks: models.Models, params: Any, z_t: Array, t: Array, inputs: Mapping[str, Any], tile: Tile | None = None
) -> Array:
    """The UNet's prediction, as a whole or in patches, each of which may have a context of its own: (b, p, t, d).
    `inputs`: the UNet's, and ``keys_and_values`` of the context, if they are there already."""
    variables = {"params": params["unet"], "context": inputs.get("keys_and_values", {})}
    inputs = {name: x for name, x in inputs.items() if name != "keys_and_values"}

    def predict_patch(joined: Array, *context: Array) -> Array:  # z_t and the map in its channels
        z, spatial = joined[..., : z_t.shape[-1]], joined[..., z_t.shape[-1] :]
        own = ({"concat": spatial} if "concat" in inputs else {}) | ({"context": context[0]} if context else {})
        return networks.unet.apply(variables, z, t, **{**inputs, **own}).astype(jnp.float32)

    joined = jnp.concatenate([z_t, inputs["concat"]], axis=-1) if "concat" in inputs else z_t
    if tile is None:
        return predict_patch(joined)
    of_patches = "context" in inputs and inputs["context"].ndim == 4
    each = (jnp.moveaxis(inputs["context"], 1, 0),) if of_patches else ()
    return tiles.tiled(predict_patch, joined, *tile[:2], each=each)


def in_compute_dtype(params: Any, networks: models.Models) -> dict:
    """The UNet's kernels in its compute type, because XLA does not move the cast out of a loop on every device."""
    def cast(path: Any, x: Array) -> Array:
        return x.astype(networks.unet.dtype) if path[-1].key == "kernel" else x  # norms are float32

    return {**params, "unet": jax.tree.map_with_path(cast, params["unet"])}


def _tau(networks: models.Models, params: Any, conditions: Mapping[str, Array], program: Program) -> dict[str, Any]:
    """`training.diffusion.condition`, and the keys and values of its context, once for all steps; of layouts (b, p, l),
    a context (b, p, t, d) alone."""
    tau = functools.partial(stage2.condition, networks, params, options=program.conditioning)
    if program.conditioning.crossattn != "layout" or conditions["layout"].ndim == 2:
        inputs = tau(conditions)
        if "context" in inputs:
            inputs["keys_and_values"] = layers.keys_and_values(
                params["unet"], inputs["context"], networks.unet.dtype)
        return inputs
    layout = conditions["layout"]
    inputs = tau({**conditions, "layout": layout.reshape(-1, layout.shape[-1])})
    return inputs | {"context": inputs["context"].reshape(*layout.shape[:2], *inputs["context"].shape[1:])}


def _condition_map(
    params: Any, batch: Mapping[str, Array], program: Program, networks: models.Models | None = None
) -> dict[str, Array]:
    """`training.diffusion.condition_map`, where the first stage encodes in patches if there are tiles."""
    networks = networks or program.models
    encode = functools.partial(_means, params, models=networks, tile=program.coder_tile)
    return stage2.condition_map(
        networks, params, params["first_stage"], batch, program.conditioning, encode=encode)


def _decode(
    params: Any, z: Array, scale_factor: Array, *, models: models.Models, tile: Tile | None = None
) -> Array:
    """Pictures of scaled latents, in patches where there are tiles."""
    def decode(z: Array, moments: Any) -> Array:
        variables = {"params": params["first_stage"], "moments": moments}
        return models.first_stage.apply(variables, z, method="decode").astype(jnp.float32)

    z = z / scale_factor
    if tile is None:
        return decode(z, {})
    return tiles.alike(decode, functools.partial(_moments, models, params, "decode"), z, tile.side, tile.overlap)


def _encode(
    params: Any, x: Array, scale_factor: Array, *, models: models.Models, tile: Tile | None = None
) -> Array:
    """Scaled latents of pictures, in patches where there are tiles."""
    return scale_factor * _means(params, x, models=models, tile=tile)


def _means(params: Any, x: Array, *, models: models.Models, tile: Tile | None) -> Array:
    """The means of unscaled latents."""
    def encode(x: Array, moments: Any) -> Array:
        return stage2.posterior(models, params["first_stage"], x, moments)[0]

    if tile is None:
        return encode(x, {})
    moments = functools.partial(_moments, models, params, "encode")
    return tiles.alike(encode, moments, x, tile.side * tile.factor, tile.overlap * tile.factor)


def _moments(networks: models.Models, params: Any, method: str, patch: Array) -> Any:
    """What the first stage's groups are normalized by in a patch: see `models.layers.GroupNorm`."""
    variables = {"params": params["first_stage"]}
    return networks.first_stage.apply(variables, patch, method=method, mutable=["moments"])[1].get("moments", {})


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
