"""Safetensors files: a directory's tensors, unread, and writing them one at a time, in shards.

The format is 8 bytes (the header's length), a JSON header, then the tensors back to back. The
library checks the headers; the values are read and written here, because it maps whole files into
memory to read them, which a process's peak then counts, and wants a whole shard to write it.
"""

import contextlib
import json
import logging
import math
import re
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from blip3o_jax import paths
from blip3o_jax.errors import InputError, os_errors, require
from blip3o_jax.files import json_object, read_json
from blip3o_jax.paths import AnyPath

HEADER_LIMIT, INDEX_LIMIT = 100 << 20, 16 << 20  # bytes; the first is the library's own
BLOCK = 64 << 20  # bytes of a tensor that are checked, converted and written at once
DTYPES = {"F16": np.dtype("float16"), "BF16": np.dtype(ml_dtypes.bfloat16)}
DTYPES |= {"F32": np.dtype("float32")}
# What no parameter has, and a tensor that is only carried along may have.
CARRIED = {"F64": "float64", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"}
CARRIED |= {"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool"}
CARRIED |= {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
CARRIED = DTYPES | {code: np.dtype(dtype) for code, dtype in CARRIED.items()}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, unread; its values lie back to back from byte `offset` on."""

    file: AnyPath
    name: str  # the file's own
    shape: tuple[int, ...]
    code: str  # of the dtype
    offset: int

    @property
    def dtype(self) -> np.dtype:
        """InputError when the values are not floats that can be read."""
        readable = ", ".join(DTYPES)
        require(self.code in DTYPES, f"{self} has dtype {self.code}; readable are {readable}.")
        return DTYPES[self.code]

    @property
    def carried_dtype(self) -> np.dtype:
        """The same of any values that can be carried along."""
        unknown = f"{self} has dtype {self.code}, which cannot be kept; add --drop-unused."
        require(self.code in CARRIED, unknown)
        return CARRIED[self.code]

    def raw(self, rows: slice | None = None, carried: bool = False) -> np.ndarray:
        """The values as they are stored, finite or not: all, or `rows` of the first axis; only
        those that are `carried` along may be other than floats."""
        shape, offset = self.shape, self.offset
        dtype = self.carried_dtype if carried else self.dtype
        if rows is not None and shape:
            start, stop, _ = rows.indices(shape[0])
            shape = (max(0, stop - start), *shape[1:])
            offset += start * math.prod(shape[1:]) * dtype.itemsize
        # Nothing is allocated beside the result.
        buffer = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
        with os_errors(f"{self} cannot be read"):
            size = paths.read_into(self.file, offset, buffer.data)
        require(size == buffer.size, f"{self} is cut short.")
        return buffer.view(dtype).reshape(shape)

    def read(self, dtype) -> np.ndarray:
        """The values as `dtype`; InputError when they are not floats, or not finite in it."""
        return finite(self.raw(), dtype, str(self))

    def __str__(self) -> str:
        return f"{self.file}: tensor {self.name!r}"


def row_blocks(shape: tuple[int, ...], itemsize: int, limit: int = BLOCK) -> Iterator[slice]:
    """Slices of the first axis of at most `limit` bytes each, or of one row that is larger."""
    rows = max(1, limit // max(1, math.prod(shape[1:]) * itemsize))
    return (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))


def finite(tensor: np.ndarray, dtype, where: str) -> np.ndarray:
    """`tensor` as `dtype`; InputError beginning with `where` when a value is not finite in it."""
    with np.errstate(over="ignore"):
        tensor = tensor.astype(dtype, copy=False)
    require(np.isfinite(tensor).all(), f"{where} holds NaN or infinity as {tensor.dtype.name}.")
    return tensor


@contextlib.contextmanager
def _with_header(file: AnyPath) -> Iterator[AnyPath]:
    """A local file with the header and the length of `file`: itself, or of an object one without
    its values, which takes no room."""
    if not paths.is_bucket(file):
        yield file
        return
    with tempfile.NamedTemporaryFile() as local, file.open("rb") as stream:
        local.write(length := stream.read(8))
        if len(length) == 8:
            local.write(stream.read(min(*struct.unpack("<Q", length), HEADER_LIMIT)))
        local.truncate(file.stat().st_size)
        yield Path(local.name)


def open_file(file: AnyPath) -> dict[str, Stored]:
    """The tensors of one file; InputError when header and length disagree or a name repeats."""
    try:
        with _with_header(file) as local, safe_open(local, framework="numpy"):
            pass  # the library has checked the header against the file's length
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json_object("its header", stream.read(min(length, HEADER_LIMIT)))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{file} is damaged or cut short: {str(error).rstrip('.')}.") from error
    # Offsets count from the header's end.
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first = 8 + length + entry["data_offsets"][0]
        tensors[name] = Stored(file, name, tuple(entry["shape"]), entry["dtype"], first)
    return tensors


def _read_index(path: AnyPath) -> dict[str, str]:
    """{tensor: file} of an index; InputError for a file that could lie outside the directory."""
    places = read_json(path, INDEX_LIMIT).get("weight_map")
    is_map = isinstance(places, dict) and len(places) > 0
    require(is_map, f"{path} has no weight_map of tensor names to files.")
    there = {file.name for file in path.parent.iterdir()}
    for name, file in places.items():
        is_plain = isinstance(file, str) and re.fullmatch(r"[\w.-]+\.safetensors", file)
        sentence = f"{path} places {name!r} in {file!r}, which is not the plain name of a"
        require(is_plain, f"{sentence} .safetensors file.")
        require(file in there, f"{path} places {name!r} in {file}, which is missing.")
    return places


def metadata(file: AnyPath) -> dict[str, str]:
    """What a file says of itself beside its tensors."""
    try:
        with _with_header(file) as local, safe_open(local, framework="numpy") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is damaged or cut short: {error}.") from error


def _find(directory: AnyPath, stem: str, variant: str | None) -> AnyPath:
    """The file or index that holds the weights: of `variant` where there is one, else the plain
    ones, else those of the only variant."""
    pattern = rf"{stem}(?:\.(\w+))?\.safetensors(?:\.index(?:\.(\w+))?\.json)?"
    files: dict[str, list[AnyPath]] = {}
    for file in sorted(directory.glob(f"{stem}*")):
        if (match := re.fullmatch(pattern, file.name)) and file.is_file():
            files.setdefault(match[1] or match[2] or "", []).append(file)
    # One of them, and of that one file or one index.
    choices = f"{directory} holds the weights as {', '.join(files)}; choose with --variant."
    require(variant in files or "" in files or len(files) < 2, choices)
    name = variant if variant in files else "" if "" in files else next(iter(files), "")
    chosen, dot = files.get(name, []), f".{name}" if name else ""
    either = f"{stem}{dot}.safetensors or {stem}.safetensors.index{dot}.json"
    which = "both" if chosen else "neither"
    # PyTorch's older files are programs.
    pickles = sorted(file.name for file in directory.glob("*.bin"))[:1] if not chosen else []
    which += "".join(f" ({file} is a pickle, which is not read)" for file in pickles)
    require(len(chosen) == 1, f"{directory} needs either {either}, and has {which}.")
    if name:
        log.info("%s: the variant %s.", directory, name)
    return chosen[0]


def open_tensors(
    directory: AnyPath, stem: str = "model", variant: str | None = None
) -> dict[str, Stored]:
    """All tensors of `STEM.safetensors`, or of the shards that `STEM.safetensors.index.json` names,
    or of those of a variant (see `_find`); none is read yet. InputError when there are neither or
    both, when a shard is missing or damaged, when a tensor is in two shards, or when the index and
    the shards disagree."""
    index = _find(directory, stem, variant)
    if index.suffix == ".safetensors":
        return open_file(index)
    # Every shard holds just what the index says.
    places, tensors = _read_index(index), {}
    for file in sorted(set(places.values())):
        for name, stored in open_file(directory / file).items():
            if name in tensors:
                both = f"{tensors[name].file.name} and {file}"
                raise InputError(f"{directory}: tensor {name!r} is in both {both}.")
            is_placed = places.get(name) == file
            require(is_placed, f"{index} does not place {name!r} in {file}, which holds it.")
            tensors[name] = stored
    name = min(places.keys() - tensors.keys(), default="")
    holds = f"{index} places {name!r} in {places.get(name)}, which does not hold it."
    require(places.keys() == tensors.keys(), holds)
    return tensors


@dataclass(frozen=True)
class Entry:
    """What is known of a tensor before it is written."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def _plan(entries: Mapping[str, Entry], limit: float) -> list[list[str]]:
    """Names of each shard in order, of at most `limit` bytes unless a single tensor is larger."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in entries.items():
        if shards[-1] and size + entry.size > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += entry.size
    return shards


def _header(names: list[str], entries: Mapping[str, Entry]) -> bytes:
    """Length and JSON of the header of a file that holds the tensors `names`."""
    codes = {dtype: code for code, dtype in CARRIED.items()}
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        shape, code, start = entries[name].shape, codes[entries[name].dtype], end
        end += entries[name].size
        fields[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return struct.pack("<Q", len(text)) + text


def _write(stream, tensor: np.ndarray | Stored, dtype: np.dtype, where: str) -> None:
    """The bytes of `tensor`, a view of any order, converted and checked a block at a time; one that
    is unread and has `dtype` already is copied, whatever it holds."""
    is_carried = isinstance(tensor, Stored)
    if not is_carried and not tensor.ndim:
        tensor = tensor[None]
    for rows in row_blocks(tensor.shape or (1,), dtype.itemsize):
        block = tensor.raw(rows, carried=True) if is_carried else tensor[rows]
        if not is_carried or block.dtype != dtype:
            block = finite(block, dtype, where)
        stream.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)


def write_tensors(
    directory: Path, entries: Mapping[str, Entry], tensors: Iterable, max_shard_bytes: float
) -> None:
    """Writes (name, array or Stored) pairs in the order of `entries`, into one file, or into shards
    with an index when they exceed `max_shard_bytes`; InputError for a value not finite in its
    dtype."""
    shards, tensors, places = _plan(entries, max_shard_bytes), iter(tensors), {}
    for i, names in enumerate(shards, 1):
        number = "" if len(shards) == 1 else f"-{i:05}-of-{len(shards):05}"
        file = f"model{number}.safetensors"
        places.update(dict.fromkeys(names, file))
        with (directory / file).open("wb") as stream:
            stream.write(_header(names, entries))
            for expected in names:
                name, tensor = next(tensors)
                assert (name, tensor.shape) == (expected, tuple(entries[expected].shape))
                where = str(tensor) if isinstance(tensor, Stored) else f"Tensor {name!r}"
                _write(stream, tensor, entries[expected].dtype, where)
    # One file needs no index.
    if len(shards) > 1:
        total = sum(entry.size for entry in entries.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (directory / "model.safetensors.index.json").write_text(text)
