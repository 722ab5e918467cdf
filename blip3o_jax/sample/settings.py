"""How images are sampled."""

from dataclasses import dataclass, field

from blip3o_jax.errors import InputError


def _option(default: float, text: str):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """How images are sampled; the defaults are the published ones (docs/model.md §1.1, §4.3).

    The command line takes its options, their defaults and their help from these fields.
    """

    num_inference_steps: int = _option(30, "Euler steps of the diffusion transformer")
    guidance_scale: float = _option(2.0, "classifier-free guidance; 1 is the condition alone")
    top_k: int = _option(1200, "image tokens that are sampled from, the most likely ones")
    top_p: float = _option(0.95, "the fewest of them whose probabilities add up to this")
    temperature: float = _option(1.0, "of the image tokens; 0 takes the most likely one")
    shift: float = _option(1.0, "of the flow's schedule")

    def __post_init__(self):
        checks = (
            (
                self.num_inference_steps >= 1,
                f"num_inference_steps is at least 1, not {self.num_inference_steps}.",
            ),
            (self.top_k >= 1, f"top_k is at least 1, not {self.top_k}."),
            (0 < self.top_p <= 1, f"top_p is in (0, 1], not {self.top_p}."),
            (self.temperature >= 0, f"temperature is at least 0, not {self.temperature}."),
            (self.guidance_scale >= 0, f"guidance_scale is at least 0, not {self.guidance_scale}."),
            (self.shift > 0, f"shift is above 0, not {self.shift}."),
        )
        for holds, message in checks:
            if not holds:
                raise InputError(message)
