"""Parquet with image bytes, jsonl with image paths, and folders written by TFDS, read at random."""

import codecs
import itertools
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from blip3o_jax.data import records
from blip3o_jax.data.captions import captions_of
from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.records import FileSource, Record, RecordError
from blip3o_jax.data.row_groups import RowGroups
from blip3o_jax.errors import InputError, first_line, nearest, require
from blip3o_jax.files import json_object

# The usual names; the first one present is read.
CAPTIONS = ("caption", "text", "txt", "prompt", "captions", "conversations")
IMAGES = ("image", "images", "file_name", "image_path", "jpg", "png", "webp")
# Names in editing sets (docs/data.md) of the instruction, the first one present, and of the source
# images and the result, of which one must be present.
INSTRUCTIONS = ("used_instruction", "input_prompt", "edit_prompt", "instruction")
INPUTS = (
    *("input_images", "input_image", "source_images", "source_image", "source_img"),
    "original_image",
)
RESULTS = ("output_image", "target_image", "target_img", "edited_image")
SETTINGS = ("caption_field", "inputs_field", "image_field")
SEPARATORS = re.compile(r"[,\s]*", re.ASCII)  # between the members of a JSON array


def field_names(
    spec: SourceConfig, fields: Iterable[str], noun: str = "field"
) -> tuple[str, str, str]:
    """Names of (caption or instruction, source images or "", image or result) among the fields of a
    record: those that the source names, or the usual ones.

    RecordError, with the setting that changes it, for one that is missing or ambiguous.
    """
    fields = sorted(fields)
    texts, inputs, results = (
        [name for name in names if name in fields] for names in (INSTRUCTIONS, INPUTS, RESULTS)
    )
    captions = [name for name in CAPTIONS if name in fields]
    # An edit has two of three usual names at least; "image" may be that of its result.
    named = (spec.caption_field, spec.inputs_field, spec.image_field)
    usual_names = sum(map(bool, (texts, inputs, results)))
    is_edit = bool(spec.inputs_field) or (usual_names >= 2 and not spec.image_field)
    if is_edit:
        accepted = ((*INSTRUCTIONS[::-1], *CAPTIONS), INPUTS, (*RESULTS, "image"))
        results = results or [name for name in ("image",) if name in fields]
        present = ((texts or captions)[:1], inputs, results)
    else:
        accepted = (CAPTIONS, (), IMAGES)
        present = (captions[:1], [""], [name for name in IMAGES if name in fields][:1])
    # Each of the three.
    names = []
    for setting, own, usual, known in zip(SETTINGS, named, present, accepted, strict=True):
        how = f"set {setting} of the source"
        if not own and len(usual) > 1:
            raise RecordError(f"{noun}s {usual[0]!r} and {usual[1]!r} are both there; {how}")
        name = own or (usual or known)[0]
        if name and name not in fields:
            there = f"it has {', '.join(map(repr, fields))}; usual: {', '.join(known)}"
            raise RecordError(f"no {noun} {name!r}; {how} ({there})")
        names.append(name)
    return tuple(names)


