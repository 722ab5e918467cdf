"""Files of pictures: what they are called, the formats that their names stand for, and how a job
writes them."""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import re
from dataclasses import asdict
from typing import TYPE_CHECKING

from blip3o_jax import paths
from blip3o_jax.errors import require
from blip3o_jax.jobs.ledger import FILES
from blip3o_jax.origin import encode_image

if TYPE_CHECKING:
    from blip3o_jax.request import Sample

FORMATS = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}
SHARDED = ("tar", "array_record")  # formats of one file a shard
OTHER_FORMATS = (".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jxl", ".jp2", ".pdf", ".svg")


def image_format(out: str) -> str | None:
    """The format of an `--out` that names one picture; None for a folder, InputError for a format
    that is not written."""
    suffix = pathlib.Path(out).suffix.lower()
    formats = ", ".join(FORMATS)
    require(suffix not in OTHER_FORMATS, f"--out {out}: pictures are written as {formats}.")
    return FORMATS.get(suffix)


def file_name(text: str, number: int, *more: int, kind: str = "png") -> str:
    """NUMBER-INDEX-words.png, or the suffix of another kind of picture: sorts by prompt, and says
    what the image shows."""
    suffix = next(suffix for suffix, name in FORMATS.items() if name == kind)
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60]
    return "-".join([f"{number:05d}", *map(str, more), f"{words}{suffix}"])


def mask_name(name: str) -> str:
    """The mask's file beside that of an image."""
    path = paths.path(name)
    stem = path.with_suffix("") if path.suffix.lower() in FORMATS else path
    return f"{stem}.mask.png"


def kind_of(args: argparse.Namespace) -> str:
    """Of the pictures of a job, also of those in files of many."""
    return "png" if args.format in SHARDED else args.format


def named(args: argparse.Namespace, sample: Sample, number: int) -> str:
    """A sample's file in the folder of its job, whose request has this number."""
    request = sample.request
    several = [sample.turn] if request.then else []
    place = number // args.num_images, request.index, *several
    return file_name(sample.prompt, *place, kind=kind_of(args))


def encoded(args: argparse.Namespace, sample: Sample, facts: dict) -> list[bytes]:
    """The file of a sample, and of what is new if --mask is given."""
    kind = image_format(args.out) or kind_of(args)
    settings = {"settings": asdict(sample.request.settings)}
    files = [encode_image(sample.image, facts | settings, kind)]
    if getattr(args, "mask", False):
        files.append(encode_image(sample.mask, {}))
    return files


def write(
    args: argparse.Namespace,
    folder: paths.AnyPath,
    sample: Sample,
    number: int,
    name: str,
    facts: dict,
) -> tuple[dict, dict[str, bytes]]:
    """Writes a sample's files, or returns them if they are to be a part of its shard's; and its
    row."""
    request = sample.request
    files = dict(zip((name, mask_name(name)), encoded(args, sample, facts), strict=False))
    row = {"number": number, "id": request.id}
    tail = facts | {"tokens": sample.tokens.tolist()} | asdict(request.settings)
    if args.format in SHARDED:
        row |= {"member": name} | tail
        if args.format == "tar":
            files[f"{pathlib.Path(name).stem}.json"] = json.dumps(row).encode()
        return row, files
    for (kind, digest), (path, data) in zip(FILES, files.items(), strict=False):
        with paths.remote_errors(f"{folder / path} cannot be written"):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        row |= {kind: path, digest: hashlib.sha256(data).hexdigest()}
    return row | tail, {}
