"""Parquet with image bytes, jsonl with image paths, and folders that TFDS wrote, read at random."""

import itertools
import json
import os
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.records import (
    Record,
    RecordError,
    base_name,
    expand,
    locate,
    open_binary,
    read_bytes,
)
from blip3o_jax.errors import InputError, nearest

CAPTIONS = ("caption", "text", "txt", "prompt")  # the usual names, the first that is there
# Editing sets' names of instruction, source images and result: X2I2 reflect, X2I2 and Nano-150k,
# ShareGPT-4o.
EDITS = (
    ("used_instruction", "input_images", "image"),
    ("instruction", "input_images", "output_image"),
    ("input_prompt", "input_image", "output_image"),
)
GROUPS_KEPT = 8  # row groups of parquet in memory


class ParquetSource:
    """Rows with an image (bytes, or a struct with `bytes`, as in Hugging Face's data sets) and a
    caption.

    A row group is the least that can be read, so the newest few are kept; `blocks` says where they
    start, for an order that stays near.
    """

    def __init__(self, spec: SourceConfig):
        import pyarrow.parquet as pq

        self.paths = expand(spec.path)

        def open_file(path):
            try:
                return pq.ParquetFile(open_binary(path) if "://" in path else path)
            except (OSError, ValueError) as error:  # pyarrow's errors are of these
                raise InputError(
                    f"{path} is no whole parquet file: {str(error).splitlines()[0]}"
                ) from error

        with ThreadPoolExecutor(8) as pool:
            self.files = list(pool.map(open_file, self.paths))
        columns = self.files[0].schema_arrow.names
        self.image = _column(spec.image_field or "image", columns, self.paths[0], "image_field")
        wanted = spec.caption_field or next(
            (name for name in CAPTIONS if name in columns), CAPTIONS[0]
        )
        self.caption = _column(wanted, columns, self.paths[0], "caption_field")
        for path, file in zip(self.paths, self.files, strict=True):
            for name in (self.image, self.caption):
                _column(name, file.schema_arrow.names, path, "")
        self.groups = [
            (f, g) for f, file in enumerate(self.files) for g in range(file.metadata.num_row_groups)
        ]
        self.ends = list(
            itertools.accumulate(
                self.files[f].metadata.row_group(g).num_rows for f, g in self.groups
            )
        )
        self.blocks = np.array([0, *self.ends[:-1]])
        self.file_ends = list(itertools.accumulate(file.metadata.num_rows for file in self.files))
        self._kept, self._lock = OrderedDict(), threading.Lock()

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def key(self, i: int) -> str:
        file, row = locate(self.file_ends, i)
        return f"{base_name(self.paths[file])}:{row}"

    def __getitem__(self, i: int) -> Record:
        group, row = locate(self.ends, i)
        table = self._group(group)
        image, caption = (table.column(name)[row].as_py() for name in (self.image, self.caption))
        image = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(image, bytes):
            raise RecordError(f"no bytes in the column {self.image!r}")
        if not isinstance(caption, str):
            raise RecordError(f"no text in the column {self.caption!r}")
        return Record(self.key(i), caption.strip(), image)

    def _group(self, group: int):
        with self._lock:
            if group not in self._kept:
                f, g = self.groups[group]
                try:
                    self._kept[group] = self.files[f].read_row_group(
                        g, columns=[self.image, self.caption]
                    )
                except (OSError, ValueError) as error:
                    raise RecordError(
                        f"row group {g} of {self.paths[f]} cannot be read "
                        f"({str(error).splitlines()[0]})"
                    ) from error
                if len(self._kept) > GROUPS_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(group)
            return self._kept[group]


def _column(name: str, columns, path: str, setting: str) -> str:
    if name not in columns:
        how = (
            f"; set {setting} of the source, {nearest(name, columns)}"
            if setting
            else f"; {nearest(name, columns)}"
        )
        raise InputError(f"{path} has no column {name!r}{how}")
    return name


