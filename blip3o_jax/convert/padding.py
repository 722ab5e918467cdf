"""Rows behind the vocabulary: a mesh cuts the embedding along it, and its 217,210 rows have almost
no useful divisors (docs/model.md §4.1)."""

import numpy as np

from blip3o_jax.config import Blip3oConfig, replace

# the vocabulary's, by path
VOCAB_AXIS = {"qwen3/embed_tokens/embedding": 0, "qwen3/lm_head/kernel": 1}


def padded(cfg: Blip3oConfig, multiple: int) -> Blip3oConfig:
    """The configuration whose embedding has a multiple of `multiple` rows."""
    return replace(cfg, **{"qwen3.vocab_padding": -cfg.qwen3.vocab_size % multiple})


def with_rows(path: str, shape: tuple[int, ...], rows: int) -> tuple[int, ...]:
    """The shape of the leaf at `path` with `rows` rows of the vocabulary."""
    return tuple(rows if i == VOCAB_AXIS.get(path) else size for i, size in enumerate(shape))


def fit_vocabulary(path: str, leaf: np.ndarray, rows: int) -> np.ndarray:
    """The leaf with the vocabulary's axis padded by zeros or cut to `rows`; others as they are."""
    shape = with_rows(path, leaf.shape, rows)
    if shape == leaf.shape:
        return leaf
    cut = leaf[tuple(map(slice, shape))]
    return np.pad(cut, [(0, size - old) for size, old in zip(shape, cut.shape, strict=True)])


def fit_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """SANA's patch_embed [C,D] with zeros for the channels of a reference that it was made without,
    which changes nothing at first; or without those of a reference, as if that were zero. One of
    other sizes as it is."""
    if len(kernel) not in (2 * channels, channels // 2):
        return kernel
    return np.pad(kernel[:channels], [(0, max(0, channels - len(kernel))), (0, 0)])