class ParquetSource(FileSource):
    """Rows with captions and an image: bytes, a path, or a struct of both as in Hugging Face's
    data sets, or a list of one such; or edits, whose source images are one such or a list.

    A row group is the least that can be read, so the newest stay in memory, in `memory`; `blocks`
    says where they start, for an order that stays near.
    """

    def __init__(self, spec: SourceConfig, memory: RowGroups):
        paths = records.expand(spec.path)
        with ThreadPoolExecutor(8) as pool:
            self.files = list(pool.map(_open_parquet, paths))
        names = [file.schema_arrow.names for file in self.files]
        self.root = spec.root
        self.names = _column_names(spec, names[0], paths[0])
        self.columns = [name for name in self.names if name]
        for path, there in zip(paths, names, strict=True):
            for name in self.columns:
                require(name in there, f"{path} has no column {name!r}; {nearest(name, there)}")
        # Where files and row groups end, in records.
        metadata = [file.metadata for file in self.files]
        super().__init__(paths, [m.num_rows for m in metadata])
        self.groups = [(f, g) for f, m in enumerate(metadata) for g in range(m.num_row_groups)]
        sizes = [metadata[f].row_group(g).num_rows for f, g in self.groups]
        self.group_ends = list(itertools.accumulate(sizes))
        self.blocks = np.array([0, *self.group_ends[:-1]])
        self.memory = memory

    def __getitem__(self, i: int) -> Record:
        group, row = records.locate(self.group_ends, i)
        table = self.memory.table(self, group)
        try:
            values = {name: table.column(name)[row].as_py() for name in self.columns}
        except ValueError as error:  # text that is not UTF-8
            raise RecordError(f"it cannot be read ({first_line(error)})") from error
        caption, inputs, image = self.names
        if values[caption] is None:
            raise RecordError(f"no text in the column {caption!r}")
        texts = captions_of(values[caption], caption, bool(inputs))
        before = values.get(inputs, [])
        before = before if isinstance(before, list) else [before]
        if inputs and not before:
            raise RecordError(f"no image in the column {inputs!r}")
        root = self.root or os.path.dirname(self.paths[self.groups[group][0]])
        result = _image(values[image], image, root)
        return Record(self.key(i), texts, result, tuple(_image(x, inputs, root) for x in before))

    def read_group(self, group: int) -> Any:
        """A row group's columns, as pyarrow holds them."""
        file, number = self.groups[group]
        try:
            return self.files[file].read_row_group(number, columns=self.columns)
        except (OSError, ValueError) as error:
            where = f"row group {number} of {self.paths[file]}"
            raise RecordError(f"{where} cannot be read ({first_line(error)})") from error


def _column_names(spec: SourceConfig, columns: Iterable[str], path: str) -> tuple[str, str, str]:
    """As `field_names`, of a whole source, so that it is an InputError."""
    try:
        return field_names(spec, columns, "column")
    except RecordError as error:
        raise InputError(f"{path} has {error}.") from error


def _image(value: object, column: str, root: str) -> bytes:
    """Encoded image of a column's value; paths are relative to `root`."""
    value = _only(value, column)
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        (value,) = records.read_bytes(os.path.join(root, value), (0, -1))
    if not isinstance(value, bytes):
        raise RecordError(f"no bytes in the column {column!r}, nor a path")
    return value


def _only(value: object, name: str) -> object:
    """What a list of one holds, as of `List(Image)`; RecordError for a list of several."""
    if not isinstance(value, list):
        return value
    if len(value) != 1:
        raise RecordError(f"{len(value)} images in {name!r}, where an example has one")
    return value[0]


def _open_parquet(path: str):
    import pyarrow.parquet as pq

    try:
        # Reading a whole group ahead saves requests to a bucket, and costs its bytes once more.
        remote = "://" in path
        return pq.ParquetFile(records.open_binary(path) if remote else path, pre_buffer=remote)
    except (OSError, ValueError) as error:  # pyarrow's errors are of these
        raise InputError(f"{path} is truncated or not Parquet: {first_line(error)}") from error


class JsonlSource(FileSource):
    """Lines, or the objects of a JSON array, with captions and the path of an image; or edits, with
    the path or paths of their source images."""

    def __init__(self, spec: SourceConfig):
        self.spec = spec
        paths = records.expand(spec.path)
        self.spans = [_spans(path) for path in paths]
        super().__init__(paths, map(len, self.spans))

    def name(self, file: int, row: int) -> str:
        return str(row + 1)

    def __getitem__(self, i: int) -> Record:
        # The line, or the array's object.
        file, line = records.locate(self.ends, i)
        start, end = map(int, self.spans[file][line])
        (written,) = records.read_bytes(self.paths[file], (start, end - start))
        try:
            fields = json_object("the line", written)
        except InputError as error:
            raise RecordError(str(error).rstrip(".")) from error
        # Its caption and paths.
        caption, inputs, image = field_names(self.spec, fields)
        texts = captions_of(fields[caption], caption, bool(inputs))
        path = _only(fields[image], image)
        if not isinstance(path, str):
            raise RecordError(f"{image!r} is not text that names a file")
        paths = fields[inputs] if inputs else []
        paths = [paths] if isinstance(paths, str) else paths
        are_paths = isinstance(paths, list) and all(isinstance(path, str) for path in paths)
        if inputs and not (paths and are_paths):
            raise RecordError(f"{inputs!r} is not a list of paths")
        # The images.
        root = self.spec.root or os.path.dirname(self.paths[file])
        files = [os.path.join(root, path) for path in (path, *paths)]
        result, *before = (records.read_bytes(file, (0, -1))[0] for file in files)
        return Record(self.key(i), texts, result, tuple(before))


