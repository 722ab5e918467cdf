"""`blip3o-jax data check`, `preview`, `stats`, `cache`: a mixture's content, a sheet of it, reading
speed and cache."""

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
from blip3o_jax.jobs.output import new_file, new_folder
from blip3o_jax.jobs.train import open_feed, open_tokenizer

if TYPE_CHECKING:
    from blip3o_jax.data.feed import Feed

HELP = "inspect, time and cache a training mixture; prints one JSON line last"

REPORT = "report.json"
EXAMPLES = 5  # of what cannot be used, in the report; problems.jsonl has all
WARM = 5  # batches before the clock runs: more than are read ahead
CELL, COLUMNS, LINES = 224, 6, 4  # of a preview: pixels of a picture, lines of its caption

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

    text = "a sheet of records as training sees them: cropped, with their captions"
    preview = tasks.add_parser("preview", help=text)
    text = "records to show, evenly spread over the sources (default: %(default)s)"
    preview.add_argument("--count", type=int, default=36, metavar="N", help=text)
    preview.add_argument("--out", required=True, metavar="NAME.png", help="the sheet")
    overwrite_option(preview, "an earlier sheet")

    stats = tasks.add_parser("stats", help="how fast a mixture is read, by reader threads")
    text = "numbers of threads to try (default: %(default)s)"
    stats.add_argument("--threads", default="1,2,4", help=text)
    text = "batches to read with each (default: %(default)s)"
    stats.add_argument("--batches", type=int, default=20, metavar="N", help=text)
    for task, run in ((check, run_check), (preview, run_preview), (stats, run_stats)):
        config_option(task)
        task.set_defaults(run=run)
    data_cache.options(tasks.add_parser("cache", help=data_cache.HELP))


def run_check(args) -> int:
    """Looks at every record of every source; writes report.json, problems.jsonl, duplicates.jsonl,
    misplaced.jsonl and plots; prints the report as JSON. Exit code 1 when no record is usable."""
    from tqdm import tqdm

    from blip3o_jax.data import feed, survey
    from blip3o_jax.data.plots import survey_plots
    from blip3o_jax.data.row_groups import RowGroups
    from blip3o_jax.data.sources import open_source
    from blip3o_jax.parallel.mesh import cores

    require(args.limit >= 0, f"--limit is at least 0, not {args.limit}.")
    cfg = data_cache.read_mixture(args, "so there is no mixture to read")
    model, tokenizer = cfg.blip3o(), open_tokenizer(cfg)
    feed.row_tokens(cfg.data, model)
    limits = model.image_size, model.max_prompt_tokens
    groups = RowGroups(cfg.data.row_group_mb)
    sources = [open_source(spec, groups) for spec in cfg.data.sources]
    with new_folder(args.out, REPORT, args.overwrite) as folder:
        # Each source.
        records, problems, rows = [], [], []
        for spec, source in zip(cfg.data.sources, sources, strict=True):
            count = min(args.limit or len(source), len(source))
            how = cores(), model.image_size, cfg.data.crop, cfg.data.limits
            surveyed = survey.survey(source, tokenizer, count, *how)
            seen = list(tqdm(surveyed, spec.path, count, disable=None, mininterval=1))
            bad = [{"key": s.key, "reason": s.problem} for s in seen if s.problem]
            row = {"path": spec.path, "kind": spec.kind, "records": len(source)}
            row["notes"] = list(source.notes)
            counts = survey.summary(seen, *limits, model.max_sources)
            rows.append(row | counts | {"examples": bad[:EXAMPLES]})
            problems += bad
            records += [s for s in seen if not s.problem]
            log.info("%s: %d of %d records cannot be used.", spec.path, len(bad), len(seen))
            if edits := rows[-1]["edits"]:
                kinds = ("shifted", "zoomed", "not_comparable")
                text = "%s: of %d edits, %d are shifted, %d zoomed, %d not comparable."
                log.info(text, spec.path, edits, *(rows[-1][f"{kind}_edits"] for kind in kinds))
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
    if not records:
        return 1
    feed.check_sources(cfg.data, model, sources)  # what training would refuse
    looked, most = len(records) + len(problems), cfg.data.max_bad_fraction
    if len(problems) > most * looked:
        text = "%d of %d records cannot be used: training stops beyond data.max_bad_fraction %g."
        log.warning(text, len(problems), looked, most)
    return 0


def run_preview(args: argparse.Namespace) -> int:
    """Writes the sheet; prints one JSON line. Exit code 1 when no record can be shown."""
    import numpy as np
    from PIL import Image

    from blip3o_jax.data.records import RecordError
    from blip3o_jax.data.sources import open_source
    from blip3o_jax.data.transform import fit_caption, image_arrays
    from blip3o_jax.pixels import labelled_sheet

    require(args.count >= 1, f"--count is at least 1, not {args.count}.")
    require(args.out.endswith(".png"), f"--out names a .png, not {args.out!r}.")
    cfg = data_cache.read_mixture(args, "so there is no mixture to read")
    model, tokenizer = cfg.blip3o(), open_tokenizer(cfg)
    images, labels, good, bad = [], [], 0, 0
    sources = list(map(open_source, cfg.data.sources))
    for k, source in enumerate(sources):
        # The first sources have the records that do not divide.
        share = (args.count + len(sources) - 1 - k) // len(sources)
        count = min(share, len(source))
        for i in (n * len(source) // count for n in range(count)):
            try:
                record = source[i]
                arrays = image_arrays(record, model, cfg.data.crop, cfg.data.limits)
                caption = fit_caption(tokenizer, record.caption, len(record.inputs))
            except RecordError as error:
                bad += 1
                log.warning("Record %s is not used: %s.", source.key(i), error)
                continue
            good += 1
            # An edit's sources stand before its result.
            shown = [*arrays.get("sources", ()), arrays["images"]]
            images += [Image.fromarray(pixels).resize((CELL, CELL)) for pixels in shown]
            labels += ["(source)"] * len(record.inputs) + [caption]
    if images:
        stacked = np.stack([np.asarray(image) for image in images])
        sheet = labelled_sheet(stacked, labels, COLUMNS, scale=1, lines=LINES)
        with new_file(args.out, args.overwrite) as file:
            Image.fromarray(sheet).save(file, "PNG")
    print(json.dumps({"sheet": args.out if images else None, "shown": good, "bad": bad}))
    return 0 if images else 1


def measure(feed: Feed, batches: int) -> dict:
    """Reads `batches` batches on this host; nothing else runs meanwhile, so a batch's wait is its
    whole cost."""
    iterator = feed.train()
    for _ in range(WARM):
        rows = len(next(iter(next(iterator).values())))
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
        row = measure(open_feed(dataclasses.replace(cfg, data=data), tokenizer), args.batches)
        print(
            f"{n} threads: {row['examples_per_second']:.1f} examples/s, "
            f"{row['mb_per_second']:.2f} MB/s, a batch of {cfg.batch_size} takes "
            f"{row['wait_ms']:.1f} ms (the longest {row['longest_wait_ms']:.1f})"
        )
        rows.append(row)
    print(json.dumps({"batch_size": cfg.batch_size, "cores": cores(), "by_threads": rows}))
