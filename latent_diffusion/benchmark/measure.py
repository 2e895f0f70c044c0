"""Times a workload: compiles it ahead, warms up, and measures steps as the training loop runs them."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from latent_diffusion import flops, parallel
from latent_diffusion.benchmark import profile as profile_lib
from latent_diffusion.benchmark.workloads import Workload


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured of one workload; `report` says what the columns are. None where something does not apply.

    images_per_second: over all devices. seconds: of all measured steps together. step_seconds, step_p95_seconds: median
    and 95th percentile of the time from one step's end to the next one's. model_flops: of a step, over all devices.
    utilization: model FLOP/s as a share of the devices' bfloat16 peak (MFU). memory_bytes: of one device, as the
    compiler planned it. wait_share: of the time, waiting for data. collective_bytes: exchanged with other devices in a
    step; collectives: in how many operations. shares: of the operations' time, by kind of work, of a profile; {} where
    too little could be told apart.
    """

    images_per_second: float
    seconds: float
    step_seconds: float
    step_p95_seconds: float
    batch_size: int
    parameters: int | None
    model_flops: int | None
    utilization: float | None
    memory_bytes: int | None
    compile_seconds: float | None
    wait_share: float | None
    collectives: int | None
    collective_bytes: int | None
    shares: dict[str, float] | None = None


def measure(workload: Workload, *, warmup: int, steps: int, profile: str = "") -> Result:
    """Runs the workload `warmup` + `steps` times.

    The host is at most one step ahead of the devices and reads nothing else from them, and the clock stops when the
    last step has ended. With `profile`, a folder, three more steps are traced for TensorBoard or Perfetto.
    """
    compiling = time.perf_counter()
    run, program = parallel.compile_ahead(workload.call, *workload.arguments)
    compile_seconds = time.perf_counter() - compiling
    arguments, _ = _repeat(workload, run, workload.arguments, warmup)
    started = time.perf_counter()
    arguments, ends = _repeat(workload, run, arguments, steps)
    seconds = ends[-1] - started
    shares = _profile(workload, run, arguments, program, profile) if profile else None
    peak = flops.peak(jax.devices()[0].device_kind)
    exchanged = parallel.collectives(program.as_text()) if jax.device_count() > 1 else None
    return Result(
        images_per_second=workload.images * steps / seconds, seconds=seconds, **_of_steps(started, ends),
        batch_size=workload.images, parameters=workload.parameters, model_flops=workload.flops,
        utilization=peak and workload.flops * steps / seconds / (peak * jax.device_count()),
        memory_bytes=_memory(program), compile_seconds=compile_seconds,
        wait_share=sum(workload.waited[-steps:]) / seconds if workload.waited else None,
        collectives=None if exchanged is None else len(exchanged),
        collective_bytes=None if exchanged is None else sum(size for _, size in exchanged), shares=shares)


def _profile(workload: Workload, run: Callable, arguments: tuple, program: Any, folder: str) -> dict[str, float]:
    with jax.profiler.trace(folder):
        _repeat(workload, run, arguments, 3)
    return profile_lib.by_kind(folder, program.as_text())


def _repeat(workload: Workload, run: Callable, arguments: tuple, steps: int) -> tuple[tuple, list[float]]:
    """The arguments after so many steps, and when each step had ended: once a step is under way, the one before it is
    waited for."""
    ends, before = [], None
    for _ in range(steps):
        result = run(*arguments)
        arguments = workload.following(arguments, result)
        if before is not None:
            jax.block_until_ready(before)
            ends.append(time.perf_counter())
        before = workload.watched(result)
    jax.block_until_ready(before)
    return arguments, [*ends, time.perf_counter()]


def _of_steps(started: float, ends: list[float]) -> dict[str, float]:
    each = sorted(after - before for before, after in zip([started, *ends], ends, strict=False))
    return {"step_seconds": statistics.median(each),
            "step_p95_seconds": each[min(len(each) - 1, int(0.95 * len(each)))]}


def loader(stream: Iterator[dict], batch_size: int, *, warmup: int, steps: int) -> Result:
    """Reads `warmup` + `steps` batches, of `batch_size` over all processes, with nothing else to do.

    Both must be as many as the stream reads ahead: it gives several batches at once, and then none for long.
    """
    for _ in range(warmup):
        next(stream)
    started, ends = time.perf_counter(), []
    for _ in range(steps):
        next(stream)
        ends.append(time.perf_counter())
    seconds = ends[-1] - started
    return Result(
        images_per_second=batch_size * steps / seconds, seconds=seconds, **_of_steps(started, ends),
        batch_size=batch_size, parameters=None, model_flops=None, utilization=None, memory_bytes=None,
        compile_seconds=None, wait_share=1.0, collectives=None, collective_bytes=None)


def _memory(program: Any) -> int:
    plan = program.memory_analysis()
    return (plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
            - plan.alias_size_in_bytes)
