"""The first stage as stage 2 sees it: found in its own run, copied into the workdir once, scaled, and cached."""

import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from latent_diffusion import checkpoint, models, parallel, sizes
from latent_diffusion import config as config_lib
from latent_diffusion.data import latents as latents_cache
from latent_diffusion.data import loader
from latent_diffusion.errors import UserError
from latent_diffusion.training import diffusion as stage2
from latent_diffusion.training.batch import as_floats

SCALE_FACTOR_BATCHES = 8  # batches on which 1/std of the latents is measured


def complete_config(config: Any, workdir: epath.Path) -> None:
    """Stage 2: fills `first_stage.model` from the stage-1 run (or from this workdir's own copy), and the sizes of the
    UNet's input that follow from it where they are 0.

    Raises:
      UserError: no such stage-1 workdir, not an autoencoder's, or without a complete checkpoint.
    """
    if config.stage != "diffusion":
        return
    first = config.first_stage
    if checkpoint.has_frozen(workdir):
        _, metadata = checkpoint.load_frozen(workdir)
        origins = (metadata["source"], metadata.get("by_way_of"))
        of_another = first.workdir and checkpoint.absolute(first.workdir) not in origins
        if of_another and checkpoint.latest_step(workdir) is None:
            raise UserError(f"--workdir {workdir} holds a copy of another first stage, {metadata['source']}; nothing "
                            "else has been saved there, so the folder may be removed")
        first.model = config_lib.from_json(metadata["config"]).model
        if of_another:
            logging.warning("this run goes on with its own copy of the first stage, from %s, step %d; "
                            "first_stage.workdir=%s is not read", metadata["source"], metadata["step"], first.workdir)
    elif first.workdir:
        first.model = read_config(first.workdir).model
    elif first.model.kind != "identity":
        how = f" (python train.py --config {first.config} --workdir DIR)" if first.config else ""
        raise UserError(f"first_stage.workdir is empty: train an autoencoder first{how}, then give its workdir with "
                        "--config.first_stage.workdir=DIR")
    sizes.complete(config)


def read_config(workdir: str) -> Any:
    """The config of a stage-1 workdir that has a complete checkpoint, or of the first stage that a stage-2 workdir has
    a copy of; else `UserError`."""
    saved = epath.Path(checkpoint.absolute(workdir)) / "config.json"
    if not saved.parent.exists():
        raise UserError(f"first_stage.workdir={workdir} does not exist; train an autoencoder there first")
    if not saved.exists():
        raise UserError(f"first_stage.workdir={workdir} is not a workdir of a training run: it has no config.json")
    config = read_saved(saved)
    if config.stage == "diffusion" and checkpoint.has_frozen(saved.parent):
        return config_lib.from_json(checkpoint.load_frozen(saved.parent)[1]["config"])
    if config.stage != "autoencoder":
        raise UserError(f"first_stage.workdir={workdir} holds a run of stage {config.stage!r}, not an autoencoder")
    step = checkpoint.latest_step(saved.parent)
    if step is None:
        raise UserError(f"first_stage.workdir={workdir} has no complete checkpoint yet; let stage 1 reach one")
    if step < config.training.num_steps and not (saved.parent / checkpoint.IMPORTED).exists():
        logging.warning("first_stage.workdir=%s stopped at step %d of %d; using step %d", workdir, step,
                        config.training.num_steps, step)
    return config


