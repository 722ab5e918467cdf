"""What comes over HTTP as the body that `bodies.read_body` reads: JSON, or a form with files."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from blip3o_jax.errors import InputError
from blip3o_jax.files import json_object
from blip3o_jax.serve.answers import Refusal
from blip3o_jax.serve.bodies import FieldError, check_field

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
    """The body, in memory."""
    return b"".join([chunk async for chunk in _stream(request, limit)])


async def _stream(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body; a Refusal for one that is too large, which its header says before it is read, or
    too slow."""
    large = Refusal(413, f"The body has more than {limit} bytes.")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limit:
        raise large
    # A header may be missing or lie, so what comes is counted.
    size, end = 0, time.monotonic() + MOST_SECONDS
    chunks = aiter(request.stream())
    try:
        while True:
            chunk = await asyncio.wait_for(anext(chunks), end - time.monotonic())
            size += len(chunk)
            if size > limit:
                raise large
            yield chunk
    except StopAsyncIteration:
        return
    except TimeoutError as error:
        raise Refusal(408, f"The body took more than {MOST_SECONDS} s.") from error
    except ClientDisconnect as error:
        raise Refusal(400, "The body is not complete.") from error


async def read_fields(request: Request, takes_forms: bool) -> dict[str, Any]:
    """The fields of a body, images of a form as bytes; a Refusal or InputError for one that cannot
    be read."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return json_object("The body", await read_bytes(request))
    if kind == "multipart/form-data" and takes_forms:
        return await _fields(await _form(request, MOST_BYTES))
    kinds = "application/json" + (" or multipart/form-data" if takes_forms else "")
    raise Refusal(415, f"The content type is {kinds}, not {kind or 'missing'}.")


async def read_upload(request: Request, limit: int) -> dict[str, Any]:
    """The fields of a form, its one `file` as bytes, with its `filename`."""
    form = await _form(request, limit)
    fields: dict[str, Any] = {}
    try:
        for name, value in form.multi_items():
            if name == "file":
                _once(fields, name, await _file(name, value))
                fields["filename"] = (value.filename or "file")[:255]
            else:
                check_field(isinstance(value, str), name, "a file, which only `file` is.")
                _once(fields, name, value)
    finally:
        await form.close()
    return fields


async def _form(request: Request, limit: int) -> FormData:
    limits = {"max_files": MOST_FILES, "max_fields": MOST_FIELDS, "max_part_size": 1 << 20}
    try:
        return await MultiPartParser(request.headers, _stream(request, limit), **limits).parse()
    except (MultiPartException, KeyError, ValueError) as error:
        reason = getattr(error, "message", "its parts cannot be told apart")
        raise InputError(f"The body is not a form: {reason}") from error


async def _fields(form: FormData) -> dict[str, Any]:
    """As JSON would have them: images in a list, numbers as numbers."""
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
