"""A picture of any size as the square that a model sees, and back: one mapping, undone exactly, so
that an edit lies on its source to the pixel.

    picture [h,w]  --pad to the longer side m-->  [m,m]  --resize once-->  [size,size]
    result [size,size]  --resize once-->  [m,m]  --cut the padding off-->  [h,w]

Nothing is cropped. The padding repeats the border, half on either side (the odd pixel at the end),
so that both steps scale by the same m/size in both directions and no size is rounded.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from blip3o_jax.errors import require

MAX_SIDE = 8192  # pixels of the longer side, whose square is held in memory


@dataclass(frozen=True)
class Placement:
    """Where a picture of `height` x `width` lies in the padded square of side `side`."""

    height: int
    width: int

    @property
    def side(self) -> int:
        return max(self.height, self.width)

    @property
    def top(self) -> int:
        return (self.side - self.height) // 2

    @property
    def left(self) -> int:
        return (self.side - self.width) // 2


def placement(picture: np.ndarray) -> Placement:
    """Where a picture [h,w,3] goes; InputError for one with a side beyond `MAX_SIDE`."""
    place = Placement(*picture.shape[:2])
    size = f"{place.width} x {place.height} pixels"
    limit = f"The picture is {size}, more than {MAX_SIDE} on a side; make it smaller."
    require(place.side <= MAX_SIDE, limit)
    return place


def to_square(picture: np.ndarray, size: int) -> tuple[np.ndarray, Placement]:
    """A picture uint8 [h,w,3] -> (uint8 [size,size,3], where it lies); errors as `placement`."""
    place = placement(picture)
    below, right = place.side - place.height - place.top, place.side - place.width - place.left
    square = np.pad(picture, ((place.top, below), (place.left, right), (0, 0)), mode="edge")
    return _resized(square, size), place


def from_square(square: np.ndarray, place: Placement) -> np.ndarray:
    """uint8 [size,size,3], or [size,size] -> the picture at `place`, uint8 [h,w,3] or [h,w]."""
    whole = _resized(square, place.side)
    return whole[place.top : place.top + place.height, place.left : place.left + place.width]


def _resized(square: np.ndarray, size: int) -> np.ndarray:
    """Lanczos, antialiased; pixel centres stay where they are."""
    if len(square) == size:
        return square
    return np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.LANCZOS))


def keep_unchanged(
    source: np.ndarray, result: np.ndarray, seen: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """The result [h,w,3] with the source's own pixels where little changed, and the mask of what is
    new, uint8 [h,w].

    `seen` [h,w,3] is what the model makes of the unchanged source (its autoencoder's round trip),
    so that what the autoencoder loses does not count as change. Change is the mean absolute
    difference over channels, smoothed; from `threshold` (levels of 255) on a pixel is new, and the
    border is blended over a few pixels.
    """
    difference = np.abs(result.astype(np.float32) - seen.astype(np.float32)).mean(axis=2)
    radius = max(1, max(source.shape[:2]) // 64)
    changed = _blurred(difference, radius) >= threshold
    weight = np.clip(2 * _blurred(changed.astype(np.float32), radius), 0, 1)
    mixed = source + weight[..., None] * (result.astype(np.float32) - source)
    return np.rint(mixed).astype(np.uint8), np.rint(255 * weight).astype(np.uint8)


def check_mask(alpha: np.ndarray, source: np.ndarray) -> None:
    """InputError for a mask [h,w] of another size than its source [h,w,3]."""
    own, size = (f"{x.shape[1]} x {x.shape[0]} pixels" for x in (alpha, source))
    sentence = f"The mask is {own} and the first image {size}; make them the same size."
    require(alpha.shape == source.shape[:2], sentence)


def masked(source: np.ndarray, result: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The result uint8 [h,w,3], or [h,w], where `alpha` [h,w] is 0, the source's own pixels where
    it is 255, and a mixture between."""
    weight = 1 - alpha.reshape(*alpha.shape, *[1] * (result.ndim - 2)).astype(np.float32) / 255
    return np.rint(source + weight * (result.astype(np.float32) - source)).astype(np.uint8)


def _blurred(values: np.ndarray, radius: int) -> np.ndarray:
    """Mean over (2 radius + 1) squared pixels, the border repeated."""
    for axis in (0, 1):
        widths = [(radius + 1, radius) if i == axis else (0, 0) for i in range(2)]
        total = np.cumsum(np.pad(values, widths, mode="edge"), axis=axis, dtype=np.float64)
        upper = np.take(total, range(2 * radius + 1, total.shape[axis]), axis=axis)
        lower = np.take(total, range(values.shape[axis]), axis=axis)
        values = (upper - lower) / (2 * radius + 1)
    return values.astype(np.float32)
