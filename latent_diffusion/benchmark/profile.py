"""Where the time of a traced step goes, by the names that the compiled program gives its operations."""

import collections
import gzip
import json
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

log = logging.getLogger(__name__)
# Kinds of work, by what an operation's name (scopes and modules, then the primitive) holds; the first that fits. A
# fusion of several kinds, such as the update of a parameter with that of its average, counts as what it is named after.
KINDS = {
    "optimizer": r"/optimizer/",
    "EMA": r"/ema/",
    "convolutions": r"conv_general_dilated|winograd|/patches/",
    "attention": r"/attention/",
    "norms": r"/(in_layers_0|out_layers_0|out_0|norm\w*)/",
    "products": r"dot_general",
}
# Instructions that are the work of a fusion they are in. Their kind if their name is of none: compilers of TPUs make a
# convolution of a product, so that the name says more than the instruction.
PRODUCTS = {"convolution": "convolutions", "dot": "products"}
CALLERS = ("while", "call", "conditional")  # what they call has a time of its own
LINES = {"GPU": "Stream", "TPU": "XLA Ops"}  # lines of a device in a trace that show each operation once
LEAST = 0.5  # of the time that must be known: shares of less would mislead
CURE = "; give XLA_FLAGS=--xla_gpu_enable_command_buffer= for no command buffers, in which operations have no names"


def by_kind(folder: epath.PathLike, program: str) -> dict[str, float]:
    """Share of the operations' time for each of `KINDS`, "exchange" between devices, and "rest".

    Operations that run side by side count with the time of each. Where less than `LEAST` of the time is of operations
    that the program names, there are no shares, and a warning says so.

    Args:
      folder: where `jax.profiler.trace` wrote; of several traces the last counts.
      program: text of the compiled program that was traced.
    """
    file = max(epath.Path(folder).glob("plugins/profile/*/*.trace.json.gz"), key=str)  # folders are named by time
    device, operations = _operations(json.loads(gzip.decompress(file.read_bytes()))["traceEvents"])
    kinds, spent, unknown = _kinds(program), collections.Counter(), 0
    for operation, time in operations:
        kind = kinds.get(operation)
        if kind:
            spent[kind] += time
        elif kind is None or device == "GPU":  # streams show no caller, but a command buffer under its caller's name
            unknown += time
    known = spent.total() / (spent.total() + unknown) if spent else 0
    if known < LEAST:
        log.warning("--profile: operations that the program names are only %.0f %% of the time in the trace, too "
                    "little for shares%s", 100 * known, CURE if device == "GPU" else "")
        return {}
    return {kind: time / spent.total() for kind, time in spent.most_common()}


def _operations(events: Sequence[dict[str, Any]]) -> tuple[str, list[tuple[str, float]]]:
    """The device that a trace is of, and the name and time of each of its operations. Those of a CPU, and most of a
    GPU, have an argument with the instruction's name; those of a TPU are named like it."""
    named = {(event["name"], event["pid"], event.get("tid")): event["args"]["name"] for event in events
             if event.get("ph") == "M" and event["name"] in ("process_name", "thread_name")}
    device = next((device for device in LINES if any(
        name.startswith(f"/device:{device}") for (what, *_), name in named.items() if what == "process_name")), "CPU")
    found = []
    for event in events:
        operation = event.get("args", {}).get("hlo_op")
        if device != "CPU":
            process = named.get(("process_name", event.get("pid"), None), "")
            line = named.get(("thread_name", event.get("pid"), event.get("tid")), "")
            if not process.startswith(f"/device:{device}") or not line.startswith(LINES[device]):
                continue
            operation = operation or event["name"]
        if event.get("ph") == "X" and operation:
            found.append((operation, event["dur"]))
    return device, found


def _kinds(program: str) -> dict[str, str]:
    """Kind of each instruction, "" of `CALLERS`. A fusion is what the product in it is; what has no name of its own has
    that of the first in the computation it calls."""
    operations, scopes, calls, members, computation = {}, {}, {}, collections.defaultdict(list), ""
    for line in program.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", line):
            computation = start[1]
        elif instruction := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = .*? ([a-z\-]+)\(", line):
            operations[instruction[1]] = instruction[2]
            members[computation].append(instruction[1])
            if scope := re.search(r'op_name="([^"]+)"', line):
                scopes[instruction[1]] = scope[1]
            if called := re.search(r"calls=%?([\w.\-]+)", line):
                calls[instruction[1]] = called[1]

    def within(instruction: str) -> Iterator[str]:
        yield instruction
        for inner in members.get(calls.get(instruction, ""), ()):
            yield from within(inner)

    def kind(instruction: str) -> str:
        if operations[instruction] in CALLERS:
            return ""
        if operations[instruction].startswith(("all-", "reduce-scatter", "collective")):
            return "exchange"
        parts = [*within(instruction)]
        product = next((part for part in parts if operations[part] in PRODUCTS), "")
        scope = next((scopes[part] for part in (product, *parts) if part in scopes), "")
        named = next((kind for kind, pattern in KINDS.items() if re.search(pattern, scope)), "")
        return named or PRODUCTS.get(operations.get(product, ""), "rest")

    return {instruction: kind(instruction) for instruction in operations}
