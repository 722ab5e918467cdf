"""The lines of OpenAI's batch files, in and out, of a server and of jobs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from blip3o_jax import paths
from blip3o_jax.errors import require
from blip3o_jax.files import json_object, read_lines
from blip3o_jax.serve.bodies import Asked, Offer, check_field, read_body

MOST_LINES, MOST_BYTES = 50_000, 200_000_000


def read_batch(path: str, name: str = "") -> list[tuple[str, str, dict]]:
    """(where it stands, custom_id, fields) of each line; InputError for a file, called `name`, that
    is no batch: a line without a `custom_id` of its own, or too many lines or bytes."""
    name = name or path
    large = f"{name} has more than {MOST_BYTES // 1_000_000} MB, the most of a batch file."
    require(paths.size(paths.path(path)) <= MOST_BYTES, large)
    lines = [(n, line) for n, line in enumerate(read_lines(path, "batch"), 1) if line.strip()]
    many = f"{name} has {len(lines)} lines; a batch file has {MOST_LINES} at most."
    require(len(lines) <= MOST_LINES, many)
    return list(_rows(lines, name))


def _rows(lines: list[tuple[int, str]], name: str) -> Iterator[tuple[str, str, dict]]:
    ids = set()
    for number, line in lines:
        where = f"{name} line {number}"
        row = json_object(where, line)
        id_ = row.get("custom_id")
        require(isinstance(id_, str) and bool(id_), f"{where} has no `custom_id`.")
        is_text = id_.encode(errors="replace").decode() == id_
        require(is_text, f"{where}: the custom_id {id_!r} is not UTF-8 text.")
        require(id_ not in ids, f"{where}: the custom_id {id_!r} stands in a line before.")
        ids.add(id_)
        yield where, id_, row


def read_line(where: str, id_: str, row: dict, offer: Offer) -> Asked:
    """What a line asks for; FieldError as `bodies.read_body`."""
    method = row.get("method")
    check_field(method == "POST", "method", f"POST, not {method!r}.")
    return read_body(row.get("url"), row.get("body"), id_, offer, where)


def result_line(id_: str, status: int, body: dict) -> dict:
    """The line of the output or of the errors for a line of the batch."""
    name = hashlib.sha256(id_.encode()).hexdigest()[:24]
    response = {"status_code": status, "request_id": f"req_{name}", "body": body}
    return {"id": f"batch_req_{name}", "custom_id": id_, "response": response, "error": None}