def read_saved(file: epath.Path) -> Any:
    """The config in a config.json; an unreadable one is a `UserError`."""
    try:
        config = config_lib.from_json(file.read_text())
        if config.stage not in config_lib.STAGE_CHOICES:
            raise ValueError(f"stage {config.stage!r}")
        return config
    except (json.JSONDecodeError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{file} cannot be read as a config ({error}); it is damaged, or not a workdir's") from error


def copy_once(config: Any, workdir: epath.Path) -> tuple[Any, Mapping[str, Any]]:
    """The first stage's parameters (averaged ones, if stage 1 has them) from this workdir, into which they are copied
    from stage 1's once.

    Returns:
      (tree, metadata): the parameters, and where they came from: source, step, digest, config. Both empty for the
      identity.
    """
    if config.first_stage.model.kind == "identity":
        return {}, {}
    if not checkpoint.has_frozen(workdir):
        source = checkpoint.absolute(config.first_stage.workdir)
        if checkpoint.has_frozen(source):  # a stage-2 workdir has it already
            tree, metadata = checkpoint.load_frozen(source)
            checkpoint.save_frozen(workdir, tree, metadata | {"by_way_of": source})
            return copy_once(config, workdir)
        trees, _, step = checkpoint.load(source, ("params", "ema"))
        saved = epath.Path(source) / "config.json"
        tree = {"autoencoder": stage2.sampling_params(trees["params"], trees["ema"])["autoencoder"]}
        checkpoint.save_frozen(workdir, tree, {
            "source": source, "step": step, "digest": checkpoint.digest(tree), "config": saved.read_text()})
    tree, metadata = checkpoint.load_frozen(workdir)
    return tree["autoencoder"], metadata


def measure_scale_factor(config: Any, networks: models.Models, frozen: dict, stream: Iterator[dict]) -> float:
    """1 / std of the latents over the first batches of all devices, posterior samples included; or the config's."""
    if config.first_stage.scale_factor > 0:
        return config.first_stage.scale_factor
    moments = parallel.pmap_evaluate(stage2.latent_moments, models=networks)
    key, sums = jax.random.key(config.seed), {}
    for _ in range(SCALE_FACTOR_BATCHES):
        part = jax.device_get(moments({}, frozen, parallel.shard(next(stream)), key))
        sums = {name: sums.get(name, 0.0) + float(value) for name, value in part.items()}
    mean = sums["sum"] / sums["count"]
    variance = (sums["square"] - sums["count"] * mean**2) / (sums["count"] - 1)  # unbiased, as torch.std
    return float(1.0 / np.sqrt(variance))


def cached_sources(
    config: Any, networks: models.Models, frozen: dict, splits: Mapping[str, Any], fields: tuple[str, ...]
) -> dict[str, Any]:
    """The sets as latents in ``first_stage.cache``, into which they are encoded unless they are there already.

    Args:
      splits: ``{"train": source, "eval": source}`` of the images.
      fields: what the cache keeps beside the latents: "label", "caption".

    Returns:
      The same dict, of sources of latents.
    """
    encode = parallel.pmap_local(lambda params, batch: stage2.posterior(networks, params, as_floats(batch)["image"]))

    def encode_batch(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return parallel.gather(encode(frozen["first_stage"], parallel.shard({"image": image})))

    processes = dict(process_index=jax.process_index(), process_count=jax.process_count())
    opened = {}
    for split, source in splits.items():
        folder = epath.Path(checkpoint.absolute(config.first_stage.cache)) / split
        identity = cache_identity(config, frozen, source)
        if not latents_cache.is_complete(folder):
            stream = loader.batches(config, {"train": "train_once"}.get(split, split), fields=("image", *fields),
                                    source=source, compact=True, **processes)
            latents_cache.write_cache(folder, stream, encode_batch, identity, flips=config.data.flip,
                                      barrier=parallel.barrier, **processes)
        opened[split] = latents_cache.open_cache(folder, expected=identity)
    return opened


def cache_identity(config: Any, frozen: dict, source: Any) -> dict[str, Any]:
    """What a latents cache was made of; a cache with anything else is refused, naming the key."""
    data = {f"data.{key}": config.data[key] for key in (
        "source", "name", "path", "image_size", "channels", "split", "eval_split", "image_key", "label_key",
        "caption_key", "styles", "groups", "skin_tones", "duplicates", "style_prefix", "holdout", "crop", "background",
        "on_corrupt", "num_examples")}
    return {"digest": checkpoint.digest(parallel.to_host(frozen["first_stage"])), **data,
            "label_names": list(source.label_names), "images": len(source.source)}
