"""Devices and processes. The only file that names pmap, so that `jit(shard_map)` would be a change of this file.

The state is held *without* a leading device axis: one replicated array per leaf, ``in_axes=None``, ``out_axes=None``.
Compared with the stacked form it saves the stacking at start, is what orbax and the sampling code read as it is, and
needs no un-replication; `replicate` puts a fresh state on all local devices first, without which donation fails in
multi-process runs. A step must average what it returns (`mean_over_devices`): pmap does not check it, a test does.

With several processes, the arrays of a state that a step returns are those of all processes, and the step is pmap's
compiled program. The pmapped function itself would turn each array of this process into one of all and back, which
costs the host 14 to 26 us for each of the 2,800 arrays of a state (docs/scaling.md).
"""

import functools
import math
import os
import re
import resource
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from latent_diffusion.errors import UserError

AXIS = "batch"
COMPILE_CACHE = "~/.cache/latent_diffusion/jax"


def initialize(coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Starts `jax.distributed` when configured, by arguments or by ``JAX_COORDINATOR_ADDRESS``, or on a TPU pod.

    Must run before any other JAX call. Does nothing on a single machine.

    Raises:
      UserError: a part of the description of the processes is missing.
    """
    if jax.distributed.is_initialized():
        return
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    if coordinator:
        num_processes = num_processes or _number("JAX_NUM_PROCESSES", 0)
        process_id = process_id if process_id >= 0 else _number("JAX_PROCESS_ID", -1)
        if num_processes < 1 or not 0 <= process_id < num_processes or ":" not in coordinator:
            raise UserError(f"coordinator={coordinator!r} (HOST:PORT), num_processes={num_processes} and "
                            f"process_id={process_id} (0 .. num_processes - 1) must be given together")
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif num_processes > 1 or process_id > 0:
        raise UserError("several processes need a coordinator: HOST:PORT of process 0")
    elif _on_tpu_pod():
        jax.distributed.initialize()


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{variable}={text!r} is not a number") from None


def _on_tpu_pod() -> bool:
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES") or os.environ.get("TPU_PROCESS_ADDRESSES") or ""
    on_tpu_vm = find_spec("libtpu") is not None and any(map(os.path.exists, ("/dev/accel0", "/dev/vfio/0")))
    return len(hosts.split(",")) > 1 or on_tpu_vm


def keep_compiled() -> None:
    """Compiled programs are kept in `COMPILE_CACHE` for the next run, unless JAX_COMPILATION_CACHE_DIR in the
    environment says where else; set it empty for no cache."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(COMPILE_CACHE))


def is_first_process() -> bool:
    """Whether this process writes pictures, logs and configs."""
    return jax.process_index() == 0


@functools.cache
def _here(*axes: str) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec(*axes))


@functools.cache
def _everywhere(*axes: str) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()), (AXIS,)), PartitionSpec(*axes))


def replicate(tree: Any) -> Any:
    """Puts one copy of every leaf on every local device, as the steps expect their state."""
    return jax.device_put(tree, _here())


def of_this_process(tree: Any) -> Any:
    """The same memory, with what a step returned as arrays of this process's devices, for what works on these alone."""
    def seen(x: jax.Array) -> jax.Array:
        if x.is_fully_addressable:
            return x
        return jax.make_array_from_single_device_arrays(x.shape, _here(), [s.data for s in x.addressable_shards])

    return jax.tree.map(seen, tree)


def _of_all_processes(tree: Any, *axes: str) -> Any:
    """The same memory as arrays of all processes: replicated, or with a leading axis of devices, `AXIS`."""
    def seen(x: jax.Array) -> jax.Array:
        if not x.is_fully_addressable:
            return x
        shape = (x.shape[0] * jax.process_count(), *x.shape[1:]) if axes else x.shape
        return jax.make_array_from_single_device_arrays(
            shape, _everywhere(*axes), [s.data for s in x.addressable_shards])

    return jax.tree.map(seen, tree)


