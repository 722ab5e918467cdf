"""Answers in OpenAI's form: responses, server-sent events, errors."""

from __future__ import annotations

import base64
import dataclasses
import json
import time

import numpy as np
from starlette.responses import Response

from blip3o_jax import geometry
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.origin import encode_image, origin
from blip3o_jax.request import Request, Sample
from blip3o_jax.serve.bodies import EDITS, GENERATIONS, Asked, error_body

EVENTS = {GENERATIONS: "image_generation", EDITS: "image_edit"}


class Refusal(Exception):
    """A call that is answered with an error; `kind` and `code` are OpenAI's `type` and `code`."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.body = error_body(message, param, kind, code)
        self.headers = {} if retry_after is None else {"retry-after": str(retry_after)}


def as_json(body: dict, status: int = 200, headers: dict | None = None) -> Response:
    """A response in JSON, in ASCII, since a text may hold what UTF-8 cannot."""
    return Response(json.dumps(body), status, headers, "application/json")


def encoded(asked: Asked, sample: Sample, identity: str) -> str:
    """The base64 of a sample as the body asked for it, with what `generate` and `edit` write into
    their files; of a source, which is no file here, the hash of its pixels."""
    # The same facts in the same order give the same bytes.
    facts = origin(sample) | {"checkpoint": identity}
    facts |= {"settings": dataclasses.asdict(sample.request.settings)}
    return _base64(asked, sample.image, facts)


def encoded_partial(asked: Asked, request: Request, square: np.ndarray) -> str:
    """The same of an image uint8 [H,W,3] that is not finished, which says nothing of its origin."""
    image = square
    if request.images:
        source = request.images[0]
        image = geometry.from_square(square, geometry.placement(source))
        if request.within is not None:
            image = geometry.masked(source, image, request.within)
    return _base64(asked, image, {})


def _base64(asked: Asked, image: np.ndarray, facts: dict) -> str:
    return base64.b64encode(encode_image(image, facts, asked.format, asked.compression)).decode()


def usage(asked: Asked, given: int, config: Blip3oConfig) -> dict:
    """Tokens: those `given`, of the text with its template and of source images, and those of the
    images that are made, each of which is an event of its own in a stream."""
    each = config.ta_tok.num_tokens
    images = len(asked.requests[0].images) * each
    made = each if asked.stream else len(asked.requests) * each
    return {
        "input_tokens": given,
        "input_tokens_details": {"text_tokens": given - images, "image_tokens": images},
        "output_tokens": made,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": made},
        "total_tokens": given + made,
    }


def size_of(asked: Asked, config: Blip3oConfig) -> str:
    """WIDTHxHEIGHT of the images."""
    images = asked.requests[0].images
    height, width = images[0].shape[:2] if images else (config.image_size,) * 2
    return f"{width}x{height}"


def response(asked: Asked, images: list[str], used: dict, config: Blip3oConfig) -> dict:
    """The answer to a call that does not stream."""
    return {
        "created": int(time.time()),
        "data": [{"b64_json": image} for image in images],
        "background": "opaque",
        "output_format": asked.format,
        "size": size_of(asked, config),
        "usage": used,
    }


def event(
    url: str, asked: Asked, image: str, index: int, config: Blip3oConfig, **more: object
) -> bytes:
    """A finished image as a server-sent event, or with `partial_image_index` one that is not."""
    kind = "partial_image" if "partial_image_index" in more else "completed"
    name = f"{EVENTS[url]}.{kind}"
    data = {"type": name, "b64_json": image, "created_at": int(time.time())}
    data |= {"size": size_of(asked, config), "output_format": asked.format}
    data |= {"quality": "auto", "background": "opaque", "image_index": index} | more
    return sent(data, name)


def sent(data: dict, name: str) -> bytes:
    """A server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
