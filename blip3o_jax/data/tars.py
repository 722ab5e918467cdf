"""WebDataset tars, read at random: a tar's headers are read once, in order, and its offsets stored
in NAME.tar.index beside it.

A record is a run of members that share their name up to the first dot of its last part:
KEY.jpg|jpeg|png|webp, KEY.txt and perhaps KEY.json, as BLIP3o-Pretrain-* are laid out. Other
members are skipped.
"""

import hashlib
import json
import logging
import os
import pathlib
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from blip3o_jax.data import records
from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.records import FileSource, Record, RecordError, locate, read_bytes
from blip3o_jax.errors import InputError, require
from blip3o_jax.resources import cache_folder

VERSION = 1
BLOCK = 512
PARTS = dict.fromkeys(("jpg", "jpeg", "png", "webp"), "image") | {"txt": "text", "json": "json"}
INDEXERS = 8  # tars whose headers are read at once, as reading waits for the disk

log = logging.getLogger(__name__)


class TarSource(FileSource):
    """Records of all tars of a pattern, in the order of their names."""

    def __init__(self, spec: SourceConfig):
        self.caption_field = spec.caption_field
        paths = records.expand(spec.path)
        with ThreadPoolExecutor(INDEXERS) as pool:
            self.indexes = list(pool.map(open_index, paths))
        super().__init__(paths, map(len, self.indexes))

    def name(self, file: int, row: int) -> str:
        return self.indexes[file][row]["key"].decode()

    def __getitem__(self, i: int) -> Record:
        tar, number = locate(self.ends, i)
        row = self.indexes[tar][number]
        parts = ("image", "json" if self.caption_field else "text")
        if missing := [part for part in parts if row[part][1] < 0]:
            raise RecordError(f"no {missing[0].replace('text', 'txt')} in the tar")
        spans = [tuple(map(int, row[part])) for part in parts]
        contents = read_bytes(self.paths[tar], *spans)
        if any(len(data) < size for data, (_, size) in zip(contents, spans, strict=True)):
            raise RecordError("the tar has become shorter")
        image, written = contents
        return Record(self.key(i), self._caption(written), image)

    def _caption(self, written: bytes) -> str:
        field = self.caption_field
        try:
            return (str(json.loads(written)[field]) if field else written.decode()).strip()
        except (ValueError, KeyError, TypeError) as error:
            reason = f"json without {field!r}" if field else "txt that is not UTF-8"
            raise RecordError(reason) from error


def open_index(tar: str) -> np.ndarray:
    """The offsets of a tar's records, from its index file, or from the tar if the index is not of
    this state of it. InputError for a damaged tar."""
    version, places = _version(tar), _index_files(tar)
    for file in places:
        if (index := _load(file, version)) is not None:
            return index
    # Stored in the first place that can be written, in memory where none can.
    index = read_headers(tar)
    for file in places:
        try:
            _store(file, version, index)
            return _load(file, version)
        except OSError:
            continue
    log.warning("The index of %s cannot be stored; every run makes it again.", tar)
    return index


def read_headers(tar: str) -> np.ndarray:
    """Reads a tar's headers in order: key and, of each part, (offset, size), (-1, -1) where it is
    missing."""
    # The members, and what follows the last one.
    rows, end = [], 0
    try:
        with records.open_binary(tar) as raw, tarfile.open(fileobj=raw, mode="r:") as members:
            for member in members:
                members.members = []  # it would store them all
                size = 0
                if member.isfile():
                    _add(rows, member)
                    size = -(-member.size // BLOCK) * BLOCK
                end = member.offset_data + size
            raw.seek(end)
            beyond = raw.read(BLOCK)
    except (tarfile.TarError, EOFError) as error:
        kind = f"truncated or not an uncompressed tar ({error})"
        raise InputError(f"{tar} is {kind}; copy or decompress it.") from error
    except OSError as error:
        raise InputError(f"{tar} cannot be read: {error.strerror or error}.") from error
    # tarfile takes a damaged header for the end
    damaged = beyond.strip(b"\0") or (end % BLOCK and rows)
    where = f"at byte {end}, after {len(rows)} records"
    require(not damaged, f"{tar} is damaged {where}; copy it again.")
    # One array of them.
    width = max((len(key) for key, _ in rows), default=1)
    parts = ("image", "text", "json")
    dtype = [("key", f"S{width}"), *((part, "<i8", 2) for part in parts)]
    values = [(key, *(spans.get(part, (-1, -1)) for part in parts)) for key, spans in rows]
    return np.array(values, dtype)


def _add(rows: list, member: tarfile.TarInfo) -> None:
    """Puts a member into its record, the last one of `rows` or a new one."""
    folder, _, name = member.name.rpartition("/")
    base, _, extension = name.partition(".")
    part = PARTS.get(extension.lower())
    if not base or part is None:
        return
    key = f"{folder}/{base}".lstrip("/").encode()
    if not rows or rows[-1][0] != key or part in rows[-1][1]:
        rows.append((key, {}))
    rows[-1][1][part] = member.offset_data, member.size


def _version(tar: str) -> dict:
    """The state of a tar, which its index must have been made from."""
    if "://" in tar:
        from etils import epath

        stat = epath.Path(tar).stat()
        size, mtime = stat.length, int(stat.mtime)
    else:
        size, mtime = os.stat(tar).st_size, os.stat(tar).st_mtime_ns
    return {"version": VERSION, "size": size, "mtime": mtime}


def _index_files(tar: str) -> list[pathlib.Path]:
    """The file beside the tar, and the one in the user's cache for where that is not writable."""
    remote = "://" in tar
    name = hashlib.sha256((tar if remote else os.path.abspath(tar)).encode()).hexdigest()[:32]
    cached = cache_folder() / "tars" / f"{name}.index"
    return [cached] if remote else [pathlib.Path(f"{tar}.index"), cached]


def _load(file: pathlib.Path, version: dict) -> np.ndarray | None:
    """The index in a file, a line of JSON and the array; None when it is missing or of another
    state of the tar."""
    try:
        with file.open("rb") as stream:
            head, offset = json.loads(stream.readline()), stream.tell()
        count = head["records"]
        dtype = np.dtype([(name, kind, *map(tuple, shape)) for name, kind, *shape in head["dtype"]])
        whole = file.stat().st_size == offset + count * dtype.itemsize
        if head["version_of"] != version or not whole:
            return None
        # an empty file cannot be mapped
        return np.memmap(file, dtype, "r", offset, (count,)) if count else np.zeros(0, dtype)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _store(file: pathlib.Path, version: dict, index: np.ndarray) -> None:
    """Writes the index atomically, also when other processes write it at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    head = {"version_of": version, "records": len(index), "dtype": index.dtype.descr}
    handle, temporary = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(json.dumps(head).encode() + b"\n" + index.tobytes())
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    finally:
        pathlib.Path(temporary).unlink(missing_ok=True)
