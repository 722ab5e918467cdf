"""Stage 9 of the embedded model: the diffusion part learns edits, which are three of five rows. The
source's latents are more channels of the noisy ones, and its tokens are in the prompt.

    blip3o-jax train --config emoji_edit --workdir runs/edit

Cost: 1.5 s a step on two CPU cores, 50 minutes. `emoji_edit:noise` and the other names of VARIANTS
give the diffusion part the source in other ways (docs/emoji.md compares them).
"""

from emoji_joint import get_config as joint
from ml_collections import ConfigDict

# The source is in the prompt alone.
PROMPT = {"sana": {"in_channels": 16}, "use_und_image_vae_as_channels": False}
TOKENS = {"use_und_image_vae": True}
NOISE = {"use_und_image_vae_as_noise": True}
# Changes to the preset, whose own way is `channels` (docs/model.md §1.2).
VARIANTS = {
    "channels": {},
    "prompt": PROMPT,
    "tokens": PROMPT | TOKENS,
    "noise": PROMPT | NOISE,
    "both": PROMPT | TOKENS | NOISE,
    "features": PROMPT | {"use_tar_siglip_features": True},
}


def get_config(variant: str = "channels") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"no variant {variant!r}, but {', '.join(VARIANTS)}")
    config = joint()
    parts = ("ta_tok", "dc_ae", "sana", "diffusion_connector")
    # Rows as long as an edit may be.
    edits = {"row_length": 0, "edits": 0.6, "inverted_edits": 0.2, "composed_edits": 0.1}
    changes = {
        "model": VARIANTS[variant],
        "seed": 3,
        "num_steps": 2000,
        "init": {**dict.fromkeys(parts, "emoji_64"), "qwen3": "runs/edit_words"},
        "frozen_parts": ("qwen3",),  # which has learned edits by itself
        "data": {**config.data, **edits},
    }
    return ConfigDict({**config, **changes})
