"""Parquet with image bytes, jsonl with image paths, and folders written by TFDS, read at random."""

import functools
import itertools
import json
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from blip3o_jax.data import records
from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.records import FileSource, Record, RecordError, first_line
from blip3o_jax.errors import InputError, nearest, require

CAPTIONS = ("caption", "text", "txt", "prompt")  # the usual names; the first one present is read
# Names in editing sets (docs/data.md) of the instruction, the first one present, and of the source
# images and the result, of which one must be present.
INSTRUCTIONS = ("used_instruction", "input_prompt", "edit_prompt", "instruction")
INPUTS = (
    *("input_images", "input_image", "source_images", "source_image", "source_img"),
    "original_image",
)
RESULTS = ("output_image", "target_image", "target_img", "edited_image")
SETTINGS = ("caption_field", "inputs_field", "image_field")
MAX_GROUPS = 8  # row groups of parquet in memory


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
        accepted = (CAPTIONS, (), ("image",))
        present = (captions[:1], [""], ["image"])
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
    """Rows with a caption and an image: bytes, a path, or a struct of both as in Hugging Face's
    data sets; or edits, whose source images are one such or a list.

    A row group is the least that can be read, so the newest few stay in memory; `blocks` says where
    they start, for an order that stays near.
    """

    def __init__(self, spec: SourceConfig):
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
        self._table = functools.lru_cache(MAX_GROUPS)(self._read_group)
        self._lock = threading.Lock()

    def __getitem__(self, i: int) -> Record:
        group, row = records.locate(self.group_ends, i)
        with self._lock:  # so that threads do not read the same group
            table = self._table(group)
        values = {name: table.column(name)[row].as_py() for name in self.columns}
        caption, inputs, image = self.names
        if not isinstance(values[caption], str):
            raise RecordError(f"no text in the column {caption!r}")
        before = values.get(inputs, [])
        before = before if isinstance(before, list) else [before]
        if inputs and not before:
            raise RecordError(f"no image in the column {inputs!r}")
        root = self.root or os.path.dirname(self.paths[self.groups[group][0]])
        result = _image(values[image], image, root)
        sources = tuple(_image(value, inputs, root) for value in before)
        return Record(self.key(i), values[caption].strip(), result, sources)

    def _read_group(self, group: int):
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
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        (value,) = records.read_bytes(os.path.join(root, value), (0, -1))
    if not isinstance(value, bytes):
        raise RecordError(f"no bytes in the column {column!r}, nor a path")
    return value


def _open_parquet(path: str):
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(records.open_binary(path) if "://" in path else path)
    except (OSError, ValueError) as error:  # pyarrow's errors are of these
        raise InputError(f"{path} is truncated or not Parquet: {first_line(error)}") from error


class JsonlSource(FileSource):
    """Lines with a caption and the path of an image; or edits, with the path or paths of their
    source images."""

    def __init__(self, spec: SourceConfig):
        self.spec = spec
        paths = records.expand(spec.path)
        self.offsets = [_line_starts(path) for path in paths]
        super().__init__(paths, [len(offsets) - 1 for offsets in self.offsets])

    def name(self, file: int, row: int) -> str:
        return str(row + 1)

    def __getitem__(self, i: int) -> Record:
        # The line as JSON.
        file, line = records.locate(self.ends, i)
        start, end = map(int, self.offsets[file][line : line + 2])
        (written,) = records.read_bytes(self.paths[file], (start, end - start))
        try:
            fields = json.loads(written)
        except ValueError as error:
            raise RecordError(f"the line is not JSON ({error})") from error
        if not isinstance(fields, dict):
            raise RecordError("the line is not a JSON object")
        # Its caption and paths.
        caption, inputs, image = field_names(self.spec, fields)
        if not isinstance(fields[caption], str) or not isinstance(fields[image], str):
            raise RecordError(f"{caption!r} and {image!r} are not text")
        paths = fields[inputs] if inputs else []
        paths = [paths] if isinstance(paths, str) else paths
        are_paths = isinstance(paths, list) and all(isinstance(path, str) for path in paths)
        if inputs and not (paths and are_paths):
            raise RecordError(f"{inputs!r} is not a list of paths")
        # The images.
        root = self.spec.root or os.path.dirname(self.paths[file])
        files = [os.path.join(root, path) for path in (fields[image], *paths)]
        result, *before = (records.read_bytes(file, (0, -1))[0] for file in files)
        return Record(self.key(i), fields[caption].strip(), result, tuple(before))


def _line_starts(path: str) -> np.ndarray:
    """Offsets of the lines, and of the end; a blank line is part of the line before it, where JSON
    ignores it."""
    starts, end = [0], 0
    try:
        with records.open_binary(path) as file:
            for line in file:
                end += len(line)
                if line.strip():
                    starts.append(end)
                else:
                    starts[-1] = end
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    return np.array(starts, np.int64)


class TfdsSource:
    """A split of a folder written by TFDS in the ArrayRecord format, with an image feature and a
    text feature; no TensorFlow needed."""

    blocks = None

    def __init__(self, spec: SourceConfig):
        import tensorflow_datasets as tfds

        # TFDS raises what its file system and its parser raise
        where, split = f"The data set {spec.path}", spec.split
        try:
            builder = tfds.builder_from_directory(spec.path)
        except Exception as error:
            reason = first_line(error)
            raise InputError(f"{spec.path} was not written by TFDS: {reason}") from error
        self.caption, inputs, self.image = _column_names(spec, builder.info.features, where)
        require(not inputs, f"{where} holds edits, which are read from jsonl or parquet.")
        near = nearest(split, builder.info.splits)
        require(split in builder.info.splits, f"{where} has no split {split!r}; {near}")
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
        fields = self.source[i]
        caption = fields[self.caption]
        caption = caption.decode() if isinstance(caption, bytes) else str(caption)
        return Record(self.key(i), caption.strip(), fields[self.image])
