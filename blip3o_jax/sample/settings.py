"""How images are sampled. Imports nothing heavy, so that the command line reads its defaults."""

from dataclasses import dataclass, field

from blip3o_jax.errors import require


def _option(default: float, text: str) -> float:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """How images are sampled; the defaults are the published ones (docs/model.md §1.1, §4.3).

    The command line takes its options, their defaults and their help from these fields.
    InputError for a value out of range.
    """

    num_inference_steps: int = _option(30, "Euler steps of the diffusion transformer")
    guidance_scale: float = _option(2.0, "classifier-free guidance; 1 is the condition alone")
    top_k: int = _option(1200, "image tokens that are sampled from, the most likely ones")
    top_p: float = _option(0.95, "the fewest of them whose probabilities add up to this")
    temperature: float = _option(1.0, "of the image tokens; 0 takes the most likely one")
    shift: float = _option(1.0, "of the flow's schedule")

    def __post_init__(self):
        ranges = {
            "num_inference_steps": ("at least 1", self.num_inference_steps >= 1),
            "top_k": ("at least 1", self.top_k >= 1),
            "top_p": ("in (0, 1]", 0 < self.top_p <= 1),
            "temperature": ("at least 0", self.temperature >= 0),
            "guidance_scale": ("at least 0", self.guidance_scale >= 0),
            "shift": ("above 0", self.shift > 0),
        }
        for name, (limits, holds) in ranges.items():
            require(holds, f"{name} is {limits}, not {getattr(self, name)}.")


@dataclass(frozen=True)
class EditSettings(Settings):
    """How edits are sampled: guidance on two scales, see `condition.guidance`. The defaults are
    those that the embedded model was measured best with (docs/emoji.md)."""

    guidance_scale: float = _option(1.0, "classifier-free guidance; 1 is the condition alone")
    temperature: float = _option(0.0, "of the image tokens; 0 takes the most likely one")
    image_guidance_scale: float = _option(1.0, "guidance by the source image; 1 is none")
    renorm_min: float = _option(1.0, "guidance may shorten the velocity to this share; 1 is none")
    reference_quirks: bool = _option(False, "compare with what the PyTorch code calls no condition")

    def __post_init__(self):
        super().__post_init__()
        scale, share = self.image_guidance_scale, self.renorm_min
        require(scale >= 0, f"image_guidance_scale is at least 0, not {scale}.")
        require(0 <= share <= 1, f"renorm_min is in [0, 1], not {share}.")
