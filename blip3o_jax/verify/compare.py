"""Whether two checkpoints hold the same model: their tensors, and what their stages give."""

import hashlib
import itertools
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from blip3o_jax.checkpoints import PUBLISHED, Checkpoint
from blip3o_jax.convert import unused
from blip3o_jax.convert.published import ignored_tensors, open_published, published_rules
from blip3o_jax.convert.rules import torch_tensors
from blip3o_jax.convert.safetensors_io import Stored, open_tensors
from blip3o_jax.errors import require

INTEGERS = ("codes", "tokens")  # stages that give ids
OURS = ("name", "max_prompt_tokens")  # fields of the config on which no tensor depends
COARSE = ("bfloat16", "float16")  # dtypes that round, the one with fewer bits of mantissa first


def differing_fields(a: Checkpoint, b: Checkpoint) -> list[str]:
    """Fields of the config in which two models differ."""
    fields = (name for name in vars(a.config) if name not in OURS)
    return [name for name in fields if getattr(a.config, name) != getattr(b.config, name)]


def _unused(checkpoint: Checkpoint) -> dict[str, Stored]:
    """The tensors by published name that fill no parameter, unread; a run keeps none."""
    if checkpoint.kind == PUBLISHED:
        stored = open_published(checkpoint.folder)[1]
        return {name: stored[name] for name in ignored_tensors(checkpoint.config, stored)}
    folder = checkpoint.folder / unused.FOLDER
    return open_tensors(folder) if folder.is_dir() else {}


def _tensors(checkpoint: Checkpoint, others: dict[str, Stored]) -> Iterator[tuple[str, np.ndarray]]:
    yield from torch_tensors(published_rules(checkpoint.config), checkpoint.leaves)
    yield from ((name, others[name].raw(carried=True)) for name in sorted(others))


def compare_checkpoints(a: Checkpoint, b: Checkpoint) -> dict[str, dict]:
    """`compare_tensors` by published name, unused tensors too where both have some; InputError when
    one lacks a tensor of the other."""
    kept = [_unused(a), _unused(b)]
    mine, theirs = (_tensors(x, y if all(kept) else {}) for x, y in zip((a, b), kept, strict=True))
    pairs = itertools.zip_longest(mine, theirs, fillvalue=(None, None))
    rows = {}
    for (name, x), (other, y) in tqdm(pairs, "Comparing", unit="tensor", delay=3, disable=None):
        one, two = (f"tensor {x!r}" if x else "no tensor" for x in (name, other))
        differ = f"{a.folder} has {one} where {b.folder} has {two}: these are different models."
        require(name == other, differ)
        rows[name] = compare_tensors(x, y)
    return rows


def compare_tensors(a: np.ndarray, b: np.ndarray) -> dict:
    """Shapes, dtypes, hashes and the largest differences; two tensors agree when they are equal in
    either of their dtypes."""
    row = {"shape": list(a.shape), "dtypes": [a.dtype.name, b.dtype.name]}
    if a.shape != b.shape:
        return {**row, "other_shape": list(b.shape), "agree": False}
    contents = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    hashes = [hashlib.sha256(x).hexdigest()[:16] for x in contents]
    # A conversion to another dtype rounds, and is no difference; either may be the source's.
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = (np.array_equal(a.astype(x), b.astype(x)) for x in (a.dtype, b.dtype))
        agree = (a.dtype == b.dtype and hashes[0] == hashes[1]) or any(rounded)
        one, other = (np.nan_to_num(x.astype(np.float32)) for x in (a, b))  # JSON has no NaN
    largest = float(np.abs(one - other).max(initial=0.0))
    relative = largest / max(float(np.abs(one).max(initial=0.0)), 1e-30)
    return {**row, "sha256": hashes, "max_abs": largest, "max_rel": relative, "agree": agree}


def rounding(rows: dict[str, dict]) -> str:
    """The dtype to which the weights of both are rounded before their stages are compared: the
    coarsest that one of two tensors has and the other has not, else float32."""
    pairs = [row["dtypes"] for row in rows.values() if row["dtypes"][0] != row["dtypes"][1]]
    return next((x for x in COARSE if any(x in pair for pair in pairs)), "float32")


def compare_stages(
    a: dict[str, np.ndarray], b: dict[str, np.ndarray], tolerance: float
) -> dict[str, dict]:
    """By stage: the largest difference against the largest value; ids must be identical."""
    rows = {}
    for name, values in a.items():
        if name in INTEGERS:
            share = float(np.mean(values == b[name]))
            rows[name] = {"identical": share, "agree": share == 1.0}
            continue
        # Relative to the stage's own size: latents and logits differ by orders of magnitude.
        largest = float(np.abs(values - b[name]).max())
        relative = largest / float(np.abs(values).max())
        agree = bool(np.isfinite(relative) and relative <= tolerance)
        rows[name] = {"max_abs": largest, "max_rel": relative, "agree": agree}
    return rows
