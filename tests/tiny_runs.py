"""Tiny runs of both stages: configs, states and steps, for the tests of training. As a program, ``python tiny_runs.py
FILE RUN...`` writes the parameters after a few steps of some runs on however many devices and processes there are."""

import functools
import pathlib
import sys

import jax
import numpy as np
import program_files

from latent_diffusion import models, parallel
from latent_diffusion.diffusion import schedule as schedule_lib
from latent_diffusion.training import autoencoder as stage1
from latent_diffusion.training import diffusion as stage2
from latent_diffusion.training import optimizer

ROOT = pathlib.Path(__file__).parent.parent
BATCH, SIZE = 8, 16


def get_config(name: str, argument: str):
    return program_files.load(f"configs/{name}.py").get_config(argument)


def autoencoder_config(kind: str = "kl", **loss):
    """Stage 1 with plain SGD, so that a step's change of the parameters is its gradient."""
    config = get_config(f"autoencoder_{kind}", "smoke")
    with config.unlocked():
        config.data.image_size = SIZE
        config.model.num_res_blocks = 0  # one in each level of the decoder all the same
        config.optimizer.update(dict(name="sgd", learning_rate=1e-4, scale_lr=False))
        config.training.loss.update({"disc_start": 0, **loss})
    return config


def diffusion_config(**sections):
    """Stage 2, text and class, with plain SGD, on latents of the stage-1 config."""
    config = get_config("ldm_text", "smoke")
    with config.unlocked():
        config.data.image_size = SIZE
        config.first_stage.model.update(autoencoder_config().model)
        config.model.update(dict(image_size=SIZE // 2, in_channels=3, out_channels=3, channel_mult=(1,),
                                 num_res_blocks=0, attention_resolutions=(1,)))
        config.conditioning.update(dict(label=True, num_classes=5))
        config.conditioning.text.vocab_size = 50
        config.optimizer.update(dict(name="sgd", learning_rate=0.1, scale_lr=False, warmup_steps=0))
        for section, values in sections.items():
            config[section].update(values)
    return config


def image_batch(batch: int = BATCH) -> dict[str, np.ndarray]:
    """Compact, as the loader sends it."""
    rng = np.random.default_rng(0)
    return {"image": rng.integers(256, size=(batch, SIZE, SIZE, 3), dtype=np.uint8),
            "index": np.arange(100, 100 + batch, dtype=np.int32)}


def latent_batch(batch: int = BATCH) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shape = (batch, SIZE // 2, SIZE // 2, 3)
    return {"latent_mean": rng.standard_normal(shape).astype(np.float16),
            "latent_std": rng.uniform(0.1, 0.2, shape).astype(np.float16),
            "tokens": rng.integers(4, 50, (batch, 8)).astype(np.int32),
            "label": rng.integers(0, 5, batch).astype(np.int32),
            "index": np.arange(100, 100 + batch, dtype=np.int32)}


NULL = {"tokens": np.array([2, 3, 0, 0, 0, 0, 0, 0], np.int32), "label": np.array(5, np.int32)}


@functools.cache
def _networks(json: str):
    from latent_diffusion import config as config_lib
    return models.build(config_lib.from_json(json))


def networks(config) -> models.Models:
    from latent_diffusion import config as config_lib
    return _networks(config_lib.to_json(config))


def autoencoder_run(config, batch=None):
    """(first state, pmapped step) of stage 1."""
    tx = (optimizer.create(config), optimizer.create(config))
    static = dict(models=networks(config), tx=tx, config=config)
    sharded = parallel.shard(of_this_process(image_batch() if batch is None else batch))
    state, _ = parallel.pmap_step(stage1.create_state, **static)(None, {}, sharded, jax.random.key(0))
    return state, parallel.pmap_step(stage1.train_step, schedule=None, **static)


def of_this_process(batch):
    """Its part of a batch of all."""
    each = len(batch["index"]) // jax.process_count()
    return {name: x[jax.process_index() * each:][:each] for name, x in batch.items()}


def random_state(config):
    """A first state of stage 2 with every parameter random: nothing is hidden by a zero-initialized layer, and nothing
    has to be compiled for it."""
    tx, rng = optimizer.create(config), np.random.default_rng(3)
    shapes = jax.eval_shape(
        functools.partial(stage2.create_state, models=networks(config), tx=tx, config=config), jax.random.key(0))

    def draw(path, leaf):
        return (path[-1].key == "scale") + 0.1 * rng.standard_normal(leaf.shape, np.float32)

    params = jax.tree_util.tree_map_with_path(draw, dict(shapes.params))
    if "logvar" in params:
        params["logvar"] = np.full(shapes.params["logvar"].shape, config.diffusion.logvar_init, np.float32)
    ema_params = jax.tree.map(np.copy, stage2.averaged_subset(params, config)) if config.ema.decay > 0 else {}
    return shapes.replace(step=np.zeros((), np.int32), params=params, ema_params=ema_params,
                          opt_state=tx.init(params), scale_factor=np.ones((), np.float32))


def diffusion_run(config):
    """(first state, pmapped step) of stage 2."""
    static = dict(models=networks(config), tx=optimizer.create(config), config=config)
    schedule = schedule_lib.from_config(config.diffusion)
    return parallel.replicate(random_state(config)), parallel.pmap_step(stage2.train_step, schedule=schedule, **static)


def advance(state, step, batch, frozen, steps: int):
    """State and list of metrics after some steps on one batch."""
    frozen, sharded, metrics = parallel.replicate(frozen), parallel.shard(of_this_process(batch)), []
    for _ in range(steps):
        state, values = step(state, frozen, sharded, jax.random.key(7))
        metrics.append(jax.device_get(jax.block_until_ready(values)))
    return state, metrics


RUNS = {
    "kl": lambda steps: advance(*autoencoder_run(autoencoder_config()), image_batch(), {}, steps),
    "actnorm": lambda steps: advance(
        *autoencoder_run(autoencoder_config(disc_norm="actnorm")), image_batch(), {}, steps),
    "ldm": lambda steps: advance(*diffusion_run(diffusion_config()), latent_batch(), {"null": NULL}, steps)}


def run_both_stages(names=tuple(RUNS), steps: int = 2) -> dict[str, tuple]:
    """State and metrics after a few steps of both stages, by name."""
    return {name: RUNS[name](steps) for name in names}


def arrays(runs: dict[str, tuple]) -> dict[str, np.ndarray]:
    """Every parameter and loss of `run_both_stages`, by name."""
    found = {}
    for name, (state, metrics) in runs.items():
        for path, leaf in jax.tree.leaves_with_path(parallel.to_host(state)):
            found[name + jax.tree_util.keystr(path)] = leaf
        found |= {f"{name}.metrics.{key}": np.array([m[key] for m in metrics]) for key in metrics[0]}
    return found


def sum_of_means(shared, batch):
    return batch["x"] + sum(x.mean() for x in jax.tree.leaves(shared["params"]))


if __name__ == "__main__":
    parallel.initialize()
    runs = run_both_stages(sys.argv[2:] or RUNS)
    found = arrays(runs)
    if jax.process_count() > 1:  # what a step returned serves functions of one process
        zeros = parallel.shard({"x": np.zeros(jax.local_device_count(), np.float32)})
        shared = {"params": parallel.of_this_process(runs["ldm"][0].params)}
        found["local"] = parallel.gather(parallel.pmap_local(sum_of_means)(shared, zeros))
    np.savez(sys.argv[1], devices=jax.device_count(), **found)
