"""`blip3o-jax bench`: how fast each stage is, against PyTorch and against the machine's limits."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.errors import nearest, require
from blip3o_jax.jobs.options import checkpoint_option, needs_torch, option, overwrite_option
from blip3o_jax.jobs.output import new_file
from blip3o_jax.presets import preset
from blip3o_jax.sample.settings import Settings

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from blip3o_jax.bench.stages import Workload
    from blip3o_jax.checkpoints import Checkpoint

HELP = "how fast each stage is here, against PyTorch if asked; prints one JSON line last"
STAGES = (
    "decode",
    "denoise",
    "autoencoder",
    "text_to_image",
    "edit",
    "train_step",
    "cached_train_step",
    "few_steps_denoise",
    "few_steps_text_to_image",
    "first_picture",
)
OURS = ("edit", "cached_train_step", "first_picture")  # which PyTorch's side does not have
TOLERANCE = 1e-4  # of a result, relative to its largest value
LARGEST = 1_000_000_000  # parameters

log = logging.getLogger(__name__)


def options(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group()
    checkpoint_option(model)
    model.add_argument("--preset", help="random weights of this preset instead, e.g. mid_128")
    against = "measure PyTorch beside it (extra [parity])"
    parser.add_argument("--against", choices=["torch"], help=against)
    option(parser, "--batch-size", 4, "images at once")
    option(parser, "--num-inference-steps", 10, "Euler steps")
    option(parser, "--repeats", 5, "turns, of which the median counts")
    parser.add_argument("--stages", help=f"some of {','.join(STAGES)} (default: all)")
    parser.add_argument("--out", metavar="FILE.json", help="write the report to a file too")
    overwrite_option(parser, "an earlier report")
    parser.set_defaults(run=run)


def checked_stages(args: argparse.Namespace, cfg: Blip3oConfig) -> list[str]:
    """The stages of the model to measure, with the command line checked."""
    Settings(num_inference_steps=args.num_inference_steps)  # which checks it
    for name in ("batch_size", "repeats"):
        flag, value = f"--{name.replace('_', '-')}", getattr(args, name)
        require(value >= 1, f"{flag} is at least 1, not {value}.")
    left_out = {"edit"} if cfg.max_sources != 1 else set()
    left_out |= set(OURS) if args.against else set()
    left_out |= set() if cfg.sana.few_steps else {x for x in STAGES if x.startswith("few_steps")}
    left_out |= {"first_picture"} if args.preset else set()
    names = [name for name in STAGES if name not in left_out]
    chosen = args.stages.split(",") if args.stages else names
    for stage in chosen:
        require(stage in names, f"--stages: unknown stage {stage!r}; {nearest(stage, names)}")
    return chosen


def stage_meshes(cfg: Blip3oConfig, stages: list[str], batch_size: int) -> dict[str, Mesh]:
    """The mesh of each stage: the devices that `generate` and `train` would take."""
    import jax

    from blip3o_jax.kernels.platform import is_narrow
    from blip3o_jax.parallel import batches, mesh

    split = is_narrow(cfg) and mesh.split_cpu_into_devices(batch_size)
    generating = mesh.make_mesh()
    training = mesh.make_mesh(devices=jax.devices()[:1]) if split else generating
    batches.check_batch(batch_size, generating)
    return {name: training if name.endswith("train_step") else generating for name in stages}


def torch_side(
    work: Workload, checkpoint: Checkpoint, threads: int
) -> tuple[dict[str, dict], float]:
    """({side: {stage: function}}, FLOP/s of its matrix product) of PyTorch."""
    from blip3o_jax.bench.timing import GEMM, median_seconds

    with needs_torch("--against torch"):
        from blip3o_jax.reference import bench
    with published(checkpoint) as folder:
        sides = bench.stages(work, folder, threads)
    return sides, bench.gemm_flops_per_second(GEMM, median_seconds)


@contextlib.contextmanager
def published(checkpoint: Checkpoint) -> Iterator[pathlib.Path]:
    """A folder of its weights in the published layout, a temporary one if need be."""
    from blip3o_jax import checkpoints
    from blip3o_jax.convert.published import write_published

    if checkpoint.kind == checkpoints.PUBLISHED:
        yield checkpoint.folder
        return
    with tempfile.TemporaryDirectory(prefix="blip3o-bench-") as folder:
        target = pathlib.Path(folder)
        write_published(target, checkpoint.config, checkpoint.leaves, None, math.inf, {})
        yield target


def measure(
    checkpoint: Checkpoint, args: argparse.Namespace, meshes: dict[str, Mesh], folder: pathlib.Path
) -> dict:
    """The report of all stages of the model, each on its mesh; `folder` is for temporary files."""
    from blip3o_jax.bench import first_picture, stages, timing
    from blip3o_jax.parallel.mesh import cores
    from blip3o_jax.parallel.parameters import shardings
    from blip3o_jax.verify.compare import compare_stages

    # Every side's stages as functions: ours from weights on each mesh, PyTorch's.
    cfg, threads = checkpoint.config, cores()
    work = stages.make(cfg, args.batch_size, args.num_inference_steps)
    sides: dict[str, dict] = {}
    for mesh in set(meshes.values()):
        params = checkpoint.load(shardings=lambda tree, m=mesh: shardings(tree, m))
        for name, calls in stages.ours(work, params, mesh).items():
            own = {stage: call for stage, call in calls.items() if meshes.get(stage) == mesh}
            sides[name] = sides.get(name, {}) | own
    for name, call in first_picture.sides(args.checkpoint, folder).items():
        sides[name] = sides.get(name, {}) | {"first_picture": call}
    sizes = stages.parameter_counts(params)
    gemm = {"xla": timing.gemm_flops_per_second()}
    if args.against:
        theirs, gemm["torch"] = torch_side(work, checkpoint, threads)
        sides |= theirs
    # Stage by stage: the sides' results agree, then their times in turn.
    rows, agreement, idle, speeds = {}, {}, {}, {}
    for stage, mesh in meshes.items():
        log.info("Measuring %s.", stage)
        calls = {name: side[stage] for name, side in sides.items() if stage in side}
        results, first = {}, {}
        for name, call in calls.items():
            began = time.perf_counter()
            results[name] = call()
            first[name] = f"{name} {time.perf_counter() - began:.1f} s"
        log.info("First calls, which compile and are not counted: %s.", ", ".join(first.values()))
        # Others are compared with what computes the same, in as many steps.
        ours = results.pop("guided" if "guided" in results else "ours")
        for name, theirs in results.items():
            if shared := {key: theirs[key] for key in ours.keys() & theirs}:
                agreement[f"{stage}, {name}"] = compare_stages(shared, ours, TOLERANCE)
        times, resting = timing.alternating(calls, args.repeats)
        idle = {name: max(idle.get(name, 0.0), share) for name, share in resting.items()}
        # What the machine could reach at most.
        rounds = {"rounds": float(ours["rounds"].mean())} if "rounds" in ours else {}
        phases = stages.phases(work, stage, sizes, **rounds)
        for size in {int(phase.bytes) for phase in phases} - {0, *speeds}:
            speeds[size] = timing.read_bytes_per_second(size, threads)
        limit = timing.limit_seconds(phases, max(gemm.values()), speeds.__getitem__)
        numbers = timing.row(times, limit, *stages.amount(work, stage))
        ways = stages.steps_of_sides(work, stage, calls)
        rows[stage] = {"devices": mesh.size} | rounds | ({"steps": ways} if ways else {}) | numbers
        if rounds:
            sentence = "%d tokens in %.1f rounds of the transformer."
            log.info(sentence, cfg.ta_tok.num_tokens, rounds["rounds"])
        # a run that is stopped later has said this much
        log.info("%s", timing.table({stage: rows[stage]}).splitlines()[-1])
    options = ("batch_size", "num_inference_steps", "repeats")
    return {
        "model": args.preset or args.checkpoint,
        **{name: getattr(args, name) for name in options},
        "threads": threads,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "stages": rows,
        "agreement": agreement,
        "gemm_gflops": {name: value / 1e9 for name, value in gemm.items()},
        "read_gb_per_second": {f"{n / 1e6:.1f} MB": speeds[n] / 1e9 for n in sorted(speeds)},
        "cores_used_at_rest": idle,
    }


@contextlib.contextmanager
def random_weights(cfg: Blip3oConfig) -> Iterator[pathlib.Path]:
    """A temporary checkpoint of this model."""
    import jax

    from blip3o_jax.convert.random_weights import random_checkpoint
    from blip3o_jax.models.blip3o import Blip3o

    count = sum(leaf.size for leaf in jax.tree.leaves(Blip3o(cfg).abstract()))
    limit = f"bench makes random weights up to {LARGEST:,}."
    require(count <= LARGEST, f"{cfg.name} has {count:,} parameters; {limit}")
    with tempfile.TemporaryDirectory(prefix="blip3o-bench-") as root:
        folder = pathlib.Path(root) / cfg.name
        random_checkpoint(folder, cfg)
        yield folder


def run(args: argparse.Namespace) -> int:
    """Prints a table and one JSON line, whose `agree` is null where nothing was compared; 1 when
    the sides' results differ."""
    from blip3o_jax import checkpoints
    from blip3o_jax.bench.timing import table
    from blip3o_jax.kernels.platform import enable_compilation_cache

    cfg = preset(args.preset) if args.preset else checkpoints.config_of(args.checkpoint)
    meshes = stage_meshes(cfg, checked_stages(args, cfg), args.batch_size)
    enable_compilation_cache()
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(new_file(args.out, args.overwrite)) if args.out else None
        folder = stack.enter_context(random_weights(cfg)) if args.preset else args.checkpoint
        kept = stack.enter_context(tempfile.TemporaryDirectory(prefix="blip3o-bench-"))
        report = measure(checkpoints.open(folder), args, meshes, pathlib.Path(kept))
        if out:
            out.write_text(json.dumps(report, indent=1) + "\n")
    # For people, then as one line of JSON.
    comparisons = [row for rows in report["agreement"].values() for row in rows.values()]
    agree = all(row["agree"] for row in comparisons)
    gemm = ", ".join(f"{name} {value:.0f}" for name, value in report["gemm_gflops"].items())
    speeds = report["read_gb_per_second"].items()
    reading = ", ".join(f"{value:.0f} at {size}" for size, value in speeds)
    print(
        f"{report['model']}, batch {args.batch_size}, {args.num_inference_steps} steps, float32, "
        f"median of {args.repeats}; threads: {report['threads']}; GEMM GFLOP/s: {gemm}; "
        f"reading GB/s: {reading}"
    )
    print(table(report["stages"]))
    if comparisons:
        print("Results agree." if agree else f"Results DIFFER: {report['agreement']}")
    print(json.dumps(report | {"agree": agree if comparisons else None}))
    return 0 if agree else 1
