"""`blip3o-jax convert to-jax` and `to-torch`: PyTorch checkpoints in, and back out.

Both hold one tensor at a time. The result's convert.json says where it came from; the same,
shorter, is printed as one JSON line last.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import pathlib
import resource
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from blip3o_jax import __version__
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.errors import InputError
from blip3o_jax.jobs import verify
from blip3o_jax.jobs.options import overwrite_option
from blip3o_jax.jobs.output import new_folder

if TYPE_CHECKING:
    import numpy as np
    from jax.sharding import AbstractMesh

    from blip3o_jax.convert.rules import Rule, Shape
    from blip3o_jax.convert.sources import Source
    from blip3o_jax.training_checkpoint import RunLeaf

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


def run_to_jax(args) -> None:
    """SRC, or the parts that flags name -> the directory DST."""
    from jax.sharding import AbstractMesh

    from blip3o_jax import training_checkpoint
    from blip3o_jax.convert import sources
    from blip3o_jax.convert.converted import PARAMS, is_converted
    from blip3o_jax.convert.published import float_dtype
    from blip3o_jax.convert.rules import flatten
    from blip3o_jax.parallel.mesh import AXES, parse_mesh
    from blip3o_jax.pipeline import find_checkpoint

    began = time.perf_counter()
    dtype = None if args.dtype == KEEP else float_dtype(args.dtype)
    mesh = {"data": 1, "fsdp": 1, "tensor": 1, **parse_mesh(args.mesh)}
    if min(mesh.values()) < 1:
        raise InputError(
            f"--mesh {args.mesh!r}: sizes are positive here, where no devices say what is left."
        )
    flags = {flag: getattr(args, flag) for flag, _ in sources.GROUPS.values()}
    directory = args.source and find_checkpoint(args.source)
    if directory and (training_checkpoint.is_workdir(directory) or is_converted(directory)):
        raise InputError(f"{args.source} is for JAX already; `convert to-torch` takes it.")
    _apart(args.destination, [path for path in (directory, *flags.values()) if path])
    with new_folder(args.destination, REPORT, args.overwrite) as folder:
        source = sources.open_source(
            directory, flags, args.new_vocabulary, pathlib.Path(args.destination).absolute().name
        )
        dtypes = _leaf_dtypes(source, dtype)
        shapes = {path: tuple(leaf.shape) for path, leaf in flatten(source.match.abstract).items()}
        size = sum(math.prod(shape) * dtypes[path].itemsize for path, shape in shapes.items())
        # Compression takes a tenth to a quarter off; half is out of the question, so that is the
        # time to say so.
        _need_space(folder, size // 2 + len(shapes) * FILE_COST, args.destination)
        parts = _write_params(
            folder / PARAMS,
            source,
            shapes,
            dtypes,
            AbstractMesh(tuple(mesh[axis] for axis in AXES), AXES),
        )
        _carry(folder, source.carried, source.texts)
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
        files = {
            "parts": parts,
            "carried": sorted({*source.carried, *source.texts}),
            "files": _hashes(source.files),
        }
        (folder / REPORT).write_text(json.dumps({**report, **files}, indent=1) + "\n")
        size = _size(folder)
    print(json.dumps({**report, "checkpoint": args.destination, "bytes": size, **_cost(began)}))


def run_to_torch(args) -> None:
    """SRC, a directory of `to-jax` or a joint training run -> the published layout at DST."""
    from tqdm import tqdm

    from blip3o_jax import training_checkpoint
    from blip3o_jax.convert import sources
    from blip3o_jax.convert.config_json import config_to_json
    from blip3o_jax.convert.converted import is_converted, open_converted
    from blip3o_jax.convert.published import float_dtype, published_rules
    from blip3o_jax.convert.safetensors_io import Entry, read_json, write_tensors
    from blip3o_jax.pipeline import find_checkpoint, tokenizer_of

    began = time.perf_counter()
    if not args.max_shard_bytes >= 1:
        raise InputError(f"--max-shard-bytes is at least 1, not {args.max_shard_bytes}.")
    dtype = None if args.dtype == KEEP else float_dtype(args.dtype)
    folder = find_checkpoint(args.source)
    _apart(args.destination, [folder])
    with new_folder(args.destination, REPORT, args.overwrite) as target:
        origin: dict[str, Any] = {}
        if training_checkpoint.is_workdir(folder):
            cfg, leaves, origin["step"] = open_run(folder)
            carried, texts = {"tokenizer.json": tokenizer_of(cfg.name)}, {}
        elif is_converted(folder):
            cfg, leaves = open_converted(folder)
            origin = read_json(folder / REPORT, REPORT_LIMIT) if (folder / REPORT).is_file() else {}
            names = [
                file.name
                for file in folder.iterdir()
                if file.name in sources.TOKENIZER_FILES or sources.LICENCE.search(file.name)
            ]
            carried, texts = (
                {name: folder / name for name in names},
                _config_text(folder, origin.get("dtype"), dtype),
            )
        else:
            raise InputError(f"{args.source} is in the published layout already.")
        rules = published_rules(cfg)
        entries = {
            name: Entry(
                rule.tensor_shape(leaves[rule.path].shape), dtype or leaves[rule.path].dtype
            )
            for rule in rules
            for name in rule.names(leaves[rule.path].shape)
        }
        _need_space(target, sum(entry.size for entry in entries.values()), args.destination)
        tensors = tqdm(
            _tensors(rules, leaves),
            total=len(entries),
            desc=f"Writing {args.destination}",
            unit="tensor",
            delay=3,
            disable=None,
        )
        write_tensors(target, entries, tensors, args.max_shard_bytes)
        texts = texts or {
            "config.json": _json(
                config_to_json(cfg, (dtype or leaves["qwen3/norm/scale"].dtype).name)
            )
        }
        _carry(target, carried, texts)
        report = _origin("to-torch") | {
            "source": str(args.source),
            "dtype": args.dtype,
            "preset": cfg.name,
            "parameters": sum(math.prod(entry.shape) for entry in entries.values()),
            "tensors": len(entries),
            "dtypes": dict(Counter(entry.dtype.name for entry in entries.values())),
            "ignored_on_the_way_in": origin.get("ignored", {}),
        }
        (target / REPORT).write_text(
            _json({**report, "carried": sorted({*carried, *texts}), "origin": origin})
        )
        size = _size(target)
    print(json.dumps({**report, "checkpoint": args.destination, "bytes": size, **_cost(began)}))


def _leaf_dtypes(source: Source, dtype: np.dtype | None) -> dict[str, np.dtype]:
    """Each parameter's dtype by path: `dtype`, or that of its tensors; InputError when stacked
    layers differ or hold no floats."""
    from blip3o_jax.convert.rules import flatten

    shapes, found = flatten(source.match.abstract), {}
    for rule in source.match.rules:
        stored = [source.tensors[name] for name in rule.names(shapes[rule.path].shape)]
        for tensor in stored:
            if tensor.dtype != stored[0].dtype and dtype is None:
                first = f"{stored[0].name!r} {stored[0].dtype}"
                raise InputError(
                    f"{tensor} is {tensor.dtype} and {first}, which are one parameter "
                    "here; give --dtype."
                )
        found[rule.path] = dtype or stored[0].dtype
    return found


def _write_params(
    folder: pathlib.Path,
    source: Source,
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, np.dtype],
    mesh: AbstractMesh,
) -> dict[str, dict]:
    """Writes the Orbax checkpoint layer by layer; returns {part: numbers}."""
    from tqdm import tqdm

    from blip3o_jax.convert import orbax_io
    from blip3o_jax.convert.rules import tensor_to_leaf
    from blip3o_jax.models.blip3o import parts_of
    from blip3o_jax.parallel.parameters import spec

    orbax_io.save_tree(folder, dtypes)
    parts: dict[str, dict] = {
        part: {"tensors": 0, "parameters": 0, "bytes": 0} for part in parts_of(source.config)
    }
    total = sum(len(list(rule.names(shapes[rule.path]))) for rule in source.match.rules)
    with tqdm(total=total, desc="Converting", unit="tensor", delay=3, disable=None) as progress:
        for rule in source.match.rules:
            shape, dtype = shapes[rule.path], dtypes[rule.path]
            axes = [*spec(rule.path, shape, mesh), *[None] * len(shape)][: len(shape)]
            shards = tuple(mesh.shape[axis] if axis else 1 for axis in axes)
            chunks = orbax_io.chunk_shape(shape, dtype.itemsize, rule.stacked, shards)
            store = orbax_io.create(folder, rule.path, shape, dtype, chunks)
            for i, name in enumerate(rule.names(shape)):
                tensor = source.tensors[name]
                values = tensor_to_leaf(tensor.raw(), shape, rule, name)
                orbax_io.write(store[i] if rule.stacked else store, values, dtype, str(tensor))
                del values
                progress.update()
            part = parts[rule.path.split("/")[0]]
            part["tensors"] += i + 1
            part["parameters"] += math.prod(shape)
            part["bytes"] += math.prod(shape) * dtype.itemsize
    return parts


def open_run(workdir: pathlib.Path) -> tuple[Blip3oConfig, dict[str, Any], int]:
    """(configuration, arrays by path, step) of a joint training run."""
    from blip3o_jax import training_checkpoint
    from blip3o_jax.convert.padding import VOCAB_AXIS, padded
    from blip3o_jax.convert.rules import flatten
    from blip3o_jax.models.blip3o import Blip3o, parts_of
    from blip3o_jax.train.config import TrainConfig, from_dict

    saved, leaves, step = training_checkpoint.open_run(workdir)
    run = from_dict(TrainConfig, saved)
    if not run.whole_model:
        raise InputError(
            f"{workdir} is a run of stage {run.stage!r}; only a 'joint' or 'grpo' run "
            "holds the whole model."
        )
    cfg = run.blip3o()
    if cfg.qwen3.vocab_padding:
        cfg = padded(cfg, 1)
        leaves |= {
            path: _WithoutPadding(leaves[path], path, cfg.qwen3.vocab_size)
            for path in VOCAB_AXIS.keys() & leaves.keys()
        }
    needed = {
        path: tuple(leaf.shape)
        for path, leaf in flatten(Blip3o(cfg).abstract(parts_of(cfg))).items()
    }
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    if shapes != needed:
        path = min(
            path for path in shapes.keys() | needed.keys() if shapes.get(path) != needed.get(path)
        )
        raise InputError(
            f"{workdir}: parameter {path} has shape {shapes.get(path)}, and {cfg.name} "
            f"needs {needed.get(path)}."
        )
    return cfg, leaves, step


@dataclass(frozen=True)
class _WithoutPadding:
    """An array of a run without the rows behind the vocabulary."""

    leaf: RunLeaf
    path: str
    rows: int

    @property
    def dtype(self) -> np.dtype:
        return self.leaf.dtype

    @property
    def shape(self) -> Shape:
        from blip3o_jax.convert.padding import VOCAB_AXIS

        return tuple(
            self.rows if axis == VOCAB_AXIS[self.path] else size
            for axis, size in enumerate(self.leaf.shape)
        )

    def layers(self, stacked: bool) -> Iterator[np.ndarray]:
        from blip3o_jax.convert.padding import fit_vocabulary

        yield from (
            fit_vocabulary(self.path, layer, self.rows) for layer in self.leaf.layers(stacked)
        )


def _tensors(rules: list[Rule], leaves: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(torch name, tensor) in the order of the rules, one layer in memory at a time."""
    from blip3o_jax.convert.rules import leaf_to_tensor

    for rule in rules:
        leaf = leaves[rule.path]
        for name, layer in zip(rule.names(leaf.shape), leaf.layers(rule.stacked), strict=True):
            yield name, leaf_to_tensor(layer, rule)


