"""PyTorch's own files (`.pth`), read without PyTorch and without executing anything in them.

Such a file is a zip archive: `NAME/data.pkl`, a pickle of the saved object, whose tensors point
into `NAME/data/KEY`, raw values that are not compressed. A pickle is a program: it may call
whatever it can name. Here it can name the few things below, none of which does anything but hold
values; any other name is an error. Tensors come out as places in the file, unread.
"""

import collections
import math
import pickle
import re
import struct
import zipfile
from dataclasses import dataclass
from typing import Any

from blip3o_jax.convert.safetensors_io import Stored
from blip3o_jax.errors import InputError, require
from blip3o_jax.paths import AnyPath

# bytes; names and places take less, and each may become a hundred bytes of objects
PICKLE_LIMIT = 4 << 20
# torch's storage classes -> codes of their dtypes, and bytes of those
STORAGES = {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16"}
STORAGES |= {"DoubleStorage": "F64", "LongStorage": "I64", "IntStorage": "I32"}
STORAGES |= {"ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL"}
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
ITEM_BYTES |= {"I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Place:
    """Values in the file: of a whole storage, or of a tensor in it when there is a shape."""

    code: str
    offset: int  # bytes from the beginning of the file
    count: int
    shape: tuple[int, ...] = ()


class Fields(dict):
    """TA-Tok's EasyDict of arguments: a dict that a pickle may also give attributes."""


def _are_sizes(*numbers) -> bool:
    return all(type(n) is int and n >= 0 for n in numbers)


def _rebuild_tensor(storage, offset, shape, stride, *_unused) -> Place:
    """torch._utils._rebuild_tensor_v2, for a tensor whose values lie back to back."""
    is_place = isinstance(storage, Place) and _are_sizes(offset, *shape, *stride)
    require(is_place, "it places a tensor in no storage")
    # Back to back in row-major order, and within the storage.
    shape, count = tuple(shape), math.prod(shape)
    row_major = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    steps = zip(shape, stride, row_major, strict=True)
    contiguous = all(step == expected for size, step, expected in steps if size > 1)
    require(contiguous, f"it holds a tensor of shape {shape} that is not contiguous")
    beyond = f"it places a tensor of shape {shape} beyond the end of its storage"
    require(offset + count <= storage.count, beyond)
    return Place(storage.code, storage.offset + offset * ITEM_BYTES[storage.code], count, shape)


ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("easydict", "EasyDict"): Fields,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_unused: data,  # the tensor in it
    ("torch", "Size"): lambda shape=(): tuple(shape),
    **{("torch", name): name for name in STORAGES},
}


class _Unpickler(pickle.Unpickler):
    """Names are looked up in ALLOWED and nowhere else; storages in the archive."""

    def __init__(self, stream, archive: zipfile.ZipFile, root: str):
        super().__init__(stream)
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        refusal = f"it names {module}.{name}, which is not read: only tensors and plain values are"
        require((module, name) in ALLOWED, refusal)
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Place:
        kind, storage, key, _, count = pid
        is_storage = kind == "storage" and storage in STORAGES and type(count) is int
        is_storage = is_storage and re.fullmatch(r"\w+", str(key))
        stray = f"it places values in {str(pid)[:100]}, which is not a storage of this file"
        require(is_storage, stray)
        # The storage is as long as it says, and its bytes are in the file.
        code = STORAGES[storage]
        entry = _entry(self._archive, f"{self._root}/data/{key}")
        size, needed = entry.file_size, count * ITEM_BYTES[code]
        require(needed <= size, f"{entry.filename} has {size} bytes, and {needed} are needed")
        return Place(code, _data_offset(self._archive, entry), count)


def _entry(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """An entry whose bytes stand in the file as they are."""
    try:
        entry = archive.getinfo(name)
    except KeyError as error:
        raise InputError(f"it has no entry {name}") from error
    plain = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1
    packed = f"its entry {name} is compressed or encrypted, which torch.save never does"
    require(plain and entry.compress_size == entry.file_size, packed)
    return entry


def _data_offset(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry begin: behind its local header, which tells its own length."""
    # The archive's directory is not trusted alone.
    stream = archive.fp
    stream.seek(entry.header_offset)
    header, name = stream.read(30), f"its entry {entry.filename}"
    is_header = len(header) == 30 and header[:4] == b"PK\x03\x04"
    require(is_header, f"{name} is not where the archive's directory says")
    offset = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    end = stream.seek(0, 2)
    require(offset + entry.file_size <= end, f"{name} reaches beyond the end of the file")
    return offset


def _load(archive: zipfile.ZipFile) -> Any:
    """The saved object, with a Place for every tensor."""
    # One folder with a pickle in it, in this machine's byte order.
    names = archive.namelist()
    roots = {name.partition("/")[0] for name in names if re.fullmatch(r"[^/]*/data\.pkl", name)}
    require(len(roots) == 1, "it is a zip archive, but not one of torch.save")
    (root,) = roots
    require(len(set(names)) == len(names), "two entries of its archive have one name")
    order = f"{root}/byteorder"
    little = order not in names or archive.read(_entry(archive, order)) == b"little"
    require(little, "its values are big-endian")
    # The pickle, which may not fill the memory either.
    entry = _entry(archive, f"{root}/data.pkl")
    large = f"its pickle has {entry.file_size} bytes, more than names and places take"
    require(entry.file_size <= PICKLE_LIMIT, large)
    with archive.open(entry) as stream:
        return _Unpickler(stream, archive, root).load()


def load_pth(file: AnyPath) -> Any:
    """What torch.save wrote, tensors as Place; InputError for anything but plain values."""
    try:
        with file.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            return _load(archive)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}.") from error
    except zipfile.BadZipFile as error:
        older = "is not a zip archive as torch.save writes since PyTorch 1.6, or is cut short"
        raise InputError(f"{file} {older}.") from error
    except InputError as error:
        raise InputError(f"{file} is refused: {error}.") from error
    except Exception as error:  # a pickle's program may fail in any way, and is not ours to trust
        damaged = f"its pickle is damaged ({type(error).__name__})"
        raise InputError(f"{file} is refused: {damaged}.") from error


def open_ta_tok(file: AnyPath) -> tuple[dict[str, Any], dict[str, Stored]]:
    """(arguments, tensors by name) of `ta_tok.pth`: {"model": {"args", "sd"}}, or the inner two, or
    a bare dict of tensors, whose arguments are empty. Nested arguments come at one level."""
    content = load_pth(file)
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    # The arguments, if there are any, and the tensors by name.
    holds = f"{file} holds a {type(content).__name__} and should hold TA-Tok's arguments and"
    require(isinstance(content, dict), f"{holds} tensors.")
    args, state = (content.get("args", {}), content["sd"]) if "sd" in content else ({}, content)
    are_dicts = isinstance(state, dict) and isinstance(args, dict)
    require(are_dicts, f"{file}: `sd` and `args` should be dictionaries.")
    # Each tensor as a place in the file.
    size, tensors = file.stat().st_size, {}
    for name, place in state.items():
        is_tensor = isinstance(name, str) and _is_within(place, size)
        require(is_tensor, f"{file}: {str(name)[:60]!r} is not a tensor in this file.")
        tensors[name] = Stored(file, name, place.shape, place.code, place.offset)
    return _flat(args), tensors


def _is_within(place: Any, size: int) -> bool:
    """Whether the values are in the file; asked last, as a pickle may change what it has made."""
    if not isinstance(place, Place) or not isinstance(place.shape, tuple):
        return False
    if place.code not in ITEM_BYTES or not _are_sizes(place.offset, *place.shape):
        return False
    return place.offset + math.prod(place.shape) * ITEM_BYTES[place.code] <= size


def _flat(args: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts to one level, by the last key; the outermost wins."""
    flat: dict[str, Any] = {}
    level, seen = [args], set()
    while level:
        fields = level.pop(0)
        if id(fields) in seen:  # a pickle can put a dict into itself
            continue
        seen.add(id(fields))
        inner = {key: value for key, value in fields.items() if isinstance(value, dict)}
        level += inner.values()
        flat = {key: x for key, x in fields.items() if key not in inner} | flat
    return flat