def _spans(path: str) -> np.ndarray:
    """Where each line that is not blank begins and ends, or each object of a JSON array, int64
    [n,2]."""
    spans, end = [], 0
    try:
        with records.open_binary(path) as file:
            for line in file:
                start, end = end, end + len(line)
                if not spans and line.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
                    file.seek(0)
                    spans = _array_spans(path, file.read())
                    break
                if line.strip():
                    spans.append((start, end))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    return np.array(spans, np.int64).reshape(-1, 2)


def _array_spans(path: str, written: bytes) -> list[tuple[int, int]]:
    """Where the members of a JSON array begin and end, in bytes."""
    decoder, spans = json.JSONDecoder(), []
    try:
        text = written.decode()
        at = text.index("[") + 1
        offset = len(text[:at].encode())
        # Each member in turn, with the commas and blanks before it, which are of a byte each.
        while text[start := SEPARATORS.match(text, at).end()] != "]":
            begin = offset + start - at
            _, at = decoder.raw_decode(text, start)
            offset = begin + len(text[start:at].encode())
            spans.append((begin, offset))
        if text[start + 1 :].strip():
            raise ValueError("there is more after its end")
    except (ValueError, IndexError, RecursionError) as error:
        reason = "it has no end" if isinstance(error, IndexError) else first_line(error)
        raise InputError(f"{path} is not a JSON array: {reason}.") from error
    return spans


class TfdsSource:
    """A split of a folder written by TFDS in the ArrayRecord format, with an image feature and a
    text feature; no TensorFlow needed."""

    blocks = None
    notes = ()

    def __init__(self, spec: SourceConfig):
        import tensorflow_datasets as tfds

        # TFDS raises what its file system and its parser raise.
        where, split = f"The data set {spec.path}", spec.split
        try:
            builder = tfds.builder_from_directory(spec.path)
        except Exception as error:
            raise InputError(f"{spec.path} was not written by TFDS: {first_line(error)}") from error
        self.caption, inputs, self.image = _column_names(spec, builder.info.features, where)
        require(not inputs, f"{where} holds edits, which are read from jsonl or parquet.")
        near = nearest(split, builder.info.splits)
        require(split in builder.info.splits, f"{where} has no split {split!r}; {near}")
        # A missing shard would be a missing file when a record of it is read.
        files = [str(file) for file in builder.info.splits[split].filepaths]
        lost = [file for file in files if not os.path.exists(file)] if "://" not in files[0] else []
        first = f"the first is {os.path.basename(lost[0])}; copy it again" if lost else ""
        require(not lost, f"{where} lacks {len(lost)} of {len(files)} files of {split!r}: {first}.")
        self.name = f"{builder.info.full_name}/{split}"
        encoded = {self.image: tfds.decode.SkipDecoding()}
        try:
            self.source = builder.as_data_source(split, decoders=encoded)
        except Exception as error:
            raise InputError(f"{where} cannot be read at random: {first_line(error)}") from error

    def __len__(self) -> int:
        return len(self.source)

    def key(self, i: int) -> str:
        return f"{self.name}:{i}"

    def __getitem__(self, i: int) -> Record:
        try:
            fields = self.source[i]
            # bytes of a text feature, or an array of them
            texts = [text.decode() for text in np.ravel(fields[self.caption])]
        except Exception as error:
            raise RecordError(f"it cannot be read ({first_line(error)})") from error
        return Record(self.key(i), captions_of(texts, self.caption), fields[self.image])
