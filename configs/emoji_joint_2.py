"""Stage 7 of the embedded model: the joint stage once more, with the transformer of stage 6 and the diffusion part of stage 4.

blip3o-jax train --config emoji_joint_2 --workdir runs/joint_2
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "stage": "joint",
            "preset": "emoji_64",
            "batch_size": 32,
            "seed": 4,
            "num_steps": 600,
            "trainable_sana": "all",
            "init": {**dict.fromkeys(("diffusion_connector", "sana", "ta_tok", "dc_ae"), "runs/joint"), "qwen3": "runs/language_2"},
            "data": {"num_train": 60000, "row_length": 116, "extra": 0.25, "named_ground": 0.6},
            "optimizer": {
                "learning_rate": 7e-4,
                "final_learning_rate": 1e-5,
                "warmup_steps": 20,
                "b2": 0.98,
                "ema_decay": 0.99,
            },
            "eval_every": 300,
            "checkpoint_every": 150,
        }
    )
