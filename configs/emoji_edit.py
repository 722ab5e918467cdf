"""Stage 7 of the embedded model: `emoji_joint` goes on, three of five rows now being edits. The
source's latents are more channels of the noisy ones, and its tokens are in the prompt.

    blip3o-jax train --config emoji_edit --workdir runs/edit

Cost: 2.6 s a step on two CPU cores. Not trained to its end yet: 300 steps, the rate still high, did
29 % of 24 held-out edits (`evaluate edits --num-edits 24 --seeds 1`, 2026-11-29).
"""

from emoji_joint import get_config as joint
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = joint()
    editing = {"max_sources": 1, "use_und_image_vae_as_channels": True, "sana": {"in_channels": 32}}
    # Rows as long as an edit may be.
    edits = {"row_length": 0, "edits": 0.6, "inverted_edits": 0.2, "composed_edits": 0.1}
    changes = {"seed": 3, "init": "emoji_64", "model": editing, "data": {**config.data, **edits}}
    return ConfigDict({**config, **changes})