def shard(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Cuts a per-process batch (b, ...) into (local devices, b / local devices, ...) and sends it to the devices."""
    devices = jax.local_device_count()
    cut = {name: x.reshape(devices, x.shape[0] // devices, *x.shape[1:]) for name, x in batch.items()}
    return jax.device_put(cut, _here(AXIS))


def to_host(tree: Any) -> Any:
    """Numpy copies of the first local replica of each leaf; no collective."""
    def first_replica(x: Any) -> np.ndarray:
        return np.asarray(x.addressable_data(0) if isinstance(x, jax.Array) else x)
    return jax.tree.map(first_replica, tree)


def mean_over_devices(tree: Any) -> Any:
    """Mean over all devices of all processes, inside a step. Nothing is done on a single device, where copying the
    gradients of a large model takes a fifth of a step on a CPU."""
    return tree if jax.lax.axis_size(AXIS) == 1 else jax.lax.pmean(tree, AXIS)


def sum_over_devices(tree: Any) -> Any:
    """Sum over all devices of all processes, inside a step."""
    return jax.lax.psum(tree, AXIS)


def pmap_step(step: Callable, **static: Any) -> Callable:
    """``step(state, frozen, batch, rng, **static)`` on all devices: state, frozen weights and key replicated, batch
    sharded, the state donated. The step returns ``(state, metrics)``, equal on every device.
    """
    call = _pmap(step, static, (None, None, 0, None), out_axes=(None, None), donate_argnums=(0,))
    return call if jax.process_count() == 1 else _compiled_at_first_call(call)


def _compiled_at_first_call(call: Callable) -> Callable:
    """A `pmap_step`, for arguments of one structure, without pmap's conversions of arrays between this process and all:
    see above."""
    kept: dict[str, Any] = {}  # the program; the frozen weights as given, and as arrays of all processes

    @functools.wraps(call)
    def step(state: Any, frozen: Any, batch: Any, rng: Any) -> Any:
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(batch)):  # for its shapes
            return call(state, frozen, batch, rng)
        _, program = ahead(state, frozen, batch, rng)
        if kept.get("given") is not frozen:
            kept.update(given=frozen, frozen=_of_all_processes(frozen))
        state, batch = _of_all_processes(state), _of_all_processes(batch, AXIS)
        return program((state,), (kept["frozen"],), (batch,), (rng,))

    def ahead(*arguments: Any) -> tuple[Callable, Any]:
        if "program" not in kept:
            _, kept["program"] = call.ahead(*arguments)
        return step, kept["program"]

    step.ahead = ahead
    return step


def pmap_evaluate(step: Callable, **static: Any) -> Callable:
    """``step(params, frozen, batch, rng, **static)`` on all devices: returns one replicated tree; nothing donated."""
    return _pmap(step, static, (None, None, 0, None), out_axes=None)


def pmap_local(function: Callable, **static: Any) -> Callable:
    """``function(params, batch, **static)`` on this process's devices alone, so that it may call it without the others;
    the result keeps a leading device axis."""
    return _pmap(function, static, (None, 0), devices=jax.local_devices())


def pmap_draw(function: Callable, *, donate: bool, **static: Any) -> Callable:
    """``function(shared, start, batch, **static)`` on this process's devices alone: the first replicated, the others
    and the result with a leading device axis, and the memory of `start` given away if `donate`."""
    return _pmap(function, static, (None, 0, 0), devices=jax.local_devices(), donate_argnums=(1,) if donate else ())


def _pmap(function: Callable, static: dict[str, Any], in_axes: tuple, **options: Any) -> Callable:
    """pmap with every argument in a tuple of its own: where there happen to be as many leaves as arguments, as with an
    empty tree of weights, JAX 0.10 would take `in_axes` to be one for each leaf."""
    @functools.wraps(function)
    def unwrapped(*arguments: tuple[Any]) -> Any:
        return function(*(argument for argument, in arguments), **static)

    mapped = jax.pmap(unwrapped, axis_name=AXIS, in_axes=tuple((axis,) for axis in in_axes), **options)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        return mapped(*((argument,) for argument in arguments))

    def ahead(*arguments: Any) -> tuple[Callable, Any]:
        program = mapped.lower(*((argument,) for argument in arguments)).compile()
        return lambda *arguments: program(*((argument,) for argument in arguments)), program

    call.ahead = ahead
    return call


def compile_ahead(call: Callable, *arguments: Any) -> tuple[Callable, Any]:
    """What a `pmap_...` function does with arguments such as these, compiled now: to be called like it, and the
    compiled program (its `as_text`, `memory_analysis`). With several processes, of `pmap_step` and of functions on this
    process's devices alone."""
    return call.ahead(*arguments)


def collectives(text: str) -> list[tuple[str, int]]:
    """The collectives of a compiled program (`compile_ahead`): kind and bytes of the result."""
    kinds = r"all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    found = re.findall(rf"= (.+?) ({kinds})(?:-start)?\(", text)
    return [(kind, sum(_bytes(*shape) for shape in re.findall(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]", shapes)))
            for shapes, kind in found]


def _bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return math.prod(map(int, filter(None, shape.split(",")))) * bits // 8


def peak_memory() -> int:
    """The most bytes that were in use at once, of the first local accelerator or, where there is none, this process."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return statistics.get("peak_bytes_in_use", kilobytes * (1 if sys.platform == "darwin" else 1024))


def gather(tree: Any) -> Any:
    """Host numpy of a device-sharded result (devices, b, ...) of this process, as (devices * b, ...)."""
    def local(x: jax.Array) -> np.ndarray:
        shards = sorted(x.addressable_shards, key=lambda s: s.index[0].start or 0)
        return np.concatenate([np.asarray(s.data).reshape(-1, *x.shape[2:]) for s in shards])
    return jax.tree.map(local, tree)


def any_process(flag: Callable[[], bool]) -> Callable[[], bool]:
    """Starts asking whether any process raises its flag; returns a function that gives the answer, equal everywhere.

    With several processes it is a collective that does not wait: all call it at the same place, and read the answer at
    the same later place, when the devices are done with it.
    """
    if jax.process_count() == 1:
        return flag
    votes = jax.device_put(np.full(jax.local_device_count(), flag(), np.float32), _here(AXIS))
    answer = _vote()(votes)
    return lambda: bool(to_host(answer) > 0)


@functools.cache
def _vote() -> Callable:
    return jax.pmap(sum_over_devices, axis_name=AXIS, out_axes=None)


def barrier() -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils
        multihost_utils.sync_global_devices("barrier")


def in_first_process(function: Callable[[], None]) -> None:
    """Calls a function in the first process, and waits for it everywhere. Raises UserError in all processes if it did
    there."""
    error = None
    if is_first_process():
        try:
            function()
        except UserError as caught:
            error = caught
    if any_process(lambda: error is not None)():
        raise error or UserError("the first process refused to go on; see its message")


def assert_replicated(tree: Any) -> None:
    """Raises AssertionError naming the first leaf whose local replicas differ in any bit."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        first, *others = [np.asarray(s.data) for s in leaf.addressable_shards]
        if any(first.tobytes() != other.tobytes() for other in others):
            raise AssertionError(f"replicas of {jax.tree_util.keystr(path)} differ")
