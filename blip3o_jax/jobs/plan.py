"""`blip3o-jax plan`: memory, time and cost of a config on a TPU topology that is not here."""

from __future__ import annotations

import argparse
import json
import logging
import math
from typing import TYPE_CHECKING

from blip3o_jax.errors import check_number, require
from blip3o_jax.jobs.options import config_option, option
from blip3o_jax.presets import PRESETS
from blip3o_jax.sample.settings import EditSettings, Settings, defaults

if TYPE_CHECKING:
    import jax

    from blip3o_jax.chips import Chip
    from blip3o_jax.train.config import TrainConfig

HELP = "plan a config for a TPU topology that is not here: memory, time, cost; one JSON line last"
log = logging.getLogger(__name__)
MANY = 1_000_000  # images that generation is planned for
WEIGHTS = ("bfloat16", "int8")


def options(parser: argparse.ArgumentParser) -> None:
    config_option(parser, "; NAME:TOPOLOGY where it knows several; with --generate also a preset")
    topologies = "e.g. v5e:16x16, v5p:4x4x8, v6e:4x4, tpu7x:2x2x1, with --generate also a100, h100"
    parser.add_argument("--topology", help=f"{topologies}, h200 (default: the config's)")
    million = "plan generation of a million images instead, N a device at once, or as many as fit"
    many = {"nargs": "?", "const": math.inf, "type": int, "metavar": "N"}
    parser.add_argument("--generate", help=million, **many)
    edits = "with --generate: edits, of as many pictures each as the model takes"
    parser.add_argument("--edit", action="store_true", help=edits)
    eight = "of generation: int8 are the kernels of the layers of Qwen3 and SANA"
    parser.add_argument("--weights", choices=WEIGHTS, default=WEIGHTS[0], help=eight)
    steps = f"of generation (default: {Settings.num_inference_steps}, or a model's few)"
    parser.add_argument("--num-inference-steps", type=int, help=steps)
    unsharded = "of generation, as `generate --mesh` (default: unsharded weights on every device)"
    parser.add_argument("--mesh", default="", help=unsharded)
    best = "over rows a device and remat; the best that fits"
    parser.add_argument("--search", action="store_true", help=best)
    option(parser, "--mfu", 0.4, "share of the peak assumed for the time")
    parser.add_argument("--price", type=float, metavar="DOLLARS", help="price of a chip-hour")
    quick = "a quick look at a model cut to N layers: neither a verdict on the run nor its price"
    parser.add_argument("--depth", type=int, metavar="N", help=quick)
    parser.set_defaults(run=run)


def read_run(args: argparse.Namespace) -> TrainConfig:
    """The config that is planned, with the command line checked."""
    from blip3o_jax.chips import GPUS
    from blip3o_jax.train.config import TrainConfig
    from blip3o_jax.train.read_config import read_config

    price, trains = args.price, args.generate is None
    require(0 < args.mfu <= 1, f"--mfu is in (0, 1], not {args.mfu}.")
    if price is not None:
        check_number(price, "--price")
    is_whole = args.depth is None
    require(is_whole or price is None, "--price is of the whole model; leave --depth out.")
    require(trains or not args.search, "--search is over ways to train; leave --generate out.")
    elsewhere = "a run's is its config's, e.g. --config.mesh.fsdp=8."
    require(not (args.mesh and trains), f"--mesh is that of --generate; {elsewhere}")
    counts = (args.num_inference_steps, None if trains else args.generate)
    at_least = "--generate and --num-inference-steps are at least 1."
    require(all(count is None or count >= 1 for count in counts), at_least)
    for flag, is_given in (("--weights", args.weights != WEIGHTS[0]), ("--edit", args.edit)):
        require(not (is_given and trains), f"{flag} is of generation; add --generate.")
    if args.config in PRESETS and not trains:
        require(not args.overrides, "A preset has no --config.KEY; name a config.")
        cfg = TrainConfig("joint", preset=args.config)
    else:
        cfg = read_config(args.config, args.overrides)
    # A config that knows several topologies is read again for the one that is asked for.
    if args.topology and cfg.topology and cfg.topology != args.topology:
        cfg = read_config(f"{args.config.partition(':')[0]}:{args.topology}", args.overrides)
    unnamed = f"The config {args.config} names no topology; give one with --topology, e.g. v5e:4x4."
    require(bool(args.topology or cfg.topology), unnamed)
    require(not (args.search and cfg.grpo), "--search is over ways of supervised training.")
    is_gpu = args.topology in GPUS
    require(not (trains and is_gpu), "Training is planned for TPUs alone, whose compiler is here.")
    return cfg


