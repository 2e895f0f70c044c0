r"""Time of a training step, or of DDIM sampling, beside diffusers: equal UNets with shared weights, in turn in one run.

    PYTHONPATH=. python benchmarks/torch_peer.py --mode train --model churches --channels 96 --batch 4
    PYTHONPATH=. python benchmarks/torch_peer.py --mode sample --model cin --channels 192 --batch 2 --compile
    PYTHONPATH=. python benchmarks/torch_peer.py --mode train --model cin --channels 192 --size 64 --batch 64 \
        --bfloat16 --compile
    PYTHONPATH=. python benchmarks/torch_peer.py --mode sample --model cin --channels 192 --size 64 --batch 64 \
        --bfloat16 --compile

Needs requirements-parity.txt, or on a GPU diffusers and a torch for it. `churches` is the unconditional LDM-8 of
LSUN-churches, `cin` the class-conditional LDM-4 of ImageNet (cin256_v2), both with --channels instead of 192 channels.
A training step is noise, loss, gradients, AdamW (torch's fused one) and EMA, on latents. Theirs runs in PyTorch's eager
mode in both memory layouts, with --compile also compiled, where that works. Eager and compiled share weights, AdamW and
EMA, so that there are ours and two of theirs in memory. Prints how far the two predictions and the gradients are apart,
then the seconds of each way of each side in each round, and last the ratio ours / theirs for the best of their ways,
with its name. Compiling is done before and not counted.
"""

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory of the same GPU

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import traverse_util

from latent_diffusion import defaults, models, parallel, programs
from latent_diffusion.diffusion import samplers
from latent_diffusion.diffusion import schedule as schedule_lib
from latent_diffusion.interop import diffusers_names, diffusers_settings
from latent_diffusion.models import layers
from latent_diffusion.training import diffusion as stage2
from latent_diffusion.training import optimizer

CUDA = torch.cuda.is_available()
LAYOUTS = {"theirs": torch.contiguous_format, "theirs, channels_last": torch.channels_last}

MODELS = {
    "churches": dict(in_channels=4, out_channels=4, channel_mult=(1, 2, 2, 4, 4), attention_resolutions=(1, 2, 4, 8),
                     use_scale_shift_norm=True, resblock_updown=True, num_heads=-1, num_head_channels=32),
    "cin": dict(in_channels=3, out_channels=3, channel_mult=(1, 2, 3, 5), attention_resolutions=(8, 4, 2), num_heads=1,
                use_spatial_transformer=True, context_dim=512),
}


def make_config(name: str, channels: int, size: int, batch: int, dtype: str):
    config = defaults.diffusion()
    config.model.update(MODELS[name] | dict(model_channels=channels, image_size=size, dtype=dtype))
    config.optimizer.update(dict(learning_rate=1e-4, scale_lr=False))
    config.training.batch_size = batch
    config.conditioning.update(dict(crossattn="class" if config.model.context_dim else "none", num_classes=1000))
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
    return unet.eval().to("cuda" if CUDA else "cpu")


def autocast(config, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.model.dtype == "bfloat16")


def their_sampler(unet, config, z_T: torch.Tensor, extra: dict[str, torch.Tensor], steps: int) -> Callable:
    """Takes the function to call: `unet`, or that compiled."""
    scheduler = diffusers.DDIMScheduler.from_config(diffusers_settings.scheduler_config(config))

    @torch.inference_mode()
    def run(predict: Callable) -> np.ndarray:
        scheduler.set_timesteps(steps)
        z = z_T
        with autocast(config, z.device):  # around all steps, so that eager mode casts the weights once
            for t in scheduler.timesteps:
                z = scheduler.step(predict(z, t, **extra).sample.float(), t, z, eta=0.0).prev_sample
        return z.cpu().numpy().transpose(0, 2, 3, 1)

    return run


