"""What a job is and what is done of it, on disk, so that any number of processes can share it, die
and start again.

OUT/job/job.json            what the job is: a start with anything else is refused
OUT/job/done/NUMBER.jsonl   a row for each result of a shard of requests, once all are written
OUT/manifest.jsonl          the rows of all shards in the order of the requests, at the end

Each file appears whole. A row names its file and that file's hash, so a result that was damaged or
deleted is made again; a file of the job itself that cannot be one is an InputError that says so.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import heapq
import io
import itertools
import json
import re
import tarfile
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from blip3o_jax import paths
from blip3o_jax.errors import InputError, require
from blip3o_jax.files import json_object, read_json
from blip3o_jax.jobs.output import made
from blip3o_jax.origin import digest_of

VERSION = 1  # of the files of a job
JOB, FACTS, DONE, MANIFEST = "job", "job/job.json", "job/done", "manifest.jsonl"
# What a row names, and by what hash.
FILES = (("file", "sha256"), ("mask", "mask_sha256"), ("shard", "shard_sha256"))
BEGUN = "begun"  # the fact when a job first began, in seconds, which may differ
FURTHER = "files"  # the fact what else a job writes than rows name, which may differ
# Names of results, of which a killed process leaves some without a row; the group is the number.
RESULT = re.compile(
    r"(shards/\d+|singles/\d+-\d|(?:images/)?\d{5,}-\d+(?=-))[a-z0-9-]*"
    r"(?:\.mask)?\.(?:png|webp|jpg|tar|array_record)"
)
READERS = 16  # files of a job that are read at once: each may wait for a bucket's answer
Rows = dict[int, list[dict]]  # of a shard, by the request's number
# What helps where a file of the job is damaged.
OTHER_JOB = "name another folder, or add --overwrite to make all of it again"
OTHER_ROWS = "delete this file and give the job's command again, which makes what it recorded"


def write_whole(folder: paths.AnyPath, name: str, data: Iterable[bytes]) -> None:
    """Writes a file of the job that nobody sees half written; InputError if it cannot be."""
    with paths.remote_errors(f"{folder / name} cannot be written"):
        paths.write_chunks(folder / name, data, folder / JOB)


def place(folder: paths.AnyPath) -> contextlib.AbstractContextManager:
    """A job's folder in the block, so that one that cannot be is known before there is work; it
    does not stay for a job that does not begin."""
    if not paths.is_bucket(folder):
        return made(folder / JOB)
    trial = folder / JOB / f"{paths.NEW}{uuid.uuid4().hex}"
    with paths.remote_errors(f"{folder} cannot be written"):
        paths.write_bytes(trial, b"")
        trial.unlink()
    return contextlib.nullcontext()


@contextlib.contextmanager
def mended_by(fix: str) -> Iterator[None]:
    """Ends an InputError with what helps."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{str(error).rstrip('.')}; {fix}.") from error


def begin(folder: paths.AnyPath, facts: dict, overwrite: bool = False) -> None:
    """Makes `folder` that of the job with these facts, or goes on with it, if `is_begun` allows it.
    `overwrite` deletes an earlier job there first."""
    begun = is_begun(folder, facts, overwrite)
    if begun and overwrite:
        with paths.remote_errors(f"{folder} cannot be deleted"):
            paths.clear_folder(folder, FACTS)
    if not begun or overwrite:
        facts = {"version": VERSION, **facts, BEGUN: int(time.time())}
        write_whole(folder, FACTS, [json.dumps(facts, indent=1).encode()])


def is_begun(folder: paths.AnyPath, facts: dict, overwrite: bool = False) -> bool:
    """Whether `folder` holds the job with these facts; InputError if it holds anything else, and
    that shows the difference if it is another job that is not to be overwritten."""
    with paths.remote_errors(f"{folder} cannot be read"):
        require(not folder.exists() or folder.is_dir(), f"{folder} exists and is not a folder.")
        # In this order: another share may begin the job between the two.
        is_empty = _is_empty(folder)
        has_job = (folder / FACTS).is_file()
        other = f"{folder} holds other files and no job (no {FACTS}), so it is not overwritten;"
        require(has_job or is_empty, f"{other} name another folder.")
    if has_job and overwrite:
        # What is damaged is all made again; another command's results may be dear to someone.
        before = facts
        with contextlib.suppress(InputError):
            before = read_facts(folder)
        was, now = before.get("command"), facts.get("command")
        other = f"{folder} holds a job of `{was}`, which `{now}` does not overwrite;"
        require(was == now, f"{other} name another folder, or delete it yourself.")
        further = [*before.get(FURTHER, ()), *facts.get(FURTHER, ())]
        _check_own(folder, {MANIFEST, *map(str, further)})
    if not has_job or overwrite:
        return has_job
    facts = json.loads(json.dumps({"version": VERSION, **facts}))  # tuples are lists there
    before = read_facts(folder)
    names = {**before, **facts}.keys() - {BEGUN, FURTHER}
    names = sorted(name for name in names if before.get(name) != facts.get(name))
    if names:
        was, now = (", ".join(f"{n} {_shown(job, n)}" for n in names) for job in (before, facts))
        fix = "give the same command, name another folder, or add --overwrite"
        raise InputError(f"{folder} holds a job with {was}; this one has {now}: {fix}.")
    return True


def _is_empty(folder: paths.AnyPath) -> bool:
    """Whether there is nothing, but for what was left by one that was killed as it began."""
    own = folder / JOB
    for place in [place for place in (folder, own) if place.is_dir()]:
        if any(file != own and not paths.is_left_over(file) for file in place.iterdir()):
            return False
    return True


