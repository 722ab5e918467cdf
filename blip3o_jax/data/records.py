"""One record of a source, and the files of sources, on disk or in a bucket (etils.epath)."""

import bisect
import glob
import itertools
import os
import posixpath
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from blip3o_jax.errors import InputError

MAGIC = "*?["


class RecordError(Exception):
    """One record cannot be used; the message says why, without its key."""


@dataclass(frozen=True)
class Record:
    """An image with its caption; or an edit: `inputs` are the images before, `caption` the
    instruction, `image` the result. All encoded."""

    key: str
    caption: str
    image: bytes
    inputs: tuple[bytes, ...] = ()


class Source(Protocol):
    """What a mixture reads: records by number, or RecordError."""

    blocks: np.ndarray | None  # where runs start that are read at once

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Any: ...
    def key(self, i: int) -> str: ...


class FileSource:
    """Records of several files, file after file; a subclass says which fields make one."""

    blocks = None

    def __init__(self, paths: list[str], counts: Iterable[int]):
        self.paths = paths
        self.ends = list(itertools.accumulate(counts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def place(self, i: int) -> tuple[int, int]:
        """(number of the file, record in it)"""
        return locate(self.ends, i)

    def key(self, i: int) -> str:
        """The file's name and the record's in it."""
        file, row = self.place(i)
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
    elif any(c in pattern for c in MAGIC) and not os.path.exists(pattern):
        paths = sorted(glob.glob(pattern, recursive=True))
    else:
        paths = [pattern] if os.path.isfile(pattern) else []
    if not paths:
        raise InputError(
            f"data.sources: no file at {pattern!r}; name a file or a pattern that matches some."
        )
    return paths


def _remote(pattern: str) -> list[str]:
    from etils import epath

    parts = pattern.split("/")
    magic = [i for i, part in enumerate(parts) if any(c in part for c in MAGIC)]
    try:
        if not magic:
            return [pattern] if epath.Path(pattern).exists() else []
        folder = epath.Path("/".join(parts[: magic[0]]))
        return sorted(str(path) for path in folder.glob("/".join(parts[magic[0] :])))
    except Exception as error:  # whatever the bucket's client raises
        raise InputError(
            f"data.sources: {pattern!r} cannot be listed: {type(error).__name__}: {error}."
        ) from error


def open_binary(path: str):
    """The file, open for reading."""
    if "://" not in path:
        return open(path, "rb")
    from etils import epath

    return epath.Path(path).open("rb")


def read_bytes(path: str) -> bytes:
    """The file's contents; RecordError when they cannot be read."""
    try:
        with open_binary(path) as file:
            return file.read()
    except OSError as error:
        raise RecordError(f"{path} cannot be read ({error.strerror or error})") from error