def their_trainer(unet, config, z_0: torch.Tensor, extra: dict[str, torch.Tensor], steps: int) -> Callable:
    """Takes the function to call: `unet`, or that compiled."""
    scheduler = diffusers.DDPMScheduler.from_config(diffusers_settings.scheduler_config(config))
    options, parameters = config.optimizer, [*unet.parameters()]
    averaged, classes = [*parameters], torch.nn.Embedding(1001, 512).to(z_0.device)
    label = torch.arange(len(z_0), device=z_0.device)
    parameters += classes.parameters() if extra else []
    adamw = torch.optim.AdamW(parameters, lr=options.learning_rate, betas=(options.b1, options.b2), eps=options.eps,
                              weight_decay=options.weight_decay, fused=True)
    averages = [p.detach().clone() for p in averaged]

    def run(predict: Callable) -> None:
        for _ in range(steps):
            eps, t = torch.randn_like(z_0), torch.randint(config.diffusion.timesteps, z_0.shape[:1], device=z_0.device)
            z_t = scheduler.add_noise(z_0, eps, t)
            with autocast(config, z_0.device):
                given = {name: classes(label)[:, None] for name in extra}
                prediction = predict(z_t, t, **given).sample
            loss = torch.nn.functional.mse_loss(prediction.float(), eps)
            adamw.zero_grad(set_to_none=True)
            loss.backward()
            adamw.step()
            with torch.no_grad():
                torch._foreach_lerp_(averages, averaged, 1 - config.ema.decay)
        loss.item()

    return run


def our_trainer(networks, config, params, z_0: jax.Array, extra: dict[str, jax.Array], steps: int) -> Callable:
    schedule, tx = schedule_lib.from_config(config.diffusion), optimizer.create(config)
    step = parallel.pmap_step(stage2.train_step, models=networks, schedule=schedule, tx=tx, config=config)
    state = jax.jit(lambda: stage2.create_state(jax.random.key(0), models=networks, tx=tx, config=config))()
    state = [parallel.replicate(state.replace(params=state.params | {"unet": params}, ema_params={
        "unet": jax.tree.map(np.array, params)}))]
    batch = {"latent_mean": z_0, "latent_std": np.zeros_like(z_0), "index": np.arange(len(z_0), dtype=np.int32)}
    batch = parallel.shard(batch | ({"label": np.arange(len(z_0), dtype=np.int32)} if extra else {}))
    frozen = parallel.replicate({"first_stage": {}, "null": {"label": np.int32(1000)}, "conditioner": {}})

    def run() -> None:
        for _ in range(steps):
            state[0], metrics = step(state[0], frozen, batch, jax.random.key(0))
        float(metrics["loss"])

    return run


def our_sampler(networks, config, params, z_T: jax.Array, extra: dict[str, jax.Array], steps: int) -> Callable:
    schedule = schedule_lib.from_config(config.diffusion)

    @jax.jit
    def sample(params, z_T, extra):  # as `programs.draw` does: what is equal in all steps comes first
        params, inputs = programs.in_compute_dtype({"unet": params}, networks), dict(extra)
        if extra:
            inputs["keys_and_values"] = layers.keys_and_values(params["unet"], extra["context"], networks.unet.dtype)
        denoise = functools.partial(programs.predict, networks, params, inputs=inputs)
        return samplers.sample(denoise, schedule, jax.random.key(0), z_T.shape, steps=steps, z_T=z_T)

    params = jax.device_put(params)
    return lambda: np.asarray(sample(params, z_T, extra))


def seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def check(networks, params, theirs, inputs: dict[str, jax.Array], theirs_inputs: dict[str, Any], loose: bool) -> None:
    """Predictions, and the gradient of their mean square, are the same."""
    def loss(params):
        prediction = networks.unet.apply({"params": params}, **inputs)
        return jnp.mean(prediction**2), prediction

    (_, here), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    there = theirs(**theirs_inputs).sample
    there.square().mean().backward()
    norms = [float(jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradients)))),
             float(torch.sqrt(sum((p.grad**2).sum() for p in theirs.parameters())))]
    there = there.detach().cpu().numpy().transpose(0, 2, 3, 1)
    apart = np.abs(here - there).max() / np.abs(there).max()
    print(f"predictions: std {there.std():.3f}, apart by at most {apart:.1e} of the largest; norms of the gradients: "
          f"{norms[0]:.6g} and {norms[1]:.6g}")
    assert apart < (3e-2 if loose else 1e-4) and abs(norms[0] / norms[1] - 1) < (3e-2 if loose else 1e-3)
    theirs.zero_grad(set_to_none=True)


