"""Stage 6 of the embedded model: the transformer writes tokens (cross-entropy), its states
condition the diffusion part (velocity loss).

    blip3o-jax train --config emoji_joint --workdir runs/joint

Cost: 2.0 s a step on two idle CPU cores, 50 minutes. Result on held-out scenes: 94 % of the tokens,
flow loss 0.16.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "stage": "joint",
            "preset": "emoji_64",
            "batch_size": 32,
            "seed": 2,  # another order of the scenes than the stages before saw
            "num_steps": 1500,
            "joint": {"trainable_sana": "all"},  # there is no pretrained one
            "init": {
                "dc_ae": "runs/autoencoder",
                "ta_tok": "runs/tokenizer",
                "qwen3": "runs/picture",
            },
            "data": {
                "num_train": 60000,
                "row_length": 116,
                "weights": {
                    "single_object": 1.5,
                    "two_object": 1.5,
                    "counting": 2.0,
                    "colors": 1.5,
                    "position": 2.5,
                    "color_attr": 2.5,
                },
                "extra": 0.25,
                "named_ground": 0.9,
            },
            "optimizer": {
                "learning_rate": 1e-3,
                "final_learning_rate": 1e-5,
                "warmup_steps": 50,
                "b2": 0.98,
                "ema_decay": 0.99,
            },
            "eval_every": 500,
            "checkpoint_every": 100,
        }
    )
