"""BLIP3o-NEXT with a transformer of 0.6B, pretraining: everything else as `pretrain_3b`.

    blip3o-jax convert to-jax jax-0.6b --ar Qwen3-0.6B --dit SANA1.5_1.6B_1024px_diffusers
    --tokenizer ta_tok.pth --new-vocabulary mean
    blip3o-jax data cache --config pretrain_0_6b --out cache/pretrain_0_6b
    blip3o-jax train --config pretrain_0_6b:v5e:16x16 --workdir /mnt/runs/pretrain_0_6b

512 images a step, 336,000 steps, as the 3B model's: 5.4 passes over the data, so they are encoded
once, into a cache. Planned at 40 % of the peak, which is arithmetic (`blip3o-jax plan --config
pretrain_0_6b:TOPOLOGY`): v5e:16x16 0.31 s a step, 29 h, 7,363 chip-hours; v5p:4x4x8 0.26 s, 25 h,
3,160; v6e:16x16 0.07 s, 6 h, 1,580; on 16 chips or less as many chip-hours: v5e:4x4 19 days,
v5p:2x2x4 8, v6e:4x4 4; tpu7x:2x2x1 7 days, 629 chip-hours.
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
            "preset": "blip3o_next_0_6b",
            "topology": topology,
            "mesh": {"fsdp": -1, "data": 1},
            "remat": "full",
            "batch_size": 512,
            "num_steps": 336_000,
            "init": dict.fromkeys(
                ("qwen3", "diffusion_connector", "sana", "ta_tok", "dc_ae"), "jax-0.6b"
            ),
            "data": {
                "sources": [
                    {"kind": "webdataset", "path": f"{data}-Long-Caption/*.tar"},
                    {"kind": "webdataset", "path": f"{data}-Short-Caption/*.tar"},
                ],
                "tokenizer": "jax-0.6b/tokenizer.json",
                "cache": "cache/pretrain_0_6b",
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
