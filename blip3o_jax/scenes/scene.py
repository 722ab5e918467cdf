"""A scene: one to four 24 px sprites on an 8 px grid of a 64x64 picture, or one short word; its
pixels and its patches' names."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from blip3o_jax.errors import require
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
_NUMBERS = {word: number for number, word in enumerate(PATCH_WORDS)}
# Words of a sprite's first row, what it is, its colour, and again what it is; of a letter's too.
SKETCH_WORDS = np.array([word.split()[-1] in ("0", "1", "2", "top") for word in PATCH_WORDS])


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
    # Its words are those of the art.
    grounds = f"is not one of {', '.join(GROUNDS)}."
    require(scene.ground in GROUNDS, f"The ground {scene.ground!r} {grounds}")
    for thing in scene.things:
        name = f"{thing.color or 'natural'} {thing.object!r}"
        drawn = thing.object in OBJECTS and thing.color in LOOKS
        see = "see scenes.sprites OBJECTS and COLORS."
        require(drawn, f"There is no sprite for {name}; {see}")
    boxes = [(thing.row, thing.column, SPAN, SPAN) for thing in scene.things]
    if (word := scene.word) is not None:
        spelled = 0 < len(word) <= LONGEST_WORD and set(word) <= set(LETTERS)
        require(spelled, f"The word {word!r} must be 1 to {LONGEST_WORD} letters A-Z.")
        boxes.append((*word_cell(word), LETTER_SPAN, len(word)))
    # Everything is inside the picture, and each cell belongs to one thing.
    covers = np.zeros((PATCHES, PATCHES), int)
    for row, column, height, width in boxes:
        inside = min(row, column) >= 0 and max(row + height, column + width) <= PATCHES
        require(inside, f"The cell ({row}, {column}) puts a thing outside the picture.")
        covers[row : row + height, column : column + width] += 1
    require(covers.max() <= 1, "Things of a scene must not overlap.")


def _mixed(color: np.ndarray, cover: np.ndarray, ground: str) -> np.ndarray:
    """A colour (0..1) over a ground by its cover, uint8."""
    return np.rint(color * cover * 255 + np.float32(GROUNDS[ground]) * (1 - cover)).astype(np.uint8)


@lru_cache(maxsize=2048)
def _on_ground(name: str, color: str | None, ground: str) -> np.ndarray:
    """A sprite composed over a ground, uint8 [24, 24, 3]."""
    rgba = sprites.render(name, color)
    return _mixed(rgba[..., :3], rgba[..., 3:], ground)


@lru_cache(maxsize=256)
def _letter_on_ground(letter: str, ground: str) -> np.ndarray:
    """A letter in ink over a ground, uint8 [16, 8, 3]."""
    return _mixed(sprites.INK, sprites.letters()[LETTERS.index(letter)][..., None], ground)


def compose(scene: Scene) -> np.ndarray:
    """The scene's pixels, uint8 [64, 64, 3]; InputError for one that cannot be drawn."""
    _check(scene)
    image = np.full((SIZE, SIZE, 3), GROUNDS[scene.ground], np.uint8)
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
    words = np.full((PATCHES, PATCHES), _NUMBERS[scene.ground], np.uint8)
    for thing in scene.things:
        names = (thing.object, thing.color or "natural")
        numbers = [_NUMBERS[f"{names[place % 2]} {place}"] for place in range(SPAN * SPAN)]
        rows, columns = slice(thing.row, thing.row + SPAN), slice(thing.column, thing.column + SPAN)
        words[rows, columns] = np.reshape(numbers, (SPAN, SPAN))
    if scene.word:
        row, column = word_cell(scene.word)
        for i, letter in enumerate(scene.word):
            halves = [_NUMBERS[f"{letter} top"], _NUMBERS[f"{letter} bottom"]]
            words[row : row + LETTER_SPAN, column + i] = halves
    return words
