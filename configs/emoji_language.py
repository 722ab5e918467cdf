"""Stage 4 of the embedded model: the transformer alone on whole rows; prompt words still count nothing.

blip3o-jax train --config emoji_language --workdir runs/language

The joint stage starts from its weights. Without the diffusion part it sees more than twice as many prompts a minute.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "stage": "joint",
            "preset": "emoji_64",
            "batch_size": 32,
            "seed": 1,  # another order of the scenes than the stage before saw
            "num_steps": 900,
            "init": {"ta_tok": "runs/tokenizer", "qwen3": "runs/sketch"},
            "data": {
                "num_train": 60000,
                "row_length": 116,
                "weights": {"single_object": 1.5, "two_object": 1.5, "counting": 1.5, "colors": 1.0, "position": 3.0, "color_attr": 4.0},
                "extra": 0.4,
                "named_ground": 0.95,
            },
            "optimizer": {
                "learning_rate": 1e-3,
                "final_learning_rate": 2e-4,
                "warmup_steps": 30,
                "b2": 0.98,
                "weight_decay": 0.01,
                "ema_decay": 0.99,
            },
            "loss": {"flow_fraction": 0.0, "text_weight": 0.0},
            "eval_every": 900,
            "checkpoint_every": 300,
        }
    )
