"""Text to image and editing, compiled: a program for each network, between which arrays stay on the
devices.

Not one for all: in one program with the denoising, XLA's CPU backend (jaxlib 0.10.2) decoded the
first picture of each of several devices wrong in half of all runs.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax import Array

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.kernels.platform import jit
from blip3o_jax.models.blip3o import Blip3o, Params
from blip3o_jax.sample import flow, generate
from blip3o_jax.sample.condition import Sources, guidance
from blip3o_jax.sample.settings import MOST

# What puts a program on disk: (function, name, names of static arguments) -> function of the same.
Keep = Callable[[Callable, str, tuple[str, ...]], Callable]
DECODING = ("top_k", "top_p", "temperature")  # settings of `write_tokens`; the others are of `draw`


@dataclass(frozen=True)
class Programs:
    """One model's functions of `generate` of the same names, each compiled when it is first called,
    and once for all who share them."""

    write_tokens: Callable
    encode_latents: Callable
    encode_sources: Callable
    draw_latents: Callable
    path: Callable
    pictures: Callable

    def draw(
        self,
        params: Params,
        hidden: Array,
        key_numbers: Array,
        sources: Sources | None = None,
        **settings: Any,
    ) -> tuple[Array, Array]:
        """`draw_latents`, then `pictures`: (images, latents)."""
        latents = self.draw_latents(params, hidden, key_numbers, sources, **settings)
        return self.pictures(params, latents), latents


@dataclass(frozen=True)
class Stepwise(Programs):
    """Programs whose denoising stops after the steps that `stops` of their number names, and is
    `seen` there: the step, and what gives the images of the latents as they would end. One program
    does for any number of steps, and the images are the same (tests/serve/test_steps.py)."""

    first_noise: Callable
    denoise_between: Callable
    stops: Callable[[int], Iterable[int]]
    seen: Callable[[int, int, Callable[[], Array]], None]

    def draw(
        self,
        params: Params,
        hidden: Array,
        key_numbers: Array,
        sources: Sources | None = None,
        *,
        num_inference_steps: int,
        **settings: Any,
    ) -> tuple[Array, Array]:
        """As that of `Programs`."""
        # As `generate.draw_latents`, in parts.
        levels, begin = flow.levels(num_inference_steps, MOST + 1), 0
        latents = self.first_noise(key_numbers)
        for end in sorted({*self.stops(num_inference_steps), num_inference_steps}):
            latents, estimate = self.denoise_between(
                params, hidden, latents, sources, levels, begin, end, **settings
            )
            # A step is over once it is computed, not once it is dispatched.
            show = functools.partial(self.pictures, params, jax.block_until_ready(estimate))
            self.seen(end, num_inference_steps, show)
            begin = end
        return self.pictures(params, latents), latents


def _program(
    function: Callable, model: Blip3o, keep: Keep | None, static: tuple[str, ...] = (), **options
) -> Callable:
    compiled = functools.partial(function, model)
    compiled = jit(compiled, model.config, static_argnames=static, **options)
    return keep(compiled, function.__name__, static) if keep else compiled


def stepwise(
    model: Blip3o, run: Programs, stops: Callable, seen: Callable, keep: Keep | None = None
) -> Stepwise:
    """A model's programs `run`, seen as they denoise."""
    if isinstance(run, Stepwise):
        return replace(run, stops=stops, seen=seen)
    first_noise = _program(generate.first_noise, model, keep)
    denoise_between = _program(generate.denoise_between, model, keep)
    return Stepwise(
        **vars(run),
        first_noise=first_noise,
        denoise_between=denoise_between,
        stops=stops,
        seen=seen,
    )


def programs(
    model: Blip3o, out_shardings: jax.sharding.Sharding | None = None, keep: Keep | None = None
) -> Programs:
    """The programs of a model, whose images are placed by `out_shardings`; `keep`, if given, puts
    those that make images on disk (`executables.keeper`)."""
    program = functools.partial(_program, model=model, keep=keep)
    steps = "num_inference_steps"
    return Programs(
        write_tokens=program(generate.write_tokens, static=("top_k",), writes_tokens=True),
        encode_latents=program(generate.encode_latents),
        encode_sources=program(generate.encode_sources),
        draw_latents=program(generate.draw_latents, static=(steps,)),
        # Of training, whose parameters are others in every step.
        path=_program(generate.path, model, None, static=(steps, "sampler")),
        pictures=program(generate.pictures, out_shardings=out_shardings),
    )


def text_to_image(
    run: Programs, params: Params, prompt: Array, valid: Array, key_numbers: Array, **settings: Any
) -> dict[str, Array]:
    """Images of prompts, with the fields of `Settings` as keywords -> {"images" uint8 [B,H,W,3],
    "tokens", "logprobs"}, see `generate.write_tokens`."""
    decoding = {name: settings.pop(name) for name in DECODING}
    written = run.write_tokens(params, prompt, valid, key_numbers, **decoding)
    images, _ = run.draw(params, written.pop("hidden"), key_numbers, **settings)
    return {"images": images, **written}


def edit(
    run: Programs,
    params: Params,
    prompt: Array,
    valid: Array,
    key_numbers: Array,
    images: Array,
    exists: Array,
    latents: Array | None = None,
    **settings: Any,
) -> dict[str, Array]:
    """Edits of images uint8 [B,N,H,W,3], which exist [B,N], with keywords as `text_to_image` takes
    them, `guidance_scale` being a `condition.Guidance`.

    The prompts hold image tokens where those of the source images go. `latents` [B,N,Y,X,C], if
    given, are the sources' own, of an edit before, so that they are not encoded again. Returns what
    `text_to_image` does, the "source_codes" [B,N*n], and the "latents" [B,Y,X,C] of the result.
    """
    codes, sources = run.encode_sources(params, images, exists, latents)
    decoding = {name: settings.pop(name) for name in DECODING}
    written = run.write_tokens(params, prompt, valid, key_numbers, codes, **decoding)
    images, latents = run.draw(params, written.pop("hidden"), key_numbers, sources, **settings)
    return {"images": images, "latents": latents, "source_codes": codes, **written}


def by_text(config: Blip3oConfig, scale: float | None, editing: bool) -> dict[str, Any]:
    """The setting of guidance by the text alone, of an edit the instruction; None is none. A model
    of few steps guides by instruction and source together."""
    if editing:
        scale = 1.0 if scale is None else scale
        return {"guidance_scale": guidance(scale, scale if config.sana.few_steps else 1.0)}
    return {"guidance_scale": scale}


def round_trip(run: Programs, params: Params, images: Array) -> Array:
    """What the autoencoder makes of images uint8 [B,H,W,3]."""
    return run.pictures(params, run.encode_latents(params, images))
