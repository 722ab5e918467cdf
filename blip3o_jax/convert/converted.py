"""A directory of `convert to-jax`: params/ (Orbax), config.json and the tokenizer as in the
published layout, hashes.json, convert.json (its origin)."""

import functools
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jax.sharding import AbstractMesh
from tqdm import tqdm

from blip3o_jax.config import Blip3oConfig, replace
from blip3o_jax.convert import hashes, orbax_io
from blip3o_jax.convert.config_json import EMBEDDING, config_from_json
from blip3o_jax.convert.orbax_io import Leaf, open_leaves
from blip3o_jax.convert.published import about, check_shapes, read_fields
from blip3o_jax.convert.rules import tensor_to_leaf
from blip3o_jax.convert.safetensors_io import Entry
from blip3o_jax.convert.sources import Source
from blip3o_jax.errors import InputError
from blip3o_jax.models.blip3o import parts_of
from blip3o_jax.moved import refuse
from blip3o_jax.parallel.mesh import AXES
from blip3o_jax.parallel.parameters import spec

__getattr__ = functools.partial(refuse, "convert.converted")

PARAMS = "params"


def is_converted(directory: str | Path) -> bool:
    """Whether the directory is one of `convert to-jax`."""
    return (Path(directory) / PARAMS / "_METADATA").is_file()


def open_converted(directory: Path) -> tuple[Blip3oConfig, dict[str, Leaf]]:
    """(configuration, arrays by path), none read yet; InputError when config.json and the arrays
    contradict each other."""
    fields, leaves = read_fields(directory), open_leaves(directory / PARAMS)
    with about(directory / "config.json"):
        embedding = leaves.get("qwen3/embed_tokens/embedding")
        shapes = {EMBEDDING: embedding.shape} if embedding else {}
        cfg = config_from_json(fields, shapes, directory.resolve().name)
    if "qwen3/lm_head/kernel" in leaves:
        cfg = replace(cfg, **{"qwen3.tie_word_embeddings": False})
    check_shapes(directory / PARAMS, cfg, leaves)
    return cfg, leaves


def plan_arrays(source: Source, dtype: np.dtype | None) -> dict[str, Entry]:
    """Each parameter's shape and dtype by path: `dtype`, or that of its tensors; InputError when
    stacked layers differ or hold no floats."""
    arrays = {}
    for rule in source.match.rules:
        shape = source.match.shapes[rule.path]
        first, *others = (source.tensors[name] for name in rule.names(shape))
        for tensor in others:
            if tensor.dtype != first.dtype and dtype is None:
                raise InputError(
                    f"{tensor} is {tensor.dtype} and {first.name!r} {first.dtype}, which are one "
                    "parameter here; give --dtype."
                )
        arrays[rule.path] = Entry(shape, dtype or first.dtype)
    return arrays


def write_params(
    directory: Path, source: Source, arrays: Mapping[str, Entry], mesh: Mapping[str, int]
) -> dict[str, dict]:
    """Writes params/ and hashes.json, one layer in memory at a time, in files of one layer and one
    shard of the mesh each; returns {part: numbers}."""
    folder = directory / PARAMS
    axis_sizes = AbstractMesh(tuple(mesh[axis] for axis in AXES), AXES)
    orbax_io.save_tree(folder, {path: entry.dtype for path, entry in arrays.items()})
    parts = {part: {"tensors": 0, "parameters": 0, "bytes": 0} for part in parts_of(source.config)}
    total = sum(len(list(rule.names(arrays[rule.path].shape))) for rule in source.match.rules)
    with tqdm(total=total, desc="Converting", unit="tensor", delay=3, disable=None) as progress:
        for rule in source.match.rules:
            # An empty array in its chunks ...
            shape, dtype = arrays[rule.path].shape, arrays[rule.path].dtype
            axes = [*spec(rule.path, shape, axis_sizes), *[None] * len(shape)][: len(shape)]
            shards = tuple(mesh[axis] if axis else 1 for axis in axes)
            chunks = orbax_io.chunk_shape(shape, dtype.itemsize, rule.stacked, shards)
            store = orbax_io.create(folder, rule.path, shape, dtype, chunks)

            # ... filled tensor by tensor.
            names = list(rule.names(shape))
            for i, name in enumerate(names):
                tensor = source.tensors[name]
                values = tensor_to_leaf(tensor.raw(), shape, rule, name)
                orbax_io.write(store[i] if rule.stacked else store, values, dtype, str(tensor))
                del values
                progress.update()
            part = parts[rule.path.split("/")[0]]
            part["tensors"] += len(names)
            part["parameters"] += math.prod(shape)
            part["bytes"] += arrays[rule.path].size
    hashes.record(directory, [file for file in folder.rglob("*") if file.is_file()])
    return parts
