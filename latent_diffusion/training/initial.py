"""A run that begins with the weights of another one: fine-tuning."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util

from latent_diffusion import checkpoint
from latent_diffusion.errors import UserError
from latent_diffusion.training import diffusion as stage2
from latent_diffusion.training import first_stage


@dataclasses.dataclass(frozen=True)
class Beginning:
    """params: by names with "/", without those that begin at random. scale_factor: of stage 2, else None."""

    params: Mapping[str, np.ndarray]
    scale_factor: float | None

    def put_into(self, state: Any) -> Any:
        """A first state, on the host, with these parameters, and with averages (if it has any) equal to them."""
        flat = traverse_util.flatten_dict(dict(state.params), sep="/")
        params = traverse_util.unflatten_dict({**flat, **self.params}, sep="/")
        averages = {name: jax.tree.map(np.array, params[name]) for name in state.ema_params}
        return state.replace(params=params, ema_params=averages)


def load(config: Any, workdir: epath.Path, shapes: Any) -> Beginning | None:
    """The parameters of ``training.initial``, averages where that has any; None for a run without, or that goes on.

    Args:
      workdir: of the run.
      shapes: of its state.

    Raises:
      UserError: no such workdir, one of the other stage, or parameters that it lacks or that have another shape there
        and are not in ``training.initial_skip``.
    """
    given = config.training.initial
    if not given or checkpoint.latest_step(workdir) is not None:
        return None
    source = checkpoint.absolute(given)
    saved = epath.Path(source) / "config.json"
    if not saved.exists():
        raise UserError(f"training.initial={given} is not a workdir: it has no config.json")
    stage = first_stage.read_saved(saved).stage
    if stage != config.stage:
        raise UserError(f"training.initial={given} holds stage {stage!r}, this is {config.stage!r}")
    trees, metadata, _ = checkpoint.load(source, ("params", "ema"))
    found = traverse_util.flatten_dict(stage2.sampling_params(trees["params"], trees["ema"]), sep="/")
    params, wanted = {}, traverse_util.flatten_dict(dict(shapes.params), sep="/")
    skipped = {skip: [name for name in wanted if f"{name}/".startswith(f"{skip}/")]
               for skip in config.training.initial_skip}
    if unknown := [skip for skip, matching in skipped.items() if not matching]:
        raise UserError(f"training.initial_skip: this model has no parameters {unknown[0]!r}; choose from "
                        f"{', '.join(sorted({name.split('/')[0] for name in wanted}))} and what is in them")
    for name, leaf in wanted.items():
        if any(name in matching for matching in skipped.values()):
            continue
        there = found[name].shape if name in found else None
        if there != leaf.shape:
            what = "lacks" if there is None else f"has the shape {list(there)} of"
            raise UserError(f"training.initial={given} {what} {name}, which is {list(leaf.shape)} here; use its config "
                            "(configs/finetune.py), or begin this at random with "
                            f"training.initial_skip=\"('{name}',)\"")
        params[name] = found[name].astype(leaf.dtype)
    return Beginning(params, metadata.get("scale_factor"))
