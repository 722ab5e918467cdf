"""BLIP3o-NEXT 3B, pretraining: Qwen3 and the connector on 32 M captioned images, SANA frozen but
for its captions' way in (docs/model.md §6).

    blip3o-jax convert to-jax jax-3b --ar Qwen3-1.7B --dit SANA1.5_1.6B_1024px_diffusers --tokenizer
    ta_tok.pth --new-vocabulary mean
    blip3o-jax data cache --config pretrain_3b --out cache/pretrain
    blip3o-jax train --config pretrain_3b:v5e:16x16 --workdir /mnt/runs/pretrain_3b

512 images a step, 336,000 steps, as on the project's page: 5.4 passes over the data, so they are
encoded once, into a cache. Planned at 40 % of the peak, which is arithmetic (`blip3o-jax plan
--config pretrain_3b:TOPOLOGY`): v5e:16x16 0.54 s a step, 50 h, 12,918 chip-hours; v5p:4x4x8 0.46 s,
43 h, 5,544; v6e:16x16 0.12 s, 11 h, 2,772; on 16 chips or less as many chip-hours: v5e:4x4 34 days,
v5p:2x2x4 14, v6e:4x4 7; tpu7x:2x2x1 12 days, 1,103 chip-hours.
"""

from ml_collections import ConfigDict

# What the pods that the run was planned for need; on others it takes what the plan of them finds
# (`blip3o-jax plan --search`).
PODS = {
    "v5e:16x16": {"mesh": {"fsdp": 16}, "remat": "dots"},
    "v5p:4x4x8": {"mesh": {"fsdp": 32}, "remat": "dots"},
    "v6e:16x16": {"mesh": {"fsdp": 16}, "remat": "dots"},
    "v5e:4x4": {"accumulate": 8},
    "v5p:2x2x4": {"accumulate": 4, "remat": "dots"},
    "v6e:4x4": {"accumulate": 8, "remat": "dots"},
    "tpu7x:2x2x1": {"accumulate": 8, "remat": "dots"},
}


def get_config(topology: str = "v5e:16x16") -> ConfigDict:
    data = "data/BLIP3o-Pretrain"
    return ConfigDict(
        {
            "stage": "joint",
            "preset": "blip3o_next_3b",
            "topology": topology,
            "mesh": {"fsdp": -1, "data": 1},
            "remat": "full",
            "batch_size": 512,
            "num_steps": 336_000,
            "init": dict.fromkeys(
                ("qwen3", "diffusion_connector", "sana", "ta_tok", "dc_ae"), "jax-3b"
            ),
            "data": {
                "sources": [
                    {"kind": "webdataset", "path": f"{data}-Long-Caption/*.tar"},
                    {"kind": "webdataset", "path": f"{data}-Short-Caption/*.tar"},
                ],
                "tokenizer": "jax-3b/tokenizer.json",
                "cache": "cache/pretrain",
                # of a prompt of 512 tokens, 729 of the image and its end: a multiple of 128, for
                # the TPU's kernel
                "row_length": 1280,
                "reader_threads": 16,
            },
            "optimizer": {"learning_rate": 1e-4, "final_learning_rate": 1e-5, "warmup_steps": 3360},
            "log_every": 50,
            "eval_every": 2000,
            "checkpoint_every": 1000,
            **PODS.get(topology, {}),
        }
    )
