"""Stage 7 of the embedded model: it learns to edit and goes on making pictures from text, half of
the rows each. The source's latents are more channels of the noisy ones, and its tokens are in the
prompt.

    blip3o-jax train --config emoji_edit --workdir runs/edit
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "stage": "joint",
            "preset": "emoji_64",
            "model": {
                "max_sources": 1,
                "use_und_image_vae_as_channels": True,
                "sana": {"in_channels": 32},
            },
            "batch_size": 32,
            "seed": 3,
            "num_steps": 1500,
            "joint": {"trainable_sana": "all"},
            "init": "emoji_64",
            "data": {
                "num_train": 60000,
                "edits": 0.6,
                "inverted_edits": 0.2,
                "composed_edits": 0.1,
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
