"""A picture of any size as the model's square and back: the same size, not shifted, not zoomed."""

import numpy as np
import pytest
from PIL import Image

from blip3o_jax import geometry
from blip3o_jax.errors import InputError
from blip3o_jax.registration import shift

SIZES = [
    *((1, 1), (1, 1000), (1000, 1), (7, 300), (300, 7)),
    *((63, 64), (64, 63), (64, 64), (200, 150), (97, 256)),
]


def picture(height: int, width: int) -> np.ndarray:
    """Smooth blobs of colour, uint8 [h,w,3], that differ everywhere."""
    rng = np.random.default_rng(height * 1009 + width)
    coarse = rng.integers(0, 256, (max(2, height // 12), max(2, width // 12), 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def moved(result: np.ndarray, source: np.ndarray) -> float:
    """By how many pixels, see `registration.shift`."""
    return shift(result, source, np.zeros(source.shape[:2], bool))


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("factor", [1, 1.5])
def test_there_and_back_is_the_picture(height, width, factor):
    source = picture(height, width)
    size = int(max(height, width) * factor)
    square, place = geometry.to_square(source, size)
    assert square.shape == (size, size, 3)
    result = geometry.from_square(square, place)
    assert result.shape == source.shape
    assert np.abs(result.astype(int) - source).mean() < 1
    for part in (np.s_[:], np.s_[: height // 2], np.s_[:, : width // 2]):
        if min(result[part].shape[:2]) >= 30:  # halves too: a zoom shifts them apart
            assert moved(result[part], source[part]) < 0.1


@pytest.mark.parametrize(("height", "width"), [(200, 150), (97, 256), (300, 300)])
def test_a_small_model_loses_detail_but_neither_shifts_nor_zooms(height, width):
    source = picture(height, width)
    square, place = geometry.to_square(source, 64)
    result = geometry.from_square(square, place)
    assert result.shape == source.shape
    middle, centre = height // 2, width // 2
    for part in (np.s_[:middle], np.s_[middle:], np.s_[:, :centre], np.s_[:, centre:]):
        assert moved(result[part], source[part]) < 0.5
    assert result.mean(axis=(0, 1)) == pytest.approx(source.mean(axis=(0, 1)), abs=1)


def test_nothing_is_cropped_and_the_border_is_repeated():
    source = np.zeros((2, 5, 3), np.uint8)
    source[0], source[1] = 10, 20
    square, place = geometry.to_square(source, 5)
    assert square[:, 0, 0].tolist() == [10, 10, 20, 20, 20]  # the odd row at the end
    assert (place.top, place.left, place.side) == (1, 0, 5)
    np.testing.assert_array_equal(geometry.from_square(square, place), source)
    mask = np.arange(25, dtype=np.uint8).reshape(5, 5)
    np.testing.assert_array_equal(geometry.from_square(mask, place), mask[1:3])


def test_a_side_too_long_is_refused():
    with pytest.raises(InputError, match=r"is 8193 x 1 pixels, more than 8192 on a side"):
        geometry.to_square(np.zeros((1, 8193, 3), np.uint8), 64)


def test_unchanged_pixels_are_the_sources_own():
    source = picture(96, 128)
    seen = np.clip(source.astype(int) + 6, 0, 255).astype(np.uint8)  # what the autoencoder loses
    result = seen.copy()
    result[20:60, 30:70] = (255, 0, 255)
    mixed, mask = geometry.keep_unchanged(source, result, seen, 16.0)
    assert mixed.dtype == mask.dtype == np.uint8
    assert mask.shape == (96, 128)
    np.testing.assert_array_equal(mixed[24:56, 34:66], result[24:56, 34:66])
    assert (mask[24:56, 34:66] == 255).all()
    far = np.ones((96, 128), bool)
    far[12:68, 22:78] = False
    np.testing.assert_array_equal(mixed[far], source[far])
    assert (mask[far] == 0).all()
    # What is new within a mask alone, as of a picture so of a plane.
    alpha = np.array([[0, 255], [100, 155]], np.uint8)
    planes = np.full((2, 2), 10, np.uint8), np.full((2, 2), 210, np.uint8)
    expected = [[210, 10], [132, 88]]
    assert geometry.masked(*planes, alpha).tolist() == expected
    colours = (np.repeat(x[..., None], 3, 2) for x in planes)
    np.testing.assert_array_equal(geometry.masked(*colours, alpha)[..., 1], expected)
    nothing, empty = geometry.keep_unchanged(source, seen, seen, 16.0)
    np.testing.assert_array_equal(nothing, source)
    assert not empty.any()
