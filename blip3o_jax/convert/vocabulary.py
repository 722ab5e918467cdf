"""Qwen3's vocabulary and BLIP3o's: the ids of the new tokens, and rows for them in an embedding
that has none (docs/model.md §4.1).

The new tokens follow the tokenizer's last: `<im_start> <im_end>` (special), `<S0>` to `<S2>`,
`<I0>` to the last code. Qwen3's matrix has more rows than its tokenizer has tokens; its rows beyond
the new ones are dropped.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blip3o_jax.config import VocabConfig
from blip3o_jax.convert.safetensors_io import Stored, finite, row_blocks
from blip3o_jax.errors import require
from blip3o_jax.text import Text

MODES = ("mean", "projected-codebook")
TAGS, SCALES = ("<im_start>", "<im_end>"), ("<S0>", "<S1>", "<S2>")
TOKENS = {"image_start_tag_id": TAGS[0], "image_end_tag_id": TAGS[1]}
TOKENS |= {"scale_start_token_id": SCALES[0], "image_start_token_id": "<I0>"}
TOKENS |= {"pad_token_id": "<|endoftext|>", "eos_token_id": "<|im_end|>"}
SPREAD = 1e-9  # of the old rows' covariance, as transformers draws new rows
SEED = 0
Blocks = Iterator[tuple[slice, np.ndarray]]  # places of rows [n,d] and their values in float32


@dataclass(frozen=True)
class Made:
    """A tensor that is made here and not read; the rest is as in Stored."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    raw: Callable[[], np.ndarray]  # all values
    file: Path | None = None

    def __str__(self) -> str:
        return f"new tensor {self.name!r}"


def known_vocabulary(tokenizer: Any, num_image_tokens: int) -> VocabConfig | None:
    """The ids of a tokenizer that has BLIP3o's tokens; None for one that has none of them."""
    # All of them or none.
    ids = {field: tokenizer.token_to_id(token) for field, token in TOKENS.items()}
    if ids["image_start_token_id"] is None:
        return None
    for field, number in ids.items():
        require(number is not None, f"The tokenizer has <I0> but not {TOKENS[field]}.")
    scales = [token for token in SCALES if tokenizer.token_to_id(token) is not None]
    return VocabConfig(**ids, num_scale_tokens=len(scales), num_image_tokens=num_image_tokens)


def extend_tokenizer(file: Path, tokenizer: Any, num_image_tokens: int) -> tuple[str, VocabConfig]:
    """(tokenizer.json with BLIP3o's tokens at the end of a tokenizer from `file`, their ids)."""
    for token in (*TAGS, *SCALES):
        is_new = tokenizer.token_to_id(token) is None
        require(is_new, f"{file} has the token {token} already, and not all of the others.")
    beside = "the tokenizer_config.json or added_tokens.json that belongs to vocab.json is needed"
    for token in (TOKENS["pad_token_id"], TOKENS["eos_token_id"]):
        lacks = f"{file}: the tokenizer has no token {token}; {beside}."
        require(tokenizer.token_to_id(token) is not None, lacks)
    # In the order of BLIP3o's ids.
    tokenizer.add_special_tokens(list(TAGS))
    tokenizer.add_tokens([*SCALES, *(f"<I{i}>" for i in range(num_image_tokens))])
    vocab = known_vocabulary(tokenizer, num_image_tokens)
    Text(tokenizer, vocab, max_prompt_tokens=1)  # checks every id
    return tokenizer.to_str(), vocab


def _rows(matrix: Stored, count: int) -> Blocks:
    """The first `count` rows in float32, a block at a time."""
    for rows in row_blocks((count, matrix.shape[1]), 4):
        yield rows, finite(matrix.raw(rows), np.float32, str(matrix))


def extend_matrix(
    matrix: Stored, vocab: VocabConfig, mode: str, codes: Callable[[], Blocks]
) -> Made:
    """Qwen3's embedding (or head) with a row for every id of `vocab`, made when asked for.

    The rows of the two tags are Qwen3's own, unused as yet. Those of the scale tokens are drawn, as
    transformers draws new rows, around the mean of the rows before them with SPREAD of their
    covariance. Those of the image tokens are, for "mean", the mean of the rows before them; for
    "projected-codebook" TA-Tok's codes times a fixed random matrix, as large as an average row.
    """
    scales, images = vocab.scale_start_token_id, vocab.image_start_token_id
    old, width = matrix.shape
    few = f"{matrix} has {old} rows, too few for the {vocab.image_start_tag_id} tokens of its"
    require(old >= scales, f"{few} tokenizer and two more.")

    def make() -> np.ndarray:
        # The old rows, and what they are on average.
        values = np.empty((vocab.size, width), matrix.dtype)
        total, squares = np.zeros(width), 0.0
        for rows, block in _rows(matrix, scales):
            values[rows] = block  # back to the dtype it came from, so the same bits
            total += block.sum(0, dtype=np.float64)
            squares += float(np.square(block, dtype=np.float64).sum())
        mean, rng = total / scales, np.random.default_rng(SEED)
        # The scale tokens. A sum of centred rows with random weights has their covariance, which
        # need not be formed for that.
        drawn = np.zeros((images - scales, width))
        for _, block in _rows(matrix, scales):
            weights = rng.standard_normal((images - scales, len(block)), np.float32)
            drawn += weights @ (block - mean.astype(np.float32))
        drawn = mean + (SPREAD / scales) ** 0.5 * drawn
        values[scales:images] = drawn
        # The image tokens.
        if mode == "mean":
            values[images:] = (total + drawn.sum(0)) / images
        else:
            values[images:] = _projected(codes(), values[images:].shape, (squares / scales) ** 0.5)
        return values

    return Made(matrix.name, (vocab.size, width), matrix.dtype, make)


def _projected(codes: Blocks, shape: tuple[int, int], length: float) -> np.ndarray:
    """Codes [n,c] -> rows of `shape` [n,d] at roughly the same angles, on average `length` long."""
    rows, matrix, squares = np.empty(shape, np.float32), None, 0.0
    for at, block in codes:
        if matrix is None:
            rng = np.random.default_rng(SEED)
            matrix = rng.standard_normal((block.shape[1], shape[1]), np.float32)
        rows[at] = block @ matrix
        squares += float(np.square(rows[at]).sum(dtype=np.float64))
    rows *= length / (squares / len(rows)) ** 0.5
    return rows


def codebook(embedding: Stored, weight: Stored, bias: Stored) -> Blocks:
    """TA-Tok's codes [n,c]: the embedding through `embedding_proj`, normed (docs/model.md §2.3)."""
    matrix, offset = weight.read(np.float32).T, bias.read(np.float32)
    for rows, block in _rows(embedding, embedding.shape[0]):
        projected = block @ matrix + offset
        yield rows, projected / np.maximum(np.linalg.norm(projected, axis=1, keepdims=True), 1e-12)
