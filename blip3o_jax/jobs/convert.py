"""`blip3o-jax convert to-jax` and `to-torch`: PyTorch checkpoints in, and back out, one tensor at a
time. convert.json in the result says where it came from; the same, shorter, is printed last."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip3o_jax import __version__, paths
from blip3o_jax.errors import require
from blip3o_jax.jobs import verify
from blip3o_jax.jobs.options import overwrite_option
from blip3o_jax.jobs.output import new_folder

if TYPE_CHECKING:
    import numpy as np

    from blip3o_jax.checkpoints import Checkpoint
    from blip3o_jax.paths import AnyPath

log = logging.getLogger(__name__)

HELP = "PyTorch checkpoints in and out; prints one JSON report last"

KEEP = "keep"
DTYPES = [KEEP, "float32", "bfloat16", "float16"]
REPORT = "convert.json"
REPORT_LIMIT = 64 << 20  # bytes
FILE_COST = 16 << 10  # bytes that a file takes on disk at least, and its folder


def options(parser: argparse.ArgumentParser) -> None:
    directions = parser.add_subparsers(dest="direction", metavar="DIRECTION", required=True)
    # Into JAX.
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
    text = "take the .fp16, .bf16, ... weights of a folder that has them; needed where it has"
    to_jax.add_argument("--variant", metavar="NAME", help=f"{text} several and no plain ones")
    text = "do without the tensors of this name, * for any characters; may be repeated"
    to_jax.add_argument("--ignore", metavar="PATTERN", action="append", default=[], help=text)
    text = "merge the LoRA adapter that lies beside a part's weights"
    to_jax.add_argument("--merge-lora", action="store_true", help=text)
    # Back, and a comparison of both.
    text = "a converted checkpoint or a training run in the published PyTorch layout"
    to_torch = directions.add_parser("to-torch", help=text)
    text = "folder of to-jax, training workdir, or WORKDIR@STEP for one of its checkpoints"
    to_torch.add_argument("source", metavar="SRC", help=text)
    _result_options(to_torch, run_to_torch, "each parameter's own")
    text = "a converted checkpoint whose unused tensors and small files a run's result gets"
    to_torch.add_argument("--unused", metavar="DIR", help=text)
    text = "size of a file (default: %(default).0f)"
    to_torch.add_argument("--max-shard-bytes", type=float, default=5e9, help=text)
    verify.options(directions.add_parser("verify", help=verify.HELP))


def _result_options(parser: argparse.ArgumentParser, run: Callable, own: str) -> None:
    """What both directions ask about their result."""
    parser.add_argument("destination", metavar="DST")
    text = f"of the result (default: {own})"
    parser.add_argument("--dtype", default=KEEP, choices=DTYPES, help=text)
    text = "leave out the tensors of the source that the model here does not use"
    parser.add_argument("--drop-unused", action="store_true", help=text)
    overwrite_option(parser, "an earlier conversion")
    parser.set_defaults(run=run)


def run_to_jax(args: argparse.Namespace) -> None:
    """SRC, or the parts that flags name -> the directory DST."""
    from blip3o_jax import checkpoints
    from blip3o_jax.convert import converted, hashes, sources, unused
    from blip3o_jax.convert.folders import Options
    from blip3o_jax.convert.published import float_dtype, write_beside
    from blip3o_jax.parallel.mesh import parse_mesh

    dtype = None if args.dtype == KEEP else float_dtype(args.dtype)
    mesh = {"data": 1, "fsdp": 1, "tensor": 1, **parse_mesh(args.mesh)}
    left = "sizes are positive here, where no devices say what is left"
    require(min(mesh.values()) >= 1, f"--mesh {args.mesh!r}: {left}.")
    flags = {flag: getattr(args, flag) for flag in sources.FLAGS.values()}
    for flag, path in flags.items():
        exists = not path or paths.path(path).exists()
        require(exists, f"--{flag} {path}: there is no such file or folder.")
    directory, kind = checkpoints.find(args.source) if args.source else (None, None)
    is_torch = kind in (None, checkpoints.PUBLISHED)
    require(is_torch, f"{args.source} is for JAX already; `convert to-torch` takes it.")
    # DST appears when all is written.
    read_from = [path for path in (directory, *flags.values()) if path]
    with _conversion(args, read_from) as (folder, report, details):
        # Headers alone say whether everything is there, and fits the disk. Compression saves a
        # tenth to a quarter; half is out of the question, so this is the time to say so.
        name = paths.path(args.destination).absolute().name
        options = Options(args.variant, tuple(args.ignore), args.merge_lora)
        source = sources.open_source(directory, flags, args.new_vocabulary, name, options)
        if "tokenizer.json" not in source.beside:
            where = f"copy one into {args.destination}"
            log.warning(
                "The source has no tokenizer.json, without which no prompt is read; %s.", where
            )
        kept = {} if args.drop_unused else source.unused
        size = _size(source.leaves, dtype) // 2 + len(source.leaves) * FILE_COST
        size += unused.size(kept, dtype)
        _need_space(folder, size, args.destination)
        # The result, and what it was made of.
        parts = converted.write_params(folder, source.leaves, dtype, mesh)
        unused.keep(folder, kept, dtype)
        write_beside(folder, source.beside)
        read = hashes.over_files(hashes.hash_file, source.files, "Hashing the source")
        numbers = {"used": sum(part["tensors"] for part in parts.values())}
        numbers |= {"ignored": len(source.ignored), "kept": len(kept), "made": len(source.made)}
        repeated = {} if args.drop_unused else source.repeated
        report |= {
            "source": {label: str(path) for label, path in source.folders.items()},
            "dtype": args.dtype,
            "mesh": args.mesh,
            "parameters": sum(part["parameters"] for part in parts.values()),
            "tensors": numbers,
            "ignored": source.ignored,
            "made": source.made,
            "names": source.notes,
            "merged": source.merged,
        }
        details |= {"parts": parts, "carried": sorted(source.beside), "renamed": source.renamed}
        details["repeated"] = {name: (dtype or own).name for name, own in repeated.items()}
        details["files"] = {str(file): row for file, row in read.items()}


def run_to_torch(args: argparse.Namespace) -> None:
    """SRC, a directory of `to-jax` or a joint training run -> the published layout at DST."""
    from blip3o_jax import checkpoints
    from blip3o_jax.convert import unused
    from blip3o_jax.convert.published import float_dtype, write_published

    dtype = None if args.dtype == KEEP else float_dtype(args.dtype)
    shard = args.max_shard_bytes
    require(shard >= 1, f"--max-shard-bytes is at least 1, not {shard}.")
    folder, kind = checkpoints.find(args.source)
    require(kind != checkpoints.PUBLISHED, f"{args.source} is in the published layout already.")
    # A run keeps none of its source's unused tensors.
    keeper = paths.path(args.unused) if args.unused else folder
    own = f"{args.source} is converted and keeps its own unused tensors; --unused is for a run."
    require(not args.unused or kind == checkpoints.RUN, own)
    no_keeper = f"--unused {args.unused} is not a folder of `convert to-jax`."
    require(not args.unused or checkpoints.find(keeper)[1] == checkpoints.CONVERTED, no_keeper)
    # DST appears when all is written.
    with _conversion(args, [folder, keeper]) as (target, report, details):
        checkpoint = checkpoints.open(args.source)
        checkpoint.verify()  # every byte: damage would travel on under a good name
        if args.unused:
            unused.verify(keeper, whole=True)
        config, leaves = checkpoint.config, checkpoint.leaves
        origin, beside = _beside(checkpoint, dtype, keeper)
        # What the model does not use, under the names that the source had.
        more, names, source = {}, {}, _origin(keeper) if args.unused else origin
        if not args.drop_unused:
            more = unused.restored(keeper, source, (config, leaves), dtype)
            names = unused.own_names(source)
        # Nothing is written unless all of it fits.
        size = _size(leaves, dtype) + sum(entry.size for entry, _ in more.values())
        _need_space(target, size, args.destination)
        entries = write_published(target, config, leaves, dtype, shard, beside, more, names)
        report |= {
            "source": str(args.source),
            "dtype": args.dtype,
            "preset": config.name,
            "parameters": sum(math.prod(entry.shape) for entry in entries.values()),
            "tensors": len(entries),
            "restored": len(more),
            "dtypes": Counter(entry.dtype.name for entry in entries.values()),
            "ignored_on_the_way_in": origin.get("ignored", {}),
        }
        if config.sana.few_steps:
            report["not_in_diffusers"] = sorted(name for name in entries if ".span_embed." in name)
            log.info(
                "diffusers' SANA has no %s: it then takes many steps, as before stage 'distill'.",
                ", ".join(report["not_in_diffusers"]),
            )
        details |= {"carried": sorted({*beside, "config.json"}), "origin": origin}


@contextlib.contextmanager
def _conversion(
    args: argparse.Namespace, read_from: list[str | AnyPath]
) -> Iterator[tuple[Path, dict[str, Any], dict[str, Any]]]:
    """(the folder that becomes DST, a report, its details) for the block to fill: the two are
    written as convert.json, and the report is printed with what the conversion took."""
    from blip3o_jax.convert.published import to_text, write_beside

    began, now = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    # Overwriting would remove a source that lies in the result, or the other way round.
    target = paths.path(args.destination).resolve()
    for place in read_from:
        source = paths.path(place).resolve()
        apart = source not in (target, *target.parents) and target not in source.parents
        lie = f"{args.destination} and the source {place} lie in each other"
        require(apart, f"{lie}; name another folder.")
    report: dict[str, Any] = {"conversion": args.direction}
    report |= {"converter": f"blip3o_jax {__version__}", "time": now}
    details: dict[str, Any] = {}
    with new_folder(args.destination, REPORT, args.overwrite) as folder:
        yield folder, report, details
        write_beside(folder, {REPORT: to_text({**report, **details})})
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    # What it took is known when all is in its place.
    report |= {"checkpoint": args.destination, "bytes": size}
    report["seconds"] = round(time.perf_counter() - began, 1)
    report["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    print(json.dumps(report))


def _size(leaves: dict[str, Any], dtype: np.dtype | None) -> int:
    """Bytes of the parameters as `dtype`."""
    return sum(math.prod(x.shape) * (dtype or x.dtype).itemsize for x in leaves.values())


def _origin(folder: AnyPath) -> dict[str, Any]:
    """A folder's convert.json, where it has one."""
    from blip3o_jax.files import read_json

    report = folder / REPORT
    return read_json(report, REPORT_LIMIT) if report.is_file() else {}


