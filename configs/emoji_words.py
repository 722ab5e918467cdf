"""The embedded model learns to write, `the word "CAT" on gray`, and is reinforced by OCR.

    blip3o-jax train --config emoji_words:autoencoder --workdir runs/words_autoencoder
    blip3o-jax train --config emoji_words:tokenizer --workdir runs/words_tokenizer
    blip3o-jax train --config emoji_words:pretrain_ar --workdir runs/words_ar
    blip3o-jax train --config emoji_words:joint --workdir runs/words_joint
    blip3o-jax train --config emoji_words:letters --workdir runs/words
    blip3o-jax grpo --config emoji_words:grpo --workdir runs/words_grpo
    blip3o-jax evaluate scenes --num-words 120 --checkpoint runs/words_grpo --out out/words

The first three start from the embedded weights, which have never seen a letter. Cost and result of
each: docs/rl.md.
"""

from emoji_grpo import get_config as grpo
from ml_collections import ConfigDict

HALF = {"text_fraction": 0.5}
PICTURES = {**HALF, "num_train": 20000}
# The kinds of things in the other half, most of the hardest ones; named grounds.
PROMPTS = {
    "weights": {
        "single_object": 1.0,
        "two_object": 1.0,
        "counting": 2.0,
        "colors": 1.0,
        "position": 2.0,
        "color_attr": 2.0,
    },
    "extra": 0.2,
    "named_ground": 0.9,
}
STAGES = {
    # Letters, which the embedded autoencoder blurs.
    "autoencoder": {
        "init": "emoji_64",
        "num_steps": 1000,
        "data": PICTURES,
        "autoencoder": {"latent_noise": 0.1},
    },
    # Names of the halves of each letter, 52 of the 256 codes.
    "tokenizer": {"init": "emoji_64", "num_steps": 800, "data": PICTURES, "batch_size": 32},
    # Prompt -> tokens: the transformer spells before it conditions.
    "pretrain_ar": {
        "init": {"qwen3": "emoji_64"},
        "num_steps": 500,
        "batch_size": 32,
        "data": {
            "exercises": {"recital": 0.1, "sketch": 0.4, "picture": 0.5},
            "row_length": 116,
            **HALF,
            **PROMPTS,
        },
    },
    # Tokens, and latents from the transformer's states.
    "joint": {
        "init": {
            "dc_ae": "runs/words_autoencoder",
            "ta_tok": "runs/words_tokenizer",
            "qwen3": "runs/words_ar",
            "diffusion_connector": "emoji_64",
            "sana": "emoji_64",
        },
        "num_steps": 800,
        "joint": {"trainable_sana": "all"},
        "data": {"row_length": 116, **PICTURES, **PROMPTS},
    },
    # What the tokens of each letter look like takes longest.
    "letters": {
        "stage": "joint",
        "init": "runs/words_joint",
        "frozen_parts": ("qwen3",),
        "num_steps": 1500,
        "joint": {"trainable_sana": "all"},
        "data": {"row_length": 116, **PICTURES, **PROMPTS, "text_fraction": 0.8},
    },
}


def reinforced() -> ConfigDict:
    """The transformer is rewarded for words that OCR reads, while the judge of the letters' shapes
    only watches."""
    config = grpo()
    section = {**config.grpo, "rewards": {"ocr": 1.0}, "watched": ("strict",)}
    data = {"seed": 5, "row_length": 116, "text_fraction": 1.0}
    changes = {"init": "runs/words", "num_steps": 160, "data": data, "grpo": section}
    return ConfigDict({**config, **changes})


def get_config(stage: str = "autoencoder") -> ConfigDict:
    if stage == "grpo":
        return reinforced()
    if stage not in STAGES:
        raise ValueError(f"no stage {stage!r}, but {', '.join(STAGES)}, grpo")
    config = {
        "stage": stage,
        "preset": "emoji_64",
        "batch_size": 16,
        "optimizer": {
            "learning_rate": 1e-3,
            "final_learning_rate": 2e-5,
            "warmup_steps": 50,
            "b2": 0.99,
            "ema_decay": 0.995,
        },
        "eval_every": 250,
        "checkpoint_every": 250,
    }
    return ConfigDict({**config, **STAGES[stage]})
