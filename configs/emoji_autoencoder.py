"""Stage 1 of the embedded model: the autoencoder, 64x64 pixels to 8x8 latents.

blip3o-jax train --config emoji_autoencoder --workdir runs/autoencoder

Cost: 33 minutes on two CPU cores that the next stage shared. Result on held-out scenes: 32.5 dB
PSNR. The latents' standard deviation is 53; the preset's `dc_ae.scaling_factor` brings it to 1.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "stage": "autoencoder",
            "preset": "emoji_64",
            "batch_size": 16,
            "num_steps": 4000,
            "data": {"num_train": 60000},
            "optimizer": {
                "learning_rate": 1.5e-3,
                "final_learning_rate": 2e-5,
                "warmup_steps": 100,
                "b2": 0.99,
                "ema_decay": 0.995,
            },
            "autoencoder": {"latent_noise": 0.1},
            "eval_every": 1000,
            "checkpoint_every": 1000,
        }
    )
