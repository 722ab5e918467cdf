"""A model of the smallest sizes that has every part, a run of it, and batches that are a function
of the step: for tests and proofs."""

import itertools

import numpy as np

from blip3o_jax.train.config import DataConfig, OptimizerConfig, TrainConfig

SMALL = {
    "qwen3.num_hidden_layers": 1,
    "qwen3.hidden_size": 32,
    "qwen3.intermediate_size": 32,
    "sana.num_layers": 1,
    "sana.num_attention_heads": 2,
    "sana.attention_head_dim": 16,
    "sana.num_cross_attention_heads": 2,
    "sana.cross_attention_head_dim": 16,
    "sana.sample_size": 2,
    "ta_tok.encoder.num_hidden_layers": 1,
    "ta_tok.encoder.image_size": 16,
    "ta_tok.decoder_depth": 1,
    "dc_ae.block_out_channels": (8, 8, 8, 16),
    "dc_ae.encoder_layers_per_block": (0, 1, 1, 1),
    "dc_ae.decoder_layers_per_block": (0, 1, 1, 1),
}

# eps: Adam would blow up what is rounding
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=1, ema_decay=0.9, eps=1e-4)


def config(**changes) -> TrainConfig:
    """A joint run, six steps long."""
    return TrainConfig(
        **{
            "stage": "joint",
            "model": SMALL,
            "batch_size": 8,
            "num_steps": 6,
            "trainable_sana": "all",
            "log_every": 1,
            "eval_every": 6,
            "checkpoint_every": 3,
            "optimizer": OPTIMIZER,
            **changes,
        }
    )


def batch_at(step: int, rows: int = 8) -> dict[str, np.ndarray]:
    """Of the joint stage."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, 300, (rows, 16)).astype(np.int32)
    return {
        "images": rng.integers(0, 256, (rows, 16, 16, 3), np.uint8),
        "tokens": tokens,
        "start": np.full(rows, 8, np.int32),
    }


def practice(**changes) -> TrainConfig:
    """A run of the transformer alone, which compiles in no time."""
    data = DataConfig(exercises={"recital": 1.0}, row_length=16)
    return config(**{"stage": "practice", "trainable_sana": "captions", "data": data, **changes})


def rows_at(step: int, rows: int = 8) -> dict[str, np.ndarray]:
    """Of the practice stage; row i counts i + 1 times, and at least half of its tokens do not
    count."""
    positions = np.tile(np.arange(16, dtype=np.int32), (rows, 1))
    weights = (positions > 8).astype(np.float32) * np.arange(1, rows + 1, dtype=np.float32)[:, None]
    return {"tokens": batch_at(step, rows)["tokens"], "positions": positions, "weights": weights}


def from_step(batch_of):
    """Step -> endless batches `batch_of(step)`, `batch_of(step + 1)`, ..., as the loop asks for
    them."""
    return lambda step: (batch_of(now) for now in itertools.count(step))