def _check_own(folder: paths.AnyPath, own: set[str]) -> None:
    """InputError for a file that a job's folder holds beside what its rows name and its `own`."""
    with contextlib.suppress(InputError):  # of a damaged row, whose result is one without
        for rows in ahead(lambda shard: recorded(folder, shard), begun_shards(folder)):
            own |= {row[x] for row in itertools.chain(*rows.values()) for x, _ in FILES if x in row}
    begun = {match[1] for match in map(RESULT.fullmatch, own) if match}
    with paths.remote_errors(f"{folder} cannot be read"):
        files = itertools.filterfalse(paths.is_left_over, paths.files_below(folder))
        names = [file.relative_to(folder).as_posix() for file in files]
    for name in names:
        match = RESULT.fullmatch(name)
        is_own = name in own or name.startswith(f"{JOB}/") or (match and match[1] not in begun)
        holds = f"{folder} also holds {name}, which its job did not write"
        require(is_own, f"{holds}; move it away, or name another folder.")


def _shown(facts: dict, name: str) -> str:
    return json.dumps(facts[name]) if name in facts else "none"


def read_facts(folder: paths.AnyPath) -> dict:
    """What `begin` wrote."""
    path = folder / FACTS
    with paths.remote_errors(f"{path} cannot be read"):
        require(path.is_file(), f"{folder} holds no job (no {FACTS}).")
    with mended_by(OTHER_JOB):
        facts = read_json(path)
        for name in ("requests", BEGUN):
            is_whole = type(facts.get(name)) is int
            require(is_whole, f"{path} is damaged: its `{name}` is no whole number.")
        require(type(facts.get(FURTHER, [])) is list, f"{path} is damaged: `{FURTHER}` is no list.")
    return facts


def ahead(function: Callable, items: Iterable, most: int = READERS) -> Iterator:
    """What the function gives for each item, in order; so many threads are ahead of who asks."""
    waiting: collections.deque[Future] = collections.deque()
    with ThreadPoolExecutor(most) as executor:
        for item in items:
            waiting.append(executor.submit(function, item))
            if len(waiting) == most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


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


def begun_shards(folder: paths.AnyPath) -> set[int]:
    """The shards of which something is recorded."""
    with paths.remote_errors(f"{folder} cannot be read"):
        files = list((folder / DONE).glob("*.jsonl"))
    return {int(file.stem) for file in files if file.stem.isdecimal()}


def recorded(folder: paths.AnyPath, shard: int, numbers: list[int] | None = None) -> Rows:
    """The rows of a shard, by number, none if it has none yet; InputError for a number that is none
    of the shard's, if these are given."""
    path, lines = folder / shard_name(shard), []
    rows: Rows = {}
    with paths.remote_errors(f"{path} cannot be read"), contextlib.suppress(FileNotFoundError):
        lines = path.read_bytes().splitlines()
    for place, line in enumerate(lines, 1):
        with mended_by(OTHER_ROWS):
            row = json_object(f"{path} line {place}", line)
            number = row.get("number")
            is_own = type(number) is int and (numbers is None or number in numbers)
            are_files = all(
                isinstance(row.get(name, ""), str) and isinstance(row.get(digest, ""), str)
                for name, digest in FILES
            )
            is_made = isinstance(row.get("tokens"), list) or "error" in row
            is_row = is_own and are_files and is_made and isinstance(row.get("id"), str)
            require(is_row, f"{path} line {place} is damaged: it is no row of this shard.")
        rows.setdefault(number, []).append(row)
    return rows


def intact(folder: paths.AnyPath, shard: int, numbers: list[int]) -> Rows:
    """As `recorded`, but only requests that did not fail and whose files are what they were."""
    hashes = functools.cache(digest_of)

    def is_intact(row: dict) -> bool:
        files = [(row[name], row.get(digest)) for name, digest in FILES if name in row]
        is_made = bool(files) and "error" not in row
        return is_made and all(hashes(folder / name) == digest for name, digest in files)

    rows = recorded(folder, shard, numbers)
    return {number: own for number, own in rows.items() if all(map(is_intact, own))}


def finish(
    folder: paths.AnyPath, shards: list[list[int]], groups: list[list[int]]
) -> tuple[int, list[str]] | None:
    """Writes the manifest if all requests of the shards are recorded, and gives the number of its
    results and the ids of the requests that failed; None if some are left to other processes.

    groups: shards whose numbers ascend from one to the next, so that rows are merged as they are
    read, however many.
    """
    if not begun_shards(folder) >= set(range(len(shards))):
        return None
    # All is read before anything is written: a signal may have ended a shard's process halfway.
    results, failed = 0, {}
    read = ahead(lambda shard: recorded(folder, shard, shards[shard]), range(len(shards)))
    for numbers, rows in zip(shards, read, strict=True):
        if len(rows) < len(numbers):
            return None
        failed |= {number: own[0]["id"] for number, own in rows.items() if "error" in own[0]}
        results += sum("error" not in row for row in itertools.chain(*rows.values()))

    def lines(group: list[int]) -> Iterator[tuple[int, int, str]]:
        for rows in ahead(lambda shard: recorded(folder, shard), group):
            for place, row in enumerate(itertools.chain(*rows.values())):
                yield row["number"], place, json.dumps(row)

    merged = heapq.merge(*map(lines, groups))
    write_whole(folder, MANIFEST, (f"{line}\n".encode() for *_, line in merged))
    return results, [id_ for _, id_ in sorted(failed.items())]
