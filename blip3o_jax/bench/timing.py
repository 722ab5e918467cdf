"""Timing calls in turn, what the machine can do, and the limit that follows for a stage."""

import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.bench.stages import Phase
from blip3o_jax.kernels.platform import jit

GEMM = 2048  # rows and columns of the matrices multiplied
SETTLE = 0.1  # seconds, twice, that the process rests after a turn
TURN = 0.3  # seconds of calls in a turn, at least one call
COLUMNS = {
    "ours": "blip3o_jax",
    "guided": "blip3o_jax",
    "cold": "blip3o_jax",
    "original": "PyTorch, original's way",
    "well": "PyTorch done well",
    "compiled": "PyTorch compiled",
}


def seconds(call: Callable[[], object], count: int = 1) -> float:
    """Seconds of a call, the mean of `count`."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def median_seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """The median of `repeats` calls, after one to warm up."""
    call()
    return statistics.median(seconds(call) for _ in range(repeats))


def alternating(calls: dict[str, Callable[[], object]], repeats: int) -> tuple[dict, dict]:
    """({name: seconds of a call in each turn}, {name: the share of a core that the process uses
    while it rests afterwards})."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    idle = dict.fromkeys(calls, 0.0)
    # The first call warms up, and says how many make a turn.
    counts = {name: max(1, round(TURN / max(seconds(call), 1e-9))) for name, call in calls.items()}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(seconds(call, counts[name]))
            # The thread pool of this side goes to sleep, or the share of a core says it does not.
            time.sleep(SETTLE)
            busy = time.process_time()
            time.sleep(SETTLE)
            idle[name] = max(idle[name], (time.process_time() - busy) / SETTLE)
    return times, idle


def read_bytes_per_second(size: int, threads: int) -> float:
    """How fast `threads` read `size` bytes repeatedly: from memory, or a cache that holds them."""
    parts = [np.ones(max(1, size // 4 // threads), np.float32) for _ in range(threads)]
    passes = max(2, int(2e9 / max(size, 1)))

    def read(part: np.ndarray) -> None:
        for _ in range(passes):
            part.max()

    with ThreadPoolExecutor(threads) as pool:
        elapsed = median_seconds(lambda: list(pool.map(read, parts)), 3)
    return sum(part.nbytes for part in parts) * passes / elapsed


def gemm_flops_per_second(size: int = GEMM) -> float:
    """Rate of one f32 product of square matrices in XLA."""
    a = jnp.ones((size, size))
    product = jit(jnp.matmul)
    return 2 * size**3 / median_seconds(lambda: jax.block_until_ready(product(a, a)))


def limit_seconds(phases: list[Phase], gemm: float, bandwidth: Callable[[int], float]) -> float:
    """The least time of a stage: in each phase arithmetic or reading, whichever takes longer."""

    def pass_seconds(phase: Phase) -> float:
        reading = phase.bytes / bandwidth(int(phase.bytes)) if phase.bytes else 0.0
        return max(phase.flops / gemm, reading)

    return sum(phase.passes * pass_seconds(phase) for phase in phases)


def row(times: dict[str, list[float]], limit: float, amount: float, unit: str) -> dict:
    """The numbers of one stage: median seconds of every side, values in the unit, how many times
    faster we are, and the share of the limit that we reach.

    A rate counts `amount` a call; where it is 0 the value is the seconds themselves.
    """
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours = medians["ours"]
    return {
        "unit": unit,
        "value": {name: amount / t if amount else t for name, t in medians.items()},
        "ratio": {name: t / ours for name, t in medians.items() if name != "ours"},
        "limit": amount / limit if amount else limit,
        "share_of_limit": limit / ours,
        "seconds": medians,
        "seconds_min_max": {name: [min(values), max(values)] for name, values in times.items()},
    }


def table(rows: dict[str, dict]) -> str:
    """The rows of all stages as Markdown; those with the same sides, sampled in the same `steps`,
    are a table."""
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for stage, numbers in rows.items():
        values, ratios, steps = numbers["value"], numbers["ratio"], numbers.get("steps", {})
        # Our column, then two of each other side.
        titles = {
            name: f"{COLUMNS[name]}, {steps[name]}" if steps else COLUMNS[name] for name in values
        }
        pairs = [title for side in ratios for title in (titles[side], "ours is")]
        head = ("stage", "devices", "unit", titles["ours"], *pairs, "limit", "reached")
        pairs = [x for side in ratios for x in (f"{values[side]:.3g}", f"{ratios[side]:.2f}×")]
        cells = [stage, str(numbers["devices"]), numbers["unit"], f"{values['ours']:.3g}", *pairs]
        limit, share = numbers["limit"], numbers["share_of_limit"]
        reached = [f"{limit:.3g}", f"{100 * share:.0f} %"] if limit else ["", ""]
        tables.setdefault(head, []).append([*cells, *reached])

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    return "\n\n".join(
        "\n".join(map(line, [head, ["---"] * len(head), *lines])) for head, lines in tables.items()
    )
