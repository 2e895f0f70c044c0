"""Time of DDIM sampling beside diffusers: equal UNets with shared weights, in turn in one process.

    python benchmarks/torch_sampling.py --model churches --steps 50 --batch 4

Needs requirements-parity.txt. `churches` is the unconditional LDM-8 of LSUN-churches, `cin` the class-conditional LDM-4
of ImageNet (cin256_v2), both with --channels instead of 192 channels. Prints how far the two predictions are apart,
then the seconds of each way of each side in each round, and last the ratio of the best times, ours / theirs. Compiling
is done before and not counted.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import traverse_util

from latent_diffusion import defaults, models
from latent_diffusion.diffusion import samplers
from latent_diffusion.diffusion import schedule as schedule_lib
from latent_diffusion.interop import diffusers_names, diffusers_settings

MODELS = {
    "churches": dict(in_channels=4, out_channels=4, channel_mult=(1, 2, 2, 4, 4), attention_resolutions=(1, 2, 4, 8),
                     use_scale_shift_norm=True, resblock_updown=True, num_heads=-1, num_head_channels=32),
    "cin": dict(in_channels=3, out_channels=3, channel_mult=(1, 2, 3, 5), attention_resolutions=(8, 4, 2), num_heads=1,
                use_spatial_transformer=True, context_dim=512),
}


def make_config(name: str, channels: int, size: int):
    config = defaults.diffusion()
    config.model.update(MODELS[name] | dict(model_channels=channels, image_size=size))
    config.conditioning.crossattn = "vectors" if config.model.context_dim else "none"
    return config


def make_params(unet, inputs: dict[str, jax.Array], seed: int):
    """Random, also where a new network has zeros."""
    shapes = jax.eval_shape(lambda key: unet.init(key, **inputs), jax.random.key(0))["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        size = 0.05 if len(leaf.shape) < 2 else np.prod(leaf.shape[:-1]) ** -0.5
        return np.float32((path[-1].key == "scale") + size * rng.normal(size=leaf.shape))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def their_unet(config, params) -> torch.nn.Module:
    given = diffusers_settings.unet_config(config)
    unet = getattr(diffusers, given["_class_name"]).from_config(given)
    state = {}
    for path, value in traverse_util.flatten_dict(params).items():
        heads = 1
        if "qkv" in path:
            heads, _ = models.build(config).unet.head_layout(value.shape[-1] // 3)
        keys = diffusers_names.unet(path, config.model)
        values = diffusers_names.to_theirs(path, value, heads, config.model.use_new_attention_order, "unet")
        state |= {key: torch.tensor(np.array(part)) for key, part in zip(keys, values, strict=True)}
    unet.load_state_dict(state)
    return unet.eval()


def their_sampler(unet, config, z_T: torch.Tensor, extra: dict[str, torch.Tensor], steps: int) -> Callable[[], None]:
    scheduler = diffusers.DDIMScheduler.from_config(diffusers_settings.scheduler_config(config))

    @torch.inference_mode()
    def run() -> np.ndarray:
        scheduler.set_timesteps(steps)
        z = z_T
        for t in scheduler.timesteps:
            z = scheduler.step(unet(z, t, **extra).sample, t, z, eta=0.0).prev_sample
        return z.numpy().transpose(0, 2, 3, 1)

    return run


def our_sampler(unet, config, params, z_T: jax.Array, extra: dict[str, jax.Array], steps: int) -> Callable[[], None]:
    schedule = schedule_lib.from_config(config.diffusion)

    @jax.jit
    def sample(params, z_T, extra):
        def denoise(z_t, t):
            return unet.apply({"params": params}, z_t, t, **extra)

        return samplers.sample(denoise, schedule, jax.random.key(0), z_T.shape, steps=steps, z_T=z_T)

    params = jax.device_put(params)
    return lambda: np.asarray(sample(params, z_T, extra))


def seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="churches")
    parser.add_argument("--channels", type=int, default=96, help="of the first level")
    parser.add_argument("--size", type=int, default=32, help="side of the latents")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="also diffusers with torch.compile")
    args = parser.parse_args()

    config = make_config(args.model, args.channels, args.size)
    ours, rng = models.build(config).unet, np.random.default_rng(0)
    z = jnp.asarray(rng.normal(size=(args.batch, args.size, args.size, config.model.in_channels)), jnp.float32)
    extra = {}
    if config.model.context_dim:
        extra["context"] = jnp.asarray(rng.normal(size=(args.batch, 1, config.model.context_dim)), jnp.float32)
    params = make_params(ours, dict(z_t=z, t=jnp.zeros(args.batch, jnp.int32)) | extra, seed=1)
    theirs = their_unet(config, params)
    z_theirs = torch.tensor(np.array(z)).permute(0, 3, 1, 2).contiguous()
    extra_theirs = {"encoder_hidden_states": torch.tensor(np.array(extra["context"]))} if extra else {}

    t = jnp.full(args.batch, 500, jnp.int32)
    here = jax.jit(lambda params: ours.apply({"params": params}, z, t, **extra))(params)
    with torch.inference_mode():
        there = theirs(z_theirs, 500, **extra_theirs).sample.numpy().transpose(0, 2, 3, 1)
    apart = np.abs(here - there).max()
    print(f"predictions: std {there.std():.3f}, apart by at most {apart:.1e}")
    assert apart < 1e-4 * max(1.0, np.abs(there).max())

    last = their_unet(config, params).to(memory_format=torch.channels_last)
    z_last = z_theirs.to(memory_format=torch.channels_last)
    ways = {
        "ours": our_sampler(ours, config, params, z, extra, args.steps),
        "theirs": their_sampler(theirs, config, z_theirs, extra_theirs, args.steps),
        "theirs, channels_last": their_sampler(last, config, z_last, extra_theirs, args.steps)}
    if args.compile:
        ways["theirs, compiled"] = their_sampler(torch.compile(theirs), config, z_theirs, extra_theirs, args.steps)
        ways["theirs, channels_last, compiled"] = their_sampler(
            torch.compile(last), config, z_last, extra_theirs, args.steps)
    for name, run in ways.items():
        print(f"{name}: first call {seconds(run):.1f} s", flush=True)
    times = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, run in ways.items():
            times[name].append(seconds(run))
    for name, measured in times.items():
        print(f"{name}: {' '.join(f'{x:.2f}' for x in measured)} s, median {statistics.median(measured):.2f}")
    best = {name: min(measured) for name, measured in times.items()}
    their_best = min((name for name in best if name != "ours"), key=best.get)
    print(f"ratio ours / {their_best}: {best['ours'] / best[their_best]:.2f} "
          f"({os.cpu_count()} CPUs, torch threads {torch.get_num_threads()})")


if __name__ == "__main__":
    main()
