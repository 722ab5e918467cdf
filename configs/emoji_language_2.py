"""Stage 6 of the embedded model: the transformer alone, on whole rows again after the sketches.

blip3o-jax train --config emoji_language_2 --workdir runs/language_2
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "stage": "joint",
            "preset": "emoji_64",
            "batch_size": 32,
            "seed": 3,
            "num_steps": 500,
            "init": {"ta_tok": "runs/tokenizer", "qwen3": "runs/sketch"},
            "data": {
                "num_train": 20000,
                "row_length": 116,
                "weights": {"single_object": 1.0, "two_object": 1.0, "counting": 0.5, "colors": 1.0, "position": 3.0, "color_attr": 4.0},
                "extra": 0.3,
                "named_ground": 0.75,
            },
            "optimizer": {
                "learning_rate": 8e-4,
                "final_learning_rate": 1e-4,
                "warmup_steps": 20,
                "b2": 0.98,
                "weight_decay": 0.01,
                "ema_decay": 0.995,
            },
            "loss": {"flow_fraction": 0.0, "text_weight": 0.0},
            "eval_every": 500,
            "checkpoint_every": 250,
        }
    )
