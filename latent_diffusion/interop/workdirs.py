"""Models of others as workdirs, as if they had been trained here, and back."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from latent_diffusion import checkpoint, conditions, defaults, models
from latent_diffusion import config as config_lib
from latent_diffusion.errors import UserError
from latent_diffusion.interop.compvis import Component, Imported
from latent_diffusion.training import diffusion as stage2
from latent_diffusion.training import text_encoder


def write(
    imported: Imported, workdir: epath.PathLike, *, source: str, step: int = 0,
    tokenizer: conditions.Tokenizer | None = None,
) -> None:
    """Writes a workdir: the config, one checkpoint with the weights (as trained, and averages), the frozen first stage
    and text encoder, the tokenizer.

    Args:
      imported: from `compvis.read_model` or `diffusers.read_model`.
      workdir: an empty or new folder, or a bucket's.
      source: where the weights came from, kept beside them.
      step: how long they were trained; the number of the checkpoint.
      tokenizer: of a text model.

    Raises:
      UserError: a workdir that holds something, a text model without tokenizer, or one that does not fit.
    """
    workdir, config = epath.Path(workdir), imported.config
    check(config, workdir, tokenizer)
    workdir.mkdir(parents=True, exist_ok=True)
    params, metadata = dict(imported.params), {"step": step, "stage": config.stage, "data": {"next_index": step}}
    if config.stage == "diffusion":
        metadata["scale_factor"] = config.first_stage.scale_factor
        _write_frozen(config, params, workdir, source, step)
    trained = ("unet", "conditioner", "autoencoder", "logvar")
    items = {"params": {name: params[name] for name in trained if name in params}, "ema": imported.ema_params}
    if "discriminator" in params:
        items["discriminator"] = {"params": params["discriminator"], "stats": params.get("discriminator_stats", {})}
    with checkpoint.open_manager(workdir) as manager:
        checkpoint.save(manager, step, items, metadata | {"config": config_lib.to_json(config)})
        manager.wait_until_finished()
    if tokenizer is not None:
        tokenizer.save(workdir)
    rows = [dataclasses.asdict(row) for row in imported.report]
    (workdir / checkpoint.IMPORTED).write_text(json.dumps({"source": source, "step": step, "report": rows}, indent=1))
    (workdir / "config.json").write_text(config_lib.to_json(config))


def check(
    config: ConfigDict, workdir: epath.PathLike, tokenizer: conditions.Tokenizer | None, *, measured: bool = True
) -> None:
    """The errors of `write` that can be told before any weights are read; not `measured`: the weights tell how many
    tokens there are."""
    workdir = epath.Path(workdir)
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise UserError(f"--workdir {workdir} is not empty; give another")
    text = config.conditioning.get("crossattn") == "text"
    if tokenizer is not None and not text:
        raise UserError("--vocab is given, but this model takes no text")
    if text and tokenizer is None:
        kind = "a folder with vocab.json and merges.txt, or bpe_simple_vocab_16e6.txt.gz" if (
            config.conditioning.text.kind == "clip") else "bert-base-uncased's vocab.txt"
        raise UserError(f"a text model needs its tokenizer: give {kind} with --vocab")
    if text and measured and tokenizer.size != config.conditioning.text.vocab_size:
        raise UserError(f"--vocab has {tokenizer.size} entries, but the model's text encoder has "
                        f"{config.conditioning.text.vocab_size}")


def _write_frozen(config: ConfigDict, params: dict[str, Any], workdir: epath.Path, source: str, step: int) -> None:
    """Moves what is never trained out of `params` into the workdir."""
    first_stage = params.pop("first_stage", None)
    if first_stage is not None:
        stage1 = defaults.autoencoder()
        stage1.model.update(config.first_stage.model.to_dict())
        stage1.data.update(dict(image_size=config.data.image_size, channels=config.data.channels))
        tree = {"autoencoder": first_stage}
        checkpoint.save_frozen(workdir, tree, {"source": source, "step": step, "digest": checkpoint.digest(tree),
                                               "config": config_lib.to_json(stage1)})
    if stage2.has_frozen_text(config.conditioning):
        tree = params.pop("conditioner")
        checkpoint.save_frozen(workdir, tree, {"source": source, "digest": checkpoint.digest(tree)},
                               name=text_encoder.NAME)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a workdir holds: its config with the scale factor filled in, the parameters as `compvis.export_model` takes
    them, the averages, the step, and the tokenizer of a text model."""

    config: ConfigDict
    params: Mapping[str, Any]
    ema_params: Mapping[str, Any]
    step: int
    tokenizer: conditions.Tokenizer | None = None


def read(workdir: epath.PathLike, step: int | None = None) -> Trained:
    """Reads a workdir of either stage, trained here or imported. Raises UserError where there is none."""
    workdir = epath.Path(workdir).expanduser()
    if not (workdir / "config.json").exists():
        raise UserError(f"--workdir {workdir} is not a workdir of a training run: it has no config.json")
    config = config_lib.from_json((workdir / "config.json").read_text())
    trees, metadata, step = checkpoint.load(workdir, ("params", "ema"), step)
    params = dict(trees["params"])
    if config.stage == "autoencoder":
        params |= _discriminator(workdir, step)
    if config.stage == "diffusion":
        with config.unlocked():
            measured = not config.first_stage.scale_factor
            config.first_stage.scale_by_std = bool(config.first_stage.scale_by_std or measured)
            config.first_stage.scale_factor = float(np.float32(metadata["scale_factor"]))
        if config.first_stage.model.kind != "identity":
            params["first_stage"] = checkpoint.load_frozen(workdir)[0]["autoencoder"]
        frozen = text_encoder.read(config, models.build(config), workdir)
        params = stage2.with_frozen(params, {"conditioner": frozen}) | {
            name: params[name] for name in ("first_stage", "logvar") if name in params}
    text = config.conditioning.text.kind if config.conditioning.get("crossattn") == "text" else None
    return Trained(config, params, trees["ema"], step, text and conditions.saved_tokenizer(workdir, text))


def _discriminator(workdir: epath.Path, step: int) -> dict[str, Any]:
    """The discriminator and its statistics, of an imported first stage or of one that was trained here; {} without."""
    if "discriminator" in checkpoint.item_names(workdir, step):
        found = checkpoint.load(workdir, ("discriminator",), step)[0]["discriminator"]
        params, stats = found["params"], found.get("stats", {})
    else:
        rest = checkpoint.load(workdir, ("optimizer",), step)[0]["optimizer"]
        params, stats = rest.get("disc_params", {}).get("discriminator", {}), rest.get("disc_stats", {})
    stats = {name: values for name, values in stats.items() if "mean" in values}  # ActNorm has none
    return ({"discriminator": params} if params else {}) | ({"discriminator_stats": stats} if params and stats else {})


def components(params: Mapping[str, Any], target: str) -> list[Component]:
    """Rows on what is written where."""
    return [Component(name, sum(x.size for x in jax.tree.leaves(tree)), target) for name, tree in params.items()]
