"""Text to image and editing, compiled: a program for each network, between which arrays stay on the
devices.

Not one for all: in one program with the denoising, XLA's CPU backend (jaxlib 0.10.2) decoded the
first picture of each of several devices wrong in half of all runs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from blip3o_jax.kernels.platform import jit
from blip3o_jax.models.blip3o import Blip3o, Params
from blip3o_jax.sample import generate
from blip3o_jax.sample.condition import Sources


def programs(
    model: Blip3o, out_shardings: jax.sharding.Sharding | None = None
) -> tuple[Callable, Callable]:
    """(write, draw): `generate.write_tokens`; and `generate.draw_latents`, then
    `generate.pictures`: (images, latents), the images placed by `out_shardings`."""
    write = _program(model, generate.write_tokens, static_argnames="top_k")
    draw_latents = _program(model, generate.draw_latents, static_argnames="num_inference_steps")
    pictures = _program(model, generate.pictures, out_shardings=out_shardings)

    def draw(
        params: Params,
        hidden: Array,
        key_numbers: Array,
        sources: Sources | None = None,
        **settings: Any,
    ) -> tuple[Array, Array]:
        latents = draw_latents(params, hidden, key_numbers, sources, **settings)
        return pictures(params, latents), latents

    return write, draw


def _program(model: Blip3o, function: Callable, **options) -> Callable:
    return jit(functools.partial(function, model), model.config, **options)


def text_to_image(
    model: Blip3o, out_shardings: jax.sharding.Sharding | None = None
) -> Callable[..., dict[str, Array]]:
    """A function of (params, prompt, valid, key_numbers), and the fields of `Settings` as keywords
    -> {"images" uint8 [B,H,W,3], "tokens", "logprobs"}, see `generate.write_tokens`."""
    write, draw = programs(model, out_shardings)

    def sample(params, prompt, valid, key_numbers, *, top_k, top_p, temperature, **settings):
        decoding = {"top_k": top_k, "top_p": top_p, "temperature": temperature}
        written = write(params, prompt, valid, key_numbers, **decoding)
        images, _ = draw(params, written.pop("hidden"), key_numbers, **settings)
        return {"images": images, **written}

    return sample


def edit(
    model: Blip3o, out_shardings: jax.sharding.Sharding | None = None
) -> Callable[..., dict[str, Array]]:
    """A function of (params, prompt, valid, key_numbers, images uint8 [B,N,H,W,3], exists [B,N]),
    and keywords as `text_to_image` takes them, `guidance_scale` being a `condition.Guidance`.

    The prompts hold image tokens where those of the source images go. `latents` [B,N,Y,X,C], if
    given, are the sources' own, of an edit before, so that they are not encoded again. Returns what
    `text_to_image` does, and the "latents" [B,Y,X,C] of the result.
    """
    write, draw = programs(model, out_shardings)
    encode = _program(model, generate.encode_sources)

    def sample(
        params: Params,
        prompt: Array,
        valid: Array,
        key_numbers: Array,
        images: Array,
        exists: Array,
        latents: Array | None = None,
        **settings: Any,
    ) -> dict[str, Array]:
        codes, sources = encode(params, images, exists, latents)
        decoding = {name: settings.pop(name) for name in ("top_k", "top_p", "temperature")}
        written = write(params, prompt, valid, key_numbers, codes, **decoding)
        images, latents = draw(params, written.pop("hidden"), key_numbers, sources, **settings)
        return {"images": images, "latents": latents, **written}

    return sample


def round_trip(
    model: Blip3o, out_shardings: jax.sharding.Sharding | None = None
) -> Callable[[Params, Array], Array]:
    """A function of (params, images uint8 [B,H,W,3]) -> what the autoencoder makes of them."""
    encode = _program(model, generate.encode_latents)
    pictures = _program(model, generate.pictures, out_shardings=out_shardings)
    return lambda params, images: pictures(params, encode(params, images))
