"""Stage 10 of the embedded model: GRPO on edits and prompts, half of each.

The transformer is rewarded for what the judges see in the pictures; all else is frozen.

    blip3o-jax grpo --config emoji_edit_grpo --workdir runs/edit_grpo

Cost: 9 s a step on two CPU cores. Not run from its beginning to its end; the embedded weights had
101 + 150 + 110 + 200 + 70 steps of it, with 0.6 to 0.75 of edits (docs/emoji.md).
"""

from emoji_grpo import get_config as grpo
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = grpo()
    # Rows as long as an edit may be.
    data = {**config.data, "row_length": 0, "edits": 0.5}
    return ConfigDict({**config, "init": "runs/edit", "data": data})
