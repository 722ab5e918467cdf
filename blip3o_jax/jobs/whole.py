"""Images that a command needs all of, to score them or to lay them out: made by any number of
processes and restarts, as those of `generate` (jobs/work.py)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from blip3o_jax import paths
from blip3o_jax.errors import InputError, counted, require
from blip3o_jax.files import read_lines
from blip3o_jax.jobs import ledger, work
from blip3o_jax.jobs.images import image_format, named

if TYPE_CHECKING:
    from blip3o_jax.pipeline import Pipeline
    from blip3o_jax.request import Request, Sample


def job_of(args: argparse.Namespace, num_images: int) -> argparse.Namespace:
    """The command line as that of a job, whose results are a folder; InputError for one picture."""
    require(image_format(args.out) is None, f"--out {args.out} is a picture; name a folder.")
    own = {"format": "png", "reward": [], "best_of": 1, "num_images": num_images}
    return argparse.Namespace(**{**vars(args), **own})


def make(
    args: argparse.Namespace,
    requests: list[Request],
    facts: dict,
    name: work.Namer | None = None,
    prepare: Callable[[], object] = lambda: None,
) -> work.Outcome | None:
    """Makes this process's share of the images in the folder --out, as `work.make`; None, and a
    line that says so, if others are at work on the rest. InputError if a request failed."""

    def below_images(sample: Sample, number: int) -> str:
        return f"images/{named(args, sample, number)}"

    outcome = work.make(args, requests, facts, {}, name or below_images, prepare)
    if outcome.failed:
        # One reason stands for all.
        folder = paths.path(args.out)
        there = sorted(ledger.begun_shards(folder))
        shards = ledger.ahead(lambda shard: ledger.recorded(folder, shard), there)
        errors = (row["error"] for rows in shards for (row, *_) in rows.values() if "error" in row)
        what = f"{counted(len(outcome.failed), 'request')} of {folder} failed"
        what = f"{what} ({next(errors).rstrip('.')}), so nothing is scored"
        raise InputError(f"{what}; the same command tries them again.")
    if outcome.results is None:
        print(outcome.left)
        return None
    return outcome


def samples(folder: paths.AnyPath, requests: list[Request]) -> Iterator[Sample]:
    """The images of a job that is done, in the order of its requests, as they are in its files."""
    from blip3o_jax.pictures import array
    from blip3o_jax.request import Sample

    def read(line: str) -> Sample:
        import numpy as np

        row = json.loads(line)
        image = array(str(folder / row["file"]))
        request, turn = requests[row["number"]], row.get("turn", 0)
        return Sample(request, turn, image, np.array(row["tokens"], np.int32))

    yield from ledger.ahead(read, filter(None, read_lines(folder / ledger.MANIFEST)))


def score(
    args: argparse.Namespace, requests: list[Request], facts: dict, num_images: int
) -> tuple[Pipeline, list[Sample]] | None:
    """The images of all requests and the model that made them, for who scores them; None as in
    `make`."""
    args = job_of(args, num_images)
    facts |= {ledger.FURTHER: ["sheet.png", "images.jsonl", "result.json"]}
    outcome = make(args, requests, facts)
    if outcome is None:
        return None
    folder = paths.path(args.out)
    identity = ledger.read_facts(folder)["checkpoint"]
    return outcome.pipeline or work.ready(args, identity), list(samples(folder, requests))
