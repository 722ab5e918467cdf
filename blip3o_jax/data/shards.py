"""Shards of ArrayRecord read at random, those in a bucket from copies."""

import hashlib
import itertools
import logging
import threading
from collections.abc import Sequence
from pathlib import Path

from blip3o_jax import paths
from blip3o_jax.data.records import locate
from blip3o_jax.paths import AnyPath
from blip3o_jax.resources import cache_folder

log = logging.getLogger(__name__)


def open_shards(files: Sequence[AnyPath], sizes: Sequence[int]) -> Sequence[bytes]:
    """The records of several files, of `sizes` records each, one after another."""
    if paths.is_bucket(files[0]):
        return _Copies(files, sizes)
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    return ArrayRecordDataSource([str(file) for file in files])


class _Copies:
    """The same in a bucket: each file is copied whole into the cache folder when it is first read,
    since ArrayRecord reads from disks alone."""

    def __init__(self, files: Sequence[AnyPath], sizes: Sequence[int]):
        self.files, self.ends = files, list(itertools.accumulate(sizes))
        self.opened: dict[int, Sequence[bytes]] = {}
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> bytes:
        number, row = locate(self.ends, i)
        with self.lock:
            if number not in self.opened:
                self.opened[number] = open_shards([_copied(self.files[number])], ())
        return self.opened[number][row]


def _copied(file: AnyPath) -> Path:
    """A file's copy, under a name of its state, so that one that was written again is copied
    again."""
    state = hashlib.sha256(f"{file} {paths.state(file)}".encode()).hexdigest()[:32]
    copy = cache_folder() / "shards" / f"{state}-{file.name}"
    if not copy.is_file():
        log.info("Copying %s into %s.", file, copy.parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        paths.copy_file(file, copy)
    return copy
