r"""A training step, or sampling, with each of our speed-ups taken out, one at a time, in turn in one run.

    PYTHONPATH=. python benchmarks/toggles.py --config configs/ldm_unconditional.py:lsun_churches256 --narrow 64
    PYTHONPATH=. python benchmarks/toggles.py --mode sample --config configs/ldm_class.py:cin256_v2 --narrow 64 \
        --dtype bfloat16 --steps 20

Prints the seconds of a step, or of sampling a batch (the best and the median of all rounds) with everything, and how
many times as long it takes without each. Each training step gets its batch from the host, as in training. What does not
concern a config is left out: the cache where it can have none, keys and values without a context, kernels in float32.
States of all of them are kept, which is too much for the memory of a GPU at full width.
Each is compiled anew, which takes a minute or two for a UNet of 64 channels.
"""

import argparse
import collections
import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

from latent_diffusion import config as config_lib
from latent_diffusion import parallel, programs
from latent_diffusion.benchmark import __main__ as benchmark
from latent_diffusion.benchmark import workloads
from latent_diffusion.models import attention, convolution, layers, perceptual, winograd
from latent_diffusion.training import autoencoder, diffusion, loop


def always_mean(tree):
    return jax.lax.pmean(tree, parallel.AXIS)


def plain_product(x, kernel, dimension_numbers=None, precision=None, **options):
    return jnp.dot(x, kernel, precision=precision, **options)


def flax_norm(groups, epsilon, dtype, name=None):
    return nn.GroupNorm(groups, epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def without_products(x, kernel, strides, padding, **options):
    if winograd.pays(x, kernel, strides, padding):
        return winograd.winograd(x, kernel)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)


def not_donated(step, **static):
    return parallel._pmap(step, static, (None, None, 0, None), out_axes=(None, None))


def float_inputs(config, batch_size, *, cached=False, compact=False, make=workloads.inputs):
    return make(config, batch_size, cached=cached)


CACHE = "the cache of latents"  # without it, a step encodes its pictures
AHEAD = "running one step ahead"  # without it, the host waits for each step
KEYS = "keys and values before the loop"
KERNELS = "kernels in bfloat16 before the loop"
NOTHING = {"nothing": [], "nothing (the same once more)": []}  # how large the noise is
TRAINING = {  # what is replaced: (where, name, by what)
    "Winograd's convolutions": [(winograd, "pays", lambda *arguments: False)],
    "the gradient of attention head by head": [(attention, "LARGE", 2**62)],
    "products on two axes": [(module, "multiply", plain_product) for module in (layers, convolution, winograd)],
    "products for 1x1 kernels and small pictures": [(module, "convolve", without_products)
                                                    for module in (layers, perceptual)],
    "patches of pictures up to 8x8": [(convolution, "MOST_PIXELS", 0)],
    "GroupNorm's own order of sums": [(layers, "GroupNorm", flax_norm)],
    "the barrier before the gradients' norm": [(module, "gradient_norm", optax.tree.norm)
                                               for module in (autoencoder, diffusion)],
    "leaving out the mean over one device": [(module, "mean_over_devices", always_mean)
                                             for module in (autoencoder, diffusion)],
    "bytes and float16 from the host": [(workloads, "inputs", float_inputs)],
    "donating the state": [(parallel, "pmap_step", not_donated)],
    AHEAD: [],
    CACHE: [],
}
SAMPLING = {
    KEYS: [(layers, "keys_and_values", lambda params, context, dtype: {})],
    KERNELS: [(programs, "in_compute_dtype", lambda params, networks: params)],
}
WITHOUT = {"train": NOTHING | TRAINING, "sample": NOTHING | SAMPLING}


@contextlib.contextmanager
def replaced(patches: list) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for where, name, value in patches:
            stack.enter_context(mock.patch.object(where, name, value))
        yield


def concerns(config: Any, name: str) -> bool:
    if name == CACHE:
        return benchmark.is_cached(config)
    if name == KEYS:
        return config.conditioning.crossattn != "none"
    return name != KERNELS or config.model.dtype == "bfloat16"


def workload_of(config: Any, mode: str, cached: bool) -> workloads.Workload:
    if mode == "sample":
        programs.compiled.cache_clear()  # it remembers functions that have been traced
        return benchmark.workload(config, None)
    workload = workloads.train(config, config.training.batch_size, cached=cached)
    batch = workloads.inputs(config, config.training.batch_size, cached=cached, compact=True)
    return workloads.on_data(workload, itertools.repeat(batch))


def seconds(workload: workloads.Workload, call: Callable, arguments: list[tuple], most: int) -> float:
    """Of each of three calls, of which at most `most` are under way at once. Replaces the arguments by the next."""
    started, under_way = time.perf_counter(), collections.deque()
    for _ in range(3):
        result = call(*arguments[0])
        arguments[0] = workload.following(arguments[0], result)
        under_way.append(workload.watched(result))
        if len(under_way) == most:
            jax.block_until_ready(under_way.popleft())
    jax.block_until_ready([*under_way])
    return (time.perf_counter() - started) / 3


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--mode", choices=WITHOUT, default="train")
    parser.add_argument("--narrow", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the config's")
    parser.add_argument("--steps", type=int, help="of the sampler; default: the config's")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    flags = {"mode": args.mode, "narrow": args.narrow, "batch_size": args.batch_size, "dtype": args.dtype,
             "steps": args.steps}
    benchmark.FLAGS(["benchmark", *(f"--{name}={value}" for name, value in flags.items() if value is not None)])
    return args


def main() -> None:
    args = parse()
    config, _ = benchmark.completed(config_lib.load(args.config))
    if args.mode == "sample" and config.stage == "autoencoder":
        raise SystemExit("--mode sample needs a config of stage 2")
    names = [name for name in WITHOUT[args.mode] if concerns(config, name)]

    running, times = {}, {name: [] for name in names}
    for name in tqdm(names, "compiling", leave=False):
        with replaced(WITHOUT[args.mode][name]):
            jax.clear_caches()
            workload = workload_of(config, args.mode, benchmark.is_cached(config) and name != CACHE)
            call, _ = parallel.compile_ahead(workload.call, *workload.arguments)
        most = 1 if name == AHEAD else loop.MAX_STEPS_IN_FLIGHT
        running[name] = (workload, call, [workload.arguments], most)
    for round_ in tqdm(range(args.rounds + 1), "rounds", leave=False):
        for name in names:
            measured = seconds(*running[name])
            if round_:  # the first is to warm up
                times[name].append(measured)

    best, median = ({name: of(times[name]) for name in names} for of in (min, statistics.median))
    print(f"with everything: {best['nothing']:.3f} s (median: {median['nothing']:.3f})")
    for name in names[1:]:
        ratio, of_medians = best[name] / best["nothing"], median[name] / median["nothing"]
        print(f"without {name}: {ratio:.2f} times as long (medians: {of_medians:.2f})")


if __name__ == "__main__":
    main()
