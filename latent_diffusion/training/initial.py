"""A run that begins with the weights of another one: fine-tuning."""

from typing import Any

import numpy as np
from etils import epath
from flax import traverse_util

from latent_diffusion import checkpoint
from latent_diffusion.errors import UserError
from latent_diffusion.training import diffusion as stage2
from latent_diffusion.training import first_stage


def load(config: Any, state: Any) -> tuple[Any, dict[str, Any]]:
    """The first state of a run with the parameters of ``training.initial``: averages, where that has any.

    Args:
      state: at step 0, on the host, of either stage.

    Returns:
      (state, metadata): the state, with averages (if it has any) equal to the parameters, and what that run's
      checkpoint says of itself.

    Raises:
      UserError: no such workdir, one of the other stage, or parameters that it lacks or that have another shape there
      and
        are not in ``training.initial_skip``.
    """
    source = first_stage.absolute(config.training.initial)
    saved = epath.Path(source) / "config.json"
    if not saved.exists():
        raise UserError(f"training.initial={config.training.initial} is not a workdir: it has no config.json")
    stage = first_stage.read_saved(saved).stage
    if stage != config.stage:
        raise UserError(f"training.initial={config.training.initial} holds stage {stage!r}, this is {config.stage!r}")
    trees, metadata, _ = checkpoint.load(source, ("params", "ema"))
    found = traverse_util.flatten_dict(stage2.sampling_params(trees["params"], trees["ema"]), sep="/")
    params = {}
    for name, leaf in traverse_util.flatten_dict(dict(state.params), sep="/").items():
        if any(name == skip or name.startswith(f"{skip}/") for skip in config.training.initial_skip):
            params[name] = leaf
            continue
        there = found[name].shape if name in found else None
        if there != leaf.shape:
            what = "lacks" if there is None else f"has the shape {list(there)} of"
            raise UserError(f"training.initial={config.training.initial} {what} {name}, which is {list(leaf.shape)} "
                            "here; use its config (configs/finetune.py), or begin this at random with "
                            f"training.initial_skip=\"('{name}',)\"")
        params[name] = found[name].astype(leaf.dtype)
    tree = traverse_util.unflatten_dict(params, sep="/")
    averages = {name: traverse_util.unflatten_dict({
        path: np.array(x) for path, x in traverse_util.flatten_dict(tree[name]).items()}) for name in state.ema_params}
    return state.replace(params=tree, ema_params=averages), metadata
