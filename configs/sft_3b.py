"""BLIP3o-NEXT 3B, supervised fine-tuning of `pretrain_3b` on BLIP3o-60k and ShareGPT-4o-Image
(docs/model.md §6).

    blip3o-jax data cache --config sft_3b --out /mnt/cache/sft
    blip3o-jax train --config sft_3b:v5e:16x16 --workdir /mnt/runs/sft_3b

128 images a step, 7,000 steps, as on the project's page: several passes over the data, so they are
encoded once, into a cache. Two chips share an image where a pod has more chips than a step has
images. Planned at 40 % of the peak, an estimate (`blip3o-jax plan --config sft_3b:TOPOLOGY`):
v5e:16x16 0.14 s a step, 67 chip-hours; v5p:4x4x8 0.12 s, 29; v6e:16x16 0.03 s, 14; v5e:4x4 2.2 s,
4.2 h; v5p:2x2x4 0.93 s, 1.8 h; v6e:4x4 0.46 s, 0.9 h; tpu7x:2x2x1 0.74 s, 1.4 h.
"""

from common import DISK, published_run
from ml_collections import ConfigDict

# What the pods that the run was planned for need; on others it takes what the plan of them finds
# (`blip3o-jax plan --search`).
PODS = {
    "v5e:16x16": {"mesh": {"fsdp": 16, "tensor": 2}, "remat": "dots"},
    "v5p:4x4x8": {"mesh": {"fsdp": 32}, "remat": "none"},
    "v6e:16x16": {"mesh": {"fsdp": 16, "tensor": 2}, "remat": "dots"},
    "v5e:4x4": {"accumulate": 2},
    "v5p:2x2x4": {"remat": "dots"},
    "v6e:4x4": {"accumulate": 2, "remat": "dots"},
    "tpu7x:2x2x1": {"accumulate": 2, "remat": "dots"},
}


def get_config(topology: str = "v5e:16x16") -> ConfigDict:
    sources = [
        {"kind": "webdataset", "path": f"{DISK}/data/BLIP3o-60k/*.tar"},
        {"kind": "jsonl", "path": f"{DISK}/data/ShareGPT-4o-Image/text_to_image.jsonl"},
    ]
    tokenizer = f"{DISK}/jax-3b/tokenizer.json"
    return published_run(
        topology,
        PODS,
        preset="blip3o_next_3b",
        init=f"{DISK}/runs/pretrain_3b",
        data={"sources": sources, "tokenizer": tokenizer, "cache": f"{DISK}/cache/sft"},
        batch_size=128,
        num_steps=7_000,
        optimizer={"learning_rate": 5e-5, "final_learning_rate": 1e-5, "warmup_steps": 70},
        eval_every=500,
        checkpoint_every=500,
    )
