"""`blip3o-jax convert verify A B`: whether two copies of a model are the same, tensor by tensor and
stage by stage."""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blip3o_jax.config import Blip3oConfig, replace
from blip3o_jax.errors import InputError

if TYPE_CHECKING:
    import numpy as np

HELP = "whether two copies of a model agree, tensor by tensor and stage by stage; exit 1 if not"

INTEGERS = ("codes", "tokens")
LARGEST_RUN = 1_000_000_000  # parameters, beyond which stages run only when asked for


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "a",
        metavar="A",
        help="a checkpoint of any kind: embedded name, published or converted folder, training "
        "workdir",
    )
    parser.add_argument("b", metavar="B", help="another")
    parser.add_argument("--torch", action="store_true", help="run A in PyTorch (extra [parity])")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="of a stage, relative to its largest value (default: %(default)s)",
    )
    parser.add_argument(
        "--stages",
        action="store_true",
        help="run the stages of a model of more than a billion parameters too",
    )
    parser.add_argument(
        "--report", metavar="FILE", help="write the report with every tensor to a file"
    )
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Copy:
    """A checkpoint of any kind, unread: `tensors()` yields (published name, values) in the order of
    the rules."""

    folder: pathlib.Path
    config: Blip3oConfig
    tensors: Callable[[], Iterator[tuple[str, np.ndarray]]]
    load: Callable[[], dict]


def open_copy(name: str) -> Copy:
    """An embedded name, a published folder, a directory of `to-jax`, or a training run."""
    from blip3o_jax import training_checkpoint
    from blip3o_jax.convert.converted import is_converted, load_converted, open_converted
    from blip3o_jax.convert.published import load_published, match, open_published, resolve_lm_head
    from blip3o_jax.jobs.convert import open_run
    from blip3o_jax.models.blip3o import parts_of
    from blip3o_jax.pipeline import find_checkpoint

    folder = find_checkpoint(name)
    if training_checkpoint.is_workdir(folder):
        cfg, leaves, _ = open_run(folder)
        return Copy(
            folder,
            cfg,
            lambda: _of_leaves(cfg, leaves),
            lambda: training_checkpoint.load_run(folder)[1],
        )
    if is_converted(folder):
        cfg, leaves = open_converted(folder)
        return Copy(folder, cfg, lambda: _of_leaves(cfg, leaves), lambda: load_converted(folder)[1])
    cfg, stored = open_published(folder)
    tied, repeated = resolve_lm_head(cfg.qwen3.tie_word_embeddings, stored)
    cfg = replace(cfg, **{"qwen3.tie_word_embeddings": tied})
    kept = {key: tensor for key, tensor in stored.items() if key not in repeated}
    found = match(folder, cfg, kept, parts_of(cfg))
    names = [key for rule in found.rules for key in rule.names(_shape(found.abstract, rule.path))]
    return Copy(
        folder,
        cfg,
        lambda: ((key, stored[key].read(stored[key].dtype)) for key in names),
        lambda: load_published(folder)[1],
    )


def _shape(tree, path: str):
    for key in path.split("/"):
        tree = tree[key]
    return tree.shape


def _of_leaves(cfg: Blip3oConfig, leaves) -> Iterator[tuple[str, np.ndarray]]:
    from blip3o_jax.convert.published import published_rules
    from blip3o_jax.convert.rules import leaf_to_tensor

    for rule in published_rules(cfg):
        leaf = leaves[rule.path]
        for key, layer in zip(rule.names(leaf.shape), leaf.layers(rule.stacked), strict=True):
            yield key, leaf_to_tensor(layer, rule)


def compare_tensors(a: np.ndarray, b: np.ndarray) -> dict:
    """Shapes, dtypes, hashes and the largest differences.

    They agree when equal in the coarser of two dtypes.
    """
    import numpy as np

    row = {"shape": list(a.shape), "dtypes": [a.dtype.name, b.dtype.name]}
    if a.shape != b.shape:
        return {**row, "other_shape": list(b.shape), "agree": False}
    hashes = [
        hashlib.sha256(np.ascontiguousarray(x).reshape(-1).view(np.uint8)).hexdigest()[:16]
        for x in (a, b)
    ]
    one, other = (x.astype(np.float32) for x in (a, b))
    largest = float(np.abs(one - other).max(initial=0.0))
    coarse = min((a.dtype, b.dtype), key=lambda dtype: dtype.itemsize)
    with np.errstate(over="ignore"):
        agree = hashes[0] == hashes[1] or np.array_equal(one.astype(coarse), other.astype(coarse))
    return {
        **row,
        "sha256": hashes,
        "max_abs": largest,
        "max_rel": largest / max(float(np.abs(one).max(initial=0.0)), 1e-30),
        "agree": bool(agree),
    }


