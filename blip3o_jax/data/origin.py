"""What a cache was made from: the files of its sources, each by name, size, time and digest, so
that a run notices what has changed since.

A digest is of what describes the records, not of every pixel: a whole .jsonl, the footer of
Parquet, the places of a tar's members and its captions, and of other files blocks spread over them.
It is computed only where size and time do not tell.
"""

import glob
import hashlib
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from blip3o_jax.data import records, tars
from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.folder import list_folder
from blip3o_jax.errors import InputError

BLOCK, BLOCKS = 4096, 64  # bytes, and how many of them, of a file without an index
FOOTER = 8  # bytes at the end of Parquet: the footer's size and a mark
READERS = 8  # files at once, as reading waits for the disk


def files_of(spec: SourceConfig) -> list[str]:
    """Paths of a source's files, in order; none where they are not on this machine."""
    pattern = spec.path
    if spec.kind == "array_record":
        folder = pattern if "://" in pattern else glob.escape(pattern)
        pattern = f"{folder}/*-{spec.split}.array_record*"
    try:
        if spec.kind == "folder":
            pairs, _ = list_folder(spec)
            files = sorted({*pairs.keys(), *pairs.values()})
            return [path for file in files if os.path.exists(path := os.path.join(pattern, file))]
        return records.expand(pattern)
    except InputError:
        return []


def look(spec: SourceConfig, there: Sequence[dict] = ()) -> list[dict]:
    """The files of a source as they are: name below the folder that all share, size, time, digest.

    Of files that have the name, size and time of one of `there`, the digest is taken from it; where
    there are some, those of another name or size differ without one (None).
    """
    paths = files_of(spec)
    before = {file["name"]: file for file in there}
    folders = [path.replace(os.sep, "/").split("/")[:-1] for path in paths]
    alike = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))
    shared = len(list(alike))

    def describe(path: str) -> dict:
        size, time = records.state(path)
        name = "/".join(path.replace(os.sep, "/").split("/")[shared:])
        file = {"name": name, "size": size, "time": time, "digest": None}
        earlier = before.get(name, {})
        same_size = earlier.get("size") == size
        if same_size and earlier["time"] == time:
            file["digest"] = earlier["digest"]
        elif same_size or not there:
            file["digest"] = digest(path, spec)
        return file

    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(describe, paths))


def compare(there: Sequence[dict], here: Sequence[dict]) -> str | None:
    """What is not `here` as it was `there`, in words; None when all is, whatever the times."""
    before, now = ({file["name"]: file for file in files} for files in (there, here))
    both = [name for name in before if name in now]
    same = ("size", "digest")
    groups = {
        "changed": [name for name in both if any(before[name][k] != now[name][k] for k in same)],
        "gone": [name for name in before if name not in now],
        "new": [name for name in now if name not in before],
    }
    phrases = []
    for what, names in groups.items():
        if names:
            first, how = names[0], ""
            if what == "changed":
                how = f", {before[first]['size']} bytes then, {now[first]['size']} now"
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            phrases.append(f"{what}: {first}{how}{more}")
    return "; ".join(phrases) or None


def digest(path: str, spec: SourceConfig) -> str:
    """SHA-256 of what describes a file's records."""
    result = hashlib.sha256()
    size, _ = records.state(path)
    with records.open_binary(path) as file:
        if spec.kind == "jsonl":
            while block := file.read(1 << 20):
                result.update(block)
        elif spec.kind == "parquet":
            file.seek(max(0, size - FOOTER))
            length = int.from_bytes(file.read(4), "little") + FOOTER
            file.seek(max(0, size - length))
            result.update(file.read(length))
        elif spec.kind == "webdataset":
            rows, _ = tars.open_index(path, (spec.image_field, spec.caption_field))
            result.update(rows.tobytes())
            # Captions, which may have changed within their old sizes.
            for start, length in (row[part] for row in rows for part in ("text", "json")):
                if length > 0:
                    file.seek(int(start))
                    result.update(file.read(int(length)))
        else:
            for number in range(BLOCKS):
                file.seek(max(0, size - BLOCK) * number // (BLOCKS - 1))
                result.update(file.read(BLOCK))
    return result.hexdigest()
