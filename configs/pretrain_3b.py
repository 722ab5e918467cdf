r"""BLIP3o-NEXT 3B, pretraining: Qwen3 and the connector on 32 M captioned images, SANA frozen but
for its caption layers (docs/model.md §6).

    blip3o-jax convert to-jax /mnt/jax-3b --ar Qwen3-1.7B --dit SANA1.5_1.6B_1024px_diffusers \
        --tokenizer ta_tok.pth --new-vocabulary mean
    blip3o-jax data cache --config pretrain_3b --out /mnt/cache/pretrain
    blip3o-jax train --config pretrain_3b:v5e:16x16 --workdir /mnt/runs/pretrain_3b

512 images a step, 336,000 steps, as on the project's page: 5.4 passes over the data, so they are
encoded once, into a cache. Planned at 40 % of the peak, an estimate (`blip3o-jax plan --config
pretrain_3b:TOPOLOGY`): v5e:16x16 0.54 s a step, 50 h, 12,918 chip-hours; v5p:4x4x8 0.46 s, 43 h,
5,544; v6e:16x16 0.12 s, 11 h, 2,772; on 16 chips or less as many chip-hours: v5e:4x4 34 days,
v5p:2x2x4 14, v6e:4x4 7; tpu7x:2x2x1 12 days, 1,103 chip-hours.
"""

from common import DISK, pretrain
from ml_collections import ConfigDict


def get_config(topology: str = "v5e:16x16") -> ConfigDict:
    checkpoint, cache = f"{DISK}/jax-3b", f"{DISK}/cache/pretrain"
    return pretrain(topology, "blip3o_next_3b", checkpoint, cache)
