"""`blip3o-jax convert verify A B`: whether two copies of a model are the same, tensor by tensor and
stage by stage; `convert verify A`: whether A's files are what was recorded when it was written."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from typing import TYPE_CHECKING, Any

from blip3o_jax.errors import require
from blip3o_jax.jobs.options import needs_torch
from blip3o_jax.jobs.output import new_file

if TYPE_CHECKING:
    import numpy as np

    from blip3o_jax.checkpoints import Checkpoint

HELP = "whether two copies of a model agree, tensor by tensor and stage by stage; exit 1 if not"

LARGEST_RUN = 1_000_000_000  # parameters, beyond which stages run only when asked for


def options(parser: argparse.ArgumentParser) -> None:
    text = "embedded name, published or converted folder, training workdir or WORKDIR@STEP"
    parser.add_argument("a", metavar="A", help=f"a checkpoint of any kind: {text}")
    text = "another; without it, every byte of A's weights is compared with the hashes recorded"
    parser.add_argument("b", metavar="B", nargs="?", help=f"{text} when A was saved or converted")
    parser.add_argument("--torch", action="store_true", help="run A in PyTorch (extra [parity])")
    text = "of a stage, relative to its largest value (default: %(default)s)"
    parser.add_argument("--tolerance", type=float, default=1e-4, help=text)
    text = "run the stages of a model of more than a billion parameters too"
    parser.add_argument("--stages", action="store_true", help=text)
    text = "write the report, of two with every tensor, to a file"
    parser.add_argument("--report", metavar="FILE", help=text)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints a table and one JSON report; 0 when all agrees, 1 when anything does not."""
    with new_file(args.report, True) if args.report else contextlib.nullcontext() as file:
        report, details = _verify(args)
        if file:
            file.write_text(json.dumps({**report, **details}, indent=1) + "\n")
    print(json.dumps(report))
    return 0 if report["passed"] else 1


def _verify(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the report, what the file of --report has besides)."""
    from blip3o_jax import checkpoints
    from blip3o_jax.verify import compare, stages

    is_tolerance = 0 < args.tolerance < math.inf
    require(is_tolerance, f"--tolerance is a number above 0, not {args.tolerance}.")
    is_for_two = args.b is not None or not (args.torch or args.stages)
    require(is_for_two, "--torch and --stages compare two checkpoints; name B.")
    a = checkpoints.open(args.a)
    if args.b is None:
        identity, recorded = a.verify()
        print(f"{len(a.files)} files of weights, {'as' if recorded else 'never'} recorded")
        return {"a": args.a, "identity": identity, "recorded": recorded, "passed": True}, {}
    b = checkpoints.open(args.b)
    readable = not args.torch or a.kind == checkpoints.PUBLISHED
    only = "in PyTorch, which reads the published layout only"
    require(readable, f"--torch runs {args.a} {only}.")
    # Tensors first; the stages need the same config, and time for a large model.
    differing = compare.differing_fields(a, b)
    tensors = compare.compare_checkpoints(a, b)
    unequal = [name for name, row in tensors.items() if not row["agree"]]
    count = sum(math.prod(row["shape"]) for row in tensors.values())
    rows = {}
    reason = "the configs differ" if differing else "pass --stages to run a model of this size"
    if not differing and (args.stages or args.torch or count <= LARGEST_RUN):
        # A conversion to a coarser dtype rounded its weights; so are the other's.
        rounded = compare.rounding(tensors)
        ours = _run_in_torch(a, rounded) if args.torch else stages.run_stages(a, rounded)
        rows = compare.compare_stages(ours, stages.run_stages(b, rounded), args.tolerance)
    passed = not differing and not unequal and all(row["agree"] for row in rows.values())
    # A table for people ...
    largest = sorted(tensors, key=lambda name: -tensors[name].get("max_abs", math.inf))[:3]
    print(f"{len(tensors)} tensors, {len(tensors) - len(unequal)} equal; {count:,} values")
    for name in unequal[:20] or largest[:1]:
        print(f"  {name}  {tensors[name]}")
    for name, row in rows.items():
        numbers = "  ".join(f"{key} {value:.3g}" for key, value in row.items() if key != "agree")
        print(f"  {name:10s} {'ok ' if row['agree'] else 'NO '} {numbers}")
    # ... and one line for programs.
    hashes = [row.get("sha256", [0, 1]) for row in tensors.values()]
    report = {
        "a": str(args.a),
        "b": str(args.b),
        "a_in": "torch" if args.torch else "jax",
        "passed": passed,
        "config_differs_in": differing,
        "tensors": len(tensors),
        "unequal": unequal,
        "bit_identical": sum(mine == theirs for mine, theirs in hashes),
        "largest": {name: tensors[name] for name in largest},
        "stages": rows or f"not run: {reason}",
        "stages_rounded_to": rounded if rows else None,
    }
    return report, {"every_tensor": tensors}


def _run_in_torch(checkpoint: Checkpoint, rounded: str) -> dict[str, np.ndarray]:
    from blip3o_jax.verify.stages import stage_inputs

    with needs_torch("--torch"):
        from blip3o_jax.reference import modules
        from blip3o_jax.reference.stages import stage_outputs
    reference = modules.round_to(modules.load(checkpoint.folder), rounded)
    return stage_outputs(reference, stage_inputs(checkpoint.config))
