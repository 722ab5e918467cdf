"""A scene: one to four 24 px sprites on an 8 px grid of a 64x64 picture, or one short word; its
pixels and its patches' names."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from blip3o_jax.errors import InputError
from blip3o_jax.scenes import sprites
from blip3o_jax.scenes.sprites import COLORS, GROUNDS, LETTER_WIDTH, LETTERS, OBJECTS, SPRITE

SIZE = 64  # px, both sides of the picture
CELL = 8  # px, the grid's step and the patch
PATCHES = SIZE // CELL
SPAN = SPRITE // CELL  # cells that a sprite covers, each way
POSITIONS = PATCHES - SPAN + 1  # rows and columns where its top-left cell may be
LONGEST_WORD = SIZE // LETTER_WIDTH
LETTER_SPAN = sprites.LETTER_HEIGHT // CELL  # cells that a letter covers, from top to bottom

LOOKS = (None, *COLORS)  # None: natural
# What a patch can be called: even patches of a sprite say what it is, odd ones its colour, so that
# an unseen pair is made of seen words.
PATCH_WORDS = (
    *(f"{name} {i}" for name in OBJECTS for i in (0, 2, 4, 6, 8)),
    *(f"{color or 'natural'} {i}" for color in LOOKS for i in (1, 3, 5, 7)),
    *GROUNDS,
    *(f"{letter} {half}" for letter in LETTERS for half in ("top", "bottom")),
)
_FIRST_LOOK = 5 * len(OBJECTS)
_FIRST_GROUND = _FIRST_LOOK + 4 * len(LOOKS)
_FIRST_LETTER = _FIRST_GROUND + len(GROUNDS)

# Words of a sprite's first row: what it is, its colour, and again what it is.
SKETCH_WORDS = np.array([word.split()[-1] in ("0", "1", "2") for word in PATCH_WORDS])


@dataclass(frozen=True)
class Thing:
    """An object in one look (`color` None is natural) with its top-left corner at cell (row,
    column), each 0..5."""

    object: str
    color: str | None
    row: int
    column: int


@dataclass(frozen=True)
class Scene:
    """What is to be seen, and nothing else; `word` is A-Z, drawn at the centre."""

    things: tuple[Thing, ...]
    ground: str
    word: str | None = None


def word_cell(word: str) -> tuple[int, int]:
    """The cell (row, column) of the top half of the word's first letter."""
    return (PATCHES - LETTER_SPAN) // 2, (LONGEST_WORD - len(word)) // 2


def _check(scene: Scene) -> None:
    """InputError for a scene that cannot be drawn."""
    if scene.ground not in GROUNDS:
        raise InputError(f"The ground {scene.ground!r} is not one of {', '.join(GROUNDS)}.")
    boxes = []
    for thing in scene.things:
        if thing.object not in OBJECTS or thing.color not in LOOKS:
            raise InputError(
                f"There is no sprite for {thing.color or 'natural'} {thing.object!r}; see "
                "scenes.sprites OBJECTS and COLORS."
            )
        boxes.append((thing.row, thing.column, SPAN, SPAN))
    if scene.word is not None:
        if not 0 < len(scene.word) <= LONGEST_WORD or set(scene.word) - set(LETTERS):
            raise InputError(f"The word {scene.word!r} must be 1 to {LONGEST_WORD} letters A-Z.")
        boxes.append((*word_cell(scene.word), LETTER_SPAN, len(scene.word)))

    # Everything is inside the picture, and each cell belongs to one thing.
    covers = np.zeros((PATCHES, PATCHES), int)
    for row, column, height, width in boxes:
        if min(row, column) < 0 or row + height > PATCHES or column + width > PATCHES:
            raise InputError(f"The cell ({row}, {column}) puts a thing outside the picture.")
        covers[row : row + height, column : column + width] += 1
    if covers.max(initial=0) > 1:
        raise InputError("Things of a scene must not overlap.")


@lru_cache(maxsize=2048)
def _on_ground(name: str, color: str | None, ground: str) -> np.ndarray:
    """A sprite composed over a ground, uint8 [24, 24, 3]."""
    rgba = sprites.render(name, color)
    alpha = rgba[..., 3:]
    mixed = rgba[..., :3] * alpha * 255 + np.float32(GROUNDS[ground]) * (1 - alpha)
    return np.rint(mixed).astype(np.uint8)


@lru_cache(maxsize=256)
def _letter_on_ground(letter: str, ground: str) -> np.ndarray:
    """A letter in ink over a ground, uint8 [16, 8, 3]."""
    cover = sprites.letters()[LETTERS.index(letter)][..., None]
    mixed = sprites.INK * 255 * cover + np.float32(GROUNDS[ground]) * (1 - cover)
    return np.rint(mixed).astype(np.uint8)


def compose(scene: Scene) -> np.ndarray:
    """The scene's pixels, uint8 [64, 64, 3]; InputError for one that cannot be drawn."""
    _check(scene)
    image = np.empty((SIZE, SIZE, 3), np.uint8)
    image[:] = GROUNDS[scene.ground]
    for thing in scene.things:
        y, x = thing.row * CELL, thing.column * CELL
        image[y : y + SPRITE, x : x + SPRITE] = _on_ground(thing.object, thing.color, scene.ground)
    if scene.word:
        y, x = (CELL * c for c in word_cell(scene.word))
        word = np.concatenate([_letter_on_ground(c, scene.ground) for c in scene.word], axis=1)
        image[y : y + word.shape[0], x : x + word.shape[1]] = word
    return image


def patch_words(scene: Scene) -> np.ndarray:
    """For every 8x8 px patch the index in PATCH_WORDS of the one word that names it, uint8 [8, 8].

    A sprite's nine patches, row by row: the even ones name the object and their place in it, the
    odd ones its look and their place.
    """
    _check(scene)
    words = np.full((PATCHES, PATCHES), _FIRST_GROUND + list(GROUNDS).index(scene.ground), np.uint8)
    place = np.arange(SPAN * SPAN)
    for thing in scene.things:
        of_object = 5 * OBJECTS.index(thing.object) + place // 2
        of_look = _FIRST_LOOK + 4 * LOOKS.index(thing.color) + place // 2
        names = np.where(place % 2, of_look, of_object).reshape(SPAN, SPAN)
        words[thing.row : thing.row + SPAN, thing.column : thing.column + SPAN] = names
    if scene.word:
        row, column = word_cell(scene.word)
        for i, letter in enumerate(scene.word):
            first = _FIRST_LETTER + LETTER_SPAN * LETTERS.index(letter)
            words[row : row + LETTER_SPAN, column + i] = first + np.arange(LETTER_SPAN)
    return words
