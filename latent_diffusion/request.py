"""What is asked of a model when it is sampled, checked against its config before anything is loaded or compiled."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from latent_diffusion import conditions as conditions_lib
from latent_diffusion.diffusion import samplers
from latent_diffusion.errors import UserError, choose

Labels = int | str | Sequence[int | str] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Settings:
    """How pictures are drawn; see `pipeline.LatentDiffusion.sample`. Not `guided`: without the unconditional pass."""

    sampler: str
    steps: int
    guidance_scale: float
    guided: bool
    eta: float
    seed: int
    size: tuple[int, int]  # height, width in pixels


def resolve_settings(
    config: Any,
    *,
    sampler: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    eta: float | None = None,
    seed: int = 0,
    size: tuple[int, int] | None = None,
) -> Settings:
    """Fills in what is not given from ``config.sampling`` and checks it, before anything is compiled.

    Raises:
      UserError: an unknown sampler, impossible numbers, a size that the networks do not divide (with the nearest one
        that they do), or guidance by a model that was never trained without its condition.
    """
    options = config.sampling
    guided = guidance_scale is not None or options.guidance_scale != 1.0
    sampler = options.sampler if sampler is None else sampler
    steps = options.steps if steps is None else steps
    scale = float(options.guidance_scale if guidance_scale is None else guidance_scale)
    eta = float(options.eta if eta is None else eta)
    choose(samplers.METHODS, sampler, "sampler")
    total = config.diffusion.timesteps
    if not 1 <= steps <= total:
        raise UserError(f"steps={steps} must lie between 1 and {total}, the number of steps the model was trained with")
    if not math.isfinite(scale):
        raise UserError(f"guidance_scale={scale} must be a finite number")
    if not (math.isfinite(eta) and eta >= 0):
        raise UserError(f"eta={eta} must be a finite number, 0 or above")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} must lie between 0 and {2**32 - 1}")
    fields = condition_fields(config)
    if fields and scale != 1 and not all(_null_is_trained(config, name) for name in fields):
        raise UserError(f"guidance_scale={scale:g}, but this model was trained without conditioning dropout and "
                        "cannot be guided; use guidance_scale 1")
    return Settings(sampler, int(steps), scale, guided and bool(fields), eta, int(seed), _check_size(config, size))


def _check_size(config: Any, size: tuple[int, int] | None) -> tuple[int, int]:
    size = size or (config.data.image_size,) * 2
    first = config.first_stage.model
    factor = 1 if first.kind == "identity" else 2 ** (len(first.ch_mult) - 1)
    down = 2 ** (len(config.model.channel_mult) - 1)
    multiple = factor * down
    if any(side <= 0 or side % multiple for side in size):
        nearest = ",".join(str(max(1, round(side / multiple)) * multiple) for side in size)
        raise UserError(f"size={','.join(map(str, size))}: height and width must be multiples of {multiple} "
                        f"({factor} of the first stage x {down} of the UNet); the nearest size is {nearest}")
    return int(size[0]), int(size[1])


def condition_fields(config: Any) -> tuple[str, ...]:
    """Which conditions the model takes: "tokens" (text), "label" (a class), both or none."""
    options = config.conditioning
    label = options.label or options.crossattn == "class"
    return (("tokens",) if options.crossattn == "text" else ()) + (("label",) if label else ())


def _null_is_trained(config: Any, name: str) -> bool:
    options = config.conditioning
    return options.dropout > 0 or {"tokens": options.text_dropout, "label": options.label_dropout}[name] > 0


def resolve_conditions(
    config: Any,
    prompts: str | Sequence[str] | None,
    labels: Labels | None,
    label_names: Sequence[str] = (),
) -> tuple[list[str] | None, list[int] | None]:
    """Checks prompts and labels against the model; if both are given they become equally long (one may be single).

    Raises:
      UserError: a condition that this model does not take, or needs and did not get; an empty prompt; an unknown label;
        prompts and labels of different number.
    """
    fields, classes = condition_fields(config), config.conditioning.num_classes
    if prompts is not None:
        if "tokens" not in fields:
            raise UserError("this model takes no text; sample it without prompts"
                            + (", with labels" if "label" in fields else ""))
        prompts = conditions_lib.check_prompts([prompts] if isinstance(prompts, str) else list(prompts))
    if labels is not None:
        if "label" not in fields:
            raise UserError("this model has no classes; sample it without labels"
                            + (", with prompts" if "tokens" in fields else ""))
        names = (*label_names, *map(str, range(len(label_names), classes)))
        labels = [labels] if isinstance(labels, int | str | np.integer) else list(labels)
        labels = [number for label in labels for number in _label_numbers(str(label), names)]
        if not labels:
            raise UserError("no label given; leave labels out or name at least one")
    for name, given in (("tokens", prompts), ("label", labels)):
        if name in fields and given is None and not _null_is_trained(config, name):
            kind = "prompts" if name == "tokens" else "labels"
            raise UserError(f"this model cannot do without {kind}: it was trained without conditioning dropout")
    if prompts and labels:
        number = max(len(prompts), len(labels))
        if {len(prompts), len(labels)} - {1, number}:
            raise UserError(f"{len(prompts)} prompts and {len(labels)} labels: give as many of both, or one of either")
        prompts, labels = ((x * number)[:number] for x in (prompts, labels))
    return prompts, labels


def _label_numbers(label: str, names: Sequence[str]) -> list[int]:
    """One label, or several with commas between them; but there are names that have commas."""
    exact = [i for i, name in enumerate(names) if name.lower() == label.strip().lower()]
    return exact[:1] or conditions_lib.parse_labels(label, names).tolist()


# --- reading a workdir -----------------------------------------------------------------------------------------------


def absolute(path: epath.PathLike) -> epath.Path:
    """The path with ~ expanded, unless it is a bucket's."""
    return epath.Path(path) if "://" in str(path) else epath.Path(path).expanduser()


def read_config(workdir: epath.PathLike) -> Any:
    """The config of a stage-2 workdir; reads nothing else.

    Raises:
      UserError: no such workdir, no or an unreadable config.json, or a run of stage 1.
    """
    from latent_diffusion import config as config_lib  # needs ml_collections, which nothing else here does

    path = absolute(workdir)
    if not path.exists():
        raise UserError(f"workdir {path} does not exist")
    saved = path / "config.json"
    if not saved.exists():
        raise UserError(f"{path} is not a workdir of a training run: it has no config.json")
    try:
        config = config_lib.from_json(saved.read_text())
        stage = config.stage
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise UserError(f"{saved} cannot be read: {error}") from error
    if stage != "diffusion":
        raise UserError(f"workdir {path} holds an autoencoder (stage 1); give the workdir of a stage-2 run")
    return config


def read_label_names(workdir: epath.PathLike) -> tuple[str, ...]:
    """The class names of a workdir, () if it has none."""
    path = absolute(workdir) / "labels.txt"
    return conditions_lib.load_labels(path) if path.exists() else ()
