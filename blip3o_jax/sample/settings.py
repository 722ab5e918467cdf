"""How images are sampled. Imports nothing heavy, so that the command line reads its defaults."""

from __future__ import annotations

import numbers
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, TypeVar

from blip3o_jax.errors import check_number, require

if TYPE_CHECKING:
    from blip3o_jax.config import Blip3oConfig

AnySettings = TypeVar("AnySettings", bound="Settings")

# What divides or multiplies lies between these, and so do steps, where images can come from them.
LEAST, MOST = 0.001, 1000
LEVELS = 255  # the largest level of a pixel
TOKENS = 2**31 - 1  # that are sampled from, in int32: no vocabulary has more


def _option(default: float, text: str, least: float = 0, most: float = MOST) -> float:
    return field(default=default, metadata={"help": text, "limits": (least, most)})


@dataclass(frozen=True)
class Settings:
    """How images are sampled; the defaults are the published ones (docs/model.md §1.1, §4.3).

    The command line takes its options, their defaults and their help from these fields.
    InputError for a value out of range.
    """

    num_inference_steps: int = _option(30, "Euler steps of the diffusion transformer", 1)
    guidance_scale: float = _option(2.0, "classifier-free guidance; 1 is the condition alone")
    top_k: int = _option(1200, "image tokens to sample from, the most likely ones", 1, TOKENS)
    top_p: float = _option(0.95, "the fewest of them whose probabilities add up to this", LEAST, 1)
    temperature: float = _option(1.0, "temperature of image tokens; 0 takes the most likely one")
    shift: float = _option(1.0, "shift of the flow's schedule", LEAST)

    def __post_init__(self):
        for option in fields(self):
            name, value, limits = option.name, getattr(self, option.name), option.metadata["limits"]
            if isinstance(option.default, bool):
                require(isinstance(value, bool), f"{name} is true or false, not {value!r}.")
                continue
            check_number(value, name, *limits)
            is_kind = isinstance(option.default, float) or isinstance(value, numbers.Integral)
            require(is_kind, f"{name} is a whole number, not {value!r}.")
            # 2 is 2.0: programs are compiled for each kind of number.
            object.__setattr__(self, name, type(option.default)(value))
        is_sampled = self.temperature == 0 or self.temperature >= LEAST
        require(is_sampled, f"temperature is 0 or at least {LEAST}, not {self.temperature!r}.")


@dataclass(frozen=True)
class EditSettings(Settings):
    """How edits are sampled: guidance on two scales, see `condition.guidance`. The defaults are
    those that the embedded model was measured best with (docs/emoji.md)."""

    guidance_scale: float = _option(1.0, "classifier-free guidance; 1 is the condition alone")
    temperature: float = _option(0.0, "temperature of image tokens; 0 takes the most likely one")
    image_guidance_scale: float = _option(1.0, "guidance by the source image; 1 is none")
    renorm_min: float = _option(1.0, "guidance may shorten the velocity to this; 1 is none", most=1)
    reference_quirks: bool = _option(False, "guide by the PyTorch code's null condition")


def defaults(config: Blip3oConfig, kind: type[AnySettings] = Settings, **changes) -> AnySettings:
    """Settings of this kind as a model is sampled by default, one of few steps in those, with
    `changes`."""
    few = config.sana.few_steps
    return kind(**({"num_inference_steps": few} if few else {}) | changes)


def check_few_steps(settings: Settings) -> None:
    """InputError for settings that a model of few steps does not know: it guides by itself, by one
    scale from 1 on, which for an edit is that of text and source together."""
    scale = settings.guidance_scale
    require(scale >= 1, f"A checkpoint of few steps has a guidance_scale from 1 on, not {scale}.")
    if isinstance(settings, EditSettings):
        image = settings.image_guidance_scale
        sentence = "A checkpoint of few steps guides by text and source together: guidance_scale"
        same = f"{sentence} {scale} and image_guidance_scale {image} must be equal."
        require(scale == image, same)
        plain = settings.renorm_min == 1 and not settings.reference_quirks
        sentence = "renorm_min and reference_quirks have no effect on a checkpoint of few steps"
        require(plain, f"{sentence}, which guides by itself; leave them out.")
