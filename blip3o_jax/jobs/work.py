"""A job at work: requests -> one result each in a folder, over any number of processes and
restarts.

Requests of one shape of programs are cut into shards, and shard n belongs to process n modulo their
number; what is done is in the ledger (jobs/ledger.py). The same requests give the same bytes,
however many processes there are and however often they die.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import hashlib
import json
import logging
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blip3o_jax import paths
from blip3o_jax.errors import InputError, counted, require
from blip3o_jax.jobs import ledger, lock
from blip3o_jax.jobs.images import SHARDED, encoded, image_format, mask_name, named, write
from blip3o_jax.jobs.options import check_devices, load_for
from blip3o_jax.jobs.output import new_file
from blip3o_jax.origin import origin, source_of, sources
from blip3o_jax.train import stop

if TYPE_CHECKING:
    from blip3o_jax.config import Blip3oConfig
    from blip3o_jax.pipeline import Pipeline
    from blip3o_jax.request import Request, Sample
    from blip3o_jax.text import Text

log = logging.getLogger(__name__)

SHARD = 32  # requests that are recorded together, and at most made again after a crash
Namer = Callable[["Sample", int], str]
WRITERS = 8  # threads that encode and write while the devices go on; most wait for a bucket
FAILED = 1  # exit code of a job that is done but for requests that failed


def shards_of(
    requests: list[Request], config: Blip3oConfig, text: Text, refused: dict[int, InputError]
) -> tuple[list[list[int]], list[list[int]], dict[int, InputError]]:
    """Numbers of the requests of each shard; the shards of each shape, in which numbers ascend; and
    why requests cannot be served, which have shards of their own."""
    from blip3o_jax.pipeline import shape
    from blip3o_jax.request import encode

    numbers: dict[tuple, list[int]] = {}
    refused = dict(refused)
    for number, request in enumerate(requests):
        key = ()
        try:
            if number not in refused:
                key = shape(request, encode(request, config, text), config)
        except InputError as error:
            refused[number] = error
        numbers.setdefault(key, []).append(number)
    shards, groups = [], []
    for _, own in sorted(numbers.items(), key=lambda item: repr(item[0])):
        cut = [own[start : start + SHARD] for start in range(0, len(own), SHARD)]
        groups.append(list(range(len(shards), len(shards) + len(cut))))
        shards += cut
    return shards, groups, refused


def run(
    args: argparse.Namespace,
    requests: list[Request],
    facts: dict,
    is_file: bool,
    refused: dict[int, InputError] | None = None,
) -> int:
    """Makes a command's requests, as a job in the folder --out or as one file; returns the exit
    code.

    facts: what makes this job another than an earlier one. A bad request of a file fails alone in a
    folder, as do those already `refused`, by number; one that was typed ends it all.
    """
    from blip3o_jax import checkpoints
    from blip3o_jax.jobs.best import check_rewards
    from blip3o_jax.request import encode
    from blip3o_jax.rl.rewards.protocol import check_asked

    check_devices(args)
    check_rewards(args.reward, args.best_of)
    if args.reward:
        is_plain = not image_format(args.out) and not any(request.then for request in requests)
        require(is_plain, "--reward is for a job in a folder, of one turn.")
        facts |= {"reward": args.reward, "best_of": args.best_of}
    config, text = checkpoints.config_of(args.checkpoint), checkpoints.text_of(args.checkpoint)
    is_one, refused = image_format(args.out) is not None, dict(refused or {})
    for number, request in enumerate(requests):
        try:
            if is_one or not is_file:
                encode(request, config, text)
            for name in args.reward:
                check_asked(name, request.prompt, request.metadata or {})
        except InputError as error:
            if is_one or not is_file:
                raise
            refused.setdefault(number, error)
    # One picture, or a job in a folder, which is known again by what its requests ask for.
    if is_one:
        is_plain = args.format == "png" and not args.share
        require(is_plain, f"--format and --share are of a job; {args.out} is one file.")
        return _run_file(args, requests)
    outcome = make(args, requests, facts | {"format": args.format}, refused)
    where = ledger.MANIFEST
    if outcome.results is None:
        print(outcome.left)
        where = ledger.DONE
    else:
        print(f"{counted(outcome.results, 'image')} in {args.out}")
    if outcome.failed:
        names = ", ".join(outcome.failed[:3]) + (", ..." if len(outcome.failed) > 3 else "")
        what = f"{counted(len(outcome.failed), 'request')} failed ({names})"
        print(f"blip3o-jax: {what}; {paths.path(args.out) / where} says why.", file=sys.stderr)
    return FAILED if outcome.failed else 0


def _run_file(args: argparse.Namespace, requests: list[Request]) -> int:
    """Writes the one image as --out, and what is new beside it if --mask is given."""
    total = sum(len(request.texts) for request in requests)
    require(total == 1, f"{args.out} is one file, but you asked for {total} images; name a folder.")
    names = [args.out, mask_name(args.out)][: 1 + bool(getattr(args, "mask", False))]
    with contextlib.ExitStack() as stack:
        places = [stack.enter_context(new_file(name, args.overwrite)) for name in names]
        pipeline = load_for(args)
        pipeline.warn(requests)
        (sample,) = pipeline.run(requests)
        files = encoded(args, sample, origin(sample) | {"checkpoint": pipeline.identity})
        for place, data in zip(places, files, strict=True):
            place.write_bytes(data)
    print(args.out)
    return 0


@dataclass(frozen=True)
class Outcome:
    """What a process knows of a job when its share is done."""

    results: int | None  # of the whole job; None if others are at work on the rest
    failed: list[str]  # ids of the requests that failed, of the whole job or else of this share
    left: str  # a sentence for who waits for the rest
    pipeline: Pipeline | None  # if anything was to be made here


def make(
    args: argparse.Namespace,
    requests: list[Request],
    facts: dict,
    refused: dict[int, InputError],
    name: Namer | None = None,
    prepare: Callable[[], object] = lambda: None,
) -> Outcome:
    """Makes what is not made yet of this process's share of a job in the folder --out.

    name: (sample, number of its request) -> its file there. `prepare` writes what requests read
    there, in every process that has something to make.
    """
    from blip3o_jax import checkpoints
    from blip3o_jax.parallel.processes import share, wait_for_others

    config, text = checkpoints.config_of(args.checkpoint), checkpoints.text_of(args.checkpoint)
    folder = paths.path(args.out)
    facts |= {"requests": len(requests), "input": _digest(requests, folder, bool(args.reward))}
    shards, groups, refused = shards_of(requests, config, text, refused)
    name = name or functools.partial(named, args)
    index, count = share(args.share)
    require(count == 1 or not args.overwrite, "--overwrite is of one process alone.")
    identity = checkpoints.open(args.checkpoint).identity
    facts = {**facts, "checkpoint": identity, "shard": SHARD}
    begun = ledger.is_begun(folder, facts, args.overwrite)
    if args.overwrite:
        lock.outwait(folder)
    own = [shard for shard in range(len(shards)) if shard % count == index]
    # A place, model or devices that cannot be are refused before there is a folder, or one is
    # emptied.
    is_needed = any(not set(shards[shard]) <= refused.keys() for shard in own)
    pipeline = None
    with contextlib.ExitStack() as stack:
        if is_needed and (not begun or args.overwrite):
            stack.enter_context(ledger.place(folder))
            pipeline = ready(args, identity)
        ledger.begin(folder, facts, args.overwrite)
    failed: list[str] = []
    with lock.locked(folder, index, count) as life, stop.watch(together=False) as leaves:
        # What is there already, if it is what it was.
        done, left = {}, {shard: shards[shard] for shard in own}
        there = sorted(ledger.begun_shards(folder) & left.keys())
        read = ledger.ahead(lambda shard: ledger.intact(folder, shard, shards[shard]), there)
        for shard, rows in zip(there, read, strict=True):
            rows = {n: row for n, row in rows.items() if len(row) == len(requests[n].texts)}
            check_sources(folder, requests, rows)
            whole = len(rows) == len(shards[shard])
            # Rows are needed once more where the shard is not whole.
            done[shard] = rows if not whole and args.format not in SHARDED else {}
            left[shard] = [] if whole else [n for n in shards[shard] if n not in done[shard]]
        # What cannot be served needs no model.
        for shard in [shard for shard in own if set(shards[shard]) <= refused.keys()]:
            del left[shard]
            rows = {n: [failure(requests[n], n, refused[n])] for n in shards[shard]}
            ledger.record(folder, shard, rows)
            failed += [requests[n].id for n in rows]
        todo = [number for numbers in left.values() for number in numbers]
        if todo:
            log.info("%d of %d requests are to be made here.", len(todo), len(requests))
            pipeline = pipeline or ready(args, identity)
            pipeline.warn([requests[number] for number in todo])
            prepare()
            failed += _work(args, folder, requests, left, done, pipeline, name, leaves, life)
        ended = ledger.finish(folder, shards, groups)
    wait_for_others()
    there = counted(len(shards), "part")
    what = "is done" if own else f"is empty, since the job has {there}"
    left = f"Share {index}/{count} of {args.out} {what}; others are at work on the rest."
    results, failed = ended or (None, failed)
    return Outcome(results, failed, left, pipeline)


def _digest(requests: list[Request], folder: paths.AnyPath, are_judged: bool) -> str:
    """By which a job's requests are known again, also in a `folder` that was moved: what they ask
    for, of which pictures, and what rewards are told of those that `are_judged`."""
    from blip3o_jax.pictures import alpha_of, array

    digest, own = hashlib.sha256(), f"{folder}/"
    for request in requests:
        files = [x.removeprefix(own) if isinstance(x, str) else x for x in request.images]
        images = [x if isinstance(x, str) else source_of(x, array) for x in files]
        masks = [] if request.within is None else [request.within]
        masks = [x if isinstance(x, str) else source_of(x, alpha_of) for x in masks]
        told = [request.metadata or {}] if are_judged else []
        facts = [request.id, request.texts, images, *masks, *told]
        digest.update(json.dumps(facts, default=repr).encode())
    return digest.hexdigest()


def ready(args: argparse.Namespace, identity: str) -> Pipeline:
    """The pipeline; InputError where a server of --reward does not answer, or where the checkpoint
    is no longer the one of this identity."""
    from blip3o_jax.rl.rewards.protocol import check_there

    check_there(args.reward)
    pipeline = load_for(args)
    changed = f"{args.checkpoint} was {identity} and is {pipeline.identity} now; name that one."
    require(pipeline.identity == identity, changed)
    return pipeline


def check_sources(folder: paths.AnyPath, requests: list[Request], rows: ledger.Rows) -> None:
    """InputError for results that were made of other source images or another mask than are there
    now."""
    for number, (row, *_) in rows.items():
        now, before = None, _made_of(row)
        with contextlib.suppress(InputError):  # one that is gone is no other one
            now = _made_of(sources(requests[number]))
        name = row.get("file", row.get("shard"))
        were = f"{folder / str(name)} was made of {json.dumps(before)}"
        fix = "put them back, name another folder, or add --overwrite"
        require(now in (None, before), f"{were}, and these are now {json.dumps(now)}: {fix}.")


def _made_of(facts: dict) -> list[dict]:
    """The source images, and then the mask, that a row or `origin.sources` names."""
    return [*facts.get("sources", []), *([facts["within"]] if "within" in facts else [])]


def _work(
    args: argparse.Namespace,
    folder: paths.AnyPath,
    requests: list[Request],
    left: dict[int, list[int]],
    done: dict[int, ledger.Rows],
    pipeline: Pipeline,
    name: Namer,
    leaves: Callable[[int], bool],
    life: dict,
) -> list[str]:
    """Makes the requests that are `left` of each shard, and records each shard once it is done;
    returns the ids of those that failed."""
    from tqdm import tqdm

    from blip3o_jax.jobs.best import best_of
    from blip3o_jax.rl.rewards.http import Unreachable

    order = [(shard, number) for shard, numbers in left.items() for number in numbers]
    places = {id(requests[number]): (shard, number) for shard, number in order}
    missing = {shard: len(own) for shard, own in left.items()}
    done = {shard: done.get(shard, {}) for shard in left}
    # Files of shards that become one.
    held: dict[int, dict[str, bytes]] = collections.defaultdict(dict)
    writing: collections.deque[tuple[int, int, bool, Future]] = collections.deque()
    recording: collections.deque[Future] = collections.deque()
    failures: list[str] = []

    def record(shard: int, rows: ledger.Rows, files: dict[str, bytes]) -> None:
        ledger.record(folder, shard, ledger.write_shard(folder, shard, rows, files, args.format))

    def written(sample: Sample, number: int) -> tuple[dict, dict[str, bytes]]:
        facts = origin(sample) | {"checkpoint": pipeline.identity} | sample.facts
        return write(args, folder, sample, number, name(sample, number), facts)

    def settle(most: int) -> None:
        """Waits until no more than `most` results are being written."""
        while len(writing) > most:
            shard, number, is_last, future = writing.popleft()
            row, files = future.result()
            done[shard].setdefault(number, []).append(row)
            held[shard] |= files
            missing[shard] -= is_last
            life["made"] += is_last
            if is_last and not missing[shard]:
                rows, files = done.pop(shard), held.pop(shard)
                recording.append(executor.submit(record, shard, rows, files))
        while len(recording) > min(most, WRITERS):
            recording.popleft().result()

    def failed(request: Request, reason: str) -> None:
        shard, number = places[id(request)]
        failures.append(request.id)
        row = failure(request, number, InputError(reason)), {}
        writing.append((shard, number, True, executor.submit(lambda: row)))

    # Encoders and writers work while the devices are at the next batch.
    with ThreadPoolExecutor(WRITERS) as executor:
        asked = (requests[number] for _, number in order)
        if args.reward:
            samples = best_of(pipeline, asked, args.best_of, args.reward, failed)
        else:
            samples = pipeline.run(asked, failed)
        away, total = None, sum(len(requests[number].texts) for _, number in order)
        try:
            for sample in tqdm(samples, total=total, unit="image"):
                shard, number = places[id(sample.request)]
                is_last = sample.turn == len(sample.request.then)
                future = executor.submit(written, sample, number)
                writing.append((shard, number, is_last, future))
                settle(4 * pipeline.batch_size)
                if leaves(number):
                    break
        except Unreachable as error:
            away = error
        settle(0)
    # What a shard has so far, where a signal or a server that is away ends the work; a file of many
    # is whole or not at all.
    for shard, rows in ((shard, done[shard]) for shard in left if shard in done):
        whole = {n: own for n, own in rows.items() if len(own) == len(requests[n].texts)}
        if missing[shard] and whole and args.format not in SHARDED:
            ledger.record(folder, shard, whole)
    if away:
        raise InputError(f"{str(away).rstrip('.')}; the same command makes the rest.") from away
    return failures


def failure(request: Request, number: int, error: InputError) -> dict:
    """The row of a request that cannot be served."""
    row = {"number": number, "id": request.id, "error": str(error)}
    return row | ({"param": error.param} if hasattr(error, "param") else {})


def status(out: str) -> int:
    """Prints what is done of the job in a folder, and the shares that are being made."""
    folder = paths.path(out)
    facts = ledger.read_facts(folder)
    done = failures = 0
    with paths.remote_errors(f"{folder} cannot be read"):
        locks = list((folder / ledger.JOB).glob("lock-*.json"))
    shards = sorted(ledger.begun_shards(folder))
    for rows in ledger.ahead(lambda shard: ledger.recorded(folder, shard), shards):
        failures += sum("error" in row for (row, *_) in rows.values())
        done += len(rows)
    result = {"requests": facts["requests"], "done": done - failures, "failed": failures}
    lives = [life for life in map(lock.read, locks) if life and lock.is_alive(life)]
    rates = [life["made"] / life["seconds"] for life in lives if life["seconds"]]
    print(json.dumps(result | {"requests_per_s": round(sum(rates), 3), "at_work": lives}))
    return 0
