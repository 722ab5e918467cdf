"""Denoising in parts, by one program for any number of steps: bit for bit what one scan gives."""

import functools

import jax
import numpy as np
import pytest
from editing import CHANNELS
from tiny import SMALL

from blip3o_jax.config import replace
from blip3o_jax.convert.random_weights import random_params
from blip3o_jax.kernels.platform import jit
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.presets import preset
from blip3o_jax.sample import flow, generate
from blip3o_jax.sample.condition import Sources, guidance
from blip3o_jax.sample.settings import MOST

MODEL = Blip3o(replace(preset("emoji_64"), **{**SMALL, **CHANNELS}))


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    states = rng.normal(
        size=(2, MODEL.config.ta_tok.num_tokens + 1, MODEL.config.qwen3.hidden_size)
    )
    latents = rng.normal(size=(2, 1, 2, 2, MODEL.config.dc_ae.latent_channels))
    sources = Sources(latents.astype(np.float32), np.ones((2, 1), bool))
    keys = np.arange(6, dtype=np.uint32).reshape(2, 3)
    return random_params(MODEL.config), states.astype(np.float32), keys, sources


@pytest.mark.parametrize("is_edit", [False, True])
def test_any_parts_of_any_number_of_steps_give_the_bits_of_one_scan(is_edit, inputs):
    params, hidden, keys, sources = inputs
    scale = guidance(2.0, 3.0) if is_edit else 2.0
    sources = sources if is_edit else None
    static = {"static_argnames": "num_inference_steps"}
    whole = jit(functools.partial(generate.draw_latents, MODEL), MODEL.config, **static)
    parts = jit(functools.partial(generate.denoise_between, MODEL), MODEL.config)
    noise = np.asarray(jax.jit(functools.partial(generate.first_noise, MODEL))(keys))
    levels = flow.levels(5, MOST + 1)
    for shift, stops in ((1.0, [5]), (3.0, [1, 4, 5]), (1.0, range(1, 6))):
        how = {"guidance_scale": scale, "shift": shift}
        expected = whole(params, hidden, keys, sources, num_inference_steps=5, **how)
        latents, begin = noise, 0
        for end in stops:
            latents, estimate = parts(params, hidden, latents, sources, levels, begin, end, **how)
            begin = end
        np.testing.assert_array_equal(latents, expected)
        np.testing.assert_array_equal(estimate, expected)  # nothing is left to estimate
    assert parts._cache_size() == 1 + 1  # from the noise of NumPy, and from the program itself
