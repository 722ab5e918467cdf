r"""BLIP3o-NEXT with a transformer of 0.6B, pretraining: everything else as `pretrain_3b`.

    blip3o-jax convert to-jax /mnt/jax-0.6b --ar Qwen3-0.6B --dit SANA1.5_1.6B_1024px_diffusers \
        --tokenizer ta_tok.pth --new-vocabulary mean
    blip3o-jax data cache --config pretrain_0_6b --out /mnt/cache/pretrain_0_6b
    blip3o-jax train --config pretrain_0_6b:v5e:16x16 --workdir /mnt/runs/pretrain_0_6b

512 images a step, 336,000 steps, as the 3B model's: 5.4 passes over the data, so they are encoded
once, into a cache. Planned at 40 % of the peak, an estimate (`blip3o-jax plan --config
pretrain_0_6b:TOPOLOGY`): v5e:16x16 0.31 s a step, 29 h, 7,363 chip-hours; v5p:4x4x8 0.26 s, 25 h,
3,160; v6e:16x16 0.07 s, 6 h, 1,580; on 16 chips or less as many chip-hours: v5e:4x4 19 days,
v5p:2x2x4 8, v6e:4x4 4; tpu7x:2x2x1 7 days, 629 chip-hours.
"""

from common import DISK, pretrain
from ml_collections import ConfigDict


def get_config(topology: str = "v5e:16x16") -> ConfigDict:
    checkpoint, cache = f"{DISK}/jax-0.6b", f"{DISK}/cache/pretrain_0_6b"
    return pretrain(topology, "blip3o_next_0_6b", checkpoint, cache)
