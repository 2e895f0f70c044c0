"""The frozen text encoder, CLIP's: its weights are copied into the workdir once and never updated."""

from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from latent_diffusion import checkpoint, models, weights
from latent_diffusion.errors import UserError
from latent_diffusion.training import diffusion as stage2

NAME = "text_encoder"


def check(config: Any, workdir: epath.Path) -> None:
    """Raises UserError if the config asks for a frozen text encoder whose weights are nowhere."""
    if stage2.has_frozen_text(config.conditioning) and not config.conditioning.text.weights and (
            not checkpoint.has_frozen(workdir, name=NAME)):
        raise UserError("conditioning.text.kind=clip is not trained here: give its weights, a file of "
                        "CLIP's text encoder or of Stable Diffusion v1, with --config.conditioning.text.weights=FILE")


def copy_once(config: Any, networks: models.Models, workdir: epath.Path) -> dict[str, Any]:
    """The frozen part of the conditioner's parameters from this workdir, into which it is copied from
    ``conditioning.text.weights`` once; {} where everything is trained.

    Raises:
      UserError: no such file, or not one with this encoder's weights.
    """
    options = config.conditioning
    if not stage2.has_frozen_text(options):
        return {}
    if not checkpoint.has_frozen(workdir, name=NAME):
        tokens = jnp.zeros((1, options.text.max_length), jnp.int32)
        shapes = jax.eval_shape(stage2.sequence_conditioner(networks).init, jax.random.key(0), tokens)["params"]
        source = checkpoint.absolute(options.text.weights)
        if checkpoint.has_frozen(source, name=NAME):  # a workdir that has a copy
            checkpoint.save_frozen(workdir, *checkpoint.load_frozen(source, name=NAME), name=NAME)
            return read(config, networks, workdir)
        tree = weights.load_clip_text(options.text.weights, shapes)
        checkpoint.save_frozen(workdir, tree, {"source": source, "digest": checkpoint.digest(tree)}, name=NAME)
    return read(config, networks, workdir)


def read(config: Any, networks: models.Models, workdir: epath.Path) -> dict[str, Any]:
    """What `copy_once` wrote."""
    if not stage2.has_frozen_text(config.conditioning):
        return {}
    tree, _ = checkpoint.load_frozen(workdir, name=NAME)
    return tree if stage2.sequence_conditioner(networks) is networks.conditioner else {"crossattn": tree}
