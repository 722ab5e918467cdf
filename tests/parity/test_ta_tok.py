"""The committed TA-Tok fixture is what PyTorch gives."""

from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.parity

FIXTURE = Path(__file__).parents[1] / "fixtures/ta_tok.npz"


def test_fixture_is_what_pytorch_gives():
    pytest.importorskip("transformers")
    from parity.make_ta_tok import make

    made = make()
    with np.load(FIXTURE) as committed:
        assert set(made) == set(committed.files)
        for name, value in made.items():
            assert value.dtype == committed[name].dtype, name
            assert np.abs(value - committed[name]).max() <= 1e-5 * np.abs(value).max(), name
