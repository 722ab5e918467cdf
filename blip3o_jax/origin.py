"""Pictures as encoded files with their origin inside."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import pathlib
from typing import TYPE_CHECKING

from blip3o_jax import paths
from blip3o_jax.errors import require

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from blip3o_jax.pictures import Picture
    from blip3o_jax.request import Request, Sample

IMAGE_DESCRIPTION = 0x010E  # EXIF's tag


def encode_image(
    image: np.ndarray, origin: dict, kind: str = "png", quality: int | None = None
) -> bytes:
    """An image uint8 [h,w,3] with its origin: as PNG text, what is not text as JSON, or whole as
    JSON in the EXIF description of a JPEG or WebP. Without a `quality`, 0 to 100, which a PNG does
    not have, a JPEG's is 95 and a WebP is lossless."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    if kind == "png":
        options = {"pnginfo": PngInfo()}
        for key, value in origin.items():
            options["pnginfo"].add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    else:
        how = {"quality": 95 if quality is None else quality}
        if kind == "webp":
            how = {"lossless": True} if quality is None else how
        else:
            how["subsampling"] = 0
        options = {"exif": Image.Exif(), **how}
        options["exif"][IMAGE_DESCRIPTION] = json.dumps(origin)
    data = io.BytesIO()
    Image.fromarray(image).save(data, kind, **options)
    return data.getvalue()


def origin(sample: Sample) -> dict:
    """What a picture and its row say of where it is from."""
    request = sample.request
    facts = {"seed": sample.seed, "index": sample.index}
    if not request.images:
        return {"prompt": sample.prompt} | facts
    facts = {"instruction": sample.prompt} | facts | {"turn": sample.turn}
    facts["instructions"] = list(request.texts[: sample.turn + 1])
    return facts | sources(request) | {"keep_unchanged": request.keep_unchanged}


def sources(request: Request) -> dict:
    """What an edit is made of: its source images, and its mask if it has one."""
    from blip3o_jax.pictures import alpha_of, array

    facts: dict = {"sources": [source_of(picture, array) for picture in request.images]}
    if request.within is not None:
        facts["within"] = source_of(request.within, alpha_of)
    return facts


def source_of(picture: Picture, read: Callable[[Picture], np.ndarray]) -> dict[str, str]:
    """The name and the sha256 of a file, or that of the pixels as they are `read` from another."""
    if isinstance(picture, str):
        return {"file": pathlib.Path(picture).name, "sha256": digest_of_file(picture)}
    return {"sha256": hashlib.sha256(read(picture).tobytes()).hexdigest()}


def digest_of_file(file: str) -> str:
    """Of a source image or a mask, as it is now."""
    with paths.remote_errors(f"{file} cannot be read"):
        state = paths.state(paths.path(file))
    digest = _digest_of_state(file, state)
    require(bool(digest), f"{file} cannot be read: it is no file.")
    return digest


@functools.lru_cache(maxsize=64)  # all turns and images of an edit are of the same
def _digest_of_state(file: str, state: tuple[int, str]) -> str:
    return digest_of(paths.path(file))


def digest_of(path: paths.AnyPath) -> str:
    """The sha256 of a file, "" where there is none."""
    with (
        paths.remote_errors(f"{path} cannot be read"),
        contextlib.suppress(FileNotFoundError, IsADirectoryError, NotADirectoryError),
        path.open("rb") as file,
    ):
        return hashlib.file_digest(file, "sha256").hexdigest()
    return ""
