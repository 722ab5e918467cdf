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


def close_gradients(ours, theirs, names):
    """Largest difference of each of `names` at most TOLERANCE of its largest value, or of a
    hundredth of all of theirs. Returns that largest value, 0 for no names."""
    theirs = {name: np.asarray(theirs[name]) for name in names}
    scales = {name: np.abs(x).max() for name, x in theirs.items()}
    largest = max(scales.values(), default=0)
    for name, scale in scales.items():
        difference = np.abs(ours[name] - theirs[name]).max()
        assert difference <= TOLERANCE * max(scale, 0.01 * largest), name
    return largest


def last(x):
    """torch [B,C,Y,X] -> [B,Y,X,C]."""
    return x.movedim(1, -1)


def first(x):
    """numpy [B,Y,X,C] -> torch [B,C,Y,X]."""
    return torch.from_numpy(np.array(x)).movedim(-1, 1)
