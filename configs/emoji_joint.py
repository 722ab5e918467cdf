"""Stage 4 of the embedded model: the transformer writes tokens (cross-entropy), its states condition the diffusion part (velocity loss).

blip3o-jax train --config emoji_joint --workdir runs/joint

Cost: 34 minutes on two CPU cores. Result: cross-entropy 0.179 on training rows and 0.291 on held-out ones, velocity error 0.161 and 0.179;
both were still falling. README has the scores.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "stage": "joint",
            "preset": "emoji_64",
            "batch_size": 32,
            "seed": 1,  # another order of the scenes than the language stage saw
            "num_steps": 1000,
            "trainable_sana": "all",  # there is no pretrained one
            "init": {"dc_ae": "runs/autoencoder", "ta_tok": "runs/tokenizer", "qwen3": "runs/language"},
            "data": {"num_train": 60000, "row_length": 112},
            "optimizer": {
                "learning_rate": 1.5e-3,
                "final_learning_rate": 1e-5,
                "warmup_steps": 50,
                "b2": 0.98,
                "ema_decay": 0.99,
            },
            "eval_every": 200,
            "checkpoint_every": 100,
        }
    )