def _config_text(
    folder: pathlib.Path, dtype_in: str | None, dtype: np.dtype | None
) -> dict[str, str]:
    """{"config.json": its text}: the file's own, but for the dtype that it names where one
    conversion or the other changed that."""
    from blip3o_jax.convert.published import CONFIG_LIMIT
    from blip3o_jax.convert.safetensors_io import read_json

    text = (folder / "config.json").read_text(encoding="utf-8")
    name = dtype.name if dtype else dtype_in
    if name in (None, KEEP):
        return {"config.json": text}
    fields = read_json(folder / "config.json", CONFIG_LIMIT)
    return {
        "config.json": _json(
            fields | {key: name for key in ("torch_dtype", "dtype") if key in fields}
        )
    }


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


def _carry(
    folder: pathlib.Path, carried: Mapping[str, pathlib.Path], texts: Mapping[str, str]
) -> None:
    for name, file in carried.items():
        shutil.copyfile(file, folder / name)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _hashes(files: set[pathlib.Path]) -> dict[str, dict]:
    """{file: its size and SHA-256} of what was read."""
    from tqdm import tqdm

    found = {}
    for file in tqdm(sorted(files), desc="Hashing the source", unit="file", delay=3, disable=None):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        found[str(file)] = {"bytes": file.stat().st_size, "sha256": digest}
    return found


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


def _json(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, indent=2) + "\n"
