"""A miniature of BLIP3o-NEXT with random weights, and its checkpoint on disk."""

import functools

import jax
import numpy as np
import pytest

from blip3o_jax.config import (
    Blip3oConfig,
    DcAeConfig,
    Qwen3Config,
    SanaConfig,
    SiglipConfig,
    TaTokConfig,
    VocabConfig,
)
from blip3o_jax.convert.published import save_published
from blip3o_jax.models.blip3o import Blip3o

VOCAB = VocabConfig(
    image_start_tag_id=20,
    image_end_tag_id=21,
    scale_start_token_id=22,
    image_start_token_id=25,
    num_image_tokens=16,
    pad_token_id=3,
    eos_token_id=5,
)
CONFIG = Blip3oConfig(
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


@pytest.fixture(scope="session", autouse=True)
def shapes_are_traced_once():
    """Tracing the networks for their shapes takes half a second, and every reader and writer does
    it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Blip3o, "abstract", functools.cache(Blip3o.abstract))
        yield


@pytest.fixture(scope="session")
def cfg():
    return CONFIG


@pytest.fixture(scope="session")
def params():
    """Drawn by numpy: compiling the modules' own initialisers would take longer than all tests
    together."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), Blip3o(CONFIG).abstract()
    )


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, params):
    """A float32 checkpoint in one file. Not to be changed: tests that damage one copy it first."""
    folder = tmp_path_factory.mktemp("published") / "tiny"
    save_published(folder, CONFIG, params)
    return folder
