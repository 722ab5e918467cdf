"""Stage 5 of the embedded model: the transformer alone once more, on the prompts that were hardest for it.

    blip3o-jax train --config emoji_language_2 --workdir runs/language_2

Which of two things comes first, and which colour is whose, is one bit in a row of a hundred tokens, and the words of a prompt, which
nobody can predict, were two thirds of the cross-entropy. Here they count nothing; the joint stage after this one asks for them again.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "stage": "joint",
            "preset": "emoji_64",
            "batch_size": 32,
            "seed": 2,
            "num_steps": 1800,
            "init": {"ta_tok": "runs/tokenizer", "qwen3": "runs/joint"},
            "data": {
                "num_train": 60000,
                "row_length": 116,
                "weights": {"single_object": 2.0, "two_object": 1.5, "counting": 1.0, "colors": 1.0, "position": 3.0, "color_attr": 3.0},
                "extra": 0.5,
                "named_ground": 0.75,
            },
            "optimizer": {
                "learning_rate": 1.5e-3,
                "final_learning_rate": 1e-4,
                "warmup_steps": 50,
                "b2": 0.98,
                "weight_decay": 0.01,
                "ema_decay": 0.995,
            },
            "loss": {"flow_fraction": 0.0, "text_weight": 0.0},
            "eval_every": 900,
            "checkpoint_every": 300,
        }
    )
