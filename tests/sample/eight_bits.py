"""What weights of eight bits make of the embedded model's score: `evaluate scenes` with both.

python tests/sample/eight_bits.py --out DIR
"""

import argparse
import pathlib

import blip3o_jax
from blip3o_jax.cli import main
from blip3o_jax.jobs import work

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=pathlib.Path, required=True)
parser.add_argument("--seeds", default="1")
args = parser.parse_args()
for dtype in ("auto", "int8"):
    pipeline = blip3o_jax.load("emoji_64", dtype=dtype, batch_size=16)
    # A job looks whether its checkpoint is still the one that it is named after.
    pipeline.identity = pipeline.identity.removesuffix("+int8")
    work.load_for = lambda _, pipeline=pipeline: pipeline
    out = ["--batch-size", "16", "--out", str(args.out / dtype)]
    assert main(["evaluate", "scenes", "--seeds", args.seeds, *out]) == 0
