"""Where the time of a traced step goes, by the names that the compiled program gives its operations."""

import collections
import gzip
import json
import re

from etils import epath

# Kinds of work, by what an operation's name (scopes and modules, then the primitive) holds; the first that fits.
KINDS = {
    "optimizer and EMA": r"/(optimizer|ema)/",
    "convolutions": r"conv_general_dilated|winograd|/patches/",
    "attention": r"/attention/",
    "norms": r"/(in_layers_0|out_layers_0|out_0|norm\w*)/",
    "products": r"dot_general",
}


def by_kind(folder: epath.PathLike, program: str) -> dict[str, float]:
    """Share of the operations' time for each of `KINDS`, "exchange" between devices, and "rest".

    Operations that run side by side count with the time of each.

    Args:
      folder: where `jax.profiler.trace` wrote; of several traces the last counts.
      program: text of the compiled program that was traced.
    """
    file = max(epath.Path(folder).glob("plugins/profile/*/*.trace.json.gz"), key=str)  # folders are named by time
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    kinds, spent = _kinds(program), collections.Counter()
    for event in events:
        operation = event.get("args", {}).get("hlo_op")
        if event.get("ph") == "X" and operation in kinds:
            spent[kinds[operation]] += event["dur"]
    return {kind: time / spent.total() for kind, time in spent.most_common()}


def _kinds(program: str) -> dict[str, str]:
    """Kind of each instruction. What has no name of its own has that of the first in the computation it calls."""
    names, inside, computation = {}, collections.defaultdict(list), ""
    calls = {}
    for line in program.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", line):
            computation = start[1]
        elif instruction := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = .*? ([a-z\-]+)\(", line):
            scope = re.search(r'op_name="([^"]*)"', line)
            names[instruction[1]] = (instruction[2], scope[1] if scope else "")
            inside[computation].append(names[instruction[1]])
            if called := re.search(r"calls=%?([\w.\-]+)", line):
                calls[instruction[1]] = called[1]

    def kind(instruction: str) -> str:
        operation, name = names[instruction]
        if operation.startswith(("all-", "reduce-scatter", "collective")):
            return "exchange"
        several = [(operation, name)] if name else inside.get(calls.get(instruction, ""), [])
        if any(operation == "convolution" for operation, _ in [names[instruction], *several]):
            return "convolutions"
        name = next((name for _, name in several if name), "")
        return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "rest")

    return {instruction: kind(instruction) for instruction in names if names[instruction][0] not in ("while", "call")}
