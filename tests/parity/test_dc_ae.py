"""The committed DC-AE fixtures are what diffusers gives."""

from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.parity

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.mark.parametrize("variant", ["published", "shuffled"])
def test_fixture_is_what_diffusers_gives(variant):
    pytest.importorskip("diffusers")
    from parity.make_dc_ae import make

    made = make(variant)
    with np.load(FIXTURES / f"dc_ae_{variant}.npz") as committed:
        assert set(made) == set(committed.files)
        for name, value in made.items():
            assert np.abs(value - committed[name]).max() <= 1e-5 * np.abs(value).max(), name