def _beside(
    checkpoint: Checkpoint, dtype: np.dtype | None, keeper: AnyPath
) -> tuple[dict[str, Any], dict[str, AnyPath | str]]:
    """(where a checkpoint came from, what its published copy has beside the weights): the small
    files of `keeper`, with a run's own tokenizer and model."""
    from blip3o_jax import checkpoints
    from blip3o_jax.convert.config_json import EDIT_FLAGS, config_to_json
    from blip3o_jax.convert.published import CONFIG_LIMIT, to_text
    from blip3o_jax.convert.sources import LICENCE, TOKENIZER_FILES
    from blip3o_jax.files import read_json

    config, origin = keeper / "config.json", _origin(keeper)
    names = {file.name for file in keeper.iterdir()}
    names = (x for x in names if x in TOKENIZER_FILES or LICENCE.search(x))
    beside: dict[str, AnyPath | str] = {name: keeper / name for name in names}
    if checkpoint.kind == checkpoints.RUN:
        origin, own = {"step": checkpoint.step}, {"tokenizer.json": checkpoint.tokenizer}
        if keeper == checkpoint.folder:
            lacks = "chat template, licences and fields of config.json like mm_vision_tower"
            log.warning("A run lacks %s; --unused takes them from a converted checkpoint.", lacks)
            return origin, own
        # What the run's own config leaves out about the model is not the case.
        left = {*EDIT_FLAGS, "rope_parameters", "dtype"}
        fields = {key: x for key, x in read_json(config, CONFIG_LIMIT).items() if key not in left}
        name = (dtype or checkpoint.leaves["qwen3/norm/scale"].dtype).name
        own["config.json"] = to_text(fields | config_to_json(checkpoint.config, name))
        return origin, beside | own
    # The source's own config.json, but for the dtype where either conversion changed it.
    beside["config.json"] = config
    name = dtype.name if dtype else origin.get("dtype")
    if name not in (None, KEEP):
        fields = read_json(config, CONFIG_LIMIT)
        fields |= {key: name for key in ("torch_dtype", "dtype") if key in fields}
        beside["config.json"] = to_text(fields)
    return origin, beside


def _need_space(folder: Path, size: int, destination: str) -> None:
    free = shutil.disk_usage(folder).free
    disk = f"its disk has {free / 1e9:.3g} GB free"
    require(size <= free, f"{destination} needs at least {size / 1e9:.3g} GB, and {disk}.")
