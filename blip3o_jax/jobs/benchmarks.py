"""`blip3o-jax evaluate NAME export|import`: images laid out as an official scorer reads them, and
what it says of them as one record."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import re
import shlex
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from blip3o_jax import paths
from blip3o_jax.errors import InputError, about, require
from blip3o_jax.evaluate.exporters import record
from blip3o_jax.evaluate.exporters.record import Benchmark, Export, Item
from blip3o_jax.evaluate.exporters.table import BENCHMARKS
from blip3o_jax.jobs import edit, ledger, whole
from blip3o_jax.jobs.images import FORMATS
from blip3o_jax.jobs.options import (
    model_options,
    option,
    overwrite_option,
    settings_of,
    share_option,
)
from blip3o_jax.jobs.output import new_file
from blip3o_jax.origin import encode_image
from blip3o_jax.sample.settings import EditSettings, Settings

if TYPE_CHECKING:
    from blip3o_jax.request import Request, Sample

MARKER = "export.json"
# What the record of an import says of the export.
KEPT = ("checkpoint", "settings", "seed", "num_images", "prompt_variant", "prompts_sha256")


def options(benchmarks: argparse._SubParsersAction) -> None:
    """Adds each benchmark with its two commands."""
    for name, benchmark in BENCHMARKS.items():
        title = f"{benchmark.title}: images for its scorer, and its scores"
        actions = benchmarks.add_parser(name, help=title).add_subparsers(
            dest="action", required=True, metavar="export|import"
        )
        job = actions.add_parser("export", help="images as the scorer reads them")
        official = f"{benchmark.prompts} of {benchmark.repository}"
        job.add_argument("--prompts", required=True, metavar="PATH", help=official)
        if benchmark.sources:
            job.add_argument("--sources", required=True, metavar="DIR", help=benchmark.sources)
        option(job, "--prompt-variant", "official", "how the prompts are worded, for the record")
        option(job, "--model-name", "blip3o_jax", "name of the model in the scorer's folders")
        model_options(job, EditSettings if benchmark.edits else Settings)
        share_option(job)
        job.set_defaults(run=run_export, seed=benchmark.seed)
        job = actions.add_parser("import", help="the scorer's results as one JSON record")
        job.add_argument("--export", required=True, metavar="DIR", help="--out of the export")
        several = {"required": True, "nargs": "+", "metavar": "PATH", "help": benchmark.results}
        job.add_argument("--results", **several)
        judge = benchmark.judge or "to be named, as it decides the scores"
        job.add_argument("--judge", default=benchmark.judge, help=f"model that judged: {judge}")
        version = "version of the judge and its scorer, e.g. a date or a commit"
        job.add_argument("--judge-version", required=True, help=version)
        option(job, "--out", "result.json", "file of the record")
        overwrite_option(job, "an earlier record")
        job.set_defaults(run=run_import)


def run_export(args: argparse.Namespace) -> None:
    """Makes the images as a job, most of them where the scorer reads them, OUT/images, then writes
    what it reads beside them, and OUT/export.json; prints the scorer's command last."""
    benchmark, prompts = BENCHMARKS[args.benchmark], paths.path(args.prompts)
    # Everything is checked before any weights are loaded.
    plain = f"--model-name {args.model_name!r} is a folder: use letters, digits, `.`, `_` and `-`."
    require(bool(re.fullmatch(r"\w[\w.-]*", args.model_name)), plain)
    job = whole.job_of(args, benchmark.num_images)
    settings = settings_of(args, EditSettings if benchmark.edits else Settings)
    items = benchmark.read(prompts, args.model_name)
    check_items(args, benchmark, items)
    folder = paths.path(args.out).resolve()
    tree = folder / "images"
    requests = requests_of(args, benchmark, items, settings)
    facts = {"benchmark": args.benchmark, "model_name": args.model_name}
    facts |= {"settings": dataclasses.asdict(settings), "seed": args.seed}
    facts |= {"num_images": benchmark.num_images, "prompt_variant": args.prompt_variant}
    facts |= {"prompts_sha256": digest_of(items)}
    write = functools.partial(write_beside, benchmark, tree, items, prompts)
    name = functools.partial(file_of, benchmark, items)
    own = {"command": f"evaluate {args.benchmark} export"} | facts
    own |= own.pop("settings")
    # All that the scorer's folder is to hold; names of sources are known without reading them.
    sources = set() if benchmark.sources else {item.source for item in items} - {""}
    beside = benchmark.beside(tree, items, prompts) if benchmark.beside and not sources else ()
    expected = sources | {name for name, _ in beside}
    expected |= {file for item in items for file in item.files}
    own[ledger.FURTHER] = [MARKER, *(f"images/{file}" for file in sorted(expected))]
    if whole.make(job, requests, own, name, functools.partial(write, True)) is None:
        return
    size = lay_out(benchmark, items, requests, folder)
    # Scorers leave out what is missing, and some judge what is too much.
    write(False)
    record.check_same(tree, files_below(tree), expected)
    export = facts | {"checkpoint": ledger.read_facts(folder)["checkpoint"]}
    export["items"] = [dataclasses.asdict(item) for item in items]
    ledger.write_whole(folder, MARKER, [json.dumps(export).encode()])
    places = {"images": tree, "out": folder, "prompts": prompts.resolve()}
    places |= {"sources": paths.path(getattr(args, "sources", ".")).resolve()}
    quoted = {name: shlex.quote(str(path)) for name, path in places.items()}
    print(f"{len(requests)} images in {tree}. In a clone of {benchmark.repository}:\n")
    print(benchmark.command.format(**quoted, model=args.model_name, size=size))


