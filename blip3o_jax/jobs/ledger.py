"""What a job is and what is done of it, on disk, so that any number of processes can share it, die
and start again.

OUT/job/job.json            what the job is: a start with anything else is refused
OUT/job/done/NUMBER.jsonl   a row for each result of a shard of requests, once all are written
OUT/manifest.jsonl          the rows of all shards in the order of the requests, at the end

Each file appears whole. A row names its file and that file's hash, so a result that was damaged or
deleted is made again.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import io
import itertools
import json
import tarfile
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from blip3o_jax import paths
from blip3o_jax.errors import InputError, require

VERSION = 1  # of the files of a job
FACTS, DONE, MANIFEST, NEW = "job/job.json", "job/done", "manifest.jsonl", "job/new-"
# What a row names, and by what hash.
FILES = (("file", "sha256"), ("mask", "mask_sha256"), ("shard", "shard_sha256"))
BEGUN = "begun"  # the fact when a job first began, in seconds, which may differ
Rows = dict[int, list[dict]]  # of a shard, by the request's number


def write_whole(folder: paths.AnyPath, name: str, data: Iterable[bytes]) -> None:
    """Writes a file of the job that nobody sees half written; InputError if it cannot be."""
    # Local ones begin under a name that no other process on any host has.
    file = folder / name
    new = file if paths.is_bucket(folder) else folder / f"{NEW}{uuid.uuid4().hex}"
    with paths.remote_errors(f"{file} cannot be written"):
        for path in (new, file):
            path.parent.mkdir(parents=True, exist_ok=True)
        with new.open("wb") as opened:
            opened.writelines(data)
        if new != file:
            new.replace(file)


def begin(folder: paths.AnyPath, facts: dict, overwrite: bool = False) -> None:
    """Makes `folder` that of the job with these facts, or goes on with it; InputError that shows
    the difference if it is another's. `overwrite` deletes an earlier job there first."""
    facts = json.loads(json.dumps({"version": VERSION, **facts}))  # tuples are lists there
    facts[BEGUN] = int(time.time())
    require(not folder.exists() or folder.is_dir(), f"{folder} exists and is not a folder.")
    with paths.remote_errors(f"{folder} cannot be read"):
        is_empty = not folder.is_dir() or not any(folder.iterdir())
        has_job = (folder / FACTS).is_file()
    other = f"{folder} holds other files and no job (no {FACTS}), so it is not overwritten;"
    other += " name another folder."
    require(is_empty or has_job, other)
    if has_job and overwrite:
        with paths.remote_errors(f"{folder} cannot be deleted"):
            (folder / FACTS).unlink()
            paths.remove_folder(folder)
        has_job = False
    if not has_job:
        write_whole(folder, FACTS, [json.dumps(facts, indent=1).encode()])
        return
    before = read_facts(folder)
    names = {**before, **facts}.keys() - {BEGUN}
    names = sorted(name for name in names if before.get(name) != facts.get(name))
    if names:
        was, now = (", ".join(f"{n} {_shown(job, n)}" for n in names) for job in (before, facts))
        fix = "give the same command, name another folder, or add --overwrite"
        raise InputError(f"{folder} holds a job with {was}; this one has {now}: {fix}.")


def _shown(facts: dict, name: str) -> str:
    return json.dumps(facts[name]) if name in facts else "none"


def read_facts(folder: paths.AnyPath) -> dict:
    """What `begin` wrote."""
    path = folder / FACTS
    facts = _parsed(path, path.read_text("utf-8")) if path.is_file() else None
    require(isinstance(facts, dict), f"{folder} holds no job (no {FACTS}).")
    return facts


def _parsed(path: paths.AnyPath, text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: it is not JSON.") from error


def shard_name(shard: int) -> str:
    return f"{DONE}/{shard:06d}.jsonl"


def record(folder: paths.AnyPath, shard: int, rows: Rows) -> None:
    """Says that these results of a shard are on disk."""
    own = itertools.chain(*(rows[number] for number in sorted(rows)))
    write_whole(folder, shard_name(shard), (f"{json.dumps(row)}\n".encode() for row in own))


def write_shard(
    folder: paths.AnyPath, shard: int, rows: Rows, files: dict[str, bytes], kind: str
) -> Rows:
    """Writes the files of a shard, if there are any, as one, a tar or ArrayRecord, whose bytes
    depend on nothing else; returns its rows, which name it."""
    if not files:
        return rows
    name = f"shards/{shard:06d}.{kind}"
    data = _tar(files) if kind == "tar" else _array_record(files)
    write_whole(folder, name, [data])
    where = {"shard": name, "shard_sha256": hashlib.sha256(data).hexdigest()}
    return {n: [row if "error" in row else row | where for row in own] for n, own in rows.items()}


def _tar(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in sorted(files.items()):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def _array_record(files: dict[str, bytes]) -> bytes:
    """A record for each file, in the order of their names."""
    from array_record.python.array_record_module import ArrayRecordWriter

    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "shard"
        writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for _, content in sorted(files.items()):
            writer.write(content)
        writer.close()
        return path.read_bytes()


def recorded(folder: paths.AnyPath, shard: int) -> Rows:
    """The rows of a shard, by number, none if it has none yet."""
    path = folder / shard_name(shard)
    rows: Rows = {}
    if not path.is_file():
        return rows
    for line in path.read_text("utf-8").splitlines():
        row = _parsed(path, line)
        rows.setdefault(row["number"], []).append(row)
    return rows


def intact(folder: paths.AnyPath, shard: int) -> Rows:
    """As `recorded`, but only requests that did not fail and whose files are what they were."""
    hashes = functools.cache(digest_of)

    def is_intact(row: dict) -> bool:
        files = [(row[name], row[digest]) for name, digest in FILES if name in row]
        return bool(files) and all(hashes(folder / name) == digest for name, digest in files)

    rows = recorded(folder, shard)
    return {number: own for number, own in rows.items() if all(map(is_intact, own))}


def digest_of(path: paths.AnyPath) -> str:
    """The sha256 of a file, "" where there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finish(folder: paths.AnyPath, groups: list[list[int]]) -> tuple[int, int] | None:
    """Writes the manifest if all shards are recorded, and gives the number of its results and of
    the requests that failed; None if some are left to other processes.

    groups: shards whose numbers ascend from one to the next, so that rows are merged as they are
    read, however many.
    """
    if not all((folder / shard_name(shard)).is_file() for shard in itertools.chain(*groups)):
        return None

    def lines(shards: list[int]) -> Iterator[tuple[int, int, str]]:
        for shard in shards:
            for place, row in enumerate(itertools.chain(*recorded(folder, shard).values())):
                yield row["number"], place, json.dumps(row)

    results = failures = 0

    def counted() -> Iterator[bytes]:
        nonlocal results, failures
        for *_, line in heapq.merge(*map(lines, groups)):
            failed = '"error": ' in line and "error" in json.loads(line)
            failures += failed
            results += not failed
            yield f"{line}\n".encode()

    write_whole(folder, MANIFEST, counted())
    return results, failures
