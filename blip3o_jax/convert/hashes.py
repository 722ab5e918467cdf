"""SHA-256 of the files that hold a model's weights: recorded when written, compared when read.

A folder's record is `hashes.json`: {file: {"bytes", "sha256", "sample"}}, paths relative to it.
`sample` is the SHA-256 of a few pieces spread over the file, cheap to compare at every load.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from blip3o_jax import paths
from blip3o_jax.errors import InputError, os_errors, require
from blip3o_jax.files import read_json
from blip3o_jax.paths import AnyPath
from blip3o_jax.resources import cache_folder

RECORD = "hashes.json"
RECORD_LIMIT = 64 << 20  # bytes
PIECES, PIECE = 8, 4096  # of a file's sample: how many, and bytes of each
WORKERS = 8


def hash_file(file: AnyPath) -> dict:
    """A file's size and SHA-256; InputError when it cannot be read."""
    with os_errors(f"{file} cannot be read"), file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"bytes": stream.tell(), "sha256": digest}


def sample_file(file: AnyPath) -> dict:
    """A file's size and the SHA-256 of PIECES pieces from its first to its last byte."""
    digest = hashlib.sha256()
    with os_errors(f"{file} cannot be read"):
        size = file.stat().st_size
        starts = [max(0, size - PIECE) * i // (PIECES - 1) for i in range(PIECES)]
        places = [(start, min(start + PIECE, size)) for start in starts]
        digest.update(b"".join(paths.read_ranges(file, places)))
    return {"bytes": size, "sample": digest.hexdigest()}


def over_files(
    function: Callable[[AnyPath], dict], files: Iterable[AnyPath], title: str = "Hashing"
) -> dict[AnyPath, dict]:
    """{file: function(file)}, several files at once, since hashing needs no interpreter lock."""
    files = sorted(files)
    with ThreadPoolExecutor(WORKERS) as pool:
        results = pool.map(function, files)
        shown = tqdm(results, title, total=len(files), unit="file", delay=3, disable=None)
        return dict(zip(files, shown, strict=True))


def _named(folder: AnyPath, rows: dict[AnyPath, dict]) -> dict[str, dict]:
    """The same by the files' names below `folder`."""
    return {file.relative_to(folder).as_posix(): row for file, row in sorted(rows.items())}


def record(folder: AnyPath, files: Iterable[AnyPath]) -> None:
    """Writes FOLDER/hashes.json about `files` below it."""
    rows = over_files(lambda file: hash_file(file) | sample_file(file), files)
    paths.write_text(folder / RECORD, json.dumps(_named(folder, rows), indent=1) + "\n")


def compare(
    folder: AnyPath, files: Iterable[AnyPath], whole: bool = False, is_part: bool = False
) -> dict[str, str] | None:
    """SHA-256 of the `files` below `folder` as hashes.json has them, None without such a record;
    InputError naming the first file whose size and sample, or with `whole` any byte, differ, or
    that is gone, unless they are but a part of those recorded."""
    if not (folder / RECORD).is_file():
        return None
    recorded = read_json(folder / RECORD, RECORD_LIMIT)
    measured = _named(folder, over_files(hash_file if whole else sample_file, files))
    # Files that are there are as recorded ...
    for name, row in measured.items():
        expected = recorded.get(name)
        require(
            isinstance(expected, dict) and row.items() <= expected.items(),
            f"{folder / name} is not what {RECORD} beside it recorded when it was written: it is "
            f"damaged or was changed; restore it, or remove {folder / RECORD} to accept it.",
        )
    # ... and none is gone.
    for name in () if is_part else sorted(recorded.keys() - measured.keys()):
        is_there = (folder / name).is_file()
        require(is_there, f"{folder / name} is missing, which {folder / RECORD} recorded.")
    return {name: str(recorded[name].get("sha256")) for name in measured}


def measure(folder: AnyPath, files: Iterable[AnyPath]) -> dict[str, str]:
    """SHA-256 of `files` below `folder`, of every byte that is there."""
    rows = _named(folder, over_files(hash_file, files))
    return {name: row["sha256"] for name, row in rows.items()}


def remembered(folder: AnyPath, files: Iterable[AnyPath]) -> dict[str, str]:
    """As `measure`, but kept in the cache folder until a file changes its size or time."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    cache = cache_folder() / "hashes" / f"{name}.json"
    cached: dict[str, dict] = {}
    with contextlib.suppress(InputError):
        cached = read_json(cache)
    # Only files that changed are hashed.
    rows, stale = {}, []
    for file in files:
        row = rows[file] = cached.get(file.relative_to(folder).as_posix(), {})
        if (row.get("bytes"), row.get("changed")) != paths.state(file):
            stale.append(file)
    for file, row in over_files(hash_file, stale).items():
        rows[file] = row | {"changed": paths.state(file)[1]}
    named = _named(folder, rows)
    # Written whole or not at all; a home that cannot be written to is no error.
    if stale:
        temporary = cache.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):
            cache.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(named))
            temporary.replace(cache)
        temporary.unlink(missing_ok=True)
    return {name: row["sha256"] for name, row in named.items()}
