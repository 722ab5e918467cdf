"""What the embedded world draws, as a frozen dataclass that needs no art."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from blip3o_jax.errors import nearest, require

# GenEval's tags with their shares of the prompts; two colours at once are the hardest to learn.
WEIGHTS = {
    "single_object": 1.0,
    "two_object": 1.5,
    "counting": 1.5,
    "colors": 2.0,
    "position": 2.0,
    "color_attr": 3.0,
}
TAGS = tuple(WEIGHTS)
# Of prompts that GenEval does not have: more than two things, and one of them alone coloured.
FURTHER_TAGS = ("three_object", "one_color")
EXERCISES = ("recital", "sketch", "picture", "edit")  # of scenes.exercises


@dataclass(frozen=True)
class WorldConfig:
    """Splits of `train` and `heldout` scenes; scene i is a function of these settings and i."""

    train: int = 60_000
    heldout: int = 2_000
    seed: int = 0
    text: float = 0.0  # share of prompts for a written word
    weights: Mapping[str, float] = field(default_factory=lambda: dict(WEIGHTS))
    # share of the training prompts of kinds that GenEval does not have: scenes.prompts.EXTRA
    extra: float = 0.15
    named_ground: float = 0.5  # share of the prompts that name the ground

    def __post_init__(self):
        for tag in self.weights:
            known = (*TAGS, *FURTHER_TAGS)
            require(tag in known, f"Unknown tag {tag!r}; {nearest(tag, known)}")

    @property
    def name(self) -> str:
        """The folder of the written world: other settings, another name."""
        drawn = json.dumps([self.text, sorted(self.weights.items()), self.extra, self.named_ground])
        digest = hashlib.sha256(drawn.encode()).hexdigest()[:8]
        return f"train{self.train}_heldout{self.heldout}_seed{self.seed}_{digest}"