def _generation(
    args: argparse.Namespace, cfg: TrainConfig, mesh: jax.sharding.Mesh, devices: list, chip: Chip
) -> tuple[dict, dict]:
    """(how images are generated, what that needs): as many at once as are asked for, or fit."""
    from blip3o_jax.parallel.batches import batch_shards
    from blip3o_jax.plan import estimate, generation

    config = cfg.blip3o()
    none = f"{args.config} has no editing weights (its max_sources is 0); edit_3b, for one, has."
    require(config.max_sources > 0 or not args.edit, none)
    given = {"num_inference_steps": args.num_inference_steps} if args.num_inference_steps else {}
    settings = defaults(config, EditSettings if args.edit else Settings, **given)
    how = config, mesh, settings, args.weights
    if args.generate == math.inf:
        lowered, result = generation.most(*how, chip)
    else:
        lowered = generation.lower(*how, args.generate * batch_shards(mesh))
        result = generation.measure(lowered, chip)
    # Time and cost of all images, from the FLOPs that each of the programs knows.
    program = lowered["pictures"]
    runs = -(-MANY // program.images)
    result |= estimate.price(program, devices, chip, args.mfu, runs, args.price)
    ways = {"images_at_once": program.images, "images_in_all": MANY, "edit": args.edit}
    ways |= {"images_a_device": program.images // batch_shards(mesh), "weights": args.weights}
    ways |= {"num_inference_steps": settings.num_inference_steps}
    return ways, result


def run(args: argparse.Namespace) -> int:
    """Prints a table and one JSON line; 1 when it does not fit (a cut model: not even that)."""
    from blip3o_jax.parallel.mesh import make_mesh, parse_mesh
    from blip3o_jax.plan import estimate, generation, programs, reinforcement

    # The config as it runs there, and the mesh; all is checked before anything is lowered.
    cfg = programs.on_accelerator(read_run(args))
    is_cut = args.depth is not None
    if is_cut:
        whole, cfg = cfg.blip3o(), programs.shallow(cfg, args.depth)
        require(cfg.blip3o() != whole, f"--depth {args.depth} cuts no part of this model.")
        log.warning("Planning a model cut to depth %d: the run itself needs more.", args.depth)
    topology = args.topology or cfg.topology
    devices, chip = programs.open_topology(topology)
    mesh = make_mesh(cfg.mesh if args.generate is None else parse_mesh(args.mesh), devices)
    # What is planned: generation, the best of several ways to train, or the step as configured.
    if args.generate is not None:
        ways, result = _generation(args, cfg, mesh, devices, chip)
    else:
        if cfg.grpo:
            lowered = reinforcement.lower(cfg, mesh)
            result = generation.measure(lowered, chip)
            program = lowered["update"]
            result |= estimate.price(program, devices, chip, args.mfu, cfg.num_steps, args.price)
        elif args.search:
            cfg, result = estimate.search(cfg, mesh, devices, chip, args.mfu, args.price)
        else:
            program = programs.lower_step(cfg, mesh)
            result = estimate.estimate(program, devices, chip, args.mfu, cfg.num_steps, args.price)
        ways = {name: getattr(cfg, name) for name in ("batch_size", "accumulate", "remat")}
        ways["ce_chunk"] = getattr(cfg.section, "ce_chunk", 0)

    if is_cut:
        result = estimate.of_cut(result)
    name = f"{args.config}, CUT to depth {args.depth}," if is_cut else args.config
    print(f"{name} on {topology}, mesh {dict(mesh.shape)}, {ways}")
    print(estimate.table(result, chip))
    asked = {"config": args.config, "topology": topology, "mesh": dict(mesh.shape)}
    print(json.dumps(asked | ways | {"depth": args.depth} | result))
    return 1 if result["fits"] is False else 0
