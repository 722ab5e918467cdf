"""`blip3o-jax edit`: source images and instructions -> PNG files of the sources' sizes with their
origin inside, and a manifest."""

from __future__ import annotations

import argparse
import warnings
from dataclasses import asdict

from blip3o_jax import paths
from blip3o_jax.errors import about, check_number, require
from blip3o_jax.jobs import work
from blip3o_jax.jobs.images import image_format, mask_name
from blip3o_jax.jobs.options import job_options, model_options, option, settings_of
from blip3o_jax.jobs.prompts import Row, read_edits
from blip3o_jax.sample.settings import LEVELS, EditSettings

HELP = "images edited by instruction"
CHANGE = 16.0  # levels from which it counts


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="IMAGE INSTRUCTION", help="source and wish")
    fields = (
        ".jsonl, .csv or .parquet: `image`, a path beside it or a list of them, `instruction`, and "
        "maybe `within`"
    )
    parser.add_argument("--edits", metavar="FILE", help=fields)
    further = "edit the result by this instruction; may be repeated"
    parser.add_argument("--then", action="append", default=[], metavar="INSTRUCTION", help=further)
    keep_option(parser)
    part = "a picture of the image's size: edit where its alpha is 0, keep the source where 255"
    parser.add_argument("--within", metavar="MASK", help=part)
    mask = "with one of these two: also write NAME.mask.png, white where the image is new"
    parser.add_argument("--mask", action="store_true", help=mask)
    option(parser, "--num-images", 1, "images of each edit")
    model_options(parser, EditSettings, to_file=True)
    job_options(parser)
    parser.set_defaults(run=run)


def keep_option(parser: argparse.ArgumentParser) -> None:
    unchanged = f"keep the source's pixels where change is below (default: {CHANGE:g} of {LEVELS})"
    keep = {"nargs": "?", "type": float, "const": CHANGE, "metavar": "LEVELS", "help": unchanged}
    parser.add_argument("--keep-unchanged", **keep)


def levels_to_keep(args: argparse.Namespace) -> float | None:
    """The threshold of `geometry.keep_unchanged`; InputError unless it is a pixel's level."""
    if args.keep_unchanged is not None:
        check_number(args.keep_unchanged, "--keep-unchanged", 0, LEVELS)
    return args.keep_unchanged


def check_place(path: str, out: str) -> None:
    """InputError for a source image or a mask that the results would replace."""
    source, target = paths.path(path).resolve(), paths.path(out).resolve()
    files = (target, target.with_name(mask_name(target.name)))
    overlaps = source in files or target in source.parents
    require(not overlaps, f"The results would replace {path}; name another --out.")


def check(path: str, out: str) -> None:
    """As `check_place`, and InputError for an image that cannot be edited."""
    from blip3o_jax.geometry import placement
    from blip3o_jax.pictures import array

    check_place(path, out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of decoders: what matters is an error
        pixels = array(path)
    with about(path):
        placement(pixels)


def check_within(mask: str, source: str) -> None:
    """InputError for a mask within which a source image cannot be edited."""
    from blip3o_jax.geometry import check_mask
    from blip3o_jax.pictures import alpha_of, array

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alpha, pixels = alpha_of(mask), array(source)
    with about(mask):
        check_mask(alpha, pixels)


def run(args: argparse.Namespace) -> int:
    """Writes OUT/NUMBER-INDEX-words.png and OUT/manifest.jsonl, or one image as OUT.png; with
    --then NUMBER-INDEX-TURN-words.png."""
    import numpy as np

    from blip3o_jax import checkpoints
    from blip3o_jax.request import Request, repeated

    if args.status:
        return work.status(args.out)
    # All of the command line is checked before any weights are loaded.
    one_way = bool(args.words) != bool(args.edits)
    require(one_way, "Give an image and an instruction, or --edits FILE, one of the two.")
    if args.words:
        missing = f"Give an image and an instruction, not {args.words[0]!r} alone."
        require(len(args.words) > 1, missing)
    one = "--within is of one edit; in the file of --edits a row has its own, in a field `within`."
    require(not args.edits or args.within is None, one)
    *sources, last = args.words or [""]
    typed = [Row("edit", last, tuple(sources), within=args.within)]
    rows = typed if args.words else read_edits(args.edits)
    require(args.num_images >= 1, f"--num-images is at least 1, not {args.num_images}.")
    levels = levels_to_keep(args)
    says_new = levels is not None or all(row.within is not None for row in rows)
    sentence = "--mask needs --keep-unchanged, or --within (in a file `within`) for every edit."
    require(says_new or not args.mask, sentence)
    settings, then = settings_of(args, EditSettings), tuple(args.then)
    checkpoints.config_of(args.checkpoint).check_sources(1)
    text, codes = checkpoints.text_of(args.checkpoint), np.zeros((1, 1), int)
    for instruction in then:
        with about("--then"):
            text.encode_edit(instruction, codes)
    # An image of a file's row that cannot be edited fails alone in a folder.
    is_alone = bool(args.edits) and not image_format(args.out)
    for path in {path for row in rows for path in row.paths}:
        (check_place if is_alone else check)(path, args.out)
    for mask, source in {(row.within, row.paths[0]) for row in rows if row.within is not None}:
        check_place(mask, args.out)
        if not is_alone:
            check_within(mask, source)
    how = {"then": then, "seed": args.seed, "settings": settings, "keep_unchanged": levels}
    requests = []
    for row in rows:
        own = {"within": row.within, "id": row.id, "where": row.where, "metadata": row.fields}
        requests.append(Request(row.text, row.paths, **own, **how))
    facts = {"command": "edit", "num_images": args.num_images, "seed": args.seed}
    facts |= {"then": then, "keep_unchanged": levels, "mask": args.mask, **asdict(settings)}
    return work.run(args, repeated(requests, args.num_images), facts, bool(args.edits))
