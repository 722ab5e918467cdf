"""Parameters as an Orbax checkpoint, written and read a block at a time.

Orbax saves arrays that are whole in memory. So it saves a tree of single numbers first; then each
of those arrays is replaced by one of the true shape through TensorStore, on which Orbax stands, and
filled. The files that describe the tree do not depend on shapes, so what results is an ordinary
checkpoint: Orbax restores it onto any mesh.
"""

import contextlib
import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401, gives numpy the name bfloat16
import numpy as np

from blip3o_jax import buckets, paths
from blip3o_jax.convert.rules import Shape
from blip3o_jax.convert.safetensors_io import BLOCK, finite, row_blocks
from blip3o_jax.errors import InputError, first_line
from blip3o_jax.paths import AnyPath
from blip3o_jax.tree import unflatten

# Orbax's own choice; a fifth smaller than none for bfloat16 weights, and as fast
COMPRESSOR = {"id": "zstd", "level": 1}
MARKER = "commit_success.txt"  # what Orbax writes last into a checkpoint in a bucket
DTYPES = {"<f4": "float32", "<f2": "float16", "bfloat16": "bfloat16"}  # Zarr's names


@dataclass(frozen=True)
class Leaf:
    """An array in a checkpoint's folder, unread; of a larger one, the part of `shape`."""

    folder: AnyPath
    name: str
    shape: Shape
    dtype: np.dtype

    def layers(self, stacked: bool) -> Iterator[np.ndarray]:
        """The array, or its layers, one in memory at a time; InputError for damage."""
        store = self._store()
        for view in (store[i] for i in range(self.shape[0])) if stacked else (store,):
            array = np.empty(view.shape, self.dtype)
            for rows in row_blocks(view.shape, self.dtype.itemsize):
                array[rows] = self._read(view[rows])
            yield array

    def reader(self, dtype: np.dtype) -> Callable[[tuple[slice, ...]], np.ndarray]:
        """A function that reads values at an index; InputError for damaged or not finite ones."""
        store = self._store()
        return lambda index: finite(self._read(store[index]), dtype, str(self))

    def _store(self) -> Any:
        place = _place(self.folder, self.name)
        store = _open({"driver": "zarr", "kvstore": place, "fill_missing_data_reads": False})
        return store[tuple(slice(0, size) for size in self.shape)]

    def _read(self, view: Any) -> np.ndarray:
        with _disk_errors(f"{self} lacks values or is damaged", reading=True):
            return view.read().result()

    def __str__(self) -> str:
        return str(self.folder / self.name)


