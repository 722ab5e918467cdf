"""Pixels: uint8 <-> [-1, 1], crops and resizing, contact sheets."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    import jax

LONG = 4  # longer side by shorter from which on `centre_crop` saves memory

Array = TypeVar("Array", np.ndarray, "jax.Array")


def to_unit(images: Array) -> Array:
    """uint8 [B,H,W,3] -> f32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1.0


def to_zero_one(images: Array) -> Array:
    """[-1, 1] -> f32 in [0, 1]; what lies beyond is clipped."""
    return (images.astype(np.float32) / 2 + 0.5).clip(0.0, 1.0)


def to_uint8(images: Array) -> Array:
    """[-1, 1] -> uint8, rounded to the nearest."""
    return (to_zero_one(images) * 255).round().astype(np.uint8)


def tokenizer_view(images: jax.Array, size: int) -> jax.Array:
    """f32 [B,H,W,3] in [-1, 1] -> [B,size,size,3]: the same frame at the tokenizer's resolution
    (bicubic, antialiased; docs/model.md §6.4)."""
    import jax

    if images.shape[1] == size:
        return images
    shape = (images.shape[0], size, size, 3)
    return jax.image.resize(images, shape, "cubic", antialias=True).clip(-1.0, 1.0)


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """uint8 [size,size,3]: the shorter side resized (bilinear, antialiased), then the middle of the
    longer one (docs/model.md §6.4).

    Of a picture that is longer than `LONG` times its shorter side only that middle is resized, so
    that memory does not grow with it; its values are those of the other way, or one level apart.
    """
    width, height = (max(size, int(size * side / min(image.size))) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    if max(width, height) > LONG * size:
        # the same middle in the picture's own pixels
        x, y = image.width / width, image.height / height
        box = left * x, top * y, (left + size) * x, (top + size) * y
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box))
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def squash(image: Image.Image, size: int) -> np.ndarray:
    """uint8 [size,size,3]: the whole frame, whatever its shape, as the PyTorch code shows it to the
    tokenizer (bicubic; docs/model.md §6.4)."""
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def contact_sheet(images: np.ndarray, columns: int = 8, margin: int = 4) -> np.ndarray:
    """uint8 [B,H,W,3] -> one picture, row by row, on white."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    # each image with the margin above and left of it; the sheet's own last, below and right
    cells = np.full((rows * columns, height + margin, width + margin, 3), 255, np.uint8)
    cells[:count, margin:, margin:] = images
    cells = cells.reshape(rows, columns, height + margin, width + margin, 3).swapaxes(1, 2)
    sheet = cells.reshape(rows * (height + margin), columns * (width + margin), 3)
    return np.pad(sheet, ((0, margin), (0, margin), (0, 0)), constant_values=255)


def labelled_sheet(
    images: np.ndarray, labels: Sequence[str], columns: int = 8, scale: int = 2, lines: int = 2
) -> np.ndarray:
    """uint8 [B,H,W,3] -> a contact sheet at `scale` times the size, `lines` of label below each."""
    height, width = (scale * side for side in images.shape[1:3])
    cells = []
    for image, label in zip(images, labels, strict=True):
        cell = Image.new("RGB", (width + 32, height + 12 * lines), "white")
        cell.paste(Image.fromarray(image).resize((width, height), Image.NEAREST), (16, 0))
        text = "\n".join(textwrap.wrap(label, (width + 4) // 5)[:lines])  # 5 px a letter
        ImageDraw.Draw(cell).multiline_text((4, height + 1), text, "black", font_size=10, spacing=1)
        cells.append(np.asarray(cell))
    return contact_sheet(np.stack(cells), columns, margin=2)


def with_legend(sheet: np.ndarray, legend: str) -> np.ndarray:
    """uint8 [H,W,3] -> the same with lines of text below it."""
    lines = textwrap.wrap(legend, sheet.shape[1] // 6)  # 5 px a letter, and some are wider
    foot = Image.new("RGB", (sheet.shape[1], 13 * len(lines) + 4), "white")
    ImageDraw.Draw(foot).multiline_text((6, 0), "\n".join(lines), "black", font_size=10, spacing=1)
    return np.concatenate([sheet, np.asarray(foot)])
