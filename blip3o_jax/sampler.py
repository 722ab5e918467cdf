"""Text to image, compiled: a program for each network, between which arrays stay on the devices.

Not one for all: in one program with the denoising, XLA's CPU backend (jaxlib 0.10.2) has decoded the first picture of each of several
devices wrong in half of all runs.
"""

import functools
from dataclasses import dataclass

from blip3o_jax import generate
from blip3o_jax.compilation import jit
from blip3o_jax.config import ConfigError
from blip3o_jax.models.blip3o import Blip3o


@dataclass(frozen=True)
class Settings:
    """How images are made; the defaults are the published ones (spec S1.1, S4.3)."""

    num_inference_steps: int = 30
    guidance_scale: float = 2.0
    top_k: int = 1200
    top_p: float = 0.95
    temperature: float = 1.0
    shift: float = 1.0

    def __post_init__(self):
        checks = (
            (self.num_inference_steps >= 1, f"num_inference_steps is at least 1, not {self.num_inference_steps}."),
            (self.top_k >= 1, f"top_k is at least 1, not {self.top_k}."),
            (0 < self.top_p <= 1, f"top_p is in (0, 1], not {self.top_p}."),
            (self.temperature >= 0, f"temperature is at least 0, not {self.temperature}."),
            (self.guidance_scale >= 0, f"guidance_scale is at least 0, not {self.guidance_scale}."),
            (self.shift > 0, f"shift is above 0, not {self.shift}."),
        )
        for holds, message in checks:
            if not holds:
                raise ConfigError(message)


def programs(model: Blip3o, out_shardings=None):
    """(write, draw): `generate.write_tokens`, and `generate.draw_latents` followed by `generate.pictures`, which are sharded as told."""

    def program(function, **options):
        return jit(functools.partial(function, model), model.config, **options)

    write = program(generate.write_tokens, static_argnames="top_k")
    draw_latents = program(generate.draw_latents, static_argnames="num_inference_steps")
    pictures = program(generate.pictures, out_shardings=out_shardings)

    def draw(params, hidden, key_numbers, **settings):
        return pictures(params, draw_latents(params, hidden, key_numbers, **settings))

    return write, draw


def text_to_image(model: Blip3o, out_shardings=None):
    """(params, prompt, valid, key_numbers, settings of both programs) -> {"images" uint8 [B,H,W,3], "tokens", "logprobs"}."""
    write, draw = programs(model, out_shardings)

    def sample(params, prompt, valid, key_numbers, *, top_k: int, top_p, temperature, **settings):
        made = write(params, prompt, valid, key_numbers, top_k=top_k, top_p=top_p, temperature=temperature)
        return {"images": draw(params, made.pop("hidden"), key_numbers, **settings), **made}

    return sample
