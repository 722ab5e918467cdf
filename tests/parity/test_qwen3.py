"""The committed Qwen3 fixture is what transformers gives."""

from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.parity

FIXTURE = Path(__file__).parents[1] / "fixtures" / "qwen3.npz"


def test_fixture_is_what_transformers_gives():
    pytest.importorskip("transformers")
    from parity.make_qwen3 import make

    made = make()
    with np.load(FIXTURE) as committed:
        assert set(made) == set(committed.files)
        for name, value in made.items():
            expected = committed[name].astype(np.float64)
            assert np.abs(value - expected).max() <= 1e-5 * np.abs(expected).max(), name
