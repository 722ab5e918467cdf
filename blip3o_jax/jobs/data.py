"""`blip3o-jax data check`, `stats`, `cache`: a mixture's content, reading speed and cache."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import pathlib
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from blip3o_jax.errors import InputError
from blip3o_jax.jobs import data_cache
from blip3o_jax.jobs.options import config_option, overwrite_option
from blip3o_jax.jobs.output import new_folder
from blip3o_jax.jobs.train import open_feed, open_tokenizer

if TYPE_CHECKING:
    from blip3o_jax.data.feed import Feed
    from blip3o_jax.train.config import TrainConfig

HELP = "look at a mixture of training data, time it, cache it; prints one JSON line last"

REPORT = "report.json"
EXAMPLES = 5  # of what cannot be used, in the report; problems.jsonl has all
WARM = 5  # batches before the clock runs: more than are read ahead

log = logging.getLogger(__name__)


def options(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    text = "read a mixture: what cannot be used, sizes, shapes, duplicates, lengths of captions"
    check = tasks.add_parser("check", help=text)
    config_option(check)
    text = "records of each source, evenly spread (default: all)"
    check.add_argument("--limit", type=int, default=0, metavar="N", help=text)
    text = "folder for report.json, the list of problems and the plots"
    check.add_argument("--out", required=True, help=text)
    overwrite_option(check, "an earlier report")
    check.set_defaults(run=run_check)

    stats = tasks.add_parser("stats", help="how fast a mixture is read, by reader threads")
    config_option(stats)
    text = "numbers of threads to try (default: %(default)s)"
    stats.add_argument("--threads", default="1,2,4", help=text)
    text = "batches to read with each (default: %(default)s)"
    stats.add_argument("--batches", type=int, default=20, metavar="N", help=text)
    stats.set_defaults(run=run_stats)
    data_cache.options(tasks.add_parser("cache", help=data_cache.HELP))


def _mixture(args) -> TrainConfig:
    from blip3o_jax.train.read_config import read_config

    cfg = read_config(args.config, args.overrides)
    if not cfg.data.sources:
        raise InputError(f"{args.config} names no data.sources, so there is no mixture to read.")
    return cfg


def run_check(args) -> None:
    """Looks at every record of every source; writes report.json, problems.jsonl, duplicates.jsonl
    and plots; prints the report as JSON."""
    from tqdm import tqdm

    from blip3o_jax.data import survey
    from blip3o_jax.data.plots import survey_plots
    from blip3o_jax.data.sources import open_source
    from blip3o_jax.parallel.mesh import cores

    if args.limit < 0:
        raise InputError(f"--limit is at least 0, not {args.limit}.")
    cfg = _mixture(args)
    model, tokenizer = cfg.blip3o(), open_tokenizer(cfg)
    sources = [open_source(spec) for spec in cfg.data.sources]
    with new_folder(args.out, REPORT, args.overwrite) as folder:
        # Each source.
        records, rows = [], []
        for spec, source in zip(cfg.data.sources, sources, strict=True):
            count = min(args.limit or len(source), len(source))
            surveyed = survey.survey(source, tokenizer, count, cores())
            seen = list(tqdm(surveyed, spec.path, count, disable=None, mininterval=1))
            bad = [{"key": s.key, "reason": s.problem} for s in seen if s.problem]
            row = {"path": spec.path, "kind": spec.kind, "records": len(source)}
            row |= survey.summary(seen, model.image_size, model.max_prompt_tokens)
            rows.append(row | {"examples": bad[:EXAMPLES]})
            records += seen
            log.info("%s: %d of %d records cannot be used.", spec.path, len(bad), len(seen))

        # All of them: what cannot be used, duplicates, plots.
        good = [s for s in records if not s.problem]
        bad = [{"key": s.key, "reason": s.problem} for s in records if s.problem]
        near = survey.near_groups(good)
        _write_lines(folder / "problems.jsonl", bad)
        _write_lines(folder / "duplicates.jsonl", ([good[i].key for i in group] for group in near))
        for name, image in survey_plots(good, model.image_size, model.max_prompt_tokens).items():
            image.save(folder / f"{name}.png")
        report = {
            "sources": rows,
            "duplicates": _counts(survey.equal_groups(good)),
            "near_duplicates": _counts(near),
        }
        (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def _counts(groups: list[list[int]]) -> dict[str, int]:
    """`superfluous`: records that could go so that one of each group stays."""
    return {"groups": len(groups), "superfluous": sum(len(group) - 1 for group in groups)}


def _write_lines(file: pathlib.Path, rows: Iterable) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def measure(feed: Feed, batches: int) -> dict:
    """Reads `batches` batches on this host; nothing else runs meanwhile, so a batch's wait is its
    whole cost."""
    import numpy as np

    iterator = feed.train()
    for _ in range(WARM):
        rows = len(next(iterator)["tokens"])
    waits = []
    for _ in range(batches):
        before = time.perf_counter()
        next(iterator)
        waits.append(time.perf_counter() - before)
    rate = batches * rows / sum(waits)
    bytes_per_example = feed.tally.counts["bytes"] / max(feed.tally.counts["read"], 1)
    return {
        "threads": feed.data.reader_threads,
        "examples_per_second": rate,
        "mb_per_second": rate * bytes_per_example / 1e6,
        "wait_ms": 1e3 * float(np.mean(waits)),
        "longest_wait_ms": 1e3 * max(waits),
    }


def run_stats(args) -> None:
    """Prints a line for each number of reader threads, then all as one JSON line."""
    from blip3o_jax.parallel.mesh import cores

    numbers = args.threads.split(",")
    if not all(n.isdigit() and int(n) > 0 for n in numbers):
        raise InputError(f"--threads are numbers of at least 1, as in 1,2,4, not {args.threads!r}.")
    if args.batches < 1:
        raise InputError(f"--batches is at least 1, not {args.batches}.")
    # The same batches with each number of threads.
    cfg = _mixture(args)
    tokenizer = open_tokenizer(cfg)
    rows = []
    for n in map(int, numbers):
        data = dataclasses.replace(cfg.data, reader_threads=n)
        feed = open_feed(dataclasses.replace(cfg, data=data), tokenizer)
        row = measure(feed, args.batches)
        print(
            f"{n} threads: {row['examples_per_second']:.1f} examples/s, "
            f"{row['mb_per_second']:.2f} MB/s, a batch of {cfg.batch_size} takes "
            f"{row['wait_ms']:.1f} ms (the longest {row['longest_wait_ms']:.1f})"
        )
        rows.append(row)
    print(json.dumps({"batch_size": cfg.batch_size, "cores": cores(), "by_threads": rows}))
