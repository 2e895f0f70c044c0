"""Model FLOPs of a config's networks and steps, counted on the traced networks in float32; nothing is compiled."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from latent_diffusion import config as config_lib
from latent_diffusion import flops, models, request, sizes
from latent_diffusion.diffusion import grids, solvers
from latent_diffusion.models.perceptual import LPIPS
from latent_diffusion.training import autoencoder as stage1
from latent_diffusion.training import diffusion as stage2

TRAINED = 3  # a forward pass, and the gradients by its inputs and by its weights, each of which is as much work


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of one forward pass for one picture, of each network; and how many parameters of them are trained."""

    encoder: int
    decoder: int
    unet: int = 0
    conditioner: int = 0
    parameters: int = 0


def shapes_of(
    config: Any, number: int, *, cached: bool = False, compact: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of `number` examples as the data code makes it for `config`, compact or not; if cached, with
    ``latent_mean`` and ``latent_std`` instead of the picture."""
    size, channels = config.data.image_size, config.data.channels
    picture, moments = (jnp.uint8, jnp.float16) if compact else (jnp.float32, jnp.float32)
    shapes = {"index": ((), jnp.int32), "image": ((size, size, channels), picture)}
    if config.stage == "diffusion":
        options, side = config.conditioning, config.model.image_size
        low = size // options.low_res.factor
        every = {
            "tokens": ((options.text.max_length,), jnp.int32), "label": ((), jnp.int32),
            "layout": ((options.layout.max_length,), jnp.int32), "vectors": ((1, options.width), jnp.float32),
            "segmentation": ((size, size), jnp.int32), "low_res": ((low, low, channels), picture),
            "image": shapes["image"], "mask": ((size, size, 1), jnp.float32)}
        fields = (*request.condition_fields(config), *request.map_fields(config))
        shapes |= {name: every[name] for name in fields}
        if cached:
            latent = ((side, side, sizes.latent_channels(config)), moments)
            shapes |= {"latent_mean": latent, "latent_std": latent}
            if "image" not in fields:
                shapes.pop("image")
    return {name: jax.ShapeDtypeStruct((number, *shape), dtype) for name, (shape, dtype) in shapes.items()}


def of(config: Any) -> Work:
    """The work of the networks of a completed config (see `sizes.complete`)."""
    config = config_lib.from_json(config_lib.to_json(config)).unlock()
    config.model.update(dict(dtype="float32", remat="none"))
    if config.stage == "diffusion":
        config.first_stage.model.dtype = "float32"
    networks, batch = models.build(config), shapes_of(config, 1)
    first = networks.first_stage
    image = jax.ShapeDtypeStruct((1, config.data.image_size, config.data.image_size, config.data.channels), jnp.float32)
    weights = jax.eval_shape(lambda x: first_stage_params(networks, x), image)
    z = jax.eval_shape(lambda p, x: stage2.posterior(networks, p, x)[0], weights, image)
    encoder = flops.count(lambda p, x: stage2.posterior(networks, p, x), weights, image)
    decoder = flops.count(lambda p, z: first.apply({"params": p}, z, method="decode"), weights, z)
    if config.stage == "autoencoder":
        return Work(encoder, decoder, parameters=_size(weights))

    options = config.conditioning
    params = jax.eval_shape(lambda: stage2.create_state(
        jax.random.key(0), models=networks, tx=optax.identity(), config=config)).params
    whole = stage2.with_frozen(params, {"conditioner": jax.eval_shape(lambda: frozen_text(config, networks))})

    def condition(params: Any, batch: Any) -> Any:  # the encoder, which inpainting needs, is counted for itself
        return stage2.condition(networks, params, batch, options) | stage2.condition_map(
            networks, params, None, batch, options, encode=lambda x: jnp.zeros(z.shape))

    inputs = jax.eval_shape(condition, whole, batch)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    unet = flops.count(lambda p, z, t, inputs: networks.unet.apply({"params": p}, z, t, **inputs),
                       params["unet"], z, t, inputs)
    return Work(encoder, decoder, unet, flops.count(condition, whole, batch), _size(params))


def of_step(config: Any, work: Work, *, cached: bool) -> int:
    """FLOPs of a training step for one picture. What is frozen counts once, recomputation not at all."""
    if config.stage == "autoencoder":
        return _of_stage1_step(config, work)
    frozen = stage2.has_frozen_text(config.conditioning)
    encoded = (not cached) + (config.conditioning.concat == "inpainting")
    return TRAINED * work.unet + (1 if frozen else TRAINED) * work.conditioner + encoded * work.encoder


def _of_stage1_step(config: Any, work: Work) -> int:
    """The generator's pass, its reconstructions once more for the discriminator; LPIPS of both pictures with the
    gradient by one; of the discriminator a pass with the gradient by its input, and two of training."""
    options, size = config.training.loss, config.data.image_size
    image = jax.ShapeDtypeStruct((1, size, size, config.data.channels), jnp.float32)
    total, key = TRAINED * (work.encoder + work.decoder), jax.random.key(0)
    if options.perceptual != "none":
        lpips = LPIPS(net=options.perceptual)
        variables = jax.eval_shape(lpips.init, key, image, image)
        total += flops.count(lambda v, x, y: lpips.apply(v, x, y), variables, image, image) * 3 // 2
    if stage1.uses_discriminator(config):
        network = stage1.discriminator(config)
        network = network.clone(axis_name=None)
        variables = jax.eval_shape(lambda x: network.init(key, x, train=True), image)
        one = flops.count(lambda v, x: network.apply(v, x, train=False), variables, image)
        total += work.encoder + work.decoder + (2 + 2 * TRAINED) * one
    return total


def of_sample(config: Any, work: Work, *, calls: int, guided: bool) -> int:
    """FLOPs of one picture: `calls` of the UNet, twice if guided (all of them), its conditions and the decoder."""
    encoded = config.conditioning.concat == "inpainting"
    return (1 + guided) * calls * work.unet + work.conditioner + encoded * work.encoder + work.decoder


def calls_of(sampler: str, schedule: Any, steps: int, spacing: str) -> int:
    """How often a sampler calls the network."""
    method = solvers.METHODS[sampler]
    return len(method.calls(grids.make(sampler, schedule, steps, spacing), schedule.v_posterior, 0.0).at)


def first_stage_params(networks: models.Models, image: jax.Array) -> dict:
    """Random ones, {} of the identity."""
    return networks.first_stage.init(jax.random.key(0), image, None).get("params", {})


def frozen_text(config: Any, networks: models.Models) -> dict:
    """Random parameters of a frozen text encoder, as `training.text_encoder.copy_once` gives them; {} without one."""
    if not stage2.has_frozen_text(config.conditioning):
        return {}
    network = stage2.sequence_conditioner(networks)
    tokens = jnp.zeros((1, config.conditioning.text.max_length), jnp.int32)
    params = network.init(jax.random.key(0), tokens)["params"]
    return params if network is networks.conditioner else {"crossattn": params}


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
