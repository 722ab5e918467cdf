"""Text and JSON as people and programs write them: prompts, edits, benchmarks and their results,
what stands beside weights, a job's own files."""

import json
from typing import Any

from blip3o_jax import paths
from blip3o_jax.errors import InputError, first_line, require
from blip3o_jax.paths import AnyPath

LARGEST = 256 << 20  # bytes


def read_text(path: str | AnyPath, what: str = "") -> str:
    """A UTF-8 file of bounded size, without a byte order mark; InputError names it as `what`."""
    file = paths.path(path)
    unread = f"The {what} file {path} cannot be read" if what else f"{path} cannot be read"
    try:
        require(file.stat().st_size <= LARGEST, f"{path} is larger than {LARGEST >> 20} MB.")
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        reason = f"it is not UTF-8 text from line {line} on; save it as UTF-8"
        raise InputError(f"{unread}: {reason}.") from error
    except OSError as error:
        raise InputError(f"{unread}: {error.strerror}.") from error


def read_lines(path: str | AnyPath, what: str = "") -> list[str]:
    """As `read_text`, lines that end at `\\n` or `\\r\\n` and nowhere else: other separators of
    Unicode are part of a prompt."""
    return [line.removesuffix("\r") for line in read_text(path, what).split("\n")]


def parse_json(where: object, text: str | bytes) -> Any:
    """The value of a JSON text; InputError, `where` it stands, for anything else, and for equal
    keys, of which JSON's reader would keep the last."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {_reason(error)}.") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"the key {key!r} is there twice")
        fields[key] = value
    return fields


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return f"{error.msg} ({line}column {error.colno})"
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    is_deep = isinstance(error, RecursionError)
    return "it is nested too deeply" if is_deep else first_line(error).partition(";")[0]


def json_object(where: object, text: str | bytes) -> dict[str, Any]:
    """As `parse_json`, an object; InputError for another value."""
    fields = parse_json(where, text)
    require(isinstance(fields, dict), f"{where} is not a JSON object.")
    return fields


def read_json(file: paths.AnyPath, limit: int = LARGEST) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes; InputError for anything else."""
    with paths.remote_errors(f"{file} cannot be read"), file.open("rb") as stream:
        # Python allocates what it may read, so no more than there is.
        text = stream.read(min(paths.size(file), limit) + 1)
    require(len(text) <= limit, f"{file} is larger than {limit} bytes, which it never needs to be.")
    return json_object(file, text)
