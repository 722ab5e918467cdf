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
# Editing sets' names of instruction, source images and result: X2I2 reflect, X2I2 and Nano-150k,
# ShareGPT-4o.
EDITS = (
    ("used_instruction", "input_images", "image"),
    ("instruction", "input_images", "output_image"),
    ("input_prompt", "input_image", "output_image"),
)
MAX_GROUPS = 8  # row groups of parquet in memory


def _columns(spec: SourceConfig, columns: Iterable[str], path: str) -> tuple[str, str]:
    """The columns of image and caption: those that the source names, or the usual ones.

    InputError, with the setting that changes it, for one that is not there.
    """
    usual = next((name for name in CAPTIONS if name in columns), CAPTIONS[0])
    names = (spec.image_field or "image", spec.caption_field or usual)
    for setting, name in zip(("image_field", "caption_field"), names, strict=True):
        how = f"set {setting} of the source, {nearest(name, columns)}"
        require(name in columns, f"{path} has no column {name!r}; {how}")
    return names


class ParquetSource(FileSource):
    """Rows with an image (bytes, or a struct with `bytes`, as in Hugging Face's data sets) and a
    caption.

    A row group is the least that can be read, so the newest few stay in memory; `blocks` says where
    they start, for an order that stays near.
    """

    def __init__(self, spec: SourceConfig):
        paths = records.expand(spec.path)
        with ThreadPoolExecutor(8) as pool:
            self.files = list(pool.map(_open_parquet, paths))
        names = [file.schema_arrow.names for file in self.files]
        self.columns = _columns(spec, names[0], paths[0])
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
        image, caption = (table.column(name)[row].as_py() for name in self.columns)
        image = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(image, bytes):
            raise RecordError(f"no bytes in the column {self.columns[0]!r}")
        if not isinstance(caption, str):
            raise RecordError(f"no text in the column {self.columns[1]!r}")
        return Record(self.key(i), caption.strip(), image)

    def _read_group(self, group: int):
        file, number = self.groups[group]
        try:
            return self.files[file].read_row_group(number, columns=list(self.columns))
        except (OSError, ValueError) as error:
            where = f"row group {number} of {self.paths[file]}"
            raise RecordError(f"{where} cannot be read ({first_line(error)})") from error


def _open_parquet(path: str):
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(records.open_binary(path) if "://" in path else path)
    except (OSError, ValueError) as error:  # pyarrow's errors are of these
        raise InputError(f"{path} is truncated or not Parquet: {first_line(error)}") from error


class JsonlSource(FileSource):
    """Lines with a caption and the path of an image; or edits, whose field names follow `EDITS`
    unless the source names them."""

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
        caption, inputs, image = self._names(fields)
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

    def _names(self, fields: dict) -> tuple[str, str, str]:
        """Field names of (caption or instruction, source images or "", image) in a line."""
        spec = self.spec
        usual = next((names for names in EDITS if all(name in fields for name in names)), None)
        if usual is None or (spec.image_field and not spec.inputs_field):
            usual = next((name for name in CAPTIONS if name in fields), CAPTIONS[0]), "", "image"
        named = (spec.caption_field, spec.inputs_field, spec.image_field)
        names = tuple(own or other for own, other in zip(named, usual, strict=True))
        if missing := [name for name in names if name and name not in fields]:
            present = ", ".join(sorted(map(repr, fields)))
            raise RecordError(f"no field {missing[0]!r} among {present}")
        return names


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
        self.image, self.caption = _columns(spec, builder.info.features, where)
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
