"""`blip3o-jax evaluate NAME export|import`: images laid out as an official scorer reads them, and
what it says of them as one record."""

from __future__ import annotations

import argparse
import dataclasses
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
from blip3o_jax.jobs import edit
from blip3o_jax.jobs.images import FORMATS
from blip3o_jax.jobs.options import load_for, model_options, option, overwrite_option, settings_of
from blip3o_jax.jobs.output import new_file, new_folder
from blip3o_jax.origin import encode_image
from blip3o_jax.sample.settings import EditSettings, Settings

if TYPE_CHECKING:
    from blip3o_jax.pipeline import Pipeline

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
        option(job, "--model-name", "blip3o_jax", "of the scorer's folders")
        model_options(job, EditSettings if benchmark.edits else Settings)
        job.set_defaults(run=run_export, seed=benchmark.seed)
        job = actions.add_parser("import", help="the scorer's results as one JSON record")
        job.add_argument("--export", required=True, metavar="DIR", help="--out of the export")
        several = {"required": True, "nargs": "+", "metavar": "PATH", "help": benchmark.results}
        job.add_argument("--results", **several)
        judge = benchmark.judge or "to be named, as it decides the scores"
        job.add_argument("--judge", default=benchmark.judge, help=f"model that judged: {judge}")
        version = "of the judge and its scorer, e.g. a date or a commit"
        job.add_argument("--judge-version", required=True, help=version)
        option(job, "--out", "result.json", "file of the record")
        overwrite_option(job, "an earlier record")
        job.set_defaults(run=run_import)


def run_export(args: argparse.Namespace) -> None:
    """Writes OUT/images for the scorer and OUT/export.json; prints the scorer's command last."""
    from blip3o_jax.parallel.processes import require_alone

    require_alone("evaluate")
    benchmark, prompts = BENCHMARKS[args.benchmark], paths.path(args.prompts)
    # Everything is checked before any weights are loaded.
    plain = f"--model-name {args.model_name!r} is a folder: use letters, digits, `.`, `_` and `-`."
    require(bool(re.fullmatch(r"\w[\w.-]*", args.model_name)), plain)
    settings = settings_of(args, EditSettings if benchmark.edits else Settings)
    items = benchmark.read(prompts, args.model_name)
    check_items(args, benchmark, items)
    images = paths.path(args.out).resolve() / "images"
    keep_results(paths.path(args.out))
    with new_folder(args.out, marker=MARKER, overwrite=args.overwrite) as folder:
        # What stands beside the images comes first: sources of edits are read from there.
        tree = folder / "images"
        tree.mkdir()
        if benchmark.prepare:
            benchmark.prepare(tree, images, items, prompts)
        prepared = files_below(tree)
        pipeline = load_for(args)
        size = write_images(args, benchmark, items, pipeline, settings, tree)
        # Scorers leave out what is missing, and some judge what is too much.
        record.check_same(tree, files_below(tree), prepared.union(*(i.files for i in items)))
        export = {"benchmark": args.benchmark, "model_name": args.model_name}
        export |= {"checkpoint": pipeline.identity, "settings": dataclasses.asdict(settings)}
        export |= {"seed": args.seed, "num_images": benchmark.num_images}
        export |= {"prompt_variant": args.prompt_variant, "prompts_sha256": digest_of(items)}
        export["files"] = sorted(files_below(tree))
        export["items"] = [dataclasses.asdict(item) for item in items]
        (folder / MARKER).write_text(json.dumps(export), "utf-8")
    places = {"images": images, "out": images.parent, "prompts": prompts.resolve()}
    places |= {"sources": paths.path(getattr(args, "sources", ".")).resolve()}
    quoted = {name: shlex.quote(str(path)) for name, path in places.items()}
    number = len(items) * benchmark.num_images
    print(f"{number} images in {images}. In a clone of {benchmark.repository}:\n")
    print(benchmark.command.format(**quoted, model=args.model_name, size=size))


def keep_results(folder: Path) -> None:
    """InputError where an earlier export holds what it did not write, such as a scorer's results,
    which --overwrite would delete."""
    file = folder / MARKER
    if file.is_file():
        export = record.parse_json(file, record.read_text(file))
        own = export.get("files", ()) if isinstance(export, dict) else ()
        other = sorted(files_below(folder) - {MARKER, *(f"images/{name}" for name in own)})
        holds = f"{folder} also holds what the export did not write, such as {other[:1]}"
        require(not other, f"{holds}; move it away, or name another folder.")


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


def write_images(
    args: argparse.Namespace,
    benchmark: Benchmark,
    items: list[Item],
    pipeline: Pipeline,
    settings: Settings,
    tree: Path,
) -> int:
    """Makes all images and writes them below `tree`; returns the side of one."""
    import numpy as np
    from tqdm import tqdm

    from blip3o_jax.pixels import contact_sheet
    from blip3o_jax.request import Request, repeated

    # All images in the order of the items.
    prompts, each = [item.prompt for item in items], benchmark.num_images
    if benchmark.edits:
        folder = paths.path(args.sources) if benchmark.sources else tree
        sources = [(str(folder / item.source),) for item in items]
    else:
        sources = [()] * len(items)
    requests = [
        Request(prompt, source, seed=args.seed, settings=settings)
        for prompt, source in zip(prompts, sources, strict=True)
    ]
    samples = pipeline.run(repeated(requests, each))
    samples = iter(tqdm(samples, total=len(requests) * each, unit="image"))
    # Each item's own ones as its files.
    facts = {"checkpoint": pipeline.identity, "settings": dataclasses.asdict(settings)}
    size = 0
    for item in items:
        own = list(itertools.islice(samples, each))
        pictures, indexes = [sample.image for sample in own], [sample.index for sample in own]
        size = len(pictures[0])
        if benchmark.grid:
            # Row by row, without a margin: scorers cut at half of the width and height.
            pictures, indexes = [contact_sheet(np.stack(pictures), 2, margin=0)], [indexes]
        for name, picture, index in zip(item.files, pictures, indexes, strict=True):
            path = tree / name
            path.parent.mkdir(parents=True, exist_ok=True)
            origin = {"prompt": item.prompt, "seed": args.seed, "index": index} | facts
            path.write_bytes(encode_image(picture, origin, FORMATS[path.suffix]))
    return size


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


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
