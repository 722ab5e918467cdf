"""The art of the embedded world: 28 objects in seven looks, five grounds, the letters A-Z; numpy
float32 in 0..1."""

import json
from functools import lru_cache

import numpy as np
from PIL import Image

from blip3o_jax.resources import ASSETS

SPRITE = 24  # px
LETTER_HEIGHT, LETTER_WIDTH = 16, 8  # px
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_INDEX = json.loads((ASSETS / "sprites.json").read_text())
OBJECTS = tuple(entry["name"] for entry in _INDEX["sprites"])
PLURALS = {entry["name"]: entry["plural"] for entry in _INDEX["sprites"]}

# A tint maps luminance onto the ramp dark - middle - light, so that the shading survives.
RAMPS = {
    "red": ((104, 0, 12), (222, 22, 34), (255, 112, 112)),
    "orange": ((150, 56, 0), (250, 122, 0), (255, 176, 84)),
    "yellow": ((158, 128, 0), (246, 214, 16), (255, 244, 130)),
    "green": ((0, 66, 22), (28, 156, 52), (124, 214, 120)),
    "blue": ((8, 20, 110), (30, 86, 226), (122, 172, 255)),
    "purple": ((60, 0, 92), (142, 40, 184), (212, 132, 240)),
}
COLORS = tuple(RAMPS)
# Natural looks that anyone would call by one of the six colours.
PLAIN_COLOR = {
    **dict.fromkeys(("apple", "heart", "balloon", "car", "book"), "red"),
    **dict.fromkeys(("cat", "star", "moon", "key", "crown"), "yellow"),
    **dict.fromkeys(("tree", "cactus"), "green"),
    **dict.fromkeys(("bird", "fish", "umbrella"), "blue"),
    "carrot": "orange",
}
GROUNDS = {
    "white": (248, 248, 248),
    "gray": (206, 208, 212),
    "cyan": (188, 236, 242),
    "pink": (252, 204, 220),
    "cream": (248, 236, 196),
}
INK = np.float32([44, 40, 60]) / 255


@lru_cache
def _atlas() -> np.ndarray:
    """[objects, 24, 24, 4], natural looks."""
    image = np.asarray(Image.open(ASSETS / "sprites.png"), np.float32) / 255
    cells = image.reshape(-1, SPRITE, _INDEX["columns"], SPRITE, 4).transpose(0, 2, 1, 3, 4)
    return cells.reshape(-1, SPRITE, SPRITE, 4)[: len(OBJECTS)]


@lru_cache
def letters() -> np.ndarray:
    """Coverage of A-Z, [26, 16, 8]."""
    image = np.asarray(Image.open(ASSETS / "letters.png"), np.float32) / 255
    return image.reshape(LETTER_HEIGHT, len(LETTERS), LETTER_WIDTH).transpose(1, 0, 2)


@lru_cache
def render(name: str, color: str | None = None) -> np.ndarray:
    """One object as RGBA [24, 24, 4], straight alpha, read-only; `color` None: as drawn."""
    rgba = _atlas()[OBJECTS.index(name)].copy()
    if color is not None:
        luminance = rgba[..., :3] @ np.float32([0.299, 0.587, 0.114])
        low, middle, high = np.percentile(luminance[rgba[..., 3] > 0.5], [4, 50, 96])
        # The commonest shade gets the plain colour; a flat sprite stays flat, its noise is not
        # blown up.
        knots = [middle - max(middle - low, 0.15), middle, middle + max(high - middle, 0.15)]
        ramps = (np.float32(RAMPS[color]) / 255).T
        rgba[..., :3] = np.stack([np.interp(luminance, knots, ramp) for ramp in ramps], axis=-1)
    rgba.setflags(write=False)
    return rgba