def compare(ways: dict[str, Callable], rounds: int) -> None:
    """Times all in turn and prints it. What torch cannot compile is left out."""
    times = {}
    for name, run in ways.items():
        try:
            print(f"{name}: first call {seconds(run):.1f} s", flush=True)
            times[name] = []
        except RuntimeError as error:
            if "compiled" not in name:
                raise
            print(f"{name}: left out, {(str(error).strip() or repr(error)).splitlines()[0]}", flush=True)
    for _ in range(rounds):
        for name, measured in times.items():
            measured.append(seconds(ways[name]))
    best, median = ({name: of(measured) for name, measured in times.items()} for of in (min, statistics.median))
    for name, measured in times.items():
        print(f"{name}: {' '.join(f'{x:.2f}' for x in measured)} s, median {median[name]:.2f}")
    theirs = min(best.keys() - {"ours"}, key=best.get)
    print(f"ratio ours / the best of theirs ({theirs}): {best['ours'] / best[theirs]:.2f}, of the medians "
          f"{median['ours'] / median[theirs]:.2f} ({os.cpu_count()} CPUs, torch threads {torch.get_num_threads()})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("train", "sample"), default="sample")
    parser.add_argument("--model", choices=MODELS, default="churches")
    parser.add_argument("--channels", type=int, default=96, help="of the first level")
    parser.add_argument("--size", type=int, default=32, help="side of the latents")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=None, help="of DDIM (50), or of training in each round (5)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="also diffusers with torch.compile")
    parser.add_argument("--bfloat16", action="store_true", help="compute in it; torch by autocast")
    args = parser.parse_args()
    steps = args.steps or {"train": 5, "sample": 50}[args.mode]

    dtype = "bfloat16" if args.bfloat16 else "float32"
    config, rng = make_config(args.model, args.channels, args.size, args.batch, dtype), np.random.default_rng(0)
    networks = models.build(config)
    z = jnp.asarray(rng.normal(size=(args.batch, args.size, args.size, config.model.in_channels)), jnp.float32)
    extra = {}
    if config.model.context_dim:
        extra["context"] = jnp.asarray(rng.normal(size=(args.batch, 1, config.model.context_dim)), jnp.float32)
    inputs = dict(z_t=z, t=jnp.full(args.batch, 500, jnp.int32)) | extra
    params = jax.device_put(make_params(networks.unet, inputs, seed=1))
    device = "cuda" if CUDA else "cpu"
    z_theirs = torch.tensor(np.array(z)).permute(0, 3, 1, 2).contiguous().to(device)
    extra_theirs = {"encoder_hidden_states": torch.tensor(np.array(extra["context"])).to(device)} if extra else {}
    check(networks, params, their_unet(config, params), inputs, dict(sample=z_theirs, timestep=500) | extra_theirs,
          args.bfloat16)

    our_way, their_way = {"train": (our_trainer, their_trainer), "sample": (our_sampler, their_sampler)}[args.mode]
    ways = {"ours": our_way(networks, config, params, z, extra, steps)}
    for name, layout in LAYOUTS.items():
        unet = their_unet(config, params).to(memory_format=layout)
        run = their_way(unet, config, z_theirs.to(memory_format=layout), extra_theirs, steps)
        ways[name] = functools.partial(run, unet)
        if args.compile:
            ways[f"{name}, compiled"] = functools.partial(run, torch.compile(unet))
    compare(ways, args.rounds)


if __name__ == "__main__":
    main()
