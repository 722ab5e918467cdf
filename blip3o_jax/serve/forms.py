"""What comes over HTTP as the body that `bodies.read_body` reads: JSON, or a form with files."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from blip3o_jax.errors import InputError
from blip3o_jax.files import json_object
from blip3o_jax.serve.answers import Refusal
from blip3o_jax.serve.bodies import FieldError

MOST_BYTES = 64 << 20  # of a body
MOST_SECONDS = 60  # that a body may take to arrive
MOST_FILES, MOST_FIELDS = 17, 64  # 16 images and a mask
# Fields of a form that are texts; others are numbers, true or false.
TEXTS = {
    *("prompt", "model", "size", "quality", "background", "moderation"),
    *("output_format", "response_format", "user", "safety_identifier"),
}
IMAGES = ("image", "image[]")


async def read_bytes(request: Request, limit: int = MOST_BYTES) -> bytes:
    """The body; a Refusal for one that is too large, which its header says before it is read, or
    too slow."""
    large = Refusal(413, f"The body has more than {limit} bytes.")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limit:
        raise large
    # A header may be missing or lie, so what comes is counted.
    chunks, size = [], 0
    try:
        async with asyncio.timeout(MOST_SECONDS):
            async for chunk in request.stream():
                chunks.append(chunk)
                size += len(chunk)
                if size > limit:
                    raise large
    except TimeoutError as error:
        raise Refusal(408, f"The body took more than {MOST_SECONDS} s.") from error
    except ClientDisconnect as error:
        raise Refusal(400, "The body is not complete.") from error
    return b"".join(chunks)


async def read_fields(request: Request, takes_forms: bool) -> dict[str, Any]:
    """The fields of a body, images of a form as bytes; a Refusal or InputError for one that cannot
    be read."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return json_object("The body", await read_bytes(request))
    if kind == "multipart/form-data" and takes_forms:
        return await _form(request, await read_bytes(request))
    kinds = "application/json" + (" or multipart/form-data" if takes_forms else "")
    raise Refusal(415, f"The content type is {kinds}, not {kind or 'missing'}.")


async def _form(request: Request, body: bytes) -> dict[str, Any]:
    async def stream() -> AsyncIterator[bytes]:
        yield body
        yield b""

    limits = {"max_files": MOST_FILES, "max_fields": MOST_FIELDS, "max_part_size": 1 << 20}
    try:
        form = await MultiPartParser(request.headers, stream(), **limits).parse()
    except (MultiPartException, KeyError, ValueError) as error:
        reason = getattr(error, "message", "its parts cannot be told apart")
        raise InputError(f"The body is not a form: {reason}") from error
    # As JSON would have them: images in a list, numbers as numbers.
    fields: dict[str, Any] = {}
    try:
        for name, value in form.multi_items():
            if name in IMAGES:
                fields.setdefault("images", []).append(await _file(name, value))
            elif name == "mask":
                _once(fields, name, await _file(name, value))
            elif name == "images":
                raise FieldError(name, "the images of a form are `image` or `image[]`.")
            elif isinstance(value, UploadFile):
                raise FieldError(name, "a file, which only `image` and `mask` are.")
            else:
                _once(fields, name, value if name in TEXTS else _plain(value))
    # Large files of a form are on disk until they are closed.
    finally:
        await form.close()
    return fields


async def _file(name: str, value: UploadFile | str) -> bytes:
    if not isinstance(value, UploadFile):
        raise FieldError(name, "a file, not a text.")
    return await value.read()


def _once(fields: dict[str, Any], name: str, value: Any) -> None:
    if name in fields:
        raise FieldError(name, "this field is there twice.")
    fields[name] = value


def _plain(value: str) -> Any:
    """A number, true or false as JSON has them, else the text itself."""
    if value in ("true", "false"):
        return value == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    return value
