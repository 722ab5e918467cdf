"""Continues from all parts of the embedded checkpoint: trains the transformer and the diffusion
part.

    blip3o-jax train --config emoji_finetune --workdir runs/finetune

Also the pattern for tuning the embedded model on other scenes (`--config.data.seed=7`).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "stage": "joint",
            "preset": "emoji_64",
            "batch_size": 32,
            "seed": 2,  # another order of the scenes than the stages before saw
            "num_steps": 2000,
            "joint": {"trainable_sana": "all"},
            "init": "emoji_64",
            "data": {"num_train": 60000, "row_length": 112},
            "optimizer": {
                "learning_rate": 1e-3,
                "final_learning_rate": 1e-5,
                "warmup_steps": 50,
                "b2": 0.98,
                "ema_decay": 0.995,
            },
            "eval_every": 500,
            "checkpoint_every": 250,
        }
    )
