"""Stage 7 of the embedded model: GRPO.

The transformer is rewarded for what the judge sees in the pictures; all else is frozen.

    blip3o-jax grpo --config emoji_grpo --workdir runs/grpo

Cost: 4.2 s a step on two idle CPU cores (docs/rl.md), 13 minutes. Result: 0.94 of 64 held-out
pictures right by GenEval's rules, 0.91 strict.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "stage": "grpo",
            "preset": "emoji_64",
            "batch_size": 64,
            "accumulate": 8,  # of which those are left out that teach nothing
            "num_steps": 180,
            "init": "runs/joint",
            "data": {
                "seed": 5,
                "row_length": 116,
                "weights": {
                    "single_object": 2.5,
                    "two_object": 1.5,
                    "counting": 4.0,
                    "colors": 1.0,
                    "position": 3.0,
                    "color_attr": 1.5,
                },
                "extra": 0.2,
                "named_ground": 0.9,
            },
            "grpo": {
                "num_generations": 8,
                "num_inference_steps": 8,
                "guidance_scale": None,
                "beta": 0.01,
                "rewards": {"scenes": 0.5, "strict": 0.5},
            },
            "optimizer": {
                "learning_rate": 1e-4,
                "final_learning_rate": 2e-5,
                "warmup_steps": 5,
                "b2": 0.98,
                "ema_decay": 0.9,
            },
            "log_every": 5,
            "eval_every": 50,
            "checkpoint_every": 50,
        }
    )
