"""What a source holds and no parameter does (layers behind the last one used, heads, buffers): kept
beside the converted parameters as it is, so that the way back writes every tensor again."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.convert import hashes, safetensors_io
from blip3o_jax.convert.published import LM_HEAD, published_name
from blip3o_jax.convert.safetensors_io import DTYPES, Entry, Stored
from blip3o_jax.errors import require
from blip3o_jax.paths import AnyPath

FOLDER = "unused"
SHARD = 5e9  # bytes
EMBEDDING_PATH = "qwen3/embed_tokens/embedding"


def entry(tensor: Stored, dtype: np.dtype | None) -> Entry:
    """What is written of a tensor: floats as `dtype`, if there is one, the rest as it is."""
    return Entry(tensor.shape, dtype if dtype and tensor.code in DTYPES else tensor.carried_dtype)


def size(tensors: Mapping[str, Stored], dtype: np.dtype | None) -> int:
    """Bytes of the tensors as `dtype`."""
    return sum(entry(tensor, dtype).size for tensor in tensors.values())


def keep(directory: AnyPath, tensors: Mapping[str, Stored], dtype: np.dtype | None) -> None:
    """Writes unused/ into a converted checkpoint, with its own hashes.json."""
    if not tensors:
        return
    folder = directory / FOLDER
    folder.mkdir()
    entries = {name: entry(tensor, dtype) for name, tensor in tensors.items()}
    safetensors_io.write_tensors(folder, entries, tensors.items(), SHARD)
    hashes.record(folder, folder.glob("*.safetensors"))


def verify(directory: AnyPath, whole: bool = False) -> None:
    """InputError unless unused/, if there is one, is as its hashes.json recorded it."""
    folder = directory / FOLDER
    hashes.compare(folder, folder.glob("*.safetensors"), whole)


def open_unused(directory: AnyPath, origin: Mapping[str, Any]) -> dict[str, Stored]:
    """The tensors kept in a converted checkpoint, unread; `origin` is its convert.json, which says
    how many they are. InputError when they are not all there."""
    counts = origin.get("tensors")
    count = counts.get("kept", 0) if isinstance(counts, Mapping) else 0
    if not count:
        return {}
    folder = directory / FOLDER
    gone = f"{folder} is missing, where the tensors were that the model does not use"
    require(folder.is_dir(), f"{gone}; restore it, or add --drop-unused.")
    verify(directory)
    tensors = safetensors_io.open_tensors(folder)
    fewer = f"{folder} holds {len(tensors)} tensors, and convert.json says {count}."
    require(len(tensors) == count, fewer)
    return tensors


def restored(
    directory: AnyPath,
    origin: Mapping[str, Any],
    checkpoint: tuple[Blip3oConfig, Mapping[str, Any]],
    dtype: np.dtype | None,
) -> dict[str, tuple[Entry, Any]]:
    """What `write_published` writes behind the parameters of a checkpoint (config, leaves): what
    the converted one at `directory` keeps, and a head that repeated the embedding, made again."""
    tensors = open_unused(directory, origin)
    more = {name: (entry(tensor, dtype), tensor) for name, tensor in tensors.items()}
    (cfg, leaves), repeated = checkpoint, origin.get("repeated", {})
    head = repeated.get(LM_HEAD) if isinstance(repeated, Mapping) else None
    if cfg.qwen3.tie_word_embeddings and head in [x.name for x in DTYPES.values()]:
        leaf = leaves[EMBEDDING_PATH]
        # No coarser than the embedding, which a rounded head would not repeat.
        finer = max(leaf.dtype, np.dtype(head), key=lambda own: own.itemsize)
        more[LM_HEAD] = Entry(leaf.shape, dtype or finer), leaf
    return more


def own_names(origin: Mapping[str, Any]) -> dict[str, str]:
    """{published name: the source's} of the tensors that another version of transformers named."""
    names = origin.get("renamed", {})
    names = names if isinstance(names, Mapping) else {}
    pairs = ((name, own) for name, own in names.items() if isinstance(own, str))
    return {name: own for name, own in pairs if published_name(own) == name}
