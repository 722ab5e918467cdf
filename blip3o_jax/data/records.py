"""One record of a source, and the files of sources, on disk or in a bucket."""

import bisect
import glob
import itertools
import os
import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from blip3o_jax import paths
from blip3o_jax.errors import InputError, require

MAX_BYTES = 256 << 20  # of one encoded image, caption or line


class RecordError(Exception):
    """One record cannot be used; the message says why, without its key."""


@dataclass(frozen=True)
class Record:
    """An image with its captions, of which training draws one; or an edit: `inputs` are the images
    before, a caption is the instruction, `image` the result. All encoded."""

    key: str
    captions: tuple[str, ...]
    image: bytes
    inputs: tuple[bytes, ...] = ()

    @property
    def caption(self) -> str:
        """The first caption."""
        return self.captions[0]


class Source(Protocol):
    """What a mixture reads: records by number, or RecordError."""

    blocks: np.ndarray | None  # where runs start that are read at once
    notes: Sequence[str]  # what the files hold besides records, as phrases

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Any: ...
    def key(self, i: int) -> str: ...


class FileSource:
    """Records of several files, file after file; a subclass says which fields make one."""

    blocks = None
    notes: Sequence[str] = ()  # what the files hold besides records, as phrases

    def __init__(self, paths: list[str], counts: Iterable[int]):
        self.paths = paths
        self.ends = list(itertools.accumulate(counts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def key(self, i: int) -> str:
        """The file's name and the record's in it."""
        file, row = locate(self.ends, i)
        name = posixpath.basename(self.paths[file].replace(os.sep, "/"))
        return f"{name}:{self.name(file, row)}"

    def name(self, file: int, row: int) -> str:
        """The record's name in its file."""
        return str(row)


def locate(ends: list[int], i: int) -> tuple[int, int]:
    """Record i of concatenated pieces -> (piece, record in it); `ends` are running totals of the
    pieces' records."""
    piece = bisect.bisect_right(ends, i)
    return piece, i - (ends[piece - 1] if piece else 0)


def expand(pattern: str) -> list[str]:
    """The files of a path or glob pattern, sorted; InputError when there are none."""
    if "://" in pattern:
        paths = _remote(pattern)
    elif os.path.exists(pattern):  # perhaps with a * in its own name
        paths = [pattern] if os.path.isfile(pattern) else []
    else:
        paths = sorted(glob.glob(pattern, recursive=True))
    no_file = f"no file at {pattern!r}; name a file or a pattern that matches some."
    require(bool(paths), f"data.sources: {no_file}")
    return paths


def _remote(pattern: str) -> list[str]:
    parts = pattern.split("/")
    magic = [i for i, part in enumerate(parts) if set(part) & set("*?[")]
    try:
        if not magic:
            return [pattern] if paths.path(pattern).exists() else []
        folder = paths.path("/".join(parts[: magic[0]]))
        return sorted(str(path) for path in folder.glob("/".join(parts[magic[0] :])))
    except OSError as error:
        reason = f"{pattern!r} cannot be listed: {error.strerror}"
        raise InputError(f"data.sources: {reason}.") from error


def open_binary(path: str):
    """The file, open for reading."""
    return paths.path(path).open("rb")


def state(path: str) -> tuple[int, int]:
    """(bytes, time of the last change in ns)."""
    stat = paths.path(path).stat()
    return stat.st_size, stat.st_mtime_ns


def read_bytes(path: str, *spans: tuple[int, int]) -> list[bytes]:
    """The file's bytes at each (offset, size), size -1 to its end; RecordError when it cannot be
    read."""
    # One byte more than is allowed tells that there are too many.
    sizes = [size if 0 <= size <= MAX_BYTES else MAX_BYTES + 1 for _, size in spans]
    places = [(start, start + size) for (start, _), size in zip(spans, sizes, strict=True)]
    try:
        contents = paths.read_ranges(paths.path(path), places)
        if any(len(data) > MAX_BYTES for data in contents):
            raise RecordError(f"more than {MAX_BYTES >> 20} MB in {path}")
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise RecordError(f"{path} cannot be read ({reason})") from error
    return contents
