"""Stage 8 of the embedded model: the transformer alone learns edits, and goes on with pictures.

    blip3o-jax train --config emoji_edit_words --workdir runs/edit_words

`emoji_edit` starts from its weights.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "stage": "pretrain_ar",
            "preset": "emoji_64",
            "batch_size": 32,
            "seed": 4,
            "num_steps": 1400,
            "init": {"qwen3": "emoji_64"},
            "data": {
                "exercises": {"picture": 0.1, "edit": 0.9},
                "row_length": 195,  # as long as an edit may be
                "weights": {
                    "single_object": 1.5,
                    "two_object": 1.5,
                    "counting": 1.5,
                    "colors": 1.0,
                    "position": 3.0,
                    "color_attr": 2.5,
                },
                "extra": 0.4,
                "named_ground": 0.95,
            },
            "optimizer": {
                "learning_rate": 1e-3,
                "final_learning_rate": 1e-4,
                "warmup_steps": 50,
                "b2": 0.98,
                "weight_decay": 0.01,
                "ema_decay": 0.99,
            },
            "eval_every": 100,
            "checkpoint_every": 100,
        }
    )
