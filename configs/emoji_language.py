"""Stage 3 of the embedded model: the transformer alone learns to write image tokens from prompts.

    blip3o-jax train --config emoji_language --workdir runs/language

Cost: 17 minutes on two CPU cores. Result: cross-entropy 0.205 on training rows, 0.292 on held-out ones, prompt and template included.

The joint stage starts from its weights. The transformer is what the score of a small model hangs on, and without the diffusion part it
sees more than twice as many prompts a minute.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "stage": "joint",
            "preset": "emoji_64",
            "batch_size": 32,
            "num_steps": 800,
            "init": {"ta_tok": "runs/tokenizer"},
            "data": {"num_train": 60000, "row_length": 112},
            "optimizer": {
                "learning_rate": 1.5e-3,
                "final_learning_rate": 5e-4,
                "warmup_steps": 100,
                "b2": 0.98,
                "ema_decay": 0.995,
            },
            "loss": {"flow_fraction": 0.0},
            "eval_every": 400,
            "checkpoint_every": 400,
        }
    )
