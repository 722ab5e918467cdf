"""Finds sprites and letters in a 64x64 picture by template matching; judge.py's eyes. Errors are
squared differences over a sprite's surroundings, divided by those of the bare ground: 0 is perfect,
1 as bad as nothing there."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from blip3o_jax.scenes import sprites
from blip3o_jax.scenes.scene import CELL, LOOKS, SIZE, Scene, Thing, compose
from blip3o_jax.scenes.sprites import GROUNDS, LETTER_HEIGHT, LETTER_WIDTH, OBJECTS, SPRITE, render

# Chosen by eye on degraded pictures: blur of 1 px and noise of 0.05 pass, even blends of two
# objects and discs do not.
MOST_ERROR = 0.25
# a sprite must explain the pixels this much better than any other object or a plain disc
MOST_OF_RIVAL = 0.6
MOST_LETTER_ERROR = 0.4
GROUND_DISTANCE = 0.1  # in RGB, 0..1 each; half the way between two grounds
FOREGROUND_DISTANCE = 0.15
COARSE_ERROR = 0.5  # at every second place: only tells where to look
MARGIN = 3  # px around a sprite that count as its surroundings
REACH = 3  # px around a place where to look


@dataclass(frozen=True)
class Detection:
    """An object (or letter) with its top-left corner in px; `color` None is the natural look,
    `error` 0 perfect."""

    object: str
    color: str | None
    row_px: int
    column_px: int
    error: float

    @property
    def plain_color(self) -> str | None:
        """The colour that one would say: a natural apple is red."""
        return self.color or sprites.PLAIN_COLOR.get(self.object)


@dataclass(frozen=True)
class Sight:
    """All that was seen; `ground` None is none of the five, `unexplained` the px of foreground that
    no detection covers."""

    detections: tuple[Detection, ...]
    ground: str | None
    unexplained: int


def look(image: np.ndarray, text: bool = False) -> Sight:
    """Detections in a picture [64, 64, 3], uint8 or float 0..1, best first; letters from left to
    right instead with `text`."""
    # The ground, and what differs from it.
    pixels = np.asarray(image, np.float32) / (255 if image.dtype == np.uint8 else 1)
    ground, shade = _find_ground(pixels)
    difference = pixels - shade
    nearest = ground or min(GROUNDS, key=lambda name: np.linalg.norm(shade - _shade(name)))
    # Sprites and letters, and what they leave unexplained.
    detections = _find_sprites(difference, nearest)
    boxes = [(d.row_px, d.column_px, SPRITE, SPRITE) for d in detections]
    if text:
        letters = _find_letters(difference, nearest)
        boxes += [(d.row_px, d.column_px, LETTER_HEIGHT, LETTER_WIDTH) for d in letters]
        detections += letters
    return Sight(tuple(detections), ground, _unexplained(difference, boxes))


def detect(image: np.ndarray) -> list[Detection]:
    """The sprites in a picture, best first."""
    return list(look(image).detections)


def _shade(ground: str) -> np.ndarray:
    return np.float32(GROUNDS[ground]) / 255


def _find_ground(pixels: np.ndarray) -> tuple[str | None, np.ndarray]:
    """The commonest ground among 4x4 blocks and its shade as painted; None and the border's shade
    if there is hardly any."""
    blocks = pixels.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3)).reshape(-1, 3)
    distances = np.stack([np.linalg.norm(blocks - _shade(name), axis=-1) for name in GROUNDS])
    near = np.where(distances.min(axis=0) < GROUND_DISTANCE, distances.argmin(axis=0), -1)
    votes = np.bincount(near[near >= 0], minlength=len(GROUNDS))
    if votes.max() < len(blocks) // 8:
        border = np.ones((16, 16), bool)
        border[1:-1, 1:-1] = False
        return None, np.median(blocks[border.ravel()], axis=0)
    return list(GROUNDS)[votes.argmax()], np.median(blocks[near == votes.argmax()], axis=0)


class _Templates(NamedTuple):
    """Per object and look, K in all: mask x difference from the ground [K, pixels], its energy [K];
    masks [objects, pixels]."""

    weighted: np.ndarray
    energy: np.ndarray
    masks: np.ndarray


@lru_cache
def _templates(ground: str) -> _Templates:
    """What _errors compares with on a ground."""
    inside = slice(CELL, CELL + SPRITE)
    weighted, energy, masks = [], [], []
    for name in OBJECTS:
        # the sprite and what lies within MARGIN px of it, diagonals included
        cover = np.pad(render(name)[..., 3] > 0.2, MARGIN)
        grown = sliding_window_view(cover, (2 * MARGIN + 1,) * 2).max(axis=(2, 3))
        mask = grown.astype(np.float32)[::2, ::2, None]
        masks.append(mask.ravel())
        for color in LOOKS:
            picture = compose(Scene((Thing(name, color, 1, 1),), ground))[inside, inside]
            difference = _soften(np.float32(picture) / 255 - _shade(ground))[::2, ::2]
            weighted.append((mask * difference).ravel())
            energy.append((mask * difference**2).sum())
    return _Templates(np.stack(weighted), np.float32(energy), np.stack(masks))


def _soften(image: np.ndarray) -> np.ndarray:
    """Blurs [Y, X, C] by 1-2-1 both ways, zero outside: sharpness and noise are not judged, and
    every second px is then enough."""
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 16


def _errors(softened: np.ndarray, templates: _Templates, step: int = 1) -> np.ndarray:
    """Error of every template at every step-th place of a softened difference: [rows, columns,
    objects, looks]."""
    views = sliding_window_view(softened, (SPRITE, SPRITE), axis=(0, 1))
    views = views[::step, ::step, :, ::2, ::2]
    rows, columns = views.shape[:2]
    flat = views.transpose(0, 1, 3, 4, 2).reshape(rows * columns, -1)
    energy = _product(np.square(flat).reshape(rows * columns, -1, 3).sum(axis=-1), templates.masks)
    error = np.repeat(energy, len(LOOKS), axis=1) - 2 * _product(flat, templates.weighted)
    error = (error + templates.energy) / templates.energy
    return error.reshape(rows, columns, len(OBJECTS), len(LOOKS))


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b.T, three rows at a time: OpenBLAS leaves small ones to one thread, where two would wait
    for each other on busy cores."""
    padded = np.pad(a, ((0, -len(a) % 3), (0, 0)))
    return (padded.reshape(-1, 3, a.shape[1]) @ b.T).reshape(len(padded), len(b))[: len(a)]


