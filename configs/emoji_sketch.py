"""Stage 5 of the embedded model: the transformer alone learns which of the things and colours of a prompt go where, from sketches.

    blip3o-jax train --config emoji_sketch --workdir runs/sketch

A sketch keeps of the image only the first three patches of each sprite (thing, colour, thing), at their places. Which word of the prompt
is meant is a few bits in a row of a hundred tokens otherwise, most of which are ground. Prompt words, which nobody can predict, count
nothing here; the joint stage asks for them again.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "stage": "joint",
            "preset": "emoji_64",
            "batch_size": 64,
            "seed": 2,
            "num_steps": 300,
            "init": {"ta_tok": "runs/tokenizer", "qwen3": "runs/joint"},
            "data": {
                "num_train": 20000,
                "sketch_length": 60,
                "weights": {"single_object": 1.0, "two_object": 1.0, "counting": 0.5, "colors": 1.0, "position": 3.0, "color_attr": 4.0},
                "extra": 0.6,
                "named_ground": 0.75,
            },
            "optimizer": {
                "learning_rate": 1.5e-3,
                "final_learning_rate": 1.5e-4,
                "warmup_steps": 50,
                "b2": 0.98,
                "weight_decay": 0.01,
                "ema_decay": 0.995,
            },
            "loss": {"flow_fraction": 0.0, "text_weight": 0.0},
            "eval_every": 300,
            "checkpoint_every": 150,
        }
    )
