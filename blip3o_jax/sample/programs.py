"""Text to image, compiled: a program for each network, between which arrays stay on the devices.

Not one for all: in one program with the denoising, XLA's CPU backend (jaxlib 0.10.2) decoded the
first picture of each of several devices wrong in half of all runs.
"""

import functools
from collections.abc import Callable

import jax
from jax import Array

from blip3o_jax.kernels.platform import jit
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.sample import generate


def programs(
    model: Blip3o, out_shardings: jax.sharding.Sharding | None = None
) -> tuple[Callable, Callable]:
    """(write, draw): `generate.write_tokens`; and `generate.draw_latents`, then
    `generate.pictures`, whose results are placed by `out_shardings`."""

    def program(function: Callable, **options) -> Callable:
        return jit(functools.partial(function, model), model.config, **options)

    write = program(generate.write_tokens, static_argnames="top_k")
    draw_latents = program(generate.draw_latents, static_argnames="num_inference_steps")
    pictures = program(generate.pictures, out_shardings=out_shardings)

    def draw(params, hidden, key_numbers, **settings):
        return pictures(params, draw_latents(params, hidden, key_numbers, **settings))

    return write, draw


def text_to_image(
    model: Blip3o, out_shardings: jax.sharding.Sharding | None = None
) -> Callable[..., dict[str, Array]]:
    """A function of (params, prompt, valid, key_numbers), and the fields of `Settings` as keywords
    -> {"images" uint8 [B,H,W,3], "tokens", "logprobs"}, see `generate.write_tokens`."""
    write, draw = programs(model, out_shardings)

    def sample(params, prompt, valid, key_numbers, *, top_k, top_p, temperature, **settings):
        decoding = {"top_k": top_k, "top_p": top_p, "temperature": temperature}
        written = write(params, prompt, valid, key_numbers, **decoding)
        images = draw(params, written.pop("hidden"), key_numbers, **settings)
        return {"images": images, **written}

    return sample
