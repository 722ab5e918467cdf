"""`blip3o-jax convert to-jax` and `to-torch`: PyTorch checkpoints in, and back out.

Both hold one tensor at a time. The result's convert.json says where it came from; the same,
shorter, is printed as one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import resource
import shutil
import time
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from blip3o_jax import __version__
from blip3o_jax.errors import InputError
from blip3o_jax.jobs import verify
from blip3o_jax.jobs.options import overwrite_option
from blip3o_jax.jobs.output import new_folder

if TYPE_CHECKING:
    import numpy as np

    from blip3o_jax.checkpoints import Checkpoint

HELP = "PyTorch checkpoints in and out; prints one JSON report last"

DTYPES = ["keep", "float32", "bfloat16", "float16"]
REPORT = "convert.json"
REPORT_LIMIT = 64 << 20  # bytes
FILE_COST = 16 << 10  # bytes that a file takes on disk at least, and its folder
KEEP = "keep"


def options(parser: argparse.ArgumentParser) -> None:
    directions = parser.add_subparsers(dest="direction", metavar="DIRECTION", required=True)
    to_jax = directions.add_parser(
        "to-jax", help="a published checkpoint, or the parts of one, for JAX on any mesh"
    )
    to_jax.add_argument(
        "source",
        metavar="SRC",
        nargs="?",
        help="folder in the published layout, or an embedded name; left out when the four parts "
        "are named",
    )
    to_jax.add_argument("destination", metavar="DST")
    to_jax.add_argument("--ar", metavar="DIR", help="Qwen3 of transformers")
    to_jax.add_argument(
        "--dit", metavar="DIR", help="SANA of diffusers: the repository, or its transformer/"
    )
    to_jax.add_argument("--vae", metavar="DIR", help="its autoencoder, if not in vae/ of --dit")
    to_jax.add_argument("--tokenizer", metavar="FILE.pth|DIR", help="TA-Tok's ta_tok.pth")
    to_jax.add_argument(
        "--dtype", default=KEEP, choices=DTYPES, help="of the result (default: each tensor's own)"
    )
    to_jax.add_argument(
        "--mesh",
        default="",
        help="e.g. fsdp=8: split the files as that mesh reads them; any other can read them too",
    )
    to_jax.add_argument(
        "--new-vocabulary",
        choices=["mean", "projected-codebook"],
        help="how a plain Qwen3 gets its image tokens",
    )
    overwrite_option(to_jax, "an earlier conversion")
    to_jax.set_defaults(run=run_to_jax)

    to_torch = directions.add_parser(
        "to-torch", help="a converted checkpoint or a training run in the published PyTorch layout"
    )
    to_torch.add_argument("source", metavar="SRC", help="folder of to-jax, or training workdir")
    to_torch.add_argument("destination", metavar="DST")
    to_torch.add_argument(
        "--dtype",
        default=KEEP,
        choices=DTYPES,
        help="of the result (default: each parameter's own)",
    )
    to_torch.add_argument(
        "--max-shard-bytes", type=float, default=5e9, help="size of a file (default: %(default).0f)"
    )
    overwrite_option(to_torch, "an earlier conversion")
    to_torch.set_defaults(run=run_to_torch)
    verify.options(directions.add_parser("verify", help=verify.HELP))


def run_to_jax(args: argparse.Namespace) -> None:
    """SRC, or the parts that flags name -> the directory DST."""
    from blip3o_jax import checkpoints
    from blip3o_jax.convert import converted, hashes, sources
    from blip3o_jax.convert.published import float_dtype, write_beside
    from blip3o_jax.parallel.mesh import parse_mesh

    began = time.perf_counter()
    dtype = None if args.dtype == KEEP else float_dtype(args.dtype)
    mesh = {"data": 1, "fsdp": 1, "tensor": 1, **parse_mesh(args.mesh)}
    if min(mesh.values()) < 1:
        raise InputError(
            f"--mesh {args.mesh!r}: sizes are positive here, where no devices say what is left."
        )
    flags = {flag: getattr(args, flag) for flag, _ in sources.GROUPS.values()}
    directory, kind = checkpoints.find(args.source) if args.source else (None, None)
    if kind in (checkpoints.RUN, checkpoints.CONVERTED):
        raise InputError(f"{args.source} is for JAX already; `convert to-torch` takes it.")
    _apart(args.destination, [path for path in (directory, *flags.values()) if path])

    with new_folder(args.destination, REPORT, args.overwrite) as folder:
        # Headers alone say whether everything is there, and fits the disk.
        name = pathlib.Path(args.destination).absolute().name
        source = sources.open_source(directory, flags, args.new_vocabulary, name)
        arrays = converted.plan_arrays(source, dtype)
        size = sum(entry.size for entry in arrays.values())
        # Compression saves a tenth to a quarter; half is out of the question, so this is the time
        # to say so.
        _need_space(folder, size // 2 + len(arrays) * FILE_COST, args.destination)

        parts = converted.write_params(folder, source, arrays, mesh)
        write_beside(folder, {**source.carried, **source.texts})
        report = _origin("to-jax") | {
            "source": {label: str(path) for label, path in source.folders.items()},
            "dtype": args.dtype,
            "mesh": args.mesh,
            "parameters": sum(part["parameters"] for part in parts.values()),
            "tensors": {
                "used": sum(part["tensors"] for part in parts.values()),
                "ignored": len(source.ignored),
                "made": len(source.made),
            },
            "ignored": source.ignored,
            "made": source.made,
        }
        read = hashes.over_files(hashes.hash_file, source.files, "Hashing the source")
        details = {
            "parts": parts,
            "carried": sorted({*source.carried, *source.texts}),
            "files": {str(file): row for file, row in read.items()},
        }
        write_beside(folder, {REPORT: json.dumps({**report, **details}, indent=1) + "\n"})
        size = _size(folder)
    print(json.dumps({**report, "checkpoint": args.destination, "bytes": size, **_cost(began)}))


def run_to_torch(args: argparse.Namespace) -> None:
    """SRC, a directory of `to-jax` or a joint training run -> the published layout at DST."""
    from blip3o_jax import checkpoints
    from blip3o_jax.convert.published import float_dtype, write_beside, write_published

    began = time.perf_counter()
    if not args.max_shard_bytes >= 1:
        raise InputError(f"--max-shard-bytes is at least 1, not {args.max_shard_bytes}.")
    dtype = None if args.dtype == KEEP else float_dtype(args.dtype)
    folder, kind = checkpoints.find(args.source)
    if kind == checkpoints.PUBLISHED:
        raise InputError(f"{args.source} is in the published layout already.")
    _apart(args.destination, [folder])

    with new_folder(args.destination, REPORT, args.overwrite) as target:
        checkpoint = checkpoints.open(args.source)
        leaves = checkpoint.leaves
        # Nothing is written unless all of it fits.
        size = sum(
            math.prod(leaf.shape) * (dtype or leaf.dtype).itemsize for leaf in leaves.values()
        )
        _need_space(target, size, args.destination)
        origin, beside = _beside(checkpoint, dtype)
        entries = write_published(
            target, checkpoint.config, leaves, dtype, args.max_shard_bytes, beside
        )
        # Where the folder came from, in it and, shorter, as the last line.
        report = _origin("to-torch") | {
            "source": str(args.source),
            "dtype": args.dtype,
            "preset": checkpoint.config.name,
            "parameters": sum(math.prod(entry.shape) for entry in entries.values()),
            "tensors": len(entries),
            "dtypes": dict(Counter(entry.dtype.name for entry in entries.values())),
            "ignored_on_the_way_in": origin.get("ignored", {}),
        }
        details = {"carried": sorted({*beside, "config.json"}), "origin": origin}
        write_beside(target, {REPORT: json.dumps({**report, **details}, indent=2) + "\n"})
        size = _size(target)
    print(json.dumps({**report, "checkpoint": args.destination, "bytes": size, **_cost(began)}))


def _beside(
    checkpoint: Checkpoint, dtype: np.dtype | None
) -> tuple[dict[str, Any], dict[str, pathlib.Path | str]]:
    """(where a checkpoint came from, the files by name that its published copy has beside the
    weights: paths to copy, or texts)."""
    from blip3o_jax import checkpoints
    from blip3o_jax.convert import sources
    from blip3o_jax.convert.published import CONFIG_LIMIT
    from blip3o_jax.convert.safetensors_io import read_json

    if checkpoint.kind == checkpoints.RUN:
        return {"step": checkpoint.step}, {"tokenizer.json": checkpoint.tokenizer}
    folder = checkpoint.folder
    origin = read_json(folder / REPORT, REPORT_LIMIT) if (folder / REPORT).is_file() else {}
    beside: dict[str, pathlib.Path | str] = {
        file.name: file
        for file in folder.iterdir()
        if file.name in sources.TOKENIZER_FILES or sources.LICENCE.search(file.name)
    }
    # The source's own config.json, but for the dtype where either conversion changed it.
    beside["config.json"] = folder / "config.json"
    name = dtype.name if dtype else origin.get("dtype")
    if name not in (None, KEEP):
        fields = read_json(folder / "config.json", CONFIG_LIMIT)
        fields |= {key: name for key in ("torch_dtype", "dtype") if key in fields}
        beside["config.json"] = json.dumps(fields, indent=2) + "\n"
    return origin, beside


def _apart(destination: str, folders: list) -> None:
    """InputError when the result would lie in what it is made from, or the other way round:
    overwriting would remove the source."""
    target = pathlib.Path(destination).resolve()
    for folder in folders:
        source = pathlib.Path(folder).resolve()
        if target == source or target in source.parents or source in target.parents:
            raise InputError(
                f"{destination} and the source {folder} lie in each other; name another folder."
            )


def _need_space(folder: pathlib.Path, size: int, destination: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(
            f"{destination} needs at least {size / 1e9:.3g} GB, and its disk has "
            f"{free / 1e9:.3g} GB free."
        )


def _origin(direction: str) -> dict[str, str]:
    return {
        "conversion": direction,
        "converter": f"blip3o_jax {__version__}",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cost(began: float) -> dict[str, float]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return {"seconds": round(time.perf_counter() - began, 1), "peak_memory_bytes": peak}


def _size(folder: pathlib.Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
