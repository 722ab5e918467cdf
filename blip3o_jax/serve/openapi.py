"""The server's OpenAPI document, from the same tables that bodies are read by."""

from __future__ import annotations

import dataclasses
from typing import Any

from blip3o_jax import __version__
from blip3o_jax.errors import MAX_SEED
from blip3o_jax.serve.bodies import (
    EDITS,
    FIXED,
    GENERATIONS,
    LABELS,
    MOST_IMAGES,
    MOST_PARTIAL,
    Offer,
    known_fields,
)
from blip3o_jax.serve.store import CHOICES, MOST_METADATA, PURPOSES

SCALES = ("guidance_scale", "image_guidance_scale")  # a model of few steps has them from 1 on
ERRORS = {
    **{"400": "A field is missing, wrong, or asks for what is not done here."},
    **{"401": "The API key is missing or wrong.", "403": "A page of another site called."},
    **{"404": "There is no such thing.", "408": "The body was too slow."},
    **{"409": "The batch has ended already."},
    **{"413": "The body is too large.", "415": "The body is of another content type."},
    **{"429": "The queue is full.", "500": "The server failed."},
    **{"503": "The server is not ready, or stops.", "504": "The call took too long."},
}


def document(offer: Offer) -> dict[str, Any]:
    """The routes of a server with this offer."""
    # A model without editing weights has no edits.
    body = {"application/json": {"schema": _body(GENERATIONS, offer)}}
    paths = {GENERATIONS: _images("Images from a prompt", body)}
    if offer.config.max_sources:
        edit = _body(EDITS, offer)
        fields = {name: value for name, value in edit["properties"].items() if name != "images"}
        binary = {"type": "string", "format": "binary"}
        count = {"minItems": 1, "maxItems": offer.config.max_sources}
        fields |= {"image": {"type": "array", "items": binary, **count}, "mask": binary}
        form = {**edit, "properties": fields, "required": ["prompt", "image"]}
        body = {"application/json": {"schema": edit}, "multipart/form-data": {"schema": form}}
        paths[EDITS] = _images("Images from images and an instruction", body)
    models = {"type": "object", "properties": {"object": {"const": "list"}, "data": _list(_MODEL)}}
    name = {"name": "name", "in": "path", "required": True, "schema": _TEXT}
    paths |= {
        "/v1/models": {"get": _get("The model", models)},
        "/v1/models/{name}": {"get": _get("The model, by name", _MODEL) | {"parameters": [name]}},
        "/health": {"get": _get("Whether the process answers", _STATUS)},
        "/ready": {"get": _get("Whether all programs are compiled", _STATUS)},
    }
    paths |= _files_and_batches()
    key = {"type": "http", "scheme": "bearer"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "blip3o-jax serve", "version": __version__},
        "paths": paths,
        "components": {"securitySchemes": {"key": key}, "schemas": {"Error": _ERROR}},
        "security": [{}, {"key": []}],
    }


def _files_and_batches() -> dict[str, Any]:
    """Their routes."""
    binary = {"type": "string", "format": "binary"}
    form = _object(purpose={"enum": [*PURPOSES]}, file=binary) | {"additionalProperties": False}
    texts = {"type": "object", "additionalProperties": _TEXT, "maxProperties": MOST_METADATA}
    fields = {"input_file_id": _TEXT, "endpoint": {"enum": [GENERATIONS, EDITS]}}
    body = _object(**fields, completion_window={"const": "24h"})
    body["properties"]["metadata"] = {**texts, "type": ["object", "null"]}
    body["additionalProperties"] = False
    choices = [{"name": n, "in": "query", "schema": {"enum": [*v]}} for n, v in CHOICES.items()]
    files = {
        "get": _get("All files", _LIST) | {"parameters": [*_PAGE, *choices]},
        "post": _post("A new file", {"multipart/form-data": {"schema": form}}, _FILE),
    }
    batches = {
        "get": _get("All batches", _LIST) | {"parameters": _PAGE},
        "post": _post("A new batch", {"application/json": {"schema": body}}, _BATCH),
    }
    gone = _object(id=_TEXT, object={"const": "file"}, deleted={"const": True})
    content = _get("The bytes of a file", {})
    content["responses"]["200"]["content"] = {"application/octet-stream": {"schema": {}}}
    routes = {
        "/v1/files/{id}": {"get": _get("A file", _FILE), "delete": _get("Delete a file", gone)},
        "/v1/files/{id}/content": {"get": content},
        "/v1/batches/{id}": {"get": _get("A batch", _BATCH)},
        "/v1/batches/{id}/cancel": {"post": _get("Cancel a batch", _BATCH)},
    }
    for route in routes.values():
        route["parameters"] = [_ID]
    return {"/v1/files": files, "/v1/batches": batches} | routes


