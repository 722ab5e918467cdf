"""A directory of `convert to-jax`: params/ (Orbax), config.json and the tokenizer as in the
published layout, convert.json (its origin)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from blip3o_jax.config import Blip3oConfig, replace
from blip3o_jax.convert.config_json import EMBEDDING, check_family, config_from_json
from blip3o_jax.convert.orbax_io import Leaf, open_leaves
from blip3o_jax.convert.padding import VOCAB_AXIS, fit_vocabulary, padded
from blip3o_jax.convert.published import CONFIG_LIMIT, about, float_dtype
from blip3o_jax.convert.rules import flatten, unflatten
from blip3o_jax.convert.safetensors_io import read_json
from blip3o_jax.errors import InputError
from blip3o_jax.models.blip3o import Blip3o, parts_of

PARAMS = "params"
LM_HEAD = "qwen3/lm_head/kernel"


def is_converted(directory: str | Path) -> bool:
    """Whether the directory is one of `convert to-jax`."""
    return (Path(directory) / PARAMS / "_METADATA").is_file()


def open_converted(directory: Path) -> tuple[Blip3oConfig, dict[str, Leaf]]:
    """(configuration, arrays by path), none read yet; InputError when config.json and the arrays
    contradict each other."""
    file = directory / "config.json"
    fields, leaves = read_json(file, CONFIG_LIMIT), open_leaves(directory / PARAMS)
    with about(file):
        check_family(fields)
        embedding = leaves.get("qwen3/embed_tokens/embedding")
        shapes = {EMBEDDING: embedding.shape} if embedding else {}
        cfg = config_from_json(fields, shapes, directory.resolve().name)
    if LM_HEAD in leaves:
        cfg = replace(cfg, **{"qwen3.tie_word_embeddings": False})
    needed = {
        path: tuple(leaf.shape)
        for path, leaf in flatten(Blip3o(cfg).abstract(parts_of(cfg))).items()
    }
    stored = {path: leaf.shape for path, leaf in leaves.items()}
    if wrong := sorted(
        path for path in needed.keys() | stored.keys() if needed.get(path) != stored.get(path)
    ):
        shape = f"has shape {stored[wrong[0]]}" if wrong[0] in stored else "is missing"
        raise InputError(
            f"{directory / PARAMS}: parameter {wrong[0]} {shape}, and config.json implies "
            f"{needed.get(wrong[0])}."
        )
    return cfg, leaves


def load_converted(
    directory: str | Path,
    dtype: Any = "float32",
    shardings: Callable[[dict], dict] | None = None,
    parts: tuple[str, ...] | None = None,
    vocab_multiple: int = 1,
) -> tuple[Blip3oConfig, dict]:
    """The configuration and the parameters (of `parts`, or all) as `dtype`, restored by Orbax, each
    host its own shards.

    `shardings` is a function from the abstract parameters to a tree of shardings; without it the
    leaves are numpy arrays. The embedding is padded to a multiple of `vocab_multiple` rows, which
    the configuration says.
    """
    import orbax.checkpoint as ocp

    directory, dtype = Path(directory).absolute(), float_dtype(dtype)
    cfg, leaves = open_converted(directory)
    chosen = {
        path: leaf
        for path, leaf in leaves.items()
        if path.split("/")[0] in (parts or parts_of(cfg))
    }
    cfg = padded(cfg, vocab_multiple)
    shapes = {path: list(leaf.shape) for path, leaf in chosen.items()}
    for path in shapes.keys() & VOCAB_AXIS.keys():
        shapes[path][VOCAB_AXIS[path]] = cfg.qwen3.vocab_rows
    item = unflatten(
        {path: jax.ShapeDtypeStruct(tuple(shape), dtype) for path, shape in shapes.items()}
    )
    if shardings is None:
        restore_args = jax.tree.map(
            lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype), item
        )
    else:
        placed = shardings(item)

        def restored(leaf, place):  # Orbax fills what the file lacks with zeros
            return ocp.ArrayRestoreArgs(
                sharding=place, dtype=dtype, global_shape=leaf.shape, strict=False
            )

        restore_args = jax.tree.map(restored, item, placed)
    args = ocp.args.PyTreeRestore(
        jax.tree.map(lambda _: 0, item), restore_args=restore_args, partial_restore=True
    )
    try:
        with ocp.PyTreeCheckpointer() as reader:
            params = reader.restore(directory / PARAMS, args=args)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(
            f"{directory / PARAMS} cannot be read: {str(error).splitlines()[0]}"
        ) from error
    if shardings is None:
        fitted = {
            path: fit_vocabulary(path, leaf, cfg.qwen3.vocab_rows)
            for path, leaf in flatten(params).items()
        }
        params = unflatten(fitted)
    return cfg, params
