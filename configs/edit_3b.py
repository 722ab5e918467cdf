"""BLIP3o-NEXT 3B edits by instruction: from `sft_3b`, on edits, reconstructions and text to image
(docs/model.md §6).

    blip3o-jax data check --config edit_3b --out check
    blip3o-jax train --config edit_3b:v5e:4x4 --workdir /mnt/runs/edit_3b

Or from a converted checkpoint: `--config.init=/mnt/jax-sft`. The connector of the source's latents
starts at random unless the checkpoint has one. The learning rates and 96 images a step are the
original's; pods of 128 chips and more take 128, which divides among them. 3,072,000 rows are as
many as the original's epoch has of Nano-150k, ten times each pair and each reconstruction. Images
are encoded in the step, a quarter of its 50 TFLOP an image. At 40 % of the peak, an estimate:
v5e:16x16 0.32 s a step, 2.1 h, 543 chip-hours; v5p:4x4x8 0.27 s, 233; v6e:16x16 0.07 s, 117;
v5e:4x4 3.8 s, 34 h; v5p:2x2x4 1.6 s, 15 h; v6e:4x4 0.82 s, 7.3 h; tpu7x:2x2x1 1.3 s, 12 h.
"""

from common import DISK, published_run
from ml_collections import ConfigDict

# As the released family: the source's tokens are in the prompt, its latents among the condition's
# tokens and beside the noisy latents, which has room for one.
EDITING = {"max_sources": 1, "use_und_image_vae": True, "use_und_image_vae_as_noise": True}

# What the pods that the run was planned for need; on others it takes what the plan of them finds
# (`blip3o-jax plan --search`).
PODS = {
    "v5e:16x16": {"mesh": {"fsdp": 16, "tensor": 2}, "remat": "dots"},
    "v5p:4x4x8": {"mesh": {"fsdp": 32}, "remat": "none"},
    "v6e:16x16": {"mesh": {"fsdp": 16, "tensor": 2}, "remat": "dots"},
    "v5e:4x4": {"accumulate": 3},
    "v5p:2x2x4": {"remat": "dots"},
    "v6e:4x4": {"accumulate": 3, "remat": "dots"},
    "tpu7x:2x2x1": {"accumulate": 2, "remat": "dots"},
}
LARGE = ("v5e:16x16", "v5p:4x4x8", "v6e:16x16")
ROWS = 3_072_000

# Shares of the rows. Nano-150k and its reconstructions, pictures that are asked to stay as they
# are, weigh the same, as in the original, whose list of the others is not whole: those are ours.
SOURCES = [
    {"kind": "jsonl", "path": f"{DISK}/data/Nano-150k/*.jsonl", "weight": 0.3},
    {"kind": "jsonl", "path": f"{DISK}/data/Nano-150k/reconstruct/*.jsonl", "weight": 0.3},
    {"kind": "jsonl", "path": f"{DISK}/data/X2I2/inpaint_edit.jsonl", "weight": 0.1},
    {"kind": "jsonl", "path": f"{DISK}/data/X2I2/video_edit.jsonl", "weight": 0.1},
    {
        "kind": "jsonl",
        "path": f"{DISK}/data/ShareGPT-4o-Image/text_and_image_to_image.jsonl",
        "weight": 0.1,
    },
    {"kind": "jsonl", "path": f"{DISK}/data/ShareGPT-4o-Image/text_to_image.jsonl", "weight": 0.05},
    {"kind": "webdataset", "path": f"{DISK}/data/BLIP3o-60k/*.tar", "weight": 0.05},
]


def get_config(topology: str = "v5e:4x4") -> ConfigDict:
    batch_size = 128 if topology in LARGE else 96
    num_steps = ROWS // batch_size
    rates = {"learning_rate": 5e-5, "final_learning_rate": 1e-5, "warmup_steps": num_steps // 100}
    # A prompt of 512 tokens, 729 of its source image and 729 of the image are 1,973.
    data = {"sources": SOURCES, "tokenizer": f"{DISK}/jax-3b/tokenizer.json", "row_length": 2048}
    return published_run(
        topology,
        PODS,
        preset="blip3o_next_3b",
        model=EDITING,
        init=f"{DISK}/runs/sft_3b",
        data=data,
        batch_size=batch_size,
        num_steps=num_steps,
        optimizer=rates,
        eval_every=500,
        checkpoint_every=500,
    )
