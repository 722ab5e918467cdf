"""OpenAI's batch files as jobs; serve/lines.py reads their lines."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
from collections.abc import Iterator

from blip3o_jax import paths
from blip3o_jax.errors import InputError
from blip3o_jax.files import json_object, read_lines
from blip3o_jax.jobs.ledger import MANIFEST, write_whole
from blip3o_jax.request import Request
from blip3o_jax.serve import lines
from blip3o_jax.serve.bodies import FieldError, Offer, error_body


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
    served, by number; InputError for a file that is no batch, see `serve.lines`."""
    requests: list[Request] = []
    refused = {}
    for where, id_, row in lines.read_batch(path):
        try:
            requests += lines.read_line(where, id_, row, offer).requests
        except FieldError as error:
            refused[len(requests)] = error
            requests.append(Request("", id=id_))
    return requests, refused


def write_results(folder: paths.AnyPath, created: int) -> None:
    """From a finished job's manifest OUT/output.jsonl and OUT/errors.jsonl, in OpenAI's form: a
    line for each of the batch's."""
    for name, wants_errors in (("output.jsonl", False), ("errors.jsonl", True)):
        results = _result_lines(folder, created, wants_errors)
        write_whole(folder, name, (f"{json.dumps(line)}\n".encode() for line in results))


def _result_lines(folder: paths.AnyPath, created: int, wants_errors: bool) -> Iterator[dict]:
    with (folder / MANIFEST).open("rb") as manifest:
        for id_, own in itertools.groupby(map(json.loads, manifest), key=lambda row: row["id"]):
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
            yield lines.result_line(id_, status, body)
