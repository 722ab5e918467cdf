"""Safetensors files: a directory's tensors as a lazy mapping, and writing them one at a time, in shards.

Reading goes through the safetensors library, which maps files into memory and checks their headers. Writing does not, because the
library wants a whole shard in memory: the format is 8 bytes (the header's length), a JSON header, then the tensors back to back.
"""

import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from blip3o_jax.config import ConfigError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
INDEX_LIMIT = 16 << 20  # bytes
DTYPES = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16), "F32": np.dtype(np.float32)}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, unread. `name` is the file's own; `dtype` is the format's code, such as BF16."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    handle: Any

    def read(self, dtype) -> np.ndarray:
        """The values as `dtype`; ConfigError when they are not floats or not finite (in `dtype`, where float16 ends at 65504)."""
        if self.dtype not in DTYPES:
            raise ConfigError(f"{self.file}: tensor {self.name!r} has dtype {self.dtype}; readable are {', '.join(DTYPES)}.")
        return finite(self.handle.get_tensor(self.name), dtype, f"{self.file}: tensor {self.name!r}")


class Tensors(Mapping):
    """Stored tensors by name, read when asked for and not kept."""

    def __init__(self, stored: Mapping[str, Stored], dtype):
        self._stored, self._dtype = stored, dtype

    def __getitem__(self, name: str) -> np.ndarray:
        return self._stored[name].read(self._dtype)

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def finite(tensor: np.ndarray, dtype, where: str) -> np.ndarray:
    """`tensor` as `dtype`; ConfigError beginning with `where` when a value is not finite in it."""
    with np.errstate(over="ignore"):
        tensor = tensor.astype(dtype, copy=False)
    if not np.isfinite(tensor).all():
        raise ConfigError(f"{where} holds NaN or infinity as {tensor.dtype.name}.")
    return tensor


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes; ConfigError otherwise."""
    try:
        with path.open("rb") as stream:
            text = stream.read(limit + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    if len(text) > limit:
        raise ConfigError(f"{path} is larger than {limit} bytes, which it never needs to be.")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a JSON {type(value).__name__} and should hold an object.")
    return value


def _open(file: Path) -> dict[str, Stored]:
    """The tensors of one file by name; ConfigError when its header and its length do not agree."""
    try:
        handle = safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} is damaged or cut short: {error}.") from error
    tensors = {}
    for name in handle.keys():  # noqa: SIM118, the handle is not a mapping
        view = handle.get_slice(name)
        tensors[name] = Stored(file, name, tuple(view.get_shape()), view.get_dtype(), handle)
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """{tensor name: file name} of an index; ConfigError for a file name that could lead out of the directory."""
    places = read_json(path, INDEX_LIMIT).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ConfigError(f"{path} has no weight_map of tensor names to files.")
    for name, file in places.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise ConfigError(f"{path} places {name!r} in {file!r}, which is not the plain name of a .safetensors file.")
        if not (path.parent / file).is_file():
            raise ConfigError(f"{path} places {name!r} in {file}, which is missing.")
    return places


def open_tensors(directory: Path) -> dict[str, Stored]:
    """All tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` names; none is read yet.

    Raises ConfigError, naming file and tensor, when there are neither or both, when a shard is missing or damaged, when a tensor is in
    two shards, or when the index and the shards disagree.
    """
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file() == index.is_file():
        raise ConfigError(f"{directory} needs either {SINGLE} or {INDEX}, and has {'both' if single.is_file() else 'neither'}.")
    if single.is_file():
        return _open(single)
    places, found = _read_index(index), {}
    for file in sorted(set(places.values())):
        for name, stored in _open(directory / file).items():
            if name in found:
                raise ConfigError(f"{directory}: tensor {name!r} is in both {found[name].file.name} and {file}.")
            if places.get(name) != file:
                raise ConfigError(f"{index} does not place {name!r} in {file}, which holds it.")
            found[name] = stored
    if absent := sorted(set(places) - set(found)):
        raise ConfigError(f"{index} places {absent[0]!r} in {places[absent[0]]}, which does not hold it.")
    return found


def _plan(shapes: Mapping[str, tuple[int, ...]], item: int, limit: float) -> list[dict[str, int]]:
    """Shards of {name: bytes} in the order of `shapes`, each of at most `limit` bytes unless a single tensor is larger."""
    shards: list[dict[str, int]] = [{}]
    for name, shape in shapes.items():
        size = int(np.prod(shape, dtype=np.int64)) * item
        if shards[-1] and sum(shards[-1].values()) + size > limit:
            shards.append({})
        shards[-1][name] = size
    return shards


def _header(sizes: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], code: str) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in sizes.items():
        entries[name] = {"dtype": code, "shape": list(shapes[name]), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return struct.pack("<Q", len(text)) + text


def write_tensors(
    directory: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[tuple[str, np.ndarray]], dtype, max_shard_bytes: float
) -> None:
    """Writes `tensors`, which come in the order of `shapes`, as `dtype` into one file, or into shards with an index when they exceed
    `max_shard_bytes`. Raises ConfigError for a value that is not finite in `dtype`."""
    dtype = np.dtype(dtype)
    code = next(code for code, known in DTYPES.items() if known == dtype)
    shards, tensors, places = _plan(shapes, dtype.itemsize, max_shard_bytes), iter(tensors), {}
    for i, sizes in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        places.update(dict.fromkeys(sizes, file))
        with (directory / file).open("wb") as stream:
            stream.write(_header(sizes, shapes, code))
            for expected in sizes:
                name, tensor = next(tensors)
                assert (name, tensor.shape) == (expected, tuple(shapes[expected]))
                stream.write(np.ascontiguousarray(finite(tensor, dtype, f"Tensor {name!r}")).reshape(-1).view(np.uint8).data)
    if len(shards) > 1:
        total = sum(size for sizes in shards for size in sizes.values())
        (directory / INDEX).write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2, sort_keys=True) + "\n"
        )
