"""What a model consists of: each network with its place in our tree, its place in the reference's state dict, and the
shapes of its parameters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from latent_diffusion import models
from latent_diffusion.errors import UserError
from latent_diffusion.interop import compvis_names as names
from latent_diffusion.models.perceptual import LPIPS
from latent_diffusion.training import autoencoder as stage1
from latent_diffusion.training import diffusion as stage2

SEQUENCE_NAMES = {"class": "class", "text": "text", "layout": "text"}


@dataclasses.dataclass(frozen=True)
class Part:
    """One network.

    where: the path of its parameters in our tree. network: which of `names.torch_name`. prefix: of its keys in the
    state dict. shapes: ``{path below where: ShapeDtypeStruct}``.
    """

    where: tuple[str, ...]
    network: str
    prefix: str
    shapes: dict[tuple[str, ...], jax.ShapeDtypeStruct]

    def key(self, path: tuple[str, ...]) -> str:
        """The name of a parameter in the state dict."""
        return self.prefix + names.torch_name(self.network, path)

    @property
    def size(self) -> int:
        """How many numbers its parameters are."""
        return sum(leaf.size for leaf in self.shapes.values())


def _flat(tree: Any) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    return traverse_util.flatten_dict(dict(tree))


def _init(module: Any, *args: Any, **kwargs: Any) -> Any:
    return jax.eval_shape(lambda key: module.init(key, *args, **kwargs), jax.random.key(0))


def _first_stage(config: Any, module: Any) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    side = module.factor
    return _flat(_init(module, jnp.zeros((1, side, side, config.in_channels)), None).get("params", {}))


def of_autoencoder(config: Any, *, loss: bool) -> list[Part]:
    """The parts of a model of stage 1; with `loss` also the discriminator, its statistics and LPIPS."""
    module = models.build_first_stage(config.model)
    parts = [Part(("autoencoder",), "first_stage", "", _first_stage(config.model, module))]
    if not loss:
        return parts
    options = config.training.loss
    x = jnp.zeros((1, 4 * 2**options.disc_layers, 4 * 2**options.disc_layers, config.data.channels))
    variables = _init(stage1.discriminator(config), x, train=False)
    network = "discriminator" if options.disc_norm == "batch" else "discriminator_actnorm"
    parts.append(Part(("discriminator",), network, "loss.discriminator.", _flat(variables["params"])))
    if network == "discriminator":
        parts.append(Part(("discriminator_stats",), network, "loss.discriminator.", _flat(variables["batch_stats"])))
    one = jnp.zeros((1, 32, 32, 3))
    parts.append(Part(("lpips",), "lpips", "loss.perceptual_loss.", _flat(_init(LPIPS(), one, one)["params"])))
    return parts


def of_diffusion(config: Any) -> list[Part]:
    """The parts of a model of stage 2: UNet, first stage, conditioner.

    Raises UserError for a conditioner of two, a sequence's and a map's, which the reference does not have.
    """
    networks = models.build(config)
    state = jax.eval_shape(lambda: stage2.create_state(
        jax.random.key(0), models=networks, tx=optax.identity(), config=config))
    parts = [Part(("unet",), "unet", "model.diffusion_model.", _flat(state.params["unet"]))]
    first = config.first_stage.model
    if first.kind != "identity":
        parts.append(Part(("first_stage",), "first_stage", "first_stage_model.",
                          _first_stage(first, networks.first_stage)))
    options = config.conditioning
    if options.concat == "segmentation" and networks.conditioner is not None and options.crossattn in SEQUENCE_NAMES:
        raise UserError(f"conditioning by {options.crossattn} and {options.concat} together has two conditioners, "
                        "where latent-diffusion has one")
    if stage2.has_frozen_text(options):
        tokens = jnp.zeros((1, options.text.max_length), jnp.int32)
        parts.append(Part(("conditioner",), "clip", "cond_stage_model.",
                          _flat(_init(networks.conditioner, tokens)["params"])))
    elif "conditioner" in state.params:
        network = SEQUENCE_NAMES.get(options.crossattn, "segmentation")
        parts.append(Part(("conditioner",), network, "cond_stage_model.", _flat(state.params["conditioner"])))
    return parts
