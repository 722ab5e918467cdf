"""The lines of OpenAI's batch file, in and out; serve/bodies.py reads their bodies."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator

from blip3o_jax import paths
from blip3o_jax.errors import InputError, require
from blip3o_jax.files import json_object, read_lines
from blip3o_jax.jobs.ledger import MANIFEST, write_whole
from blip3o_jax.request import Request
from blip3o_jax.serve.bodies import FieldError, Offer, check_field, error_body, read_body

MOST_LINES, MOST_BYTES = 50_000, 200_000_000


def is_batch(path: str) -> bool:
    """Whether the first line of a JSONL file is one of a batch."""
    if not path.endswith(".jsonl"):
        return False
    first = next(filter(str.strip, read_lines(path, "prompts")), "")
    with contextlib.suppress(InputError):
        return {"custom_id", "url"} <= json_object(path, first).keys()
    return False


def read_batch(path: str, offer: Offer) -> tuple[list[Request], dict[int, InputError]]:
    """The requests of a batch file, those of a line one after another, and why some cannot be
    served, by number; InputError for a file that is no batch: a line without a `custom_id` of its
    own, or beyond the limits of lines and bytes."""
    large = f"{path} has more than {MOST_BYTES // 1_000_000} MB, the most of a batch file."
    require(paths.size(paths.path(path)) <= MOST_BYTES, large)
    lines = [(n, line) for n, line in enumerate(read_lines(path, "batch"), 1) if line.strip()]
    many = f"{path} has {len(lines)} lines; a batch file has {MOST_LINES} at most."
    require(len(lines) <= MOST_LINES, many)
    requests: list[Request] = []
    refused, ids = {}, set()
    for number, line in lines:
        where = f"{path} line {number}"
        row = json_object(where, line)
        id_ = row.get("custom_id")
        require(isinstance(id_, str) and bool(id_), f"{where} has no `custom_id`.")
        require(id_ not in ids, f"{where}: the custom_id {id_!r} stands in a line before.")
        ids.add(id_)
        try:
            method = row.get("method")
            check_field(method == "POST", "method", f"POST, not {method!r}.")
            requests += read_body(row.get("url"), row.get("body"), id_, offer, where).requests
        except FieldError as error:
            refused[len(requests)] = error
            requests.append(Request("", id=id_))
    return requests, refused


def write_results(folder: paths.AnyPath, created: int) -> None:
    """From a finished job's manifest OUT/output.jsonl and OUT/errors.jsonl, in OpenAI's form: a
    line for each of the batch's."""
    for name, wants_errors in (("output.jsonl", False), ("errors.jsonl", True)):
        lines = _result_lines(folder, created, wants_errors)
        write_whole(folder, name, (f"{json.dumps(line)}\n".encode() for line in lines))


def _result_lines(folder: paths.AnyPath, created: int, wants_errors: bool) -> Iterator[dict]:
    with (folder / MANIFEST).open("r") as manifest:
        rows = map(json.loads, manifest)
        for id_, own in itertools.groupby(rows, key=lambda row: row["id"]):
            own = list(own)
            error = next((row for row in own if "error" in row), None)
            if wants_errors != bool(error):
                continue
            if error:
                status, body = 400, error_body(error["error"], error.get("param"))
            else:
                status, body = 200, {"created": created, "data": []}
                for row in own:
                    file = folder / row["file"]
                    with paths.remote_errors(f"{file} cannot be read; its share makes it again"):
                        data = base64.b64encode(file.read_bytes()).decode()
                    body["data"].append({"b64_json": data})
            name = hashlib.sha256(id_.encode()).hexdigest()[:24]
            response = {"status_code": status, "request_id": f"req_{name}", "body": body}
            batch = {"id": f"batch_req_{name}", "custom_id": id_}
            yield batch | {"response": response, "error": None}
