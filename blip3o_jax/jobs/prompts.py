"""Prompts and edits in the files that people write."""

from __future__ import annotations

import collections
import contextlib
import csv
import dataclasses
import io
import json
import pathlib
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from blip3o_jax import paths
from blip3o_jax.errors import InputError, first_line, require
from blip3o_jax.files import json_object, read_lines, read_text
from blip3o_jax.sample.settings import Settings

OWN_FIELDS = ("seed", "index", "num_images", "settings")
OWN_FIELDS += tuple(field.name for field in dataclasses.fields(Settings))


@dataclass(frozen=True)
class Row:
    """A prompt, or an edit of the images at `paths`, that is asked for under an `id`: the file's
    own, or `where` it stands, by which errors name it."""

    id: str
    text: str
    paths: tuple[str, ...] = ()
    fields: dict = dataclasses.field(default_factory=dict)  # all of the file's
    where: str = ""
    within: str | None = None  # the path of a mask


def read_prompts(path: str) -> list[Row]:
    """Prompts of a .txt (non-blank lines), .jsonl, .csv or .parquet file (field or column `prompt`,
    and, if there is one, `id`)."""
    rows = []
    for where, fields in _read(path, "prompts", ".txt", ".jsonl", ".csv", ".parquet"):
        text = _text(where, fields, "prompt")
        # Text in files of GenEval's prompts, and in every CSV.
        if isinstance(include := fields.get("include"), str):
            with contextlib.suppress(ValueError):
                fields["include"] = json.loads(include)
        rows.append(Row(_id(where, fields), text, fields=fields, where=where))
    return _checked(path, "prompts", rows)


def read_edits(path: str) -> list[Row]:
    """The edits of a .jsonl, .csv or .parquet file: `image`, a path relative to the file or a list
    of them, `instruction` and, if there are, `within`, the path of a mask, and `id`."""
    rows = []
    for where, fields in _read(path, "edits", ".jsonl", ".csv", ".parquet"):
        text, images = _text(where, fields, "instruction"), fields.get("image")
        require("image" in fields, f"{where} has no field `image`.")
        images = images if isinstance(images, list) else [images]
        is_text = bool(images) and all(isinstance(image, str) for image in images)
        require(is_text, f"{where}: `image` is not a path or a list of paths.")
        within = fields.get("within")
        require(isinstance(within, str | None), f"{where}: `within` is not a path.")
        for name, files in (("image", images), ("within", [within or ""])):
            strange = {"Cc", "Cs", "Zl", "Zp"} & set(map(unicodedata.category, "".join(files)))
            sentence = f"{where}: `{name}` has a line break or a character that no name has."
            require(not strange, sentence)
        folder = paths.path(path).parent
        sources = tuple(str(paths.join(folder, image)) for image in images)
        mask = str(paths.join(folder, within)) if within else None
        rows.append(Row(_id(where, fields), text, sources, fields, where, mask))
    return _checked(path, "edits", rows)


def _checked(path: str, what: str, rows: list[Row]) -> list[Row]:
    require(bool(rows), f"{path} contains no {what}.")
    places: dict[str, str] = {}
    for row in rows:
        first = places.setdefault(row.id, row.where)
        same = f"{row.where} has the id {row.id!r}, as {first} has; make them differ."
        require(first == row.where, same)
    return rows


def _id(where: str, fields: dict) -> str:
    """The row's own id, which may be a number, or where it stands."""
    id_ = fields.get("id")
    is_id = isinstance(id_, str | int | None) and not isinstance(id_, bool)
    require(is_id, f"{where}: `id` is not text or a whole number.")
    return where if id_ in (None, "") else str(id_)


def _text(where: str, fields: dict, name: str) -> str:
    require(name in fields, f"{where} has no field `{name}`.")
    text = fields[name]
    require(isinstance(text, str), f"{where}: `{name}` is not text.")
    # A field that looks as if it decided something; others are not read.
    own = next((name for name in fields if name in OWN_FIELDS), "")
    options_of = {"index": "--num-images", "settings": "options"}
    fix = f"leave it out, and give {options_of.get(own, f'--{own}'.replace('_', '-'))}"
    require(not own, f"{where}: `{own}` is not read from a row; {fix} for all of them.")
    return text


def _read(path: str, what: str, *kinds: str) -> Iterator[tuple[str, dict]]:
    """Where each row stands, and its fields."""
    kind = pathlib.Path(path).suffix
    names = f"{', '.join(kinds[:-1])} or {kinds[-1]}"
    require(kind in kinds, f"{path}: a file of {what} ends in {names}.")
    if kind == ".csv":
        yield from _csv_rows(path, what)
    elif kind == ".parquet":
        yield from _parquet_rows(path, what)
    else:
        for number, line in enumerate(read_lines(path, what), 1):
            where = f"{path} line {number}"
            if line.strip():
                text = {"prompt": line.strip(" \t\r")}
                yield where, json_object(where, line) if kind == ".jsonl" else text


def _csv_rows(path: str, what: str) -> Iterator[tuple[str, dict]]:
    """A quoted cell may hold line breaks, and its row is named by its last line."""
    rows = csv.DictReader(io.StringIO(read_text(path, what), newline=""), strict=True)
    try:
        repeated = [name for name, n in collections.Counter(rows.fieldnames).items() if n > 1]
        require(not repeated, f"{path} has several columns `{'`, `'.join(repeated)}`; keep one.")
        for row in rows:
            where, more = f"{path} line {rows.line_num}", "more cells than columns"
            require(None not in row, f"{where} has {more}; quote a text that holds commas.")
            yield where, {name: value or "" for name, value in row.items()}
    except csv.Error as error:
        raise InputError(f"{path} line {rows.line_num + 1} is not CSV: {error}.") from error


def _has_json(kind: str) -> bool:
    """Whether JSON has values of a type of Arrow: pictures' bytes are no metadata."""
    # As the type itself or that of a field within, "struct<update: date32[day]>".
    others = r"(?:^|: )(?:large_|fixed_size_)?(?:binary|date|time|decimal|duration)"
    return not re.search(others, kind)


def _parquet_rows(path: str, what: str) -> Iterator[tuple[str, dict]]:
    """Columns that are read here, those whose names `_text` refuses, and metadata."""
    from pyarrow import parquet

    number = 0
    try:
        with paths.path(path).open("rb") as stream, parquet.ParquetFile(stream) as file:
            names = {"id", "prompt", "image", "instruction", "within", *OWN_FIELDS}
            columns = [
                x.name for x in file.schema_arrow if x.name in names or _has_json(str(x.type))
            ]
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (OSError, ValueError) as error:  # pyarrow's errors are of these
        raise InputError(f"The {what} file {path} cannot be read: {first_line(error)}") from error
