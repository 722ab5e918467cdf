"""The committed SANA, connector and scheduler fixture is what PyTorch gives."""

from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.parity

FIXTURE = Path(__file__).parents[1] / "fixtures" / "sana.npz"


def test_fixture_is_what_diffusers_gives():
    pytest.importorskip("diffusers")
    from parity.make_sana import make

    made = make()
    with np.load(FIXTURE) as committed:
        assert set(made) == set(committed.files)
        for name, value in made.items():
            assert np.abs(value - committed[name]).max() <= 1e-5 * np.abs(value).max(), name
