"""Arrays of ours beside PyTorch's, whose images have their channels first."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

TOLERANCE = 1e-4  # of the largest value


def close(ours, theirs, tolerance=TOLERANCE):
    """Largest difference at most `tolerance` of the largest value."""
    ours, theirs = np.asarray(ours, np.float32), theirs.detach().float().numpy()
    assert ours.shape == theirs.shape
    assert np.isfinite(ours).all()
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def last(x):
    """torch [B,C,Y,X] -> [B,Y,X,C]."""
    return x.movedim(1, -1)


def first(x):
    """numpy [B,Y,X,C] -> torch [B,C,Y,X]."""
    return torch.from_numpy(np.array(x)).movedim(-1, 1)
