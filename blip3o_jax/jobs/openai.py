"""OpenAI's form of requests for images: bodies of /v1/images/generations and /v1/images/edits, and
the lines of a batch file, in and out."""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator
from typing import Any

from blip3o_jax import paths
from blip3o_jax.errors import MAX_SEED, InputError, require
from blip3o_jax.files import json_object, read_lines
from blip3o_jax.jobs.ledger import MANIFEST, write_whole
from blip3o_jax.request import Request
from blip3o_jax.sample.settings import EditSettings, Settings

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
MOST_IMAGES, MOST_LINES, MOST_BYTES = 10, 50_000, 200_000_000
LABELS = ("user", "safety_identifier")  # decide nothing
# Fields whose other values would ask for what is not done here.
FIXED = {
    "background": ("auto", "opaque"),
    "moderation": ("auto",),
    "quality": ("auto",),
    "response_format": ("b64_json",),
    "stream": (False,),
}


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What a body may leave out, and what it cannot change: the model's names and the size of its
    images, how they are encoded."""

    models: tuple[str, ...]
    size: int
    format: str
    seed: int
    settings: Settings
    edit_settings: EditSettings


class FieldError(InputError):
    """What is wrong with the field `param` of a body."""

    def __init__(self, param: str, sentence: str):
        super().__init__(f"{param}: {sentence}")
        self.param = param


def _field(holds: bool, param: str, sentence: str) -> None:
    if not holds:
        raise FieldError(param, sentence)


def requests_of(
    url: str, body: Any, id_: str, defaults: Defaults, where: str = ""
) -> list[Request]:
    """A request for each of the `n` images of a body that stands `where`; FieldError for a field
    that is missing, wrong or asks for what is not done here: none is passed over."""
    _field(url in (GENERATIONS, EDITS), "url", f"{GENERATIONS} or {EDITS}, not {url!r}.")
    _field(isinstance(body, dict), "body", "an object.")
    settings = defaults.edit_settings if url == EDITS else defaults.settings
    names = {field.name for field in dataclasses.fields(settings)}
    known = names | FIXED.keys() | {"prompt", "model", "n", "size", "seed", "output_format"}
    known |= {*LABELS} | ({"images"} if url == EDITS else set())
    for name in sorted(body.keys() - known):
        raise FieldError(name, "this field is not served.")
    prompt, n, seed = body.get("prompt"), body.get("n", 1), body.get("seed", defaults.seed)
    _field(isinstance(prompt, str), "prompt", "a text, which is missing.")
    _field(_is_whole(n) and 1 <= n <= MOST_IMAGES, "n", f"1 to {MOST_IMAGES}, not {n!r}.")
    is_seed = _is_whole(seed) and 0 <= seed <= MAX_SEED
    _field(is_seed, "seed", f"a whole number from 0 to {MAX_SEED}, not {seed!r}.")
    # What can only be as it is here.
    side = f"{defaults.size}x{defaults.size}"
    fixed = {"model": defaults.models, "output_format": (defaults.format,)}
    fixed |= {"size": ("auto", side)} if url == GENERATIONS else {"size": ("auto",)}
    for name, values in (FIXED | fixed).items():
        if name in body:
            shown = " or ".join(json.dumps(value) for value in values)
            _field(body[name] in values, name, f"{shown}, not {body[name]!r}.")
    for name in sorted(names & body.keys()):
        try:
            settings = dataclasses.replace(settings, **{name: body[name]})
        except InputError as error:
            raise FieldError(name, str(error).removeprefix(f"{name} is ")) from error
    images = tuple(_images(body.get("images"))) if url == EDITS else ()
    how = {"seed": seed, "settings": settings, "id": id_, "where": where}
    return [Request(prompt, images, index=index, **how) for index in range(n)]


def _is_whole(value: Any) -> bool:
    return type(value) is int


def _images(images: Any) -> Iterator[Any]:
    """PIL images of data URLs."""
    from blip3o_jax.pictures import PictureError, decode

    _field(isinstance(images, list) and bool(images), "images", "a list of {image_url}.")
    for place, image in enumerate(images):
        name = f"images[{place}]"
        url = image.get("image_url") if isinstance(image, dict) else None
        head, _, data = url.partition(";base64,") if isinstance(url, str) else ("", "", "")
        is_data = head.startswith("data:image/")
        _field(is_data, name, "image_url is a data URL, data:image/png;base64,...")
        try:
            picture = decode(base64.b64decode(data, validate=True))
        except (binascii.Error, PictureError) as error:
            raise FieldError(name, f"it cannot be used: {error}.") from error
        yield picture


def is_batch(path: str) -> bool:
    """Whether the first line of a JSONL file is one of a batch."""
    if not path.endswith(".jsonl"):
        return False
    first = next(filter(str.strip, read_lines(path, "prompts")), "")
    with contextlib.suppress(InputError):
        return {"custom_id", "url"} <= json_object(path, first).keys()
    return False


def read_batch(path: str, defaults: Defaults) -> tuple[list[Request], dict[int, InputError]]:
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
            _field(row.get("method") == "POST", "method", f"POST, not {row.get('method')!r}.")
            requests += requests_of(row.get("url"), row.get("body"), id_, defaults, where)
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


def error_body(message: str, param: str | None, kind: str = "invalid_request_error") -> dict:
    """OpenAI's form of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}
