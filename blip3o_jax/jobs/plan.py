"""`blip3o-jax plan`: what a config needs on a TPU topology, and what it takes, from the TPU's own
compiler. Needs no TPU."""

import dataclasses
import json
import logging
import time

from blip3o_jax.errors import InputError
from blip3o_jax.jobs.train import read_config
from blip3o_jax.parallel.batches import batch_shards, check_batch
from blip3o_jax.parallel.mesh import make_mesh, parse_mesh
from blip3o_jax.plan import programs
from blip3o_jax.train.config import TrainConfig

log = logging.getLogger(__name__)

REMAT = ("none", "dots", "full")  # from the least that is computed again to the most
MANY = 1_000_000  # images that generation is planned for


def open_run(args) -> tuple[TrainConfig, list, programs.Chip, object]:
    """(config, devices, chip, mesh), all checked before anything is lowered."""
    if not 0 < args.mfu <= 1:
        raise InputError(f"--mfu is in (0, 1], not {args.mfu}.")
    if args.price is not None and args.price < 0:
        raise InputError(f"--price is at least 0, not {args.price}.")
    if args.generate is not None and args.search:
        raise InputError("--search is over ways to train; leave --generate out.")
    if args.mesh and args.generate is None:
        raise InputError(
            "--mesh is that of --generate; a run's is its config's, e.g. --config.mesh.fsdp=8."
        )
    if min(args.num_inference_steps, 1 if args.generate is None else args.generate) < 1:
        raise InputError("--generate and --num-inference-steps are at least 1.")
    cfg = read_config(args.config, args.overrides)
    if args.topology and cfg.topology and cfg.topology != args.topology:
        cfg = read_config(f"{args.config.partition(':')[0]}:{args.topology}", args.overrides)
    if not (args.topology or cfg.topology):
        raise InputError(
            f"The config {args.config} names no topology; give one with --topology, e.g. v5e:4x4."
        )
    cfg = programs.on_accelerator(cfg)
    if args.depth is not None:
        cfg = programs.shallow(cfg, args.depth)
    devices, chip = programs.open_topology(args.topology or cfg.topology)
    return (
        cfg,
        devices,
        chip,
        make_mesh(cfg.mesh if args.generate is None else parse_mesh(args.mesh), devices),
    )


def planned(program: programs.Program, devices: list, chip: programs.Chip, args, runs: int) -> dict:
    """The numbers of one program."""
    began = time.perf_counter()
    found = programs.measure(program, chip) | {
        "compile_seconds": round(time.perf_counter() - began, 1)
    }
    return found | (
        programs.price(program, devices, chip, args.mfu, runs, args.price) if program.flops else {}
    )


def search(
    cfg: TrainConfig, mesh, devices: list, chip: programs.Chip, args
) -> tuple[TrainConfig, dict]:
    """(best config that fits, its numbers): the least that is computed again, then the most rows at
    once. The batch stays as it is, cut into micro-batches; rows double until they do not fit.
    InputError when nothing fits."""
    shards, best = batch_shards(mesh), None
    check_batch(cfg.batch_size, mesh)
    for remat in REMAT:
        rows = 1
        while cfg.batch_size % (shards * rows) == 0:
            tried = dataclasses.replace(
                cfg, remat=remat, accumulate=cfg.batch_size // (shards * rows)
            )
            found = planned(programs.lower_step(tried, mesh), devices, chip, args, cfg.num_steps)
            total = found["bytes"].get("total")
            needs = f"{total / programs.GIB:.2f} GiB" if total else found["reason"]
            verdict = "fits" if found["fits"] else "does not fit"
            log.info(
                "remat %s, %d rows a device x %d: %s, %s.",
                remat,
                rows,
                tried.accumulate,
                needs,
                verdict,
            )
            if not found["fits"]:
                break
            best, rows = (tried, found), 2 * rows
        if best:
            return best
    raise InputError(
        "Nothing fits, not even one row a device with remat full; take a larger fsdp, "
        "loss.ce_chunk or more chips."
    )


def table(found: dict, chip: programs.Chip) -> str:
    """The numbers for people."""
    lines = [f"{kind:<22}{size / programs.GIB:>10.3f} GiB" for kind, size in found["bytes"].items()]
    verdict = "fits" if found["fits"] else f"DOES NOT FIT: {found.get('reason', 'more than that')}"
    lines.append(
        f"{'of a device':<22}{chip.hbm:>10} GiB, {programs.RESERVED} of them reserved: {verdict}"
    )
    for kind, sent in (found.get("communication") or {}).items():
        lines.append(
            f"{kind:<22}{sent['bytes'] / programs.GIB:>10.3f} GiB in {sent['calls']} calls"
        )
    if "flops" in found:
        lines.append(
            f"{'arithmetic':<22}{found['flops'] / 1e15:>10.3f} PFLOP a run, "
            f"{found['flops_per_image'] / 1e12:.2f} TFLOP an image"
        )
        lines.append(
            f"{'at ' + format(found['mfu'], '.0%') + ' of peak':<22}{found['seconds']:>10.3f} s, "
            f"{found['images_per_second']:.1f} images/s"
        )
        cost = f", ${found['dollars']:,.0f}" if "dollars" in found else ""
        lines.append(
            f"{'in all':<22}{found['hours']:>10.1f} h for {found['runs']:,} runs, "
            f"{found['chip_hours']:,.0f} chip-hours{cost}"
        )
    return "\n".join(lines)


def run(args) -> int:
    """Prints a table and one JSON line; 1 when it does not fit."""
    cfg, devices, chip, mesh = open_run(args)
    if args.search:
        cfg, found = search(cfg, mesh, devices, chip, args)
    elif args.generate is not None:
        program = programs.lower_generation(
            cfg, mesh, args.generate * batch_shards(mesh), args.num_inference_steps
        )
        found = planned(program, devices, chip, args, runs=-(-MANY // program.images))
    else:
        found = planned(programs.lower_step(cfg, mesh), devices, chip, args, cfg.num_steps)
    name = args.topology or cfg.topology
    ways = {
        "batch_size": cfg.batch_size,
        "accumulate": cfg.accumulate,
        "remat": cfg.remat,
        "ce_chunk": cfg.loss.ce_chunk,
    }
    if args.generate is not None:
        ways = {
            "images_at_once": program.images,
            "images_in_all": MANY,
            "num_inference_steps": args.num_inference_steps,
        }
    print(f"{args.config} on {name}, mesh {dict(mesh.shape)}, {ways}")
    print(table(found, chip))
    print(
        json.dumps(
            {
                "config": args.config,
                "topology": name,
                "mesh": dict(mesh.shape),
                **ways,
                "depth": args.depth,
                **found,
            }
        )
    )
    return 0 if found["fits"] else 1
