"""What calling a compiled step costs the host, by the number of arrays in its state, with one process and with two.

    PYTHONPATH=. python benchmarks/dispatch.py --arrays 2800

Each process has one CPU device. The step adds 1 to a state of so many arrays of 8 numbers, which is no work, and gives
the state away, as training does. Three ways: pmap as `parallel.pmap_step` uses it, which with several processes is its
compiled program on arrays of all processes; the pmapped function itself, on arrays of this process; and
`jit(shard_map)`. Prints microseconds of host time for a call, the median of 50.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from latent_diffusion import parallel


def add_one(state: Any, frozen: Any, batch: Any, rng: Any) -> tuple[Any, Any]:
    total = parallel.mean_over_devices(batch["x"].sum())
    return jax.tree.map(lambda x: x + total, state), {"total": total}


def ways(arrays: int) -> dict[str, tuple[Callable, Any, Any]]:
    """Name: (step of a state and a batch, state, batch)."""
    many = {f"array{i}": np.zeros(8, np.float32) for i in range(arrays)}
    step, batch = parallel.pmap_step(add_one), {"x": np.ones(1, np.float32)}

    plain = jax.pmap(lambda state, batch: add_one(state, {}, batch, None)[0], axis_name=parallel.AXIS,
                     in_axes=(None, 0), out_axes=None, donate_argnums=0)

    def pmapped(state: Any, batch: Any) -> Any:
        return step(state, {}, batch, None)[0]

    mesh = Mesh(np.array(jax.devices()), (parallel.AXIS,))
    everywhere, split = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec(parallel.AXIS)))
    mapped = jax.jit(jax.shard_map(
        lambda state, batch: add_one(state, {}, batch, None)[0], mesh=mesh, in_specs=(PartitionSpec(), split.spec),
        out_specs=PartitionSpec(), check_vma=False), donate_argnums=0)
    global_batch = jax.make_array_from_process_local_data(split, batch["x"])
    return {
        "pmap_step": (pmapped, parallel.replicate(many), parallel.shard(batch)),
        "pmap": (plain, parallel.replicate(many), parallel.shard(batch)),
        "jit(shard_map)": (mapped, jax.device_put(many, everywhere), {"x": global_batch}),
    }


def measure(arrays: int, calls: int = 50) -> None:
    for name, (step, state, batch) in ways(arrays).items():
        times = []
        for _ in range(calls + 5):
            started = time.perf_counter()
            state = step(state, batch)
            times.append(time.perf_counter() - started)
            jax.block_until_ready(state)
        if parallel.is_first_process():
            print(f"{jax.process_count()} process(es), {arrays} arrays, {name}: "
                  f"{1e6 * statistics.median(times[5:]):.0f} us", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arrays", type=int, default=2800)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # whatever else there is, and whatever the environment says
    jax.config.update("jax_num_cpu_devices", 1)
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        parallel.initialize()
        measure(args.arrays)
        return
    measure(args.arrays)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = [subprocess.Popen([sys.executable, __file__, "--arrays", str(args.arrays)], env=os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i)})
        for i in range(2)]
    sys.exit(max(process.wait() for process in both))


if __name__ == "__main__":
    main()
