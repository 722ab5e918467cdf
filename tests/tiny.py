"""The tiny models of all tests, written once, and what they are trained on.

TRANSFORMER is the Qwen3 whose values transformers gave (fixtures/qwen3.npz). PUBLISHED has every
part at sizes of its own, for conversion. SMALL makes the embedded model's parts as small as they
can be, for runs; batches are a function of the step. `text` gives the embedded tokenizer.
"""

import itertools

import numpy as np

from blip3o_jax.config import (
    Blip3oConfig,
    DcAeConfig,
    Qwen3Config,
    SanaConfig,
    SiglipConfig,
    TaTokConfig,
    VocabConfig,
)
from blip3o_jax.presets import preset
from blip3o_jax.resources import ASSETS
from blip3o_jax.text import Text, load_tokenizer
from blip3o_jax.train.config import DataConfig, JointConfig, OptimizerConfig, TrainConfig

TRANSFORMER = Qwen3Config(
    vocab_size=72,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=0.01,
)

TRANSFORMER_VOCAB = VocabConfig(
    image_start_tag_id=30,
    image_end_tag_id=31,
    scale_start_token_id=32,
    image_start_token_id=35,
    num_image_tokens=32,  # five ids follow
    pad_token_id=0,
    eos_token_id=1,
)

VOCAB = VocabConfig(
    image_start_tag_id=20,
    image_end_tag_id=21,
    scale_start_token_id=22,
    image_start_token_id=25,
    num_image_tokens=16,
    pad_token_id=3,
    eos_token_id=5,
)
PUBLISHED = Blip3oConfig(
    name="tiny",
    vocab=VOCAB,
    qwen3=Qwen3Config(
        vocab_size=VOCAB.size + 2,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    ),
    ta_tok=TaTokConfig(
        encoder=SiglipConfig(
            hidden_size=16,
            intermediate_size=20,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=13,
            patch_size=4,
        ),
        bottleneck_dim=12,
        codebook_size=16,
        decoder_depth=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=24,
        decoder_num_patches=4,
    ),
    sana=SanaConfig(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        caption_channels=28,
        sample_size=8,
    ),
    dc_ae=DcAeConfig(
        latent_channels=4,
        attention_head_dim=8,
        block_types=("ResBlock", "EfficientViTBlock"),
        block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        qkv_multiscales=((), (5,)),
    ),
    max_prompt_tokens=30,
    connector_eps=1e-4,
)

# The embedded model without editing.
TEXT_ONLY = {"max_sources": 0, "use_und_image_vae_as_channels": False, "sana.in_channels": 16}
SMALL = {
    **TEXT_ONLY,
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


def text(max_prompt_tokens: int | None = None) -> Text:
    """The embedded tokenizer with its vocabulary, for prompts of the embedded model's length."""
    model = preset("emoji_64")
    tokenizer = load_tokenizer(ASSETS / "emoji_64" / "tokenizer.json")
    return Text(tokenizer, model.vocab, max_prompt_tokens or model.max_prompt_tokens)


def config(**changes) -> TrainConfig:
    """A joint run, six steps long."""
    return TrainConfig(
        **{
            "stage": "joint",
            "model": SMALL,
            "batch_size": 8,
            "num_steps": 6,
            "joint": JointConfig(trainable_sana="all"),
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
    return config(**{"stage": "pretrain_ar", "joint": None, "data": data, **changes})


def rows_at(step: int, rows: int = 8) -> dict[str, np.ndarray]:
    """Of the pretrain_ar stage; row i counts i + 1 times, and at least half of its tokens do not
    count."""
    positions = np.tile(np.arange(16, dtype=np.int32), (rows, 1))
    weights = (positions > 8).astype(np.float32) * np.arange(1, rows + 1, dtype=np.float32)[:, None]
    return {"tokens": batch_at(step, rows)["tokens"], "positions": positions, "weights": weights}


def from_step(batch_of):
    """Step -> endless batches `batch_of(step)`, `batch_of(step + 1)`, ..., as the loop asks for
    them."""
    return lambda step: (batch_of(now) for now in itertools.count(step))
