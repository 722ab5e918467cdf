"""Own pictures from the first stage on: a folder `pictures`, in which NAME.txt holds the caption of
NAME.jpg. Copy this file and change it; docs/data.md has sources of other kinds.

    blip3o-jax data check --config my_pictures --out check
    blip3o-jax data preview --config my_pictures --out preview.png
    blip3o-jax train --config my_pictures:autoencoder --workdir runs/my_autoencoder
    blip3o-jax train --config my_pictures:tokenizer --workdir runs/my_tokenizer
    blip3o-jax train --config my_pictures --workdir runs/my_pictures
    blip3o-jax train --config my_pictures:distill --workdir runs/my_few_steps
    blip3o-jax generate "a red kite" --checkpoint runs/my_few_steps --out out/my_pictures

Cost, measured on 2026-11-29 with 60 pictures on two CPU cores beside other runs (the commands above
with `--config.num_steps=120`, 150 and 60; emoji_autoencoder took 0.5 s a step on less busy cores):

    autoencoder  2.2 to 4.3 s a step; held-out pictures at 17.7 dB PSNR before, 26.4 after 120 steps
    tokenizer    0.4 to 2.8 s a step; heldout/features 0.38 after 150 steps, with 148 of 256 codes
    joint        7.6 to 9.2 s a step; 26 % of the image's tokens right after 60 steps, in training

The steps below are for some thousand pictures; 60 are memorised.
"""

from ml_collections import ConfigDict

# At least twice `heldout` pictures; those are never trained on but measured. A picture without a
# caption, or one that cannot be read, is counted; beyond `max_bad_fraction` the run stops.
DATA = {
    "sources": [{"kind": "folder", "path": "pictures"}],
    "heldout": 16,
    "max_bad_fraction": 0.01,
}
SHARED = {
    "preset": "emoji_64",
    "data": DATA,
    "batch_size": 16,
    "optimizer": {
        "learning_rate": 1e-3,
        "final_learning_rate": 2e-5,
        "warmup_steps": 50,
        "b2": 0.99,
        "ema_decay": 0.995,
    },
    "log_every": 50,
    "eval_every": 500,
    "checkpoint_every": 500,
}
STAGES = {
    # Pixels <-> latents, from the embedded autoencoder, which gives other pictures about 20 dB.
    "autoencoder": {"init": "emoji_64", "num_steps": 3000, "autoencoder": {"latent_noise": 0.1}},
    # Pixels -> tokens, from which a small decoder must be able to tell the latents of the
    # autoencoder before it.
    "tokenizer": {
        "init": {"dc_ae": "runs/my_autoencoder"},
        "num_steps": 2000,
        "batch_size": 32,
        "tokenizer": {"teacher": "latents"},
    },
    # Captions -> tokens -> latents, from the embedded transformer and diffusion part.
    "joint": {
        "init": {
            "dc_ae": "runs/my_autoencoder",
            "ta_tok": "runs/my_tokenizer",
            "qwen3": "emoji_64",
            "diffusion_connector": "emoji_64",
            "sana": "emoji_64",
        },
        "num_steps": 3000,
        "joint": {"trainable_sana": "all"},  # all of it, not only its caption layers
    },
    # Latents in four steps of one forward each; not needed, but faster.
    "distill": {"init": "runs/my_pictures", "model": {"sana": {"few_steps": 4}}, "num_steps": 1000},
}


def get_config(stage: str = "joint") -> ConfigDict:
    """The run of a stage: `my_pictures:autoencoder`, `:tokenizer`, `my_pictures`, `:distill`."""
    if stage not in STAGES:
        raise ValueError(f"no stage {stage!r}, but {', '.join(STAGES)}")
    return ConfigDict({"stage": stage, **SHARED, **STAGES[stage]})
