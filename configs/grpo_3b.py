"""BLIP3o-NEXT 3B is reinforced to draw what prompts ask for: GRPO of its transformer from `sft_3b`
(docs/rl.md, docs/model.md §7.2).

    blip3o-jax plan --config grpo_3b:v5p:2x2x4
    blip3o-jax grpo --config grpo_3b:v5p:2x2x4 --workdir /mnt/runs/grpo_3b

The numbers of the original's run for GenEval: 400 steps of 256 images, 16 of each prompt. Prompts
are lines of GenEval (`tag`, `include`, `prompt`); the reward is that of the server which the
original asked, on each host. For text in images: prompts with words in double quotes, the reward
`ocr`, batch_size 512, num_steps 900 and learning_rate 1e-6.

v5p:2x2x4 was compiled in full (docs/rl.md), the others were not: run `plan` first.
"""

from common import DISK
from ml_collections import ConfigDict

# What is tried first on each pod.
PODS = {
    "v5e:16x16": {"mesh": {"fsdp": 16, "data": -1}, "remat": "dots", "pieces": 1},
    "v5p:4x4x8": {"mesh": {"fsdp": 32, "data": -1}, "remat": "dots", "pieces": 2},
    "v6e:16x16": {"mesh": {"fsdp": 16, "data": -1}, "remat": "dots", "pieces": 1},
    "v5p:2x2x4": {"accumulate": 2, "remat": "dots"},
    "v6e:4x4": {"accumulate": 4, "remat": "dots"},
    "tpu7x:2x2x1": {"accumulate": 4, "remat": "dots"},
}


def get_config(topology: str = "v5p:2x2x4") -> ConfigDict:
    # Images are rendered in pieces, so that they leave room for the weights.
    pod = {"pieces": 4, **PODS.get(topology, {})}
    return ConfigDict(
        {
            "stage": "grpo",
            "preset": "blip3o_next_3b",
            "topology": topology,
            "mesh": {"fsdp": -1, "data": 1},
            "remat": "full",
            "init": f"{DISK}/runs/sft_3b",
            "batch_size": 256,
            "num_steps": 400,
            "data": {
                "prompts": f"{DISK}/data/geneval_train.jsonl",
                "tokenizer": f"{DISK}/jax-3b/tokenizer.json",
                "row_length": 1280,
            },
            "grpo": {
                "num_generations": 16,
                "pieces": pod.pop("pieces"),
                "beta": 0.001,
                "rewards": {"geneval+http://127.0.0.1:18085/": 1.0},
            },
            "optimizer": {"learning_rate": 5e-6, "final_learning_rate": 0.0},
            "log_every": 1,
            "eval_every": 50,
            "checkpoint_every": 50,
            **pod,
        },
        allow_dotted_keys=True,  # in the server's name
    )
