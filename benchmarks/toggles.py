"""A training step with each of our speed-ups taken out, one at a time, in turn in one run.

    PYTHONPATH=. python benchmarks/toggles.py --config configs/ldm_unconditional.py:lsun_churches256 --narrow 64

Prints the step's seconds (the best and the median of all rounds) with everything, and how many times as long it takes
without each. States of all of them are kept, which is too much for the memory of a GPU at full width.
Each is compiled anew, which takes a minute or two for a UNet of 64 channels.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

from latent_diffusion import config as config_lib
from latent_diffusion import parallel
from latent_diffusion.benchmark import __main__ as benchmark
from latent_diffusion.benchmark import workloads
from latent_diffusion.models import attention, convolution, layers, perceptual, winograd
from latent_diffusion.training import autoencoder, diffusion


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


CACHE = "the cache of latents"  # without it, a step encodes its pictures
WITHOUT = {  # what is replaced: (where, name, by what)
    "nothing": [],
    "nothing (the same once more)": [],  # how large the noise is
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
    CACHE: [],
}


@contextlib.contextmanager
def replaced(patches: list) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for where, name, value in patches:
            stack.enter_context(mock.patch.object(where, name, value))
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--narrow", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    benchmark.FLAGS(["benchmark", f"--narrow={args.narrow}", f"--batch_size={args.batch_size}"])
    config, _ = benchmark.completed(config_lib.load(args.config))
    cached = benchmark.is_cached(config)
    names = [name for name in WITHOUT if cached or name != CACHE]

    running, times = {}, {name: [] for name in names}
    for name in tqdm(names, "compiling", leave=False):
        with replaced(WITHOUT[name]):
            jax.clear_caches()
            workload = workloads.train(config, args.batch_size, cached=cached and name != CACHE)
            call, _ = parallel.compile_ahead(workload.call, *workload.arguments)
        running[name] = (workload, call, [workload.arguments])
    for round_ in tqdm(range(args.rounds + 1), "rounds", leave=False):
        for name, (workload, call, arguments) in running.items():
            started = time.perf_counter()
            for _ in range(3):
                result = call(*arguments[0])
                arguments[0] = workload.following(arguments[0], result)
            jax.block_until_ready(result)
            if round_:
                times[name].append((time.perf_counter() - started) / 3)

    best, median = ({name: of(times[name]) for name in names} for of in (min, statistics.median))
    print(f"with everything: {best['nothing']:.3f} s (median: {median['nothing']:.3f})")
    for name in names[1:]:
        ratio, of_medians = best[name] / best["nothing"], median[name] / median["nothing"]
        print(f"without {name}: {ratio:.2f} times as long (medians: {of_medians:.2f})")


if __name__ == "__main__":
    main()
