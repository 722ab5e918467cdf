"""Stage 11 of the embedded model: its diffusion part makes pictures and edits in four steps.

    blip3o-jax train --config emoji_few_steps --workdir runs/few_steps

As shipped it continues with the embedded weights, which have been through it; after the earlier
stages give it `--config.init=runs/edit_grpo`.

Cost: 2.6 s a step on two CPU cores beside other work. Result, in four steps of one forward each:
0.99 of the held-out prompts right, 0.92 of the edits, like the model that it began from in 30
guided steps (docs/speed.md).
"""

from emoji_edit import get_config as edit
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = edit()
    changes = {
        "stage": "distill",
        "model": {"sana": {"few_steps": 4}},
        "seed": 5,
        "num_steps": 1000,
        "init": "emoji_64",
        "optimizer": {
            "learning_rate": 2e-4,
            "final_learning_rate": 1e-6,
            "warmup_steps": 50,
            "b2": 0.98,
            "ema_decay": 0.995,
        },
        "eval_every": 250,
    }
    kept = {key: config[key] for key in ("preset", "batch_size", "data", "checkpoint_every")}
    return ConfigDict({**kept, **changes})
