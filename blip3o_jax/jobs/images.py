"""Pictures as encoded files with their origin inside, and what the files are called."""

from __future__ import annotations

import io
import json
import pathlib
import re
from typing import TYPE_CHECKING

from blip3o_jax import paths
from blip3o_jax.errors import require

if TYPE_CHECKING:
    import numpy as np

FORMATS = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}
OTHER_FORMATS = (".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jxl", ".jp2", ".pdf", ".svg")
IMAGE_DESCRIPTION = 0x010E  # EXIF's tag


def image_format(out: str) -> str | None:
    """The format of an `--out` that names one picture; None for a folder, InputError for a format
    that is not written."""
    suffix = pathlib.Path(out).suffix.lower()
    formats = ", ".join(FORMATS)
    require(suffix not in OTHER_FORMATS, f"--out {out}: pictures are written as {formats}.")
    return FORMATS.get(suffix)


def encode_image(image: np.ndarray, origin: dict, kind: str = "png") -> bytes:
    """An image uint8 [h,w,3] with its origin: as PNG text, what is not text as JSON, or whole as
    JSON in the EXIF description of a JPEG or a (lossless) WebP."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    if kind == "png":
        options = {"pnginfo": PngInfo()}
        for key, value in origin.items():
            options["pnginfo"].add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    else:
        best = {"lossless": True} if kind == "webp" else {"quality": 95, "subsampling": 0}
        options = {"exif": Image.Exif(), **best}
        options["exif"][IMAGE_DESCRIPTION] = json.dumps(origin)
    data = io.BytesIO()
    Image.fromarray(image).save(data, kind, **options)
    return data.getvalue()


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
