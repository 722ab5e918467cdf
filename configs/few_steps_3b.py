"""BLIP3o-NEXT 3B whose diffusion part makes a picture in four steps of one forward each, from
`sft_3b` (train.distill, docs/model.md §5.4).

    blip3o-jax train --config few_steps_3b:v5e:16x16 --workdir /mnt/runs/few_steps_3b

128 images a step, 14,000 steps: 30 passes over a set of 60,000, as EMF took on this model
(arXiv 2604.18168). The transformer only reads the rows.
"""

from common import DISK, published_run
from ml_collections import ConfigDict
from sft_3b import PODS
from sft_3b import get_config as sft


def get_config(topology: str = "v5e:16x16") -> ConfigDict:
    data = sft(topology).data
    return published_run(
        topology,
        PODS,
        stage="distill",
        preset="blip3o_next_3b",
        model={"sana": {"few_steps": 4}},
        init=f"{DISK}/runs/sft_3b",
        data={name: data[name] for name in ("sources", "tokenizer", "cache")},
        batch_size=128,
        num_steps=14_000,
        optimizer={"learning_rate": 5e-5, "final_learning_rate": 1e-6, "warmup_steps": 200},
        eval_every=500,
        checkpoint_every=500,
    )