def _least(errors: np.ndarray) -> tuple[int, ...]:
    """Where the smallest error is."""
    return tuple(int(i) for i in np.unravel_index(errors.argmin(), errors.shape))


def _find_sprites(difference: np.ndarray, ground: str) -> list[Detection]:
    """Greedy search: the best of every second place is looked at closely, accepted or not, and
    closed; and so on."""
    softened, templates = _soften(difference), _templates(ground)
    coarse = _errors(softened, templates, step=2).min(axis=(2, 3))
    places = 2 * np.arange(len(coarse))
    detections = []
    while coarse.min() < COARSE_ERROR:
        row, column = (2 * i for i in _least(coarse))
        detection = _look_closely(softened, templates, row, column)
        if detection:
            detections.append(detection)
            row, column = detection.row_px, detection.column_px
        # Sprites may touch, and a sloppy picture may let them overlap by a corner.
        reach = 16 if detection else 6
        coarse[np.ix_(abs(places - row) < reach, abs(places - column) < reach)] = np.inf
    return sorted(detections, key=lambda d: d.error)


def _look_closely(
    softened: np.ndarray, templates: _Templates, row: int, column: int
) -> Detection | None:
    """The best sprite within REACH px of a place, or None if it is too unlike it or nothing speaks
    for it against others."""
    # The best sprite, and the best of another object.
    top, left = max(row - REACH, 0), max(column - REACH, 0)
    bottom, right = (min(at + REACH, SIZE - SPRITE) + SPRITE for at in (row, column))
    errors = _errors(softened[top:bottom, left:right], templates)
    i, j, which, look = _least(errors)
    error = float(errors[i, j, which, look])
    rival = np.delete(errors, which, axis=2).min()
    # A plain disc in its own mean colour, in the same unit.
    window = softened[top + i :, left + j :][:SPRITE:2, :SPRITE:2]
    inside = window[_disc(which)[::2, ::2]]
    explained = len(inside) * np.square(inside.mean(axis=0)).sum()
    energy = templates.energy[which * len(LOOKS) + look]
    disc = float((np.square(window).sum() - explained) / energy)
    if error > min(MOST_ERROR, MOST_OF_RIVAL * min(rival, disc)):
        return None
    return Detection(OBJECTS[which], LOOKS[look], top + i, left + j, max(error, 0.0))


@lru_cache
def _disc(which: int) -> np.ndarray:
    """The disc with an object's area and centre, bool [24, 24]."""
    cover = render(OBJECTS[which])[..., 3]
    y, x = np.mgrid[:SPRITE, :SPRITE]
    area = cover.sum()
    return (y - (cover * y).sum() / area) ** 2 + (x - (cover * x).sum() / area) ** 2 < area / np.pi


def _find_letters(difference: np.ndarray, ground: str) -> list[Detection]:
    """Letters, greedily, then in reading order: lines from above, each from left to right."""
    # How much ink covers each pixel, and the error of each letter at each place.
    ink = sprites.INK - _shade(ground)
    cover = _soften(np.clip(difference @ ink / (ink @ ink), 0, 1)[..., None])[..., 0]
    windows = sliding_window_view(cover, (LETTER_HEIGHT, LETTER_WIDTH))
    rows, columns = windows.shape[:2]
    flat = windows.reshape(rows * columns, -1)
    shapes = np.stack([_soften(letter[..., None]).ravel() for letter in sprites.letters()])
    energy = np.square(shapes).sum(axis=1)
    errors = (np.square(flat).sum(axis=1)[:, None] - 2 * _product(flat, shapes) + energy) / energy
    errors = errors.reshape(rows, columns, -1)
    # The best place of all, then its surroundings are closed; and so on.
    detections = []
    while errors.min() < MOST_LETTER_ERROR:
        row, column, which = _least(errors)
        error = max(float(errors[row, column, which]), 0.0)
        detections.append(Detection(sprites.LETTERS[which], None, row, column, error))
        errors[max(row - 11, 0) : row + 12, max(column - 5, 0) : column + 6] = np.inf
    return sorted(detections, key=lambda d: (round(d.row_px / LETTER_HEIGHT), d.column_px))


def _unexplained(difference: np.ndarray, boxes: list[tuple[int, int, int, int]]) -> int:
    """Area in px that differs from the ground outside the boxes (row, column, height, width) and 2
    px around them."""
    blocks = difference.reshape(SIZE // 2, 2, SIZE // 2, 2, 3).mean(axis=(1, 3))
    foreground = np.linalg.norm(blocks, axis=-1) > FOREGROUND_DISTANCE
    foreground = foreground.repeat(2, axis=0).repeat(2, axis=1)
    for row, column, height, width in boxes:
        rows = slice(max(row - 2, 0), row + height + 2)
        foreground[rows, max(column - 2, 0) : column + width + 2] = False
    return int(foreground.sum())
