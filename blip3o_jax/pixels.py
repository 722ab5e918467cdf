"""Pixels: uint8 <-> [-1, 1], resizing, contact sheets."""

import jax
import jax.numpy as jnp
import numpy as np


def contact_sheet(images: np.ndarray, columns: int = 8, margin: int = 4) -> np.ndarray:
    """uint8 [B,H,W,3] -> one picture, row by row, on white."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    canvas = np.full(
        (rows * (height + margin) + margin, columns * (width + margin) + margin, 3), 255, np.uint8
    )
    for i, image in enumerate(images):
        y, x = (
            margin + (i // columns) * (height + margin),
            margin + (i % columns) * (width + margin),
        )
        canvas[y : y + height, x : x + width] = image
    return canvas


def to_unit(images):
    """uint8 [B,H,W,3] -> f32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def tokenizer_view(images, size: int):
    """f32 [B,H,W,3] -> [B,size,size,3]: the same frame at the tokenizer's resolution (bicubic,
    antialiased; §6.4)."""
    if images.shape[1] == size:
        return images
    resized = jax.image.resize(images, (images.shape[0], size, size, 3), "cubic", antialias=True)
    return jnp.clip(resized, -1.0, 1.0)
