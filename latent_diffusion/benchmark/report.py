"""Results as a table, as JSON and as a figure."""

import json
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
from etils import epath

from latent_diffusion import files

COLUMNS = {  # title: how a row, a `Result` as a dict with its "name", is shown
    "": lambda row: row["name"],
    "params": lambda row: _or_dash(row["parameters"], lambda x: f"{x / 1e6:.1f}M"),
    "batch": lambda row: str(row["batch_size"]),
    "img/s": lambda row: f"{row['images_per_second']:.3g}",
    "img/s/device": lambda row: f"{row['images_per_second'] / row['devices']:.3g}",
    "step ms": lambda row: f"{1e3 * row['step_seconds']:.3g}",
    "p95": lambda row: f"{1e3 * row['step_p95_seconds']:.3g}",
    "TFLOP/s": lambda row: _or_dash(
        _flops_of_image(row), lambda x: f"{x * row['images_per_second'] / 1e12 / row['devices']:.3g}"),
    "MFU": lambda row: _or_dash(row["utilization"], lambda x: f"{100 * x:.1f}%"),
    "GiB": lambda row: _or_dash(row["memory_bytes"], lambda x: f"{x / 2**30:.2f}"),
    "compile s": lambda row: _or_dash(row["compile_seconds"], lambda x: f"{x:.1f}"),
    "data wait": lambda row: _or_dash(row["wait_share"], lambda x: f"{100 * x:.1f}%"),
    "exchanged": lambda row: _or_dash(row["collective_bytes"], lambda x: f"{x / 2**20:.1f} MiB"),
}


def _flops_of_image(row: Mapping[str, Any]) -> float | None:
    return None if row["model_flops"] is None else row["model_flops"] / row["batch_size"]


def _or_dash(value: Any, show: Any) -> str:
    return "-" if value is None else show(value)


def environment() -> dict[str, Any]:
    """Hardware, versions and the compiler's settings, as they belong to every number. platform_version: of CUDA, ROCm
    or libtpu, as JAX's client says it."""
    device = jax.devices()[0]
    return {"device": device.device_kind, "platform": device.platform, "devices": jax.device_count(),
            "platform_version": " ".join(device.client.platform_version.split()), "processes": jax.process_count(),
            "machine": platform.platform(), "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
            **{name: os.environ[name] for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") if os.environ.get(name)}}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows below their titles; one that has an "error" shows that."""
    cells = [list(COLUMNS)] + [
        [row["name"], row["error"]] if "error" in row else [show(row) for show in COLUMNS.values()] for row in rows]
    whole = [line for line in cells if len(line) == len(COLUMNS)]
    widths = [max(len(line[i]) for line in whole) for i in range(len(COLUMNS))]
    widths[0] = max(len(line[0]) for line in cells)
    return "\n".join("  ".join(
        cell.ljust(width) if i == 0 or len(line) == 2 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(line, widths, strict=False))).rstrip() for line in cells)


def ratios(rows: Sequence[Mapping[str, Any]], pairs: Sequence[tuple[str, str]]) -> str:
    """How many times as fast the first of each pair of names is as the second, beside what model FLOPs say."""
    by_name = {row["name"]: row for row in rows if "error" not in row}
    lines = []
    for fast, slow in pairs:
        if fast in by_name and slow in by_name:
            speed = [by_name[name]["images_per_second"] for name in (fast, slow)]
            work = [_flops_of_image(by_name[name]) for name in (fast, slow)]
            flops = f" (model FLOPs: {work[1] / work[0]:.1f})" if all(work) else ""
            lines.append(f"{fast} is {speed[0] / speed[1]:.1f} times as fast as {slow}{flops}")
    return "\n".join(lines)


def write(path: epath.PathLike, rows: Sequence[Mapping[str, Any]], command: str) -> None:
    """All rows with the environment and the command, as JSON."""
    found = {"command": command, "environment": environment(), "rows": list(rows)}
    files.write_whole(epath.Path(path), (json.dumps(found, indent=1) + "\n").encode())


def figure(path: epath.PathLike, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Throughput of each row as a bar, or of a sweep as a line for each model: over the swept value, but that over
    sampling steps with the axes of the paper's Figure 7 (steps in the place of FID, which is not measured here).

    Without matplotlib there is a warning instead.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logging.warning("no figure: it needs matplotlib")
        return

    drawn = Figure(figsize=(7, 4), layout="constrained")
    axes = drawn.subplots()
    rows = [row for row in rows if "error" not in row]
    swept = next((row["sweep"] for row in rows if "sweep" in row), None)
    if swept:
        for name in dict.fromkeys(row["model"] for row in rows):
            value, speed = zip(*((row["value"], row["images_per_second"]) for row in rows if row["model"] == name),
                               strict=True)
            axes.loglog(*((speed, value) if swept == "steps" else (value, speed)), "o-", label=name)
        labels = [swept, "throughput [samples / s]"]
        axes.set(**dict(zip(("ylabel", "xlabel") if swept == "steps" else ("xlabel", "ylabel"), labels, strict=True)),
                 title=title)
        axes.legend()
    else:
        colors = ["tab:orange" if "pixels" in row["name"] else "tab:blue" for row in rows]
        bars = axes.barh([row["name"] for row in rows], [row["images_per_second"] for row in rows], color=colors)
        axes.bar_label(bars, [f"{row['images_per_second']:.3g}" for row in rows], padding=3)
        axes.set(xlabel="throughput [images / s]", title=title)
        axes.margins(x=0.12)
        axes.invert_yaxis()
    with epath.Path(path).open("wb") as file:
        drawn.savefig(file, format="png", dpi=150)
