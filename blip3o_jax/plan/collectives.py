"""What a compiled program sends between devices: its HLO text, with loops as often as they run."""

import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
DTYPES = {1: "pred s8 u8", 2: "s16 u16 f16 bf16", 4: "s32 u32 f32", 8: "s64 u64 f64"}
BYTES = {dtype: size for size, names in DTYPES.items() for dtype in names.split()}
OPCODE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
CALLERS = "calls|to_apply|body|called_computations|branch_computations"
CALLED = re.compile(rf"(?:{CALLERS})=\{{?((?:%[\w.\-]+(?:, )?)+)")
CONSTANT = re.compile(r"[su]32\[\]\S* constant\((\d+)\)")


def computations(hlo: str) -> dict[str, list[str]]:
    """Lines of each computation of a module by its name; that of the program is under "ENTRY"."""
    bodies, lines = {}, []
    for line in hlo.splitlines():
        if opening := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            lines = bodies.setdefault("ENTRY" if opening[1] else opening[2], [])
        else:
            lines.append(line)
    return bodies


def sizes(shapes: str) -> list[int]:
    """Bytes of each array in the text of a type, e.g. "(f32[8,4]{1,0}, u32[])"."""
    arrays = re.findall(r"\b(\w+)\[([\d,]*)\]", shapes)
    return [
        BYTES.get(dtype, 0) * math.prod(int(size) for size in dims.split(",") if size)
        for dtype, dims in arrays
    ]


def _visits(bodies: dict[str, list[str]], name: str, times: int) -> Iterator[tuple[str, int, str]]:
    """(computation, how often it runs, line) of everything that `name` runs."""
    for line in bodies.get(name, ()):
        yield name, times, line
        if not (called := CALLED.search(line)):
            continue
        inner = times
        if loop := re.search(r" while\(.*condition=%([\w.\-]+)", line):
            # A loop of scan or of the compiler's counts up to the constant in its condition.
            condition = list(_visits(bodies, loop[1], 1))
            tested = "\n".join(text for _, _, text in condition)
            inner *= max(map(int, CONSTANT.findall(tested)), default=1)
            # Which may have to ask all devices whether the loop goes on.
            yield from ((own, inner * count, text) for own, count, text in condition)
        for callee in re.findall(r"%([\w.\-]+)", called[1]):
            yield from _visits(bodies, callee, inner)


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """HLO text of a compiled program -> {collective: {"calls", "bytes"}} of a device in one run.

    The bytes are those of the whole array: what an all-gather yields and a reduce-scatter takes.
    About as much passes through each device, and twice as much in an all-reduce. A TPU's compiler
    splits one collective over several fusions; they share its channel and count once.
    """
    channels: dict[str, tuple[str, int, int]] = {}
    for name, times, line in _visits(computations(hlo), "ENTRY", 1):
        if not (match := OPCODE.search(line)):
            continue
        arrays = sizes(match[1])
        # What starts an asynchronous one yields operand and result; a permute's two are equal.
        size = max(arrays, default=0) if match[3] else sum(arrays)
        kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else match[2]
        channel = re.search(r"channel_id=(\d+)", line)
        key = channel[1] if channel else line.split(" = ")[0]
        # The same channel counts once, as often as its most frequent user.
        if key not in channels or channels[key][2] < times:
            channels[key] = kind, size, times
    result = {kind: {"calls": 0, "bytes": 0} for kind in KINDS}
    for kind, size, times in channels.values():
        result[kind]["calls"] += times
        result[kind]["bytes"] += size * times
    return {kind: numbers for kind, numbers in result.items() if numbers["calls"]}
