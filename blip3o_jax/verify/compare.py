"""Whether two checkpoints hold the same model: their tensors, and what their stages give."""

import hashlib
import itertools

import numpy as np
from tqdm import tqdm

from blip3o_jax.checkpoints import Checkpoint
from blip3o_jax.convert.published import published_rules
from blip3o_jax.convert.rules import torch_tensors
from blip3o_jax.errors import require

INTEGERS = ("codes", "tokens")  # stages that give ids
OURS = ("name", "max_prompt_tokens")  # fields of the config on which no tensor depends


def differing_fields(a: Checkpoint, b: Checkpoint) -> list[str]:
    """Fields of the config in which two models differ."""
    fields = (name for name in vars(a.config) if name not in OURS)
    return [name for name in fields if getattr(a.config, name) != getattr(b.config, name)]


def compare_checkpoints(a: Checkpoint, b: Checkpoint) -> dict[str, dict]:
    """`compare_tensors` by published name; InputError when one lacks a tensor of the other."""
    mine, theirs = (torch_tensors(published_rules(x.config), x.leaves) for x in (a, b))
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
    the coarser of their dtypes."""
    row = {"shape": list(a.shape), "dtypes": [a.dtype.name, b.dtype.name]}
    if a.shape != b.shape:
        return {**row, "other_shape": list(b.shape), "agree": False}
    contents = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    hashes = [hashlib.sha256(x).hexdigest()[:16] for x in contents]
    one, other = (x.astype(np.float32) for x in (a, b))
    largest = float(np.abs(one - other).max(initial=0.0))
    # A conversion to a coarser dtype rounds, and is no difference.
    coarse = min((a.dtype, b.dtype), key=lambda dtype: dtype.itemsize)
    with np.errstate(over="ignore"):
        agree = hashes[0] == hashes[1] or np.array_equal(one.astype(coarse), other.astype(coarse))
    relative = largest / max(float(np.abs(one).max(initial=0.0)), 1e-30)
    numbers = {"sha256": hashes, "max_abs": largest, "max_rel": relative}
    return {**row, **numbers, "agree": bool(agree)}


def rounding(rows: dict[str, dict]) -> str:
    """The dtype to which the weights of both are rounded before their stages are compared: the
    coarsest that one of two tensors has where the other is finer, else float32."""
    pairs = [[np.dtype(name) for name in row["dtypes"]] for row in rows.values()]
    coarser = [min(pair, key=lambda dtype: dtype.itemsize) for pair in pairs if pair[0] != pair[1]]
    return min(coarser, key=lambda dtype: dtype.itemsize, default=np.dtype(np.float32)).name


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
