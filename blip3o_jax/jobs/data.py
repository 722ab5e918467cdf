"""`blip3o-jax data check`, `stats`, `cache`: a mixture's content, reading speed and cache."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import time
from typing import TYPE_CHECKING

from blip3o_jax.errors import require
from blip3o_jax.jobs import data_cache
from blip3o_jax.jobs.options import config_option, overwrite_option
from blip3o_jax.jobs.output import new_folder
from blip3o_jax.jobs.train import open_feed, open_tokenizer

if TYPE_CHECKING:
    from blip3o_jax.data.feed import Feed

HELP = "look at a mixture of training data, time it, cache it; prints one JSON line last"

REPORT = "report.json"
EXAMPLES = 5  # of what cannot be used, in the report; problems.jsonl has all
WARM = 5  # batches before the clock runs: more than are read ahead

log = logging.getLogger(__name__)


def options(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    text = "read a mixture: what cannot be used, sizes, shapes, duplicates, lengths of captions"
    check = tasks.add_parser("check", help=text)
    text = "records of each source, evenly spread (default: all)"
    check.add_argument("--limit", type=int, default=0, metavar="N", help=text)
    text = "folder for report.json, the list of problems and the plots"
    check.add_argument("--out", required=True, help=text)
    overwrite_option(check, "an earlier report")

    stats = tasks.add_parser("stats", help="how fast a mixture is read, by reader threads")
    text = "numbers of threads to try (default: %(default)s)"
    stats.add_argument("--threads", default="1,2,4", help=text)
    text = "batches to read with each (default: %(default)s)"
    stats.add_argument("--batches", type=int, default=20, metavar="N", help=text)
    for task, run in ((check, run_check), (stats, run_stats)):
        config_option(task)
        task.set_defaults(run=run)
    data_cache.options(tasks.add_parser("cache", help=data_cache.HELP))


def run_check(args) -> None:
    """Looks at every record of every source; writes report.json, problems.jsonl, duplicates.jsonl,
    misplaced.jsonl and plots; prints the report as JSON."""
    from tqdm import tqdm

    from blip3o_jax.data import survey
    from blip3o_jax.data.plots import survey_plots
    from blip3o_jax.data.sources import open_source
    from blip3o_jax.parallel.mesh import cores

    require(args.limit >= 0, f"--limit is at least 0, not {args.limit}.")
    cfg = data_cache.read_mixture(args, "so there is no mixture to read")
    model, tokenizer = cfg.blip3o(), open_tokenizer(cfg)
    limits = model.image_size, model.max_prompt_tokens
    sources = [open_source(spec) for spec in cfg.data.sources]
    with new_folder(args.out, REPORT, args.overwrite) as folder:
        # Each source.
        records, problems, rows = [], [], []
        for spec, source in zip(cfg.data.sources, sources, strict=True):
            count = min(args.limit or len(source), len(source))
            how = cores(), model.image_size, cfg.data.crop
            surveyed = survey.survey(source, tokenizer, count, *how)
            seen = list(tqdm(surveyed, spec.path, count, disable=None, mininterval=1))
            bad = [{"key": s.key, "reason": s.problem} for s in seen if s.problem]
            row = {"path": spec.path, "kind": spec.kind, "records": len(source)}
            counts = survey.summary(seen, *limits, model.max_sources)
            rows.append(row | counts | {"examples": bad[:EXAMPLES]})
            problems += bad
            records += [s for s in seen if not s.problem]
            log.info("%s: %d of %d records cannot be used.", spec.path, len(bad), len(seen))
            if edits := rows[-1]["edits"]:
                kinds = ("shifted", "zoomed", "not_comparable")
                numbers = [rows[-1][f"{kind}_edits"] for kind in kinds]
                text = "%s: of %d edits, %d are shifted, %d zoomed, %d not comparable."
                log.info(text, spec.path, edits, *numbers)
        # All of them: what cannot be used, duplicates, misplaced edits, plots.
        groups = {
            "duplicates": survey.equal_groups(records),
            "near_duplicates": survey.near_groups(records),
        }
        near = [[records[i].key for i in group] for group in groups["near_duplicates"]]
        files = {"problems": problems, "duplicates": near, "misplaced": survey.misplaced(records)}
        for name, lines in files.items():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / f"{name}.jsonl").write_text(text)
        for name, image in survey_plots(records, *limits).items():
            image.save(folder / f"{name}.png")
        # superfluous: records that could go so that one of each group stays
        report = {"sources": rows} | {
            name: {"groups": len(members), "superfluous": sum(map(len, members)) - len(members)}
            for name, members in groups.items()
        }
        (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def measure(feed: Feed, batches: int) -> dict:
    """Reads `batches` batches on this host; nothing else runs meanwhile, so a batch's wait is its
    whole cost."""
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
        "wait_ms": 1e3 * sum(waits) / batches,
        "longest_wait_ms": 1e3 * max(waits),
    }


def run_stats(args) -> None:
    """Prints a line for each number of reader threads, then all as one JSON line."""
    from blip3o_jax.parallel.mesh import cores

    numbers = args.threads.split(",")
    valid = all(n.isdigit() and int(n) > 0 for n in numbers)
    require(valid, f"--threads are numbers of at least 1, as in 1,2,4, not {args.threads!r}.")
    require(args.batches >= 1, f"--batches is at least 1, not {args.batches}.")
    # The same batches with each number of threads.
    cfg = data_cache.read_mixture(args, "so there is no mixture to read")
    tokenizer, rows = open_tokenizer(cfg), []
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
