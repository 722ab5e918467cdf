"""The tiny published model with random weights, and its checkpoint on disk."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from converting import IGNORED
from safetensors.numpy import load_file, save_file
from tiny import PUBLISHED

from blip3o_jax.convert.published import save_published
from blip3o_jax.models.blip3o import Blip3o


@pytest.fixture(scope="session")
def cfg():
    return PUBLISHED


@pytest.fixture(scope="session")
def params():
    """Drawn by numpy: compiling the modules' own initialisers would take longer than all tests
    together."""
    rng = np.random.default_rng(0)
    shapes = Blip3o(PUBLISHED).abstract()
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, params):
    """A float32 checkpoint in one file. Not to be changed: tests that damage one copy it first."""
    folder = tmp_path_factory.mktemp("published") / "tiny"
    save_published(folder, PUBLISHED, params)
    return folder


@pytest.fixture
def published(checkpoint, tmp_path):
    """A checkpoint of mixed dtypes, with tensors that are not needed, and files beside it."""
    folder = shutil.copytree(checkpoint, tmp_path / "published")
    tensors = load_file(folder / "model.safetensors")
    tensors = {
        name: value.astype(ml_dtypes.bfloat16) if name.startswith("model.layers") else value
        for name, value in tensors.items()
    }
    tensors |= {**IGNORED, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text())) + "  \n"
    )
    (folder / "generation_config.json").write_bytes(b'{"top_k": 20}\r\n')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "LICENSE").write_text("as you like")
    (folder / "README.md").write_text("of no use")
    return folder
