"""Stage 3 of the embedded model: the transformer writes tokens (cross-entropy), its states condition the diffusion part (velocity loss).

    blip3o-jax train --config emoji_joint --workdir runs/joint \
        --config.init.dc_ae=runs/autoencoder --config.init.ta_tok=runs/tokenizer
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "stage": "joint",
            "preset": "emoji_64",
            "batch_size": 48,
            "num_steps": 4000,
            "trainable_sana": "all",
            "init": {"dc_ae": "runs/autoencoder", "ta_tok": "runs/tokenizer"},
            "data": {"num_train": 60000, "row_length": 120},
            "optimizer": {
                "learning_rate": 1.5e-3,
                "final_learning_rate": 2e-5,
                "warmup_steps": 200,
                "b2": 0.99,
                "ema_decay": 0.998,
            },
            "loss": {"flow_fraction": 0.5},
            "eval_every": 500,
            "checkpoint_every": 250,
        }
    )
