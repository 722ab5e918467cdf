"""Ceilings of a score: pictures that skip a part of the model and so its errors."""

import functools
from collections.abc import Iterator

import jax
import numpy as np

from blip3o_jax.kernels.platform import jit
from blip3o_jax.parallel.batches import put_batch
from blip3o_jax.pipeline import Pipeline
from blip3o_jax.sample import generate, programs
from blip3o_jax.sample.settings import Settings
from blip3o_jax.text import row_length


def ceilings(
    pipeline: Pipeline, prompts: list[str], images: np.ndarray, settings: Settings
) -> dict[str, np.ndarray]:
    """Pictures uint8 [B,H,W,3] from true ones of the same shape: "autoencoder" encodes and decodes
    them, "true_tokens" gives the diffusion part the tokens of the true picture."""
    model, params = pipeline.model, pipeline.params
    read = jit(functools.partial(generate.read_tokens, model), model.config)
    steps = ("num_inference_steps", "guidance_scale", "shift")
    options = {name: getattr(settings, name) for name in steps}
    # Rows of token ids with the codes open, and the number of each picture's noise.
    encoded = [pipeline.text.encode_prompt(prompt) for prompt in prompts]
    codes = np.zeros((len(encoded), model.config.ta_tok.num_tokens), np.int32)
    rows, start = pipeline.text.training_rows(encoded, codes, row_length(model.config))
    keys = np.array([generate.sample_key(0, prompt, 0) for prompt in prompts], np.uint32)
    drawn = []
    for index, count in _batches(len(images), pipeline.batch_size):
        batch = put_batch((images[index], rows[index], start[index], keys[index]), pipeline.mesh)
        with jax.set_mesh(pipeline.mesh):
            shown, _ = pipeline.programs.draw(params, read(params, *batch[:3]), batch[3], **options)
        drawn.append(np.asarray(shown)[:count])
    return {"autoencoder": autoencoded(pipeline, images), "true_tokens": np.concatenate(drawn)}


def autoencoded(pipeline: Pipeline, images: np.ndarray) -> np.ndarray:
    """Pictures uint8 [B,H,W,3] after the model's autoencoder and back."""
    results = []
    for index, count in _batches(len(images), pipeline.batch_size):
        (batch,) = put_batch((images[index],), pipeline.mesh)
        with jax.set_mesh(pipeline.mesh):
            shown = programs.round_trip(pipeline.programs, pipeline.params, batch)
        results.append(np.asarray(shown)[:count])
    return np.concatenate(results)


def _batches(number: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Indexes of `size` rows each and how many of them count; the last ones repeat the last row."""
    for first in range(0, number, size):
        yield np.minimum(np.arange(first, first + size), number - 1), min(size, number - first)
