"""Stage 4 of the embedded model: which colour is whose, said of up to four things.

    blip3o-jax train --config emoji_dictation --workdir runs/dictation

A prompt names things in their colours; the row says each thing, its colour, and the thing again, in any order. Recitals go on beside it.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "stage": "practice",
            "preset": "emoji_64",
            "batch_size": 64,
            "seed": 1,
            "num_steps": 400,
            "init": {"qwen3": "runs/recital"},
            "data": {
                "exercises": {"recital": 0.2, "dictation": 0.8},
                "row_length": 70,
            },
            "optimizer": {
                "learning_rate": 2e-3,
                "final_learning_rate": 2e-3,
                "warmup_steps": 30,
                "b2": 0.98,
                "weight_decay": 0.01,
                "ema_decay": 0.98,
            },
            "eval_every": 100,
            "checkpoint_every": 100,
        }
    )
