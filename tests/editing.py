"""A tiny editing model of random weights, and pictures for it."""

import shutil

import numpy as np
from PIL import Image
from tiny import SMALL

from blip3o_jax.config import replace
from blip3o_jax.convert.random_weights import random_checkpoint
from blip3o_jax.presets import preset
from blip3o_jax.request import Request, repeated
from blip3o_jax.resources import ASSETS

CHANNELS = {"use_und_image_vae_as_channels": True, "sana.in_channels": 32, "max_sources": 1}
TOKENS = {"use_und_image_vae": True, "max_sources": 2}
QUICK = {"num_inference_steps": 2, "temperature": 0.0}
FLAGS = ["--num-inference-steps", "2", "--temperature", "0"]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def checkpoint(folder, changes):
    random_checkpoint(folder, replace(preset("emoji_64"), **{**SMALL, **changes}))
    shutil.copy(ASSETS / "emoji_64" / "tokenizer.json", folder)
    return str(folder)


def edits(pipeline, images, turns, num_images=1, **fields):
    requests = [
        Request(text, tuple(image) if isinstance(image, list) else (image,), tuple(then), **fields)
        for image, (text, *then) in zip(images, turns, strict=True)
    ]
    return list(pipeline.run(repeated(requests, num_images)))


def half(height=20, width=30):
    """A mask's alpha: 255 on the left, 100 in a column of the middle, 0 on the right."""
    alpha = np.zeros((height, width), np.uint8)
    alpha[:, : width // 2] = 255
    alpha[:, width // 2] = 100
    return alpha


def save_mask(path, alpha):
    Image.fromarray(np.dstack([np.zeros((*alpha.shape, 3), np.uint8), alpha])).save(path)
