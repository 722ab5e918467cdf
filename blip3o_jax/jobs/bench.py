"""`blip3o-jax bench`: how fast each stage is, against PyTorch and against the machine's limits."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.errors import nearest, require
from blip3o_jax.jobs.options import needs_torch, option, overwrite_option
from blip3o_jax.jobs.output import new_file
from blip3o_jax.presets import preset
from blip3o_jax.sample.settings import Settings

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from blip3o_jax.bench.stages import Workload

HELP = "how fast each stage is here, against PyTorch if asked; prints one JSON line last"
STAGES = (
    "decode",
    "denoise",
    "autoencoder",
    "text_to_image",
    "edit",
    "train_step",
    "cached_train_step",
)
OURS = ("edit", "cached_train_step")  # which PyTorch's side does not have
TOLERANCE = 1e-4  # of a result, relative to its largest value
LARGEST = 1_000_000_000  # parameters

log = logging.getLogger(__name__)


def options(parser: argparse.ArgumentParser) -> None:
    preset_help = "emoji_64 with its weights, or e.g. mid_128 with random ones"
    option(parser, "--preset", "emoji_64", preset_help)
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


def torch_side(work: Workload, folder: pathlib.Path, threads: int) -> tuple[dict, float]:
    """({side: {stage: function}}, FLOP/s of its matrix product) of PyTorch."""
    from blip3o_jax.bench.timing import GEMM, median_seconds

    with needs_torch("--against torch"):
        from blip3o_jax.reference import bench
    sides = bench.stages(work, folder, threads)
    return sides, bench.gemm_flops_per_second(GEMM, median_seconds)


def measure(
    cfg: Blip3oConfig, folder: pathlib.Path, args: argparse.Namespace, meshes: dict[str, Mesh]
) -> dict:
    """The report of all stages of the model in `folder`, each on its mesh."""
    from blip3o_jax import checkpoints
    from blip3o_jax.bench import stages, timing
    from blip3o_jax.parallel.mesh import cores
    from blip3o_jax.parallel.parameters import shardings
    from blip3o_jax.verify.compare import compare_stages

    # Every side's stages as functions: ours from weights on each mesh, PyTorch's.
    threads = cores()
    work = stages.make(cfg, args.batch_size, args.num_inference_steps)
    sides: dict[str, dict] = {"ours": {}}
    for mesh in set(meshes.values()):
        params = checkpoints.open(folder).load(shardings=lambda tree, m=mesh: shardings(tree, m))
        calls = stages.ours(work, params, mesh)
        sides["ours"] |= {stage: calls[stage] for stage, place in meshes.items() if place == mesh}
    sizes = stages.parameter_counts(params)
    gemm = {"xla": timing.gemm_flops_per_second()}
    if args.against:
        theirs, gemm["torch"] = torch_side(work, folder, threads)
        sides |= theirs
    # Stage by stage: the sides' results agree, then their times in turn.
    rows, agreement, idle, speeds = {}, {}, {}, {}
    for stage, mesh in meshes.items():
        log.info("Measuring %s.", stage)
        calls = {name: side[stage] for name, side in sides.items()}
        results = {name: call() for name, call in calls.items()}
        ours = results.pop("ours")
        for name, theirs in results.items():
            shared = {key: theirs[key] for key in ours.keys() & theirs}
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
        rows[stage] = {"devices": mesh.size} | rounds | numbers
        if rounds:
            sentence = "%d tokens in %.1f rounds of the transformer."
            log.info(sentence, cfg.ta_tok.num_tokens, rounds["rounds"])
        # a run that is stopped later has said this much
        log.info("%s", timing.table({stage: rows[stage]}).splitlines()[-1])
    options = ("batch_size", "num_inference_steps", "repeats")
    return {
        "preset": cfg.name,
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
def weights(cfg: Blip3oConfig) -> Iterator[pathlib.Path]:
    """The embedded checkpoint of this name, or a temporary one with random weights."""
    import jax

    from blip3o_jax import checkpoints
    from blip3o_jax.convert.random_weights import random_checkpoint
    from blip3o_jax.models.blip3o import Blip3o

    if folder := checkpoints.embedded().get(cfg.name):
        yield folder
        return
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
    from blip3o_jax.bench.timing import table
    from blip3o_jax.kernels.platform import enable_compilation_cache

    cfg = preset(args.preset)
    chosen = checked_stages(args, cfg)
    meshes = stage_meshes(cfg, chosen, args.batch_size)
    enable_compilation_cache()
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(new_file(args.out, args.overwrite)) if args.out else None
        folder = stack.enter_context(weights(cfg))
        report = measure(cfg, folder, args, meshes)
        if out:
            out.write_text(json.dumps(report, indent=1) + "\n")
    # For people, then as one line of JSON.
    comparisons = [row for rows in report["agreement"].values() for row in rows.values()]
    agree = all(row["agree"] for row in comparisons)
    gemm = ", ".join(f"{name} {value:.0f}" for name, value in report["gemm_gflops"].items())
    speeds = report["read_gb_per_second"].items()
    reading = ", ".join(f"{value:.0f} at {size}" for size, value in speeds)
    print(
        f"{cfg.name}, batch {args.batch_size}, {args.num_inference_steps} steps, float32, median "
        f"of {args.repeats}; threads: {report['threads']}; GEMM GFLOP/s: {gemm}; reading GB/s: "
        f"{reading}"
    )
    print(table(report["stages"]))
    if comparisons:
        print("Results agree." if agree else f"Results DIFFER: {report['agreement']}")
    print(json.dumps(report | {"agree": agree if comparisons else None}))
    return 0 if agree else 1
