"""Whether two checkpoints hold the same model: their tensors under the published names, and what
their stages give."""

import hashlib

import numpy as np
from tqdm import tqdm

from blip3o_jax.checkpoints import Checkpoint
from blip3o_jax.convert.published import published_rules
from blip3o_jax.convert.rules import torch_tensors
from blip3o_jax.errors import InputError

INTEGERS = ("codes", "tokens")  # stages that give ids
OURS = ("name", "max_prompt_tokens")  # fields of the config on which no tensor depends


def differing_fields(a: Checkpoint, b: Checkpoint) -> list[str]:
    """Fields of the config in which two models differ."""
    fields = (name for name in vars(a.config) if name not in OURS)
    return [name for name in fields if getattr(a.config, name) != getattr(b.config, name)]


def compare_checkpoints(a: Checkpoint, b: Checkpoint) -> dict[str, dict]:
    """`compare_tensors` by published name; InputError when one has a tensor that the other has
    not."""
    mine, theirs = (torch_tensors(published_rules(x.config), x.leaves) for x in (a, b))
    rows = {}
    for name, values in tqdm(mine, "Comparing", unit="tensor", delay=3, disable=None):
        other, other_values = next(theirs, (None, None))
        if other != name:
            raise InputError(
                f"{a.folder} has tensor {name!r} where {b.folder} has {other!r}: these are "
                "different models."
            )
        rows[name] = compare_tensors(values, other_values)
    if (other := next(theirs, None)) is not None:
        raise InputError(
            f"{b.folder} has tensor {other[0]!r}, which {a.folder} has not: these are different "
            "models."
        )
    return rows


def compare_tensors(a: np.ndarray, b: np.ndarray) -> dict:
    """Shapes, dtypes, hashes and the largest differences.

    Two tensors agree when they are equal in the coarser of their dtypes.
    """
    row = {"shape": list(a.shape), "dtypes": [a.dtype.name, b.dtype.name]}
    if a.shape != b.shape:
        return {**row, "other_shape": list(b.shape), "agree": False}
    contents = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    hashes = [hashlib.sha256(x).hexdigest()[:16] for x in contents]
    one, other = (x.astype(np.float32) for x in (a, b))
    largest = float(np.abs(one - other).max(initial=0.0))
    coarse = min((a.dtype, b.dtype), key=lambda dtype: dtype.itemsize)
    with np.errstate(over="ignore"):
        agree = hashes[0] == hashes[1] or np.array_equal(one.astype(coarse), other.astype(coarse))
    return {
        **row,
        "sha256": hashes,
        "max_abs": largest,
        "max_rel": largest / max(float(np.abs(one).max(initial=0.0)), 1e-30),
        "agree": bool(agree),
    }


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
        largest = float(np.abs(values - b[name]).max())
        relative = largest / float(np.abs(values).max())
        agree = bool(np.isfinite(relative) and relative <= tolerance)
        rows[name] = {"max_abs": largest, "max_rel": relative, "agree": agree}
    return rows