def chunk_shape(shape: Shape, itemsize: int, stacked: bool, shards: Shape) -> Shape:
    """How an array is cut into files: by layer, by the number of `shards` on each axis, and into
    rows of at most BLOCK bytes, which are written together, so that none is written twice."""
    # Of each axis the part of one shard, then of one layer, then of one block.
    cut = [math.ceil(size / count) for size, count in zip(shape, shards, strict=True)]
    first = int(stacked)
    if stacked:
        cut[0] = 1
    if len(shape) > first:
        cut[first] = min(cut[first], max(1, BLOCK // (math.prod(shape[first + 1 :]) * itemsize)))
    return tuple(cut)


def save_tree(folder: AnyPath, dtypes: Mapping[str, np.dtype]) -> None:
    """A checkpoint at `folder` with the leaf paths `dtypes`, each a single number as yet."""
    import orbax.checkpoint as ocp

    assert not any("." in path for path in dtypes)  # Orbax's separator in folder names
    tree = unflatten({path: np.zeros((), dtype) for path, dtype in dtypes.items()})
    handler = ocp.StandardCheckpointHandler(use_ocdbt=False)
    with _disk_errors(f"{folder} cannot be written"), ocp.Checkpointer(handler) as writer:
        writer.save(os.fspath(folder.absolute()), args=ocp.args.StandardSave(tree))


def create(folder: AnyPath, path: str, shape: Shape, dtype: np.dtype, chunks: Shape) -> Any:
    """The leaf `path` of a `save_tree` checkpoint, replaced by an empty array: a TensorStore."""
    metadata = {"shape": shape, "chunks": chunks, "compressor": COMPRESSOR}
    metadata["dimension_separator"] = "."
    place = _place(folder, path.replace("/", "."))
    spec = {"driver": "zarr", "kvstore": place, "metadata": metadata}
    return _open(spec, dtype=np.dtype(dtype), create=True, delete_existing=True)


def write(store: Any, values: np.ndarray, dtype: np.dtype, where: str) -> None:
    """Fills `store`, an array or one layer, with `values` as `dtype`, a block of rows at a time;
    InputError beginning with `where` when one is not finite in it, OSError when the disk is full.
    """
    rows = store.chunk_layout.write_chunk.shape[0]
    for start in range(0, len(values), rows):
        block = np.ascontiguousarray(finite(values[start : start + rows], dtype, where))
        with _disk_errors("the parameters cannot be written"):
            store[start : start + len(block)].write(block).result()


def open_leaves(folder: AnyPath) -> dict[str, Leaf]:
    """The arrays of a checkpoint by path, in one database (OCDBT, of training runs) or in a folder
    each; InputError when one's description makes no sense."""
    import tensorstore

    leaves = {}
    with _disk_errors(f"{folder} cannot be read", reading=True):
        store = tensorstore.KvStore.open(_place(folder), context=_context()).result()
        for key in store.list().result():
            name, _, file = key.decode().rpartition("/")
            if file != ".zarray":
                continue
            # The file may be damaged or foreign.
            try:
                fields = json.loads(store[key])
                shape, dtype = tuple(map(int, fields["shape"])), np.dtype(DTYPES[fields["dtype"]])
            except (ValueError, KeyError, TypeError) as error:
                described = f"{folder / key.decode()} does not describe an array of floats."
                raise InputError(described) from error
            leaves[name.replace(".", "/")] = Leaf(folder, name, shape, dtype)
    return dict(sorted(leaves.items()))


def _place(folder: AnyPath, name: str = "") -> dict[str, Any]:
    """TensorStore's name for a checkpoint's folder, or for the array `name` in it."""
    inner = f"{name}/" if name else ""
    place = buckets.kvstore(f"{folder.absolute()}/")
    if (folder / "manifest.ocdbt").is_file():
        return {"driver": "ocdbt", "base": place, "path": inner}
    return {**place, "path": place["path"] + inner}


def _open(spec: dict[str, Any], **options) -> Any:
    import tensorstore

    place = spec["kvstore"]
    with _disk_errors(f"{place.get('base', place)['path']} cannot be opened"):
        return tensorstore.open(spec, context=_context(), **options).result()


@functools.cache
def _context() -> Any:
    import tensorstore

    return tensorstore.Context(buckets.RETRIES)


@functools.cache
def teach_buckets() -> None:
    """Lets Orbax write to S3 as it writes to GCS, and to both within bounded retries.

    Orbax knows gs:// alone: there a checkpoint has its name from the beginning, is complete with
    its marker (MARKER), and arrays go through TensorStore's own driver of buckets. An s3:// path
    would be one of a local disk for it. It asks these functions of its own which is which; those of
    another version of Orbax would have other names, so each must be there.
    """
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    def remove_marked(folder: Any, *, missing_ok: bool = False) -> None:
        # Its own way takes the folder's name for a pattern.
        paths.remove_folder(paths.path(os.fspath(folder)), MARKER)

    def normalized(name: str) -> str:
        return name.rstrip("/") if paths.is_bucket(name) else os.path.normpath(name)

    taught = {"_GCS_PATH_PREFIX": tuple(f"{scheme}://" for scheme in buckets.SCHEMES)}
    taught |= {"get_kvstore_for_gcs": buckets.kvstore, "rmtree": remove_marked}
    contexts = (tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT)
    also = {"_use_gcs_driver": paths.is_bucket, "_normalize_path": normalized}
    for module, functions in ((gcs_utils, taught), (tensorstore_utils, also)):
        for name, function in functions.items():
            assert hasattr(module, name), name
            setattr(module, name, function)
    for context in contexts:
        context |= buckets.RETRIES


@contextlib.contextmanager
def _disk_errors(what: str, reading: bool = False) -> Iterator[None]:
    """TensorStore's ValueError -> InputError, while writing OSError if the system says why."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code and not reading:
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
        raise InputError(f"{what}: {first_line(error)[:200]}.") from error