def requests_of(
    args: argparse.Namespace, benchmark: Benchmark, items: list[Item], settings: Settings
) -> list[Request]:
    """The images in the order of the items."""
    from blip3o_jax.request import Request, repeated

    sources = [()] * len(items)
    if benchmark.edits:
        below = paths.path(args.out) / "images"
        place = paths.path(args.sources) if benchmark.sources else below
        sources = [(str(place / item.source),) for item in items]
    requests = [
        Request(item.prompt, source, seed=args.seed, settings=settings)
        for item, source in zip(items, sources, strict=True)
    ]
    return repeated(requests, benchmark.num_images)


def file_of(benchmark: Benchmark, items: list[Item], _: Sample, number: int) -> str:
    """The file of an image: the scorer's, or one that becomes a part of a grid."""
    place, index = divmod(number, benchmark.num_images)
    if benchmark.grid:
        return f"singles/{place:05d}-{index}.png"
    return f"images/{items[place].files[index]}"


def write_beside(
    benchmark: Benchmark, tree: paths.AnyPath, items: list[Item], prompts: Path, are_read: bool
) -> None:
    """Writes what the scorer reads beside the images: the sources of edits that are not there yet,
    and all else unless they `are_read`."""
    sources = {item.source for item in items}
    there = files_below(tree) & sources
    for name, content in benchmark.beside(tree, items, prompts) if benchmark.beside else ():
        if (name in sources or not are_read) and name not in there:
            ledger.write_whole(tree.parent, f"{tree.name}/{name}", [content()])


def lay_out(
    benchmark: Benchmark, items: list[Item], requests: list[Request], folder: paths.AnyPath
) -> int:
    """Writes grids of single images; returns the side of one image."""
    import numpy as np

    from blip3o_jax.pixels import contact_sheet

    made = whole.samples(folder, requests)
    if not benchmark.grid:
        return len(next(made).image)
    identity = ledger.read_facts(folder)["checkpoint"]
    size = 0
    for item in items:
        own = list(itertools.islice(made, benchmark.num_images))
        size = len(own[0].image)
        # Row by row, without a margin: scorers cut at half of the width and height.
        grid = contact_sheet(np.stack([sample.image for sample in own]), 2, margin=0)
        request = own[0].request
        origin = {"prompt": item.prompt, "seed": request.seed}
        origin |= {"index": [sample.index for sample in own], "checkpoint": identity}
        origin |= {"settings": dataclasses.asdict(request.settings)}
        data = encode_image(grid, origin, FORMATS[Path(item.files[0]).suffix])
        ledger.write_whole(folder, f"images/{item.files[0]}", [data])
    return size


def check_items(args: argparse.Namespace, benchmark: Benchmark, items: list[Item]) -> None:
    """InputError for a prompt, a file name or a source that cannot be used."""
    import numpy as np

    from blip3o_jax import checkpoints

    config, text = checkpoints.config_of(args.checkpoint), checkpoints.text_of(args.checkpoint)
    if benchmark.edits:
        config.check_sources(1)
    codes = np.zeros((1, config.ta_tok.num_tokens), int)
    for item in items:
        with about(f"{args.prompts}, {item.key}"):
            require(isinstance(item.prompt, str), "the prompt is not text.")
            if benchmark.edits:
                text.encode_edit(item.prompt, codes)
            else:
                text.encode_prompt(item.prompt)
            for name in item.files:
                path = PurePosixPath(name)
                is_below = not path.is_absolute() and ".." not in path.parts
                require(is_below, f"{name!r} is not the name of a file.")
            if benchmark.sources:
                edit.check(str(paths.path(args.sources) / item.source), args.out)


def files_below(folder: paths.AnyPath) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in paths.files_below(folder)}


def digest_of(items: list[Item]) -> str:
    """The sha256 of the prompts in order, which tells variants apart."""
    text = json.dumps([[item.key, item.prompt] for item in items])
    return hashlib.sha256(text.encode()).hexdigest()


def run_import(args: argparse.Namespace) -> None:
    """Writes the record of a finished scorer to --out, and prints it."""
    benchmark, file = BENCHMARKS[args.benchmark], paths.path(args.export) / MARKER
    export = record.parse_json(file, record.read_text(file))
    # Of this benchmark, and as `run_export` wrote it.
    try:
        name, model_name = export["benchmark"], export["model_name"]
        items = [Item(**{**row, "files": tuple(row["files"])}) for row in export["items"]]
        facts = {key: export[key] for key in KEPT}
    except (KeyError, TypeError) as error:
        raise InputError(f"{file} was not written by `evaluate NAME export`.") from error
    require(name == args.benchmark, f"{file} is an export for {name}, not {args.benchmark}.")
    require(bool(args.judge), "Name the model that judged the images: --judge NAME.")
    results = [paths.path(path) for path in args.results]
    for path in results:
        require(path.exists(), f"{path} does not exist.")
    scores = benchmark.scores(Export(items, model_name), results)
    result = {"benchmark": name, "title": benchmark.title}
    result["scores"] = {key: round(value, 6) for key, value in scores.items()}
    result |= {"judge": args.judge, "judge_version": args.judge_version, **facts}
    # Files by content, so that a record can be told from a later run's.
    contents = {path.name: path.read_bytes() for path in record.files_of(results)}
    result["results"] = {k: hashlib.sha256(data).hexdigest() for k, data in contents.items()}
    with new_file(args.out, args.overwrite) as path:
        path.write_text(json.dumps(result, indent=1), "utf-8")
    print(json.dumps(result))