def _body(url: str, offer: Offer) -> dict[str, Any]:
    settings = offer.edit_settings if url == EDITS else offer.settings
    side = f"{offer.config.image_size}x{offer.config.image_size}"
    fields: dict[str, Any] = {
        "n": _whole(1, MOST_IMAGES),
        "seed": _whole(0, MAX_SEED),
        "model": {"enum": [*offer.models, None]},
        "size": {"enum": ["auto", *([side] if url == GENERATIONS else []), None]},
        "output_format": {"enum": [*offer.formats, None]},
        "output_compression": _whole(0, 100),
        "stream": {"type": ["boolean", "null"]},
        "partial_images": _whole(0, MOST_PARTIAL),
        **{name: {"enum": [*values, None]} for name, values in FIXED.items()},
        **{name: {"type": ["string", "null"]} for name in LABELS},
    }
    # What the command line takes its options from.
    for option in dataclasses.fields(settings):
        if option.name in offer.fixed:
            fields[option.name] = {"enum": [getattr(settings, option.name), None]}
        else:
            least, most = option.metadata["limits"]
            if offer.config.sana.few_steps and option.name in SCALES:
                least = 1
            fields[option.name] = (
                _whole(least, most)
                if type(option.default) is int
                else {"type": ["number", "null"], "minimum": least, "maximum": most}
            )
    fields["prompt"] = {"type": "string", "minLength": 1}
    required = ["prompt"]
    if url == EDITS:
        most = offer.config.max_sources
        fields["images"] = {"type": "array", "items": _IMAGE, "minItems": 1, "maxItems": most}
        fields["mask"] = {"anyOf": [_IMAGE, {"type": "null"}]}
        required = ["prompt", "images"]
    # A field that is read is described, and no other.
    assert fields.keys() == known_fields(url, offer)
    body = {"type": "object", "properties": fields, "required": required}
    return body | {"additionalProperties": False}


def _whole(least: int, most: int) -> dict[str, Any]:
    return {"type": ["integer", "null"], "minimum": least, "maximum": most}


def _list(items: dict) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _errors() -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {status: {"description": text, "content": content} for status, text in ERRORS.items()}


def _get(text: str, schema: dict) -> dict[str, Any]:
    good = {"description": text, "content": {"application/json": {"schema": schema}}}
    return {"summary": text, "responses": {"200": good} | _errors()}


def _post(text: str, content: dict, schema: dict) -> dict[str, Any]:
    return _get(text, schema) | {"requestBody": {"required": True, "content": content}}


def _images(text: str, content: dict) -> dict[str, Any]:
    route = _post(text, content, _IMAGES)
    route["responses"]["200"]["content"]["text/event-stream"] = {"schema": {}}
    return {"post": route}


def _object(**fields: dict) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(fields)}


_TEXT, _MAYBE, _COUNT = {"type": "string"}, {"type": ["string", "null"]}, {"type": "integer"}
_ERROR = _object(error=_object(message=_TEXT, type=_TEXT, param=_MAYBE, code=_MAYBE))
_MODEL = _object(
    **{"id": _TEXT, "object": {"const": "model"}, "created": _COUNT, "owned_by": _TEXT},
    **{"checkpoint": _TEXT, "defaults": {"type": "object"}, "few_steps": _COUNT},
)
_STATUS = _object(status=_TEXT)
_USAGE = _object(input_tokens=_COUNT, output_tokens=_COUNT, total_tokens=_COUNT)
_IMAGES = _object(created=_COUNT, data=_list(_object(b64_json=_TEXT)), usage=_USAGE, size=_TEXT)
_FILE = _object(id=_TEXT, object={"const": "file"}, bytes=_COUNT, purpose=_TEXT, filename=_TEXT)
_BATCH = _object(id=_TEXT, object={"const": "batch"}, status=_TEXT, request_counts={})
_LIST = _object(object={"const": "list"}, data={"type": "array"}, has_more={"type": "boolean"})
_ID = {"name": "id", "in": "path", "required": True, "schema": _TEXT}
_PAGE = [
    {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": 10000}},
    {"name": "after", "in": "query", "schema": _TEXT},
]
_IMAGE = {
    "type": "object",
    "properties": {
        "image_url": {"type": "string", "pattern": "^data:image/[a-z]+;base64,"},
        "file_id": {"type": "string"},
    },
    "additionalProperties": False,
}
