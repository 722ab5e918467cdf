"""The tiny published model with random weights, and its checkpoint on disk."""

import jax
import numpy as np
import pytest
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
