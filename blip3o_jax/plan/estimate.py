"""What a program needs before its pod is paid for: memory of a device, communication, time and
cost, from the TPU's own compiler.

libtpu (extra [tpu]) is that compiler and runs on any x86 machine.
"""

import dataclasses
import logging
import math
import time

import jax
from jax.sharding import Mesh

from blip3o_jax.chips import Chip
from blip3o_jax.errors import InputError, first_line
from blip3o_jax.parallel.batches import batch_shards, check_batch
from blip3o_jax.plan import collectives, programs
from blip3o_jax.plan.programs import Program
from blip3o_jax.train.config import TrainConfig

MIB, GIB = 2**20, 2**30
# What `price` adds.
PRICED = ("flops", "flops_per_image", "mfu", "seconds", "images_per_second", "runs", "hours")
PRICED += ("chip_hours", "dollars")
REMAT = ("none", "dots", "full")  # from the least recomputation to the most

log = logging.getLogger(__name__)


def _bytes(tree) -> int:
    """Bytes on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def measure(program: Program, chip: Chip) -> dict:
    """Compiles a program -> bytes on a device by kind, whether they fit, and the communication of a
    run where the compiler prints its program.

    They are what the compiler goes by when it refuses a program, arguments, outputs and temporaries
    less aliases, and the program's code; and what the program does not read (the image encoders,
    when it trains from a cache). Temporaries include what tiling adds to the arguments.
    """
    beside = {kind: _bytes(tree) for kind, tree in program.beside.items()}
    memory = beside | {kind: _bytes(tree) for kind, tree in program.kinds.items()}
    try:
        compiled = program.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # The compiler's own sentence about what it needs.
        lines = str(error).splitlines()
        reason = next((line.strip() for line in lines if "hbm" in line.lower()), lines[0])
        return {"bytes": memory, "fits": False, "reason": reason}
    # The compiler drops arguments that are not read: they have no sharding.
    places = jax.tree.leaves(compiled.input_shardings[0], is_leaf=lambda x: x is None)
    arguments = zip(jax.tree.leaves(program.arguments), places, strict=True)
    unread = sum(_bytes(x) for x, place in arguments if place is None)
    # The peak would leave out gaps between temporaries, and count on-chip buffers.
    used = compiled.memory_analysis()
    total = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    total += used.temp_size_in_bytes + unread + sum(beside.values())
    memory |= {"temporary": total - sum(memory.values())}
    memory |= {"code": used.generated_code_size_in_bytes}
    memory["total"] = total + memory["code"]
    fits = memory["total"] <= chip.hbm * MIB
    return {"bytes": memory, "fits": fits, **_communication(compiled)}


def _communication(compiled: jax.stages.Compiled) -> dict:
    try:
        return {"communication": collectives.collectives(compiled.as_text())}
    # libtpu 0.0.42 to 0.0.52 with jaxlib 0.10.2 cannot print every program
    except jax.errors.JaxRuntimeError as error:
        reason = f"this libtpu does not print the program: {first_line(error)}"
        return {"communication": None, "unknown": reason}


def price(
    program: Program, devices: list, chip: Chip, mfu: float, runs: int, dollars: float | None
) -> dict:
    """Time and cost of `runs` runs at `mfu` of the bfloat16 peak and `dollars` a chip-hour."""
    seconds = program.flops / (mfu * len(devices) * chip.peak)
    hours = runs * seconds / 3600
    chip_hours = len(devices) // chip.devices * hours
    return {
        "flops": program.flops,
        "flops_per_image": program.flops / program.images,
        "mfu": mfu,
        "seconds": seconds,
        "images_per_second": program.images / seconds,
        "runs": runs,
        "hours": hours,
        "chip_hours": chip_hours,
    } | ({} if dollars is None else {"dollars": dollars * chip_hours})


def estimate(
    program: Program, devices: list, chip: Chip, mfu: float, runs: int, dollars: float | None
) -> dict:
    """`measure`, the seconds that compiling took, and `price` where the FLOPs are counted."""
    began = time.perf_counter()
    result = measure(program, chip)
    result["compile_seconds"] = round(time.perf_counter() - began, 1)
    if program.flops:
        result |= price(program, devices, chip, mfu, runs, dollars)
    return result


def of_cut(result: dict) -> dict:
    """`estimate` of a model that --depth cut: without time and cost, which are not the run's; it
    fits is None, since the whole model needs more, unless not even the cut one does."""
    unpriced = {key: value for key, value in result.items() if key not in PRICED}
    return unpriced | {"fits": None if result["fits"] else False}


def search(
    cfg: TrainConfig, mesh: Mesh, devices: list, chip: Chip, mfu: float, dollars: float | None
) -> tuple[TrainConfig, dict]:
    """(best config that fits, its numbers): the least recomputation, then the most rows at once.

    The batch keeps its size, divided into micro-batches. InputError when nothing fits.
    """
    # Rows double until the compiler refuses; then more is computed again.
    shards, best = batch_shards(mesh), None
    check_batch(cfg.batch_size, mesh)
    for remat in REMAT:
        rows = 1
        while cfg.batch_size % (shards * rows) == 0:
            accumulate = cfg.batch_size // (shards * rows)
            candidate = dataclasses.replace(cfg, remat=remat, accumulate=accumulate)
            program = programs.lower_step(candidate, mesh)
            result = estimate(program, devices, chip, mfu, cfg.num_steps, dollars)
            # One line of the log for every way.
            total = result["bytes"].get("total")
            needs = f"{total / GIB:.2f} GiB" if total else result["reason"]
            way = f"remat {remat}, {rows} rows a device x {accumulate}"
            log.info("%s: %s, %s.", way, needs, "fits" if result["fits"] else "does not fit")
            if not result["fits"]:
                break
            best, rows = (candidate, result), 2 * rows
        if best:
            return best
    fix = "take a larger fsdp, joint.ce_chunk or more chips."
    raise InputError(f"Nothing fits, not even one row a device with remat full; {fix}")


def verdict(result: dict) -> str:
    """Whether it fits, in words."""
    if result["fits"] is None:
        return "a CUT model fits, which the whole one need not: plan that without --depth"
    return "fits" if result["fits"] else f"DOES NOT FIT: {result.get('reason', 'more than that')}"


def table(result: dict, chip: Chip) -> str:
    """The numbers of `estimate` for people."""

    def row(name: str, value: float, text: str, digits: int = 3) -> str:
        return f"{name:<22}{value:>10.{digits}f} {text}"

    # Memory and what is sent, then time and cost.
    rows = [row(kind, size / GIB, "GiB") for kind, size in result["bytes"].items()]
    grants = f"GiB of a device are a program's: {verdict(result)}"
    rows.append(row("of these", chip.hbm / 1024, grants))
    for kind, sent in (result.get("communication") or {}).items():
        rows.append(row(kind, sent["bytes"] / GIB, f"GiB in {sent['calls']} calls"))
    if result.get("communication", {}) is None:
        rows.append(f"{'sent':<22}{'?':>10} {result['unknown']}")
    if "flops" in result:
        image = f"PFLOP a run, {result['flops_per_image'] / 1e12:.2f} TFLOP an image"
        rate = f"s, {result['images_per_second']:.1f} images/s"
        cost = f", ${result['dollars']:,.0f}" if "dollars" in result else ""
        in_all = f"h for {result['runs']:,} runs, {result['chip_hours']:,.0f} chip-hours{cost}"
        rows.append(row("arithmetic", result["flops"] / 1e15, image))
        rows.append(row(f"at {result['mfu']:.0%} of peak", result["seconds"], rate))
        rows.append(row("in all", result["hours"], in_all, 1))
    return "\n".join(rows)