def compare_stages(
    a: dict[str, np.ndarray], b: dict[str, np.ndarray], tolerance: float
) -> dict[str, dict]:
    """By stage: the largest difference against the largest value; ids must be identical."""
    import numpy as np

    rows = {}
    for name, values in a.items():
        if name in INTEGERS:
            share = float(np.mean(values == b[name]))
            rows[name] = {"identical": share, "agree": share == 1.0}
        else:
            largest = float(np.abs(values - b[name]).max())
            relative = largest / float(np.abs(values).max())
            rows[name] = {
                "max_abs": largest,
                "max_rel": relative,
                "agree": bool(np.isfinite(relative) and relative <= tolerance),
            }
    return rows


def run(args) -> int:
    """Prints a table and one JSON report; 0 when all agrees, 1 when anything does not."""
    import numpy as np
    from tqdm import tqdm

    from blip3o_jax import training_checkpoint
    from blip3o_jax.convert.converted import is_converted

    if not args.tolerance > 0:
        raise InputError(f"--tolerance is above 0, not {args.tolerance}.")
    a, b = open_copy(args.a), open_copy(args.b)
    if args.torch and (training_checkpoint.is_workdir(a.folder) or is_converted(a.folder)):
        raise InputError(
            f"--torch runs {args.a} in PyTorch, which reads the published layout only."
        )
    names = ("name", "max_prompt_tokens")  # of ours; no tensor depends on them
    differing = [
        f for f in vars(a.config) if f not in names and getattr(a.config, f) != getattr(b.config, f)
    ]
    tensors = {}
    theirs = b.tensors()
    for name, values in tqdm(a.tensors(), desc="Comparing", unit="tensor", delay=3, disable=None):
        other, found = next(theirs, (None, None))
        if other != name:
            raise InputError(
                f"{args.a} has tensor {name!r} where {args.b} has {other!r}: these are "
                "different models."
            )
        tensors[name] = compare_tensors(values, found)
    if (other := next(theirs, None)) is not None:
        raise InputError(
            f"{args.b} has tensor {other[0]!r}, which {args.a} has not: these are different models."
        )
    unequal = [name for name, row in tensors.items() if not row["agree"]]
    count = sum(int(np.prod(row["shape"])) for row in tensors.values())
    rows = {}
    if not differing and (args.stages or args.torch or count <= LARGEST_RUN):
        rows = compare_stages(_run_a(a, args.torch), _run(b), args.tolerance)
    passed = not differing and not unequal and all(row["agree"] for row in rows.values())
    largest = sorted(tensors, key=lambda name: -tensors[name].get("max_abs", np.inf))[:3]
    print(f"{len(tensors)} tensors, {len(tensors) - len(unequal)} equal; {count:,} parameters")
    for name in unequal[:20] or largest[:1]:
        print(f"  {name}  {tensors[name]}")
    for name, row in rows.items():
        numbers = "  ".join(f"{key} {value:.3g}" for key, value in row.items() if key != "agree")
        print(f"  {name:10s} {'ok ' if row['agree'] else 'NO '} {numbers}")
    report = {
        "a": str(args.a),
        "b": str(args.b),
        "a_in": "torch" if args.torch else "jax",
        "passed": passed,
        "config_differs_in": differing,
        "tensors": len(tensors),
        "unequal": unequal,
        "bit_identical": sum(
            row.get("sha256", [0, 1])[0] == row.get("sha256", [0, 1])[1] for row in tensors.values()
        ),
        "largest": {name: tensors[name] for name in largest},
        "stages": rows or "not run: pass --stages to run a model of this size",
    }
    if args.report:
        pathlib.Path(args.report).write_text(
            json.dumps({**report, "every_tensor": tensors}, indent=1) + "\n"
        )
    print(json.dumps(report))
    return 0 if passed else 1


def _run(copy: Copy) -> dict[str, np.ndarray]:
    import jax
    import numpy as np

    from blip3o_jax.models.blip3o import Blip3o
    from blip3o_jax.verify import stages

    params = jax.tree.map(lambda x: np.asarray(x, np.float32), copy.load())
    return stages.stage_outputs(Blip3o(copy.config), params, stages.stage_inputs(copy.config))


def _run_a(copy: Copy, in_torch: bool) -> dict[str, np.ndarray]:
    if not in_torch:
        return _run(copy)
    try:
        from blip3o_jax.reference import modules
        from blip3o_jax.reference.stages import stage_outputs
    except ImportError as error:
        raise InputError(
            f"--torch needs PyTorch, transformers and diffusers ({error.name} is missing): "
            "pip install 'blip3o-jax[parity]'."
        ) from error
    from blip3o_jax.verify import stages

    return stage_outputs(modules.load(copy.folder), stages.stage_inputs(copy.config))
