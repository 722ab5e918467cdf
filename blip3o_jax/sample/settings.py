"""How images are sampled."""

from dataclasses import dataclass

from blip3o_jax.errors import InputError


@dataclass(frozen=True)
class Settings:
    """How images are made; the defaults are the published ones (docs/model.md §1.1, §4.3)."""

    num_inference_steps: int = 30
    guidance_scale: float = 2.0
    top_k: int = 1200
    top_p: float = 0.95
    temperature: float = 1.0
    shift: float = 1.0

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
