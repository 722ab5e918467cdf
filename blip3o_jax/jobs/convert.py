"""`blip3o-jax convert to-jax` and `to-torch`: PyTorch checkpoints in, and back out.

Both hold one tensor at a time. The result's convert.json says where it came from; the same,
shorter, is printed as one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip3o_jax import __version__
from blip3o_jax.errors import require
from blip3o_jax.jobs import verify
from blip3o_jax.jobs.options import overwrite_option
from blip3o_jax.jobs.output import new_folder

if TYPE_CHECKING:
    import numpy as np

    from blip3o_jax.checkpoints import Checkpoint

HELP = "PyTorch checkpoints in and out; prints one JSON report last"

KEEP = "keep"
DTYPES = [KEEP, "float32", "bfloat16", "float16"]
REPORT = "convert.json"
REPORT_LIMIT = 64 << 20  # bytes
FILE_COST = 16 << 10  # bytes that a file takes on disk at least, and its folder


def options(parser: argparse.ArgumentParser) -> None:
    directions = parser.add_subparsers(dest="direction", metavar="DIRECTION", required=True)
    text = "a published checkpoint, or the parts of one, for JAX on any mesh"
    to_jax = directions.add_parser("to-jax", help=text)
    text = "folder in the published layout, or an embedded name; left out when the four parts are"
    to_jax.add_argument("source", metavar="SRC", nargs="?", help=f"{text} named")
    _result_options(to_jax, run_to_jax, "each tensor's own")
    to_jax.add_argument("--ar", metavar="DIR", help="Qwen3 of transformers")
    text = "SANA of diffusers: the repository, or its transformer/"
    to_jax.add_argument("--dit", metavar="DIR", help=text)
    to_jax.add_argument("--vae", metavar="DIR", help="its autoencoder, if not in vae/ of --dit")
    to_jax.add_argument("--tokenizer", metavar="FILE.pth|DIR", help="TA-Tok's ta_tok.pth")
    text = "e.g. fsdp=8: split the files as that mesh reads them; any other can read them too"
    to_jax.add_argument("--mesh", default="", help=text)
    modes, text = ["mean", "projected-codebook"], "how a plain Qwen3 gets its image tokens"
    to_jax.add_argument("--new-vocabulary", choices=modes, help=text)

    text = "a converted checkpoint or a training run in the published PyTorch layout"
    to_torch = directions.add_parser("to-torch", help=text)
    to_torch.add_argument("source", metavar="SRC", help="folder of to-jax, or training workdir")
    _result_options(to_torch, run_to_torch, "each parameter's own")
    text = "size of a file (default: %(default).0f)"
    to_torch.add_argument("--max-shard-bytes", type=float, default=5e9, help=text)
    verify.options(directions.add_parser("verify", help=verify.HELP))


def _result_options(parser: argparse.ArgumentParser, run: Callable, own: str) -> None:
    """What both directions ask about their result."""
    parser.add_argument("destination", metavar="DST")
    text = f"of the result (default: {own})"
    parser.add_argument("--dtype", default=KEEP, choices=DTYPES, help=text)
    overwrite_option(parser, "an earlier conversion")
    parser.set_defaults(run=run)


def run_to_jax(args: argparse.Namespace) -> None:
    """SRC, or the parts that flags name -> the directory DST."""
    from blip3o_jax import checkpoints
    from blip3o_jax.convert import converted, hashes, sources
    from blip3o_jax.convert.published import write_beside
    from blip3o_jax.parallel.mesh import parse_mesh

    began = time.perf_counter()
    mesh = {"data": 1, "fsdp": 1, "tensor": 1, **parse_mesh(args.mesh)}
    left = "sizes are positive here, where no devices say what is left"
    require(min(mesh.values()) >= 1, f"--mesh {args.mesh!r}: {left}.")
    flags = {flag: getattr(args, flag) for flag in sources.FLAGS.values()}
    directory, kind = checkpoints.find(args.source) if args.source else (None, None)
    is_torch = kind in (None, checkpoints.PUBLISHED)
    require(is_torch, f"{args.source} is for JAX already; `convert to-torch` takes it.")
    _apart(args.destination, [path for path in (directory, *flags.values()) if path])

    with new_folder(args.destination, REPORT, args.overwrite) as folder:
        # Headers alone say whether everything is there, and fits the disk. Compression saves a
        # tenth to a quarter; half is out of the question, so this is the time to say so.
        name = Path(args.destination).absolute().name
        source = sources.open_source(directory, flags, args.new_vocabulary, name)
        arrays = converted.plan_arrays(source.leaves, _dtype(args))
        size = sum(entry.size for entry in arrays.values())
        _need_space(folder, size // 2 + len(arrays) * FILE_COST, args.destination)
        # The result, and what it was made of.
        parts = converted.write_params(folder, source.leaves, arrays, mesh)
        write_beside(folder, source.beside)
        read = hashes.over_files(hashes.hash_file, source.files, "Hashing the source")
        report = {
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
        details = {
            "parts": parts,
            "carried": sorted(source.beside),
            "files": {str(file): row for file, row in read.items()},
        }
        line = _write_report(folder, args, report, details)
    print(json.dumps({**line, **_cost(began)}))


def run_to_torch(args: argparse.Namespace) -> None:
    """SRC, a directory of `to-jax` or a joint training run -> the published layout at DST."""
    from blip3o_jax import checkpoints
    from blip3o_jax.convert.published import write_published

    began = time.perf_counter()
    shard, dtype = args.max_shard_bytes, _dtype(args)
    require(shard >= 1, f"--max-shard-bytes is at least 1, not {shard}.")
    folder, kind = checkpoints.find(args.source)
    is_jax = kind != checkpoints.PUBLISHED
    require(is_jax, f"{args.source} is in the published layout already.")
    _apart(args.destination, [folder])

    with new_folder(args.destination, REPORT, args.overwrite) as target:
        checkpoint = checkpoints.open(args.source)
        config, leaves = checkpoint.config, checkpoint.leaves
        # Nothing is written unless all of it fits.
        size = sum(math.prod(x.shape) * (dtype or x.dtype).itemsize for x in leaves.values())
        _need_space(target, size, args.destination)
        origin, beside = _beside(checkpoint, dtype)
        entries = write_published(target, config, leaves, dtype, shard, beside)
        # Where the folder came from, in it and, shorter, as the last line.
        report = {
            "source": str(args.source),
            "dtype": args.dtype,
            "preset": config.name,
            "parameters": sum(math.prod(entry.shape) for entry in entries.values()),
            "tensors": len(entries),
            "dtypes": Counter(entry.dtype.name for entry in entries.values()),
            "ignored_on_the_way_in": origin.get("ignored", {}),
        }
        details = {"carried": sorted({*beside, "config.json"}), "origin": origin}
        line = _write_report(target, args, report, details)
    print(json.dumps({**line, **_cost(began)}))


def _dtype(args: argparse.Namespace) -> np.dtype | None:
    from blip3o_jax.convert.published import float_dtype

    return None if args.dtype == KEEP else float_dtype(args.dtype)


def _beside(
    checkpoint: Checkpoint, dtype: np.dtype | None
) -> tuple[dict[str, Any], dict[str, Path | str]]:
    """(where a checkpoint came from, the files by name that its published copy has beside the
    weights: paths to copy, or texts)."""
    from blip3o_jax import checkpoints
    from blip3o_jax.convert.published import CONFIG_LIMIT, to_text
    from blip3o_jax.convert.safetensors_io import read_json
    from blip3o_jax.convert.sources import LICENCE, TOKENIZER_FILES

    if checkpoint.kind == checkpoints.RUN:
        return {"step": checkpoint.step}, {"tokenizer.json": checkpoint.tokenizer}
    report, config = checkpoint.folder / REPORT, checkpoint.folder / "config.json"
    origin = read_json(report, REPORT_LIMIT) if report.is_file() else {}
    names = {file.name for file in checkpoint.folder.iterdir()}
    names = (x for x in names if x in TOKENIZER_FILES or LICENCE.search(x))
    beside: dict[str, Path | str] = {name: checkpoint.folder / name for name in names}
    # The source's own config.json, but for the dtype where either conversion changed it.
    beside["config.json"] = config
    name = dtype.name if dtype else origin.get("dtype")
    if name not in (None, KEEP):
        fields = read_json(config, CONFIG_LIMIT)
        fields |= {key: name for key in ("torch_dtype", "dtype") if key in fields}
        beside["config.json"] = to_text(fields)
    return origin, beside


def _apart(destination: str, folders: Iterable[str | Path]) -> None:
    """InputError when the result would lie in what it is made from, or the other way round:
    overwriting would remove the source."""
    target = Path(destination).resolve()
    for folder in folders:
        source = Path(folder).resolve()
        apart = source not in (target, *target.parents) and target not in source.parents
        inside = f"{destination} and the source {folder} lie in each other; name another folder."
        require(apart, inside)


def _need_space(folder: Path, size: int, destination: str) -> None:
    free = shutil.disk_usage(folder).free
    disk = f"its disk has {free / 1e9:.3g} GB free"
    require(size <= free, f"{destination} needs at least {size / 1e9:.3g} GB, and {disk}.")


def _write_report(
    folder: Path, args: argparse.Namespace, report: dict[str, Any], details: dict[str, Any]
) -> dict[str, Any]:
    """Writes convert.json; returns what is printed of it, with the size of the result."""
    from blip3o_jax.convert.published import to_text, write_beside

    report = {
        "conversion": args.direction,
        "converter": f"blip3o_jax {__version__}",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **report,
    }
    write_beside(folder, {REPORT: to_text({**report, **details})})
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {**report, "checkpoint": args.destination, "bytes": size}


def _cost(began: float) -> dict[str, float]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return {"seconds": round(time.perf_counter() - began, 1), "peak_memory_bytes": peak}
