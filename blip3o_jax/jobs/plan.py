"""`blip3o-jax plan`: memory, time and cost of a config on a TPU topology that is not here."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from blip3o_jax.errors import require
from blip3o_jax.jobs.options import config_option, option
from blip3o_jax.sample.settings import Settings

if TYPE_CHECKING:
    from blip3o_jax.train.config import TrainConfig

HELP = "plan a config for a TPU topology that is not here: memory, time, cost; one JSON line last"
MANY = 1_000_000  # images that generation is planned for


def options(parser: argparse.ArgumentParser) -> None:
    config_option(parser, "; NAME:TOPOLOGY where it knows several")
    topologies = "e.g. v5e:16x16, v5p:4x4x8, v6e:4x4, tpu7x:2x2x1 (default: the config's)"
    parser.add_argument("--topology", help=topologies)
    million = "plan generation of a million images instead, N a device at once"
    parser.add_argument("--generate", type=int, metavar="N", help=million)
    option(parser, "--num-inference-steps", Settings.num_inference_steps, "of generation")
    unsharded = "of generation, as `generate --mesh` (default: unsharded weights on every device)"
    parser.add_argument("--mesh", default="", help=unsharded)
    best = "over rows a device and remat; the best that fits"
    parser.add_argument("--search", action="store_true", help=best)
    option(parser, "--mfu", 0.4, "share of the peak that the time is for")
    parser.add_argument("--price", type=float, metavar="DOLLARS", help="of a chip-hour")
    quick = "layers of each transformer and autoencoder stage, for a quick look"
    parser.add_argument("--depth", type=int, metavar="N", help=quick)
    parser.set_defaults(run=run)


def read_run(args: argparse.Namespace) -> TrainConfig:
    """The config that is planned, with the command line checked."""
    from blip3o_jax.train.read_config import read_config

    price, trains = args.price, args.generate is None
    require(0 < args.mfu <= 1, f"--mfu is in (0, 1], not {args.mfu}.")
    require(price is None or price >= 0, f"--price is at least 0, not {price}.")
    require(trains or not args.search, "--search is over ways to train; leave --generate out.")
    elsewhere = "a run's is its config's, e.g. --config.mesh.fsdp=8."
    require(not (args.mesh and trains), f"--mesh is that of --generate; {elsewhere}")
    counts = (args.num_inference_steps, 1 if trains else args.generate)
    require(min(counts) >= 1, "--generate and --num-inference-steps are at least 1.")
    cfg = read_config(args.config, args.overrides)
    # A config that knows several topologies is read again for the one that is asked for.
    if args.topology and cfg.topology and cfg.topology != args.topology:
        cfg = read_config(f"{args.config.partition(':')[0]}:{args.topology}", args.overrides)
    unnamed = f"The config {args.config} names no topology; give one with --topology, e.g. v5e:4x4."
    require(bool(args.topology or cfg.topology), unnamed)
    return cfg


def run(args: argparse.Namespace) -> int:
    """Prints a table and one JSON line; 1 when it does not fit."""
    from blip3o_jax.parallel.batches import batch_shards
    from blip3o_jax.parallel.mesh import make_mesh, parse_mesh
    from blip3o_jax.plan import estimate, programs

    # The config as it runs there, and the mesh; all is checked before anything is lowered.
    cfg = programs.on_accelerator(read_run(args))
    if args.depth is not None:
        cfg = programs.shallow(cfg, args.depth)
    topology = args.topology or cfg.topology
    devices, chip = programs.open_topology(topology)
    mesh = make_mesh(cfg.mesh if args.generate is None else parse_mesh(args.mesh), devices)
    # What is planned: generation, the best of several ways to train, or the step as configured.
    if args.generate is not None:
        rows, steps = args.generate * batch_shards(mesh), args.num_inference_steps
        program = programs.lower_generation(cfg, mesh, rows, steps)
        runs = -(-MANY // program.images)
        result = estimate.estimate(program, devices, chip, args.mfu, runs, args.price)
        ways = {"images_at_once": program.images, "images_in_all": MANY}
        ways["num_inference_steps"] = steps
    else:
        if args.search:
            cfg, result = estimate.search(cfg, mesh, devices, chip, args.mfu, args.price)
        else:
            program = programs.lower_step(cfg, mesh)
            result = estimate.estimate(program, devices, chip, args.mfu, cfg.num_steps, args.price)
        ways = {name: getattr(cfg, name) for name in ("batch_size", "accumulate", "remat")}
        ways["ce_chunk"] = getattr(cfg.section, "ce_chunk", 0)

    print(f"{args.config} on {topology}, mesh {dict(mesh.shape)}, {ways}")
    print(estimate.table(result, chip))
    asked = {"config": args.config, "topology": topology, "mesh": dict(mesh.shape)}
    print(json.dumps(asked | ways | {"depth": args.depth} | result))
    return 0 if result["fits"] else 1
