"""Shift and zoom of one picture against another, on made pictures."""

import functools

import numpy as np
import pytest
from PIL import Image

from blip3o_jax.evaluate.edits import heldout, pictures
from blip3o_jax.registration import register


@functools.cache
def canvas(seed: int) -> Image.Image:
    """Soft blobs of several sizes, 512 px."""
    rng = np.random.default_rng(seed)
    layers = [
        Image.fromarray(rng.integers(0, 256, (n, n, 3), np.uint8)).resize(
            (512, 512), Image.Resampling.BICUBIC
        )
        for n in (12, 40, 110)
    ]
    return Image.fromarray(
        np.mean([np.asarray(layer) for layer in layers], axis=0, dtype=int).astype(np.uint8)
    )


def view(picture: Image.Image, size: int, down=0.0, right=0.0, zoom=0.0) -> np.ndarray:
    """The middle of a canvas as uint8 [size,size,3], moved by pixels of the view and zoomed."""
    step = 384 / size
    half = 192 / (1 + zoom)
    y, x = (256 - way * step / (1 + zoom) for way in (down, right))
    box = (x - half, y - half, x + half, y + half)
    return np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS, box=box))


@pytest.mark.parametrize(
    ("down", "right", "zoom"),
    [
        *((0, 0, 0), (0.5, 0, 0), (2, 0, 0), (-1.5, 2, 0), (-5, 4, 0)),
        *((0, 0, 0.01), (0, 0, 0.03), (0, 0, -0.03), (2, 0, 0.03)),
    ],
)
def test_shift_and_zoom_are_measured(down, right, zoom):
    for size in (64, 128):
        picture = canvas(size)
        measured = register(view(picture, size, down, right, zoom), view(picture, size))
        assert measured is not None
        assert measured[0] == pytest.approx(np.hypot(down, right), abs=0.25 if zoom else 0.06)
        assert measured[1] == pytest.approx(zoom, abs=0.004)


def test_an_edit_in_place_is_neither_shifted_nor_zoomed():
    before = view(canvas(0), 64)
    recoloured, tinted, replaced = before.copy(), 255 - before // 2, before.copy()
    recoloured[8:36, 8:36] = recoloured[8:36, 8:36, [2, 0, 1]]
    replaced[10:40, 20:50] = view(canvas(1), 64)[10:40, 20:50]
    noise = np.random.default_rng(0).normal(0, 12, before.shape)
    noisy = np.clip(before + noise, 0, 255).astype(np.uint8)
    for after in (before, recoloured, replaced, noisy):
        shift, zoom = register(after, before)
        assert shift < 0.2
        assert abs(zoom) < 0.006
    # A negative has its peak upside down: the same things, but no picture of the same.
    assert register(tinted, before) is None


def test_a_replaced_part_does_not_hide_a_shift():
    before = view(canvas(0), 64)
    after = view(canvas(0), 64, right=2).copy()
    after[30:60, 4:34] = view(canvas(1), 64)[30:60, 4:34]
    shift, zoom = register(after, before)
    assert shift == pytest.approx(2, abs=0.1)
    assert abs(zoom) < 0.006


def test_other_pictures_are_not_comparable():
    size = 64
    pictures = [view(canvas(seed), size) for seed in range(4)]
    for i, picture in enumerate(pictures):
        assert register(picture, pictures[i - 1]) is None
        assert register(picture[:, ::-1], picture) is None
    # Shifted by more than an eighth, and flat ones, which show nothing.
    assert register(view(canvas(0), size, down=10), pictures[0]) is None
    assert register(np.full_like(pictures[0], 7), pictures[0]) is None
    assert register(np.full_like(pictures[0], 7), np.full_like(pictures[0], 7)) is None


def test_true_edits_of_the_embedded_world_lie_on_their_source():
    """Few are not comparable, where the edit changed most of what there is; cyclic shifts are
    found."""
    edits = heldout(60)
    before, after = pictures(edits)
    pairs = [register(image, source) for image, source in zip(after, before, strict=True)]
    comparable = np.array([pair for pair in pairs if pair])
    assert len(comparable) >= 55
    assert comparable[:, 0].max() <= 0.5
    assert (np.abs(comparable[:, 1]) > 0.01).sum() == 0
    moved = np.roll(after, 2, axis=2)
    pairs = [register(image, source) for image, source in zip(moved, before, strict=True)]
    assert sum(bool(pair) and abs(pair[0] - 2) < 0.3 for pair in pairs) >= 56
