"""`blip3o-jax bench`: how fast each stage is, against PyTorch in the same process if asked, and
against what the machine can do."""

import contextlib
import json
import logging
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from blip3o_jax.bench import stages
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.convert.published import load_published
from blip3o_jax.convert.random_weights import random_checkpoint
from blip3o_jax.errors import InputError, nearest
from blip3o_jax.jobs.output import new_file
from blip3o_jax.jobs.verify import compare_stages
from blip3o_jax.kernels.platform import enable_compilation_cache, is_narrow, jit
from blip3o_jax.parallel.batches import check_batch
from blip3o_jax.parallel.mesh import cores, make_mesh, split_cpu_into_devices
from blip3o_jax.parallel.parameters import shardings
from blip3o_jax.pipeline import embedded_checkpoints
from blip3o_jax.presets import preset

GEMM, SETTLE, TURN, TOLERANCE = 2048, 0.1, 0.3, 1e-4
LARGEST = 1_000_000_000  # parameters
COLUMNS = {"ours": "blip3o_jax", "original": "PyTorch, original's way", "well": "PyTorch done well"}

log = logging.getLogger(__name__)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median_seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """After one call to warm up."""
    call()
    return statistics.median(seconds(call) for _ in range(repeats))


def interleaved(
    calls: dict[str, Callable[[], object]], repeats: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """(seconds of each call by name, in turns; the share of a core that the process uses while it
    rests after each).

    A turn is as many calls as take `TURN` seconds, one at least. The rest lets the thread pool of
    the side that ran go to sleep; the share says whether it does.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    idle: dict[str, float] = {}
    # and warms up
    counts = {name: max(1, round(TURN / max(seconds(call), 1e-9))) for name, call in calls.items()}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(
                seconds(lambda call=call, name=name: [call() for _ in range(counts[name])])
                / counts[name]
            )
            time.sleep(SETTLE)
            busy = time.process_time()
            time.sleep(SETTLE)
            idle[name] = max(idle.get(name, 0.0), (time.process_time() - busy) / SETTLE)
    return times, idle


def read_bytes_per_second(size: int, threads: int) -> float:
    """How fast `threads` read an array of `size` bytes again and again: from memory, or from a
    cache that holds it."""
    parts = [np.ones(max(1, size // 4 // threads), np.float32) for _ in range(threads)]
    passes = max(2, int(2e9 / max(size, 1)))

    def read(part):
        for _ in range(passes):
            part.max()

    with ThreadPoolExecutor(threads) as pool:
        taken = median_seconds(lambda: list(pool.map(read, parts)), 3)
    return sum(part.nbytes for part in parts) * passes / taken


def gemm_flops_per_second(size: int = GEMM) -> float:
    """Of one f32 product of square matrices in XLA."""
    a = jnp.ones((size, size))
    product = jit(jnp.matmul)
    return 2 * size**3 / median_seconds(lambda: jax.block_until_ready(product(a, a)))


def limit_seconds(
    phases: list[stages.Phase], gemm: float, bandwidth: Callable[[int], float]
) -> float:
    """The least time of a stage: in each phase arithmetic or reading, whichever takes longer."""
    return sum(
        p.passes * max(p.flops / gemm, p.bytes / bandwidth(int(p.bytes)) if p.bytes else 0.0)
        for p in phases
    )


def row(times: dict[str, list[float]], limit: float, amount: float, unit: str) -> dict:
    """One stage: median seconds of every side, value in the unit, how many times faster we are, and
    the share of the limit we reach."""
    taken = {name: statistics.median(values) for name, values in times.items()}
    ratios = {name: taken[name] / taken["ours"] for name in taken if name != "ours"}
    values = {name: amount / t if amount else t for name, t in taken.items()}
    least = amount / limit if amount else limit
    spread = {name: [min(values), max(values)] for name, values in times.items()}
    return {
        "unit": unit,
        "value": values,
        "ratio": ratios,
        "limit": least,
        "share_of_limit": limit / taken["ours"],
        "seconds": taken,
        "seconds_min_max": spread,
    }


def table(rows: dict[str, dict]) -> str:
    """Markdown."""
    sides = list(next(iter(rows.values()))["value"])
    head = ["stage", "devices", "unit"]
    for side in sides:
        head += [COLUMNS[side]] if side == "ours" else [COLUMNS[side], "ours is"]
    lines = [[*head, "limit", "reached"], ["---"] * (len(head) + 2)]
    for stage, found in rows.items():
        cells = [stage, str(found["devices"]), found["unit"]]
        for side in sides:
            cells.append(f"{found['value'][side]:.3g}")
            if side != "ours":
                cells.append(f"{found['ratio'][side]:.2f}×")
        lines.append([*cells, f"{found['limit']:.3g}", f"{100 * found['share_of_limit']:.0f} %"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _checked(args) -> tuple[Blip3oConfig, dict[str, Mesh]]:
    """(preset, mesh of each stage: of the devices that `generate` and `train` would take)."""
    for name in ("batch_size", "num_inference_steps", "repeats"):
        if getattr(args, name) < 1:
            raise InputError(
                f"--{name.replace('_', '-')} is at least 1, not {getattr(args, name)}."
            )
    # PyTorch's code has no cache.
    known = tuple(
        stage for stage in stages.STAGES if not (args.against and stage == "cached_train_step")
    )
    chosen = args.stages.split(",") if args.stages else list(known)
    for stage in chosen:
        if stage not in known:
            raise InputError(f"--stages: unknown stage {stage!r}; {nearest(stage, known)}")
    cfg = preset(args.preset)
    split = is_narrow(cfg) and split_cpu_into_devices(args.batch_size)
    generating = make_mesh()
    training = make_mesh(devices=jax.devices()[:1]) if split else generating
    check_batch(args.batch_size, generating)
    return cfg, {
        stage: training if stage.endswith("train_step") else generating for stage in chosen
    }


def _torch_side(work: stages.Workload, folder: pathlib.Path, threads: int) -> tuple[dict, float]:
    try:
        from blip3o_jax.reference import bench
    except ImportError as error:
        raise InputError(
            f"--against torch needs PyTorch, transformers and diffusers ({error.name} is "
            "missing): pip install 'blip3o-jax[parity]'."
        ) from error
    found = bench.stages(work, folder, threads)
    return found, bench.gemm_flops_per_second(GEMM, median_seconds)


def measure(cfg: Blip3oConfig, folder: pathlib.Path, args, meshes: dict[str, Mesh]) -> dict:
    """The report of all stages of the model in `folder`, each on its mesh."""
    threads, work = cores(), stages.make(cfg, args.batch_size, args.num_inference_steps)
    sides: dict[str, dict] = {"ours": {}}
    for mesh in set(meshes.values()):
        _, params = load_published(folder, "float32", lambda tree, mesh=mesh: shardings(tree, mesh))
        found = stages.ours(work, params, mesh)
        sides["ours"] |= {stage: found[stage] for stage, place in meshes.items() if place == mesh}
    sizes = stages.parameter_counts(params)
    gemm = {"xla": gemm_flops_per_second()}
    if args.against:
        theirs, gemm["torch"] = _torch_side(work, folder, threads)
        sides |= theirs
    bandwidths: dict[int, float] = {}

    def bandwidth(size: int) -> float:
        if size not in bandwidths:
            bandwidths[size] = read_bytes_per_second(size, threads)
        return bandwidths[size]

    rows, agreement, idle = {}, {}, {}
    for stage, mesh in meshes.items():
        log.info("Measuring %s.", stage)
        calls = {name: side[stage] for name, side in sides.items()}
        first = {name: call() for name, call in calls.items()}
        for name in first.keys() - {"ours"}:
            agreement[f"{stage}, {name}"] = compare_stages(
                {k: first[name][k] for k in first["ours"].keys() & first[name]},
                first["ours"],
                TOLERANCE,
            )
        times, resting = interleaved(calls, args.repeats)
        idle = {name: max(idle.get(name, 0.0), share) for name, share in resting.items()}
        limit = limit_seconds(stages.phases(work, stage, sizes), max(gemm.values()), bandwidth)
        rows[stage] = {"devices": mesh.size} | row(times, limit, *stages.amount(work, stage))
        # a run that is stopped later has said this much
        log.info("%s", table({stage: rows[stage]}).splitlines()[-1])
    return {
        "preset": cfg.name,
        "batch_size": args.batch_size,
        "num_inference_steps": args.num_inference_steps,
        "repeats": args.repeats,
        "threads": threads,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "stages": rows,
        "agreement": agreement,
        "gemm_gflops": {name: value / 1e9 for name, value in gemm.items()},
        "read_gb_per_second": {
            f"{size / 1e6:.1f} MB": value / 1e9 for size, value in sorted(bandwidths.items())
        },
        "cores_used_at_rest": idle,
    }


@contextlib.contextmanager
def _weights(cfg: Blip3oConfig):
    """The embedded checkpoint of this name, or a random one that is gone afterwards."""
    if cfg.name in embedded_checkpoints():
        yield embedded_checkpoints()[cfg.name]
        return
    from blip3o_jax.models.blip3o import Blip3o

    count = sum(leaf.size for leaf in jax.tree.leaves(Blip3o(cfg).abstract()))
    if count > LARGEST:
        raise InputError(
            f"{cfg.name} has {count:,} parameters; bench makes random weights up to {LARGEST:,}."
        )
    with tempfile.TemporaryDirectory(prefix="blip3o-bench-") as folder:
        random_checkpoint(pathlib.Path(folder) / cfg.name, cfg)
        yield pathlib.Path(folder) / cfg.name


def run(args) -> int:
    """Prints a table and one JSON line; 1 when the sides' results differ, so that they did not do
    the same work."""
    cfg, meshes = _checked(args)
    enable_compilation_cache()
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(new_file(args.out, args.overwrite)) if args.out else None
        folder = stack.enter_context(_weights(cfg))
        report = measure(cfg, folder, args, meshes)
        if out:
            out.write_text(json.dumps(report, indent=1) + "\n")
    agree = all(found["agree"] for rows in report["agreement"].values() for found in rows.values())
    gemm = ", ".join(f"{name} {value:.0f}" for name, value in report["gemm_gflops"].items())
    reading = ", ".join(
        f"{value:.0f} at {size}" for size, value in report["read_gb_per_second"].items()
    )
    print(
        f"{cfg.name}, batch {args.batch_size}, {args.num_inference_steps} steps, float32, "
        f"median of {args.repeats}; ",
        end="",
    )
    print(f"threads: {report['threads']}; GEMM GFLOP/s: {gemm}; reading GB/s: {reading}")
    print(table(report["stages"]))
    if report["agreement"]:
        print("Results agree." if agree else f"Results DIFFER: {report['agreement']}")
    print(json.dumps(report | {"agree": agree}))
    return 0 if agree else 1
