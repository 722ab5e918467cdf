"""A directory of `convert to-jax`: params/ (Orbax), config.json and the tokenizer as in the
published layout, hashes.json, convert.json (its origin)."""

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Mapping

import numpy as np
from jax.sharding import AbstractMesh
from tqdm import tqdm

from blip3o_jax.config import Blip3oConfig, replace
from blip3o_jax.convert import hashes, orbax_io
from blip3o_jax.convert.config_json import EMBEDDING
from blip3o_jax.convert.published import Leaves, check_shapes, read_config
from blip3o_jax.convert.rules import tensor_to_leaf
from blip3o_jax.errors import require
from blip3o_jax.moved import refuse
from blip3o_jax.parallel.mesh import AXES
from blip3o_jax.parallel.parameters import spec
from blip3o_jax.paths import AnyPath

__getattr__ = functools.partial(refuse, "convert.converted")

PARAMS = "params"


def open_converted(directory: AnyPath) -> tuple[Blip3oConfig, dict[str, orbax_io.Leaf]]:
    """(configuration, unread arrays by path); InputError when the two contradict each other."""
    leaves = orbax_io.open_leaves(directory / PARAMS)
    embedding = leaves.get("qwen3/embed_tokens/embedding")
    cfg = read_config(directory, {EMBEDDING: embedding.shape} if embedding else {})
    # The source's config.json may call a model tied whose head differs.
    if "qwen3/lm_head/kernel" in leaves:
        cfg = replace(cfg, **{"qwen3.tie_word_embeddings": False})
    check_shapes(directory / PARAMS, cfg, leaves)
    return cfg, leaves


def write_params(
    directory: AnyPath, leaves: Leaves, dtype: np.dtype | None, mesh: Mapping[str, int]
) -> dict[str, dict[str, int]]:
    """Writes params/ as `dtype`, or each as it is, and hashes.json, one layer in memory at a time,
    in files of one layer and one shard of the mesh each; returns {part: numbers}. InputError when
    the layers of a parameter differ in dtype or hold no floats."""
    for leaf in leaves.values():
        first, *others = leaf.tensors.values()
        for tensor in others:
            dtypes = f"{tensor} is {tensor.dtype} and {first.name!r} {first.dtype}"
            same = dtype is not None or tensor.dtype == first.dtype
            require(same, f"{dtypes}, which are one parameter here; give --dtype.")
    # Every leaf as a single number, which is replaced below.
    folder, axis_sizes = directory / PARAMS, AbstractMesh(tuple(mesh[axis] for axis in AXES), AXES)
    orbax_io.save_tree(folder, {path: dtype or leaf.dtype for path, leaf in leaves.items()})
    parts: dict[str, Counter] = defaultdict(Counter)
    total = sum(len(leaf.tensors) for leaf in leaves.values())
    with tqdm(total=total, desc="Converting", unit="tensor", delay=3, disable=None) as progress:
        for path, leaf in leaves.items():
            # An empty array in its chunks ...
            shape, own, stacked = leaf.shape, dtype or leaf.dtype, leaf.rule.stacked
            axes = [*spec(path, shape, axis_sizes), *[None] * len(shape)][: len(shape)]
            shards = tuple(mesh[axis] if axis else 1 for axis in axes)
            chunks = orbax_io.chunk_shape(shape, own.itemsize, stacked, shards)
            store = orbax_io.create(folder, path, shape, own, chunks)
            # ... filled tensor by tensor.
            for i, (name, tensor) in enumerate(leaf.tensors.items()):
                values = tensor_to_leaf(tensor.raw(), shape, leaf.rule, name)
                orbax_io.write(store[i] if stacked else store, values, own, str(tensor))
                del values
                progress.update()
            count = math.prod(shape)
            numbers = {"tensors": len(leaf.tensors), "parameters": count}
            parts[leaf.rule.part].update(numbers, bytes=count * own.itemsize)
    hashes.record(directory, [file for file in folder.rglob("*") if file.is_file()])
    return parts
