"""The command `convert` on miniatures, run as a user would."""

import json

import numpy as np
from safetensors.numpy import load_file

from blip3o_jax.cli import main

TA_TOK = "model.vision_tower.vision_tower."
IGNORED = {
    f"{TA_TOK}encoder.head.probe": np.ones((1, 1, 16), np.float32),
    f"{TA_TOK}scale_layer.shift": np.zeros((1, 3, 1, 1), np.float32),
    "lm_head.weight": None,  # the embedding again
}


def convert(capsys, *argv):
    """The report of a conversion that must succeed."""
    assert main(["convert", *map(str, argv)]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def refused(capsys, *argv):
    """The sentence of a conversion that must not."""
    capsys.readouterr()
    assert main(["convert", *map(str, argv)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("blip3o-jax: ")
    return error


def same(folder, other, without=()):
    """Asserts that two checkpoints hold the same tensors, bit for bit."""
    one, two = (
        {k: v for f in d.glob("*.safetensors") for k, v in load_file(f).items()}
        for d in (folder, other)
    )
    assert set(one) - set(without) == set(two)
    assert all(
        (one[k].dtype, one[k].shape, one[k].tobytes())
        == (two[k].dtype, two[k].shape, two[k].tobytes())
        for k in two
    )
