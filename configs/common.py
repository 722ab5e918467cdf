"""What the runs of published models share. Not a config itself."""

from ml_collections import ConfigDict

# Where hosts find what the runs read, and each run what the one before it left: a launcher starts
# in a new clone, so every name is absolute.
DISK = "/mnt"

# What the pods that pretraining was planned for need; on others it takes what the plan of them
# finds (`blip3o-jax plan --search`).
PRETRAIN_PODS = {
    "v5e:16x16": {"mesh": {"fsdp": 16}, "remat": "dots"},
    "v5p:4x4x8": {"mesh": {"fsdp": 32}, "remat": "dots"},
    "v6e:16x16": {"mesh": {"fsdp": 16}, "remat": "dots"},
    "v5e:4x4": {"accumulate": 8},
    "v5p:2x2x4": {"accumulate": 4, "remat": "dots"},
    "v6e:4x4": {"accumulate": 8, "remat": "dots"},
    "tpu7x:2x2x1": {"accumulate": 8, "remat": "dots"},
}


def published_run(topology: str, pods: dict[str, dict], *, data: dict, **values) -> ConfigDict:
    """A joint run of a published model on a pod: what all share, `values`, then what `pods` says of
    the topology."""
    # A row is a prompt of 512 tokens, 729 of the image and its end: a multiple of 128, for the
    # TPU's kernel.
    data = {"row_length": 1280, "reader_threads": 16, **data}
    shared = {
        "stage": "joint",
        "topology": topology,
        "mesh": {"fsdp": -1, "data": 1},
        "remat": "full",
        "log_every": 50,
    }
    return ConfigDict({**shared, **values, "data": data, **pods.get(topology, {})})


def pretrain(topology: str, preset: str, checkpoint: str, cache: str) -> ConfigDict:
    """Pretraining from a converted `checkpoint`, whose tokenizer it takes, through a `cache`."""
    data = f"{DISK}/data/BLIP3o-Pretrain"
    sources = [
        {"kind": "webdataset", "path": f"{data}-Long-Caption/*.tar"},
        {"kind": "webdataset", "path": f"{data}-Short-Caption/*.tar"},
    ]
    return published_run(
        topology,
        PRETRAIN_PODS,
        preset=preset,
        init=checkpoint,
        data={"sources": sources, "tokenizer": f"{checkpoint}/tokenizer.json", "cache": cache},
        batch_size=512,
        num_steps=336_000,
        optimizer={"learning_rate": 1e-4, "final_learning_rate": 1e-5, "warmup_steps": 3360},
        eval_every=2000,
        checkpoint_every=1000,
    )
