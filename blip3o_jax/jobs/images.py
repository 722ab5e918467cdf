"""What files of pictures are called, and the formats that their names stand for."""

from __future__ import annotations

import pathlib
import re

from blip3o_jax import paths
from blip3o_jax.errors import require

FORMATS = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}
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
