"""A random checkpoint of a preset's size in the published layout, for measuring conversions.

Holds one tensor at a time.

    python tests/convert/make_synthetic.py /tmp/synthetic                     # blip3o_next_3b in
    bfloat16, 8.7 GB
    /usr/bin/time -v blip3o-jax convert to-jax /tmp/synthetic /tmp/jax        # the report's last
    line has its own measure
    /usr/bin/time -v blip3o-jax convert to-torch /tmp/jax /tmp/back
    for file in /tmp/synthetic/*.safetensors; do cmp $file /tmp/back/$(basename $file); done

The values are uniform, which compresses worse than trained weights do. Names that a conversion
ignores are left out, so that the bytes that come back are the whole of what went in.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from blip3o_jax.convert.config_json import config_to_json
from blip3o_jax.convert.published import float_dtype, published_rules
from blip3o_jax.convert.rules import torch_shapes
from blip3o_jax.convert.safetensors_io import Entry, row_blocks, write_tensors
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.presets import preset


def random_tensors(entries, seed: int):
    """(name, values in [-1/20, 1/20)) of each entry."""
    rng = np.random.default_rng(seed)
    for name, entry in tqdm(entries.items(), unit="tensor"):
        values = np.empty(entry.shape, entry.dtype)
        for rows in row_blocks(entry.shape, 4):
            values[rows] = rng.random(values[rows].shape, np.float32) / 10 - 0.05
        yield name, values


def make(
    directory: Path,
    name: str = "blip3o_next_3b",
    dtype: str = "bfloat16",
    max_shard_bytes: float = 5e9,
    seed: int = 0,
) -> None:
    """Writes config.json and the weights."""
    cfg = preset(name)
    shapes = torch_shapes(published_rules(cfg), Blip3o(cfg).abstract())
    entries = {key: Entry(shape, float_dtype(dtype)) for key, shape in shapes.items()}
    directory.mkdir(parents=True)
    write_tensors(directory, entries, random_tensors(entries, seed), max_shard_bytes)
    (directory / "config.json").write_text(json.dumps(config_to_json(cfg, dtype), indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--preset", default="blip3o_next_3b")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    make(args.directory, args.preset, args.dtype)
