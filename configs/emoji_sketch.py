"""Stage 3 of the embedded model: the transformer learns which words of a prompt are drawn where, from sketches.

    blip3o-jax train --config emoji_sketch --workdir runs/sketch

A sketch keeps of the image only the first three patches of each sprite (thing, colour, thing), at their places: in a whole row, which word
is meant is a few bits among a hundred tokens, most of them ground. Prompt words, which nobody can predict, count nothing here, and image
tokens start as the words that name them; without that, copying a word takes ten times as many steps, in which the pairs of training are
learned by heart. The joint stage asks for all tokens.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "stage": "joint",
            "preset": "emoji_64",
            "batch_size": 64,
            "num_steps": 900,
            "named_tokens": True,
            "init": {"ta_tok": "runs/tokenizer"},
            "data": {
                "num_train": 60000,
                "sketch_length": 60,
                "weights": {"single_object": 1.0, "two_object": 1.5, "counting": 0.5, "colors": 1.0, "position": 3.0, "color_attr": 4.0},
                "extra": 0.6,
                "named_ground": 0.95,
            },
            "optimizer": {
                "learning_rate": 1.5e-3,
                "final_learning_rate": 3e-4,
                "warmup_steps": 30,
                "b2": 0.98,
                "weight_decay": 0.01,
                "ema_decay": 0.98,
            },
            "loss": {"flow_fraction": 0.0, "text_weight": 0.0},
            "eval_every": 900,
            "checkpoint_every": 300,
        }
    )