class JsonlSource:
    """Lines with a caption and the path of an image; or edits, whose field names follow `EDITS`
    unless the source names them."""

    blocks = None

    def __init__(self, spec: SourceConfig):
        self.spec, self.paths = spec, expand(spec.path)
        self.offsets = [_line_starts(path) for path in self.paths]
        self.ends = list(itertools.accumulate(len(offsets) - 1 for offsets in self.offsets))

    def __len__(self) -> int:
        return self.ends[-1]

    def key(self, i: int) -> str:
        file, line = locate(self.ends, i)
        return f"{base_name(self.paths[file])}:{line + 1}"

    def __getitem__(self, i: int) -> Record:
        file, line = locate(self.ends, i)
        start, end = (int(x) for x in self.offsets[file][line : line + 2])
        try:
            with open_binary(self.paths[file]) as stream:
                stream.seek(start)
                fields = json.loads(stream.read(end - start))
        except (OSError, ValueError) as error:
            raise RecordError(f"the line is not JSON ({error})") from error
        if not isinstance(fields, dict):
            raise RecordError("the line is not a JSON object")
        caption, inputs, image = self._names(fields)
        paths = fields[inputs] if inputs else []
        paths = [paths] if isinstance(paths, str) else paths
        if (
            not isinstance(fields[caption], str)
            or not isinstance(fields[image], str)
            or not isinstance(paths, list)
        ):
            raise RecordError(
                f"{caption!r} and {image!r} are not text"
                + (f", or {inputs!r} is no list of paths" if inputs else "")
            )
        if inputs and not (paths and all(isinstance(path, str) for path in paths)):
            raise RecordError(f"{inputs!r} is no list of paths")
        root = self.spec.root or os.path.dirname(self.paths[file])
        image, *inputs = (read_bytes(os.path.join(root, path)) for path in (fields[image], *paths))
        return Record(self.key(i), fields[caption].strip(), image, tuple(inputs))

    def _names(self, fields: dict) -> tuple[str, str, str]:
        """Field names of (caption or instruction, source images or "", image) in a line."""
        spec = self.spec
        known = next((names for names in EDITS if all(name in fields for name in names)), None)
        if known is None or (spec.image_field and not spec.inputs_field):
            known = next((name for name in CAPTIONS if name in fields), CAPTIONS[0]), "", "image"
        names = (
            spec.caption_field or known[0],
            spec.inputs_field or known[1],
            spec.image_field or known[2],
        )
        if missing := [name for name in names if name and name not in fields]:
            raise RecordError(
                f"no field {missing[0]!r} among {', '.join(sorted(map(repr, fields)))}"
            )
        return names


def _line_starts(path: str) -> np.ndarray:
    """Offsets of the lines and of the end; blank lines at the end are none."""
    starts, at = [0], 0
    try:
        with open_binary(path) as file:
            for line in file:
                at += len(line)
                if line.strip():
                    starts.append(at)
                else:
                    starts[-1] = at  # belongs to the line before, so that JSON ignores it
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    return np.array(starts, np.int64)


class TfdsSource:
    """A split of a folder that TFDS wrote in the ArrayRecord format, with an image feature and a
    text feature; no TensorFlow needed."""

    blocks = None

    def __init__(self, spec: SourceConfig):
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder_from_directory(spec.path)
        except Exception as error:  # TFDS raises what its file system and its parser raise
            raise InputError(
                f"{spec.path} is no folder that TFDS wrote: {str(error).splitlines()[0]}"
            ) from error
        features, where = builder.info.features, f"The data set {spec.path}"
        self.image = _column(spec.image_field or "image", features, where, "image_field")
        wanted = spec.caption_field or next(
            (name for name in CAPTIONS if name in features), CAPTIONS[0]
        )
        self.caption = _column(wanted, features, where, "caption_field")
        if spec.split not in builder.info.splits:
            raise InputError(
                f"{where} has no split {spec.split!r}; {nearest(spec.split, builder.info.splits)}"
            )
        self.name, self.split = builder.info.full_name, spec.split
        try:
            self.source = builder.as_data_source(
                spec.split, decoders={self.image: tfds.decode.SkipDecoding()}
            )
        except Exception as error:
            raise InputError(
                f"{where} cannot be read at random: {str(error).splitlines()[0]}"
            ) from error

    def __len__(self) -> int:
        return len(self.source)

    def key(self, i: int) -> str:
        return f"{self.name}/{self.split}:{i}"

    def __getitem__(self, i: int) -> Record:
        fields = self.source[i]
        caption = fields[self.caption]
        return Record(
            self.key(i),
            (caption.decode() if isinstance(caption, bytes) else str(caption)).strip(),
            fields[self.image],
        )
