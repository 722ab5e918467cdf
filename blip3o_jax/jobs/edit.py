"""`blip3o-jax edit`: source images and instructions -> PNG files of the sources' sizes with their
origin inside, and a manifest."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import pathlib
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from blip3o_jax.errors import InputError, about, os_errors, require
from blip3o_jax.jobs.generate import file_name, mask_name, read_lines, write
from blip3o_jax.jobs.options import model_options, option, settings_of
from blip3o_jax.sample.settings import EditSettings

if TYPE_CHECKING:
    from blip3o_jax.jobs.generate import Result
    from blip3o_jax.pipeline import EditSample, Pipeline

HELP = "images edited by instruction"
LEVELS = 16.0  # of 255, from which change counts


@dataclass(frozen=True)
class Row:
    """An edit that is asked for: `where` it says so, its source images, the instruction."""

    where: str
    paths: list[str]
    instruction: str


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="IMAGE INSTRUCTION", help="source and wish")
    fields = ".jsonl with the fields `image`, a path beside it or a list of them, and `instruction`"
    parser.add_argument("--edits", metavar="FILE", help=fields)
    further = "edit the result by this instruction; may be repeated"
    parser.add_argument("--then", action="append", default=[], metavar="INSTRUCTION", help=further)
    unchanged = f"keep the source's pixels where change is below (default: {LEVELS:g} of 255)"
    keep = {"nargs": "?", "type": float, "const": LEVELS, "metavar": "LEVELS", "help": unchanged}
    parser.add_argument("--keep-unchanged", **keep)
    mask = "with --keep-unchanged: also write NAME.mask.png, white where the image is new"
    parser.add_argument("--mask", action="store_true", help=mask)
    option(parser, "--num-images", 1, "images of each edit")
    model_options(parser, EditSettings)
    parser.set_defaults(run=run)


def read_edits(path: str) -> list[Row]:
    """The edits of a .jsonl file, whose paths are relative to it."""
    lines = enumerate(read_lines(path, "edits"), 1)
    rows = [_row(path, f"{path} line {n}", line) for n, line in lines if line.strip()]
    require(bool(rows), f"{path} contains no edits.")
    return rows


def _row(path: str, where: str, line: str) -> Row:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON.") from error
    require(isinstance(fields, dict), f"{where} is not a JSON object.")
    for name in ("image", "instruction"):
        require(name in fields, f"{where} has no field `{name}`.")
    images, instruction = fields["image"], fields["instruction"]
    images = images if isinstance(images, list) else [images]
    is_text = bool(images) and all(isinstance(image, str) for image in images)
    require(is_text, f"{where}: `image` is not a path or a list of paths.")
    require(isinstance(instruction, str), f"{where}: `instruction` is not text.")
    folder = pathlib.Path(path).parent
    return Row(where, [str(folder / image) for image in images], instruction)


def check(path: str, out: str) -> dict[str, str]:
    """A source image's name and sha256; InputError for one that cannot be edited, or that the
    results would replace."""
    from blip3o_jax.geometry import placement
    from blip3o_jax.pictures import array

    source, target = pathlib.Path(path).resolve(), pathlib.Path(out).resolve()
    files = (target, target.with_name(mask_name(target.name)))
    overlaps = source in files or target in source.parents
    require(not overlaps, f"The results would replace {path}; name another --out.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of decoders: what matters is an error
        pixels = array(path)
    with about(path):
        placement(pixels)
    with os_errors(f"{path} cannot be read"):
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
    return {"file": pathlib.Path(path).name, "sha256": digest}


def run(args: argparse.Namespace) -> None:
    """Writes OUT/NUMBER-INDEX-words.png and OUT/manifest.jsonl, or one image as OUT.png; with
    --then NUMBER-INDEX-TURN-words.png."""
    import numpy as np

    from blip3o_jax import checkpoints

    # The command line, every instruction and every image are checked before weights are loaded.
    one_way = bool(args.words) != bool(args.edits)
    require(one_way, "Give an image and an instruction, or --edits FILE, one of the two.")
    if args.words:
        missing = f"Give an image and an instruction, not {args.words[0]!r} alone."
        require(len(args.words) > 1, missing)
    *paths, last = args.words or [""]
    rows = read_edits(args.edits) if args.edits else [Row("edit", paths, last)]
    require(args.num_images >= 1, f"--num-images is at least 1, not {args.num_images}.")
    levels = args.keep_unchanged
    require(levels is None or levels >= 0, f"--keep-unchanged is at least 0, not {levels}.")
    require(levels is not None or not args.mask, "--mask needs --keep-unchanged.")
    settings = settings_of(args, EditSettings)
    # Each row, by the checkpoint's small files; of its codes only the number counts here.
    config, origins = checkpoints.config_of(args.checkpoint), []
    config.check_sources(1)
    text, codes = checkpoints.text_of(args.checkpoint), np.zeros((1, config.ta_tok.num_tokens), int)
    for row in rows:
        with about(row.where):
            config.check_sources(len(row.paths))
            text.encode_edit(row.instruction, codes.repeat(len(row.paths), axis=0))
            origins.append([check(path, args.out) for path in row.paths])
    for instruction in args.then:
        with about("--then"):
            text.encode_edit(instruction, codes)
    images, turns = [row.paths for row in rows], [[row.instruction, *args.then] for row in rows]
    each = args.num_images * (1 + len(args.then))

    def result(count: int, sample: EditSample) -> Result:
        number = count // each
        more = [sample.index, sample.turn][: 2 if args.then else 1]
        origin = {n: getattr(sample, n) for n in ("instruction", "seed", "index", "turn")}
        origin["instructions"] = turns[number][: sample.turn + 1]
        origin |= {"sources": origins[number], "keep_unchanged": levels}
        return file_name(sample.instruction, number, *more), origin, sample

    def results(pipeline: Pipeline) -> Iterator[Result]:
        samples = pipeline.edits(images, turns, args.seed, args.num_images, settings, levels)
        return itertools.starmap(result, enumerate(samples))

    write(args, len(rows) * each, asdict(settings), results)
