"""The diffusion part of the embedded model, reinforced by RAM.

SANA and the connector are rewarded for what the judge sees in the pictures that they render of the
transformer's tokens; all else is frozen.

    blip3o-jax grpo --config emoji_diffusion_rl --workdir runs/diffusion_rl

Result (docs/rl.md, "Ways compared"): from weights that were only supervised, 80 steps at strength
0.3 took the held-out prompts drawn right from 0.647 to 0.657, in 12 minutes beside other work. In
two steps from the embedded weights, whose noise hardly changes a picture, no group of 16 had any
spread. `--config.grpo.train=joint` or `alternating` trains the transformer as well.
"""

from emoji_grpo import get_config as grpo
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = grpo()
    names = ("num_generations", "num_inference_steps", "guidance_scale", "rewards")
    section = {
        **{name: config.grpo[name] for name in names},
        "train": "diffusion",
        "diffusion": {"method": "ram", "strength": 0.1, "norm_penalty": 0.1, "max_kl": 1.0},
    }
    return ConfigDict({**config, "init": "emoji_64", "grpo": section})
