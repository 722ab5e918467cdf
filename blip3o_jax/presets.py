"""The named sizes: embedded, for measuring speed, and those published (arXiv 2510.15857)."""

import dataclasses

from blip3o_jax import config
from blip3o_jax.errors import nearest, require

# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads,
# head_dim
QWEN3 = {
    "emoji_64": (192, 512, 6, 6, 2, 32),
    "mid_128": (768, 2304, 14, 12, 4, 64),
    "blip3o_next_0_6b": (1024, 3072, 28, 16, 8, 128),
    "blip3o_next_3b": (2048, 6144, 28, 16, 8, 128),
}
# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, image_size, patch_size
SIGLIP = {"emoji_64": (128, 512, 3, 4, 64, 8), "mid_128": (384, 1536, 12, 6, 128, 8)}


def _emoji_64() -> config.Blip3oConfig:
    """A miniature of every part, trained and embedded: 64 px, 8x8 of 256 codes, 8x8 latents, and
    edits of one source, whose latents are more channels."""
    # bytes and words of assets/emoji_64/tokenizer.json, and behind them three vision tokens, the
    # pad and two chat tokens
    words = 559
    text_tokens = words + 6
    vocab = config.VocabConfig(
        image_start_tag_id=text_tokens,
        image_end_tag_id=text_tokens + 1,
        scale_start_token_id=text_tokens + 2,
        image_start_token_id=text_tokens + 5,
        num_image_tokens=256,
        pad_token_id=words + 3,
        eos_token_id=words + 5,
    )
    return config.Blip3oConfig(
        name="emoji_64",
        vocab=vocab,
        qwen3=config.Qwen3Config(vocab.size, *QWEN3["emoji_64"], rope_theta=1e4),
        ta_tok=config.TaTokConfig(
            encoder=config.SiglipConfig(*SIGLIP["emoji_64"]),
            select_layer_id=-1,
            bottleneck_dim=32,
            codebook_size=256,
            decoder_depth=2,
            decoder_num_attention_heads=4,
            decoder_intermediate_size=256,
            decoder_num_patches=64,
        ),
        sana=config.SanaConfig(
            in_channels=32,
            out_channels=16,
            num_layers=6,
            num_attention_heads=6,
            attention_head_dim=32,
            num_cross_attention_heads=6,
            cross_attention_head_dim=32,
            caption_channels=192,
            sample_size=8,
            interpolation_scale=1.0,
            condition_positions=True,
        ),
        dc_ae=config.DcAeConfig(
            latent_channels=16,
            block_types=("ResBlock",) * 4,
            block_out_channels=(32, 32, 64, 128),
            encoder_layers_per_block=(0, 1, 2, 2),
            decoder_layers_per_block=(0, 1, 2, 3),
            qkv_multiscales=((), (), (), ()),
            downsample_block_type="pixel_unshuffle",
            upsample_block_type="pixel_shuffle",
            # 1 / the standard deviation of the trained autoencoder's latents
            scaling_factor=0.01872,
        ),
        max_prompt_tokens=64,
        max_sources=1,
        use_und_image_vae_as_channels=True,
    )


def _mid_128() -> config.Blip3oConfig:
    """For measuring speed: 100 M + 100 M parameters, 128 px, 16x16 of 4096 codes; no weights."""
    # The text vocabulary of the embedded model, with more codes.
    vocab = dataclasses.replace(_emoji_64().vocab, num_image_tokens=4096)
    return config.Blip3oConfig(
        name="mid_128",
        vocab=vocab,
        qwen3=config.Qwen3Config(vocab.size, *QWEN3["mid_128"]),
        ta_tok=config.TaTokConfig(
            encoder=config.SiglipConfig(*SIGLIP["mid_128"]),
            bottleneck_dim=512,
            codebook_size=4096,
            decoder_num_attention_heads=4,
            decoder_intermediate_size=1024,
        ),
        sana=config.SanaConfig(
            num_layers=14,
            num_attention_heads=21,
            num_cross_attention_heads=6,
            caption_channels=768,
            sample_size=16,
        ),
        dc_ae=config.DcAeConfig(
            block_types=("ResBlock",) * 2 + ("EfficientViTBlock",) * 2,
            block_out_channels=(64, 128, 256, 256),
            encoder_layers_per_block=(1, 1, 2, 2),
            decoder_layers_per_block=(2, 2, 2, 2),
            qkv_multiscales=((), (), (5,), (5,)),
        ),
        max_prompt_tokens=64,
    )


def _next(name: str) -> config.Blip3oConfig:
    """BLIP3o-NEXT around a Qwen3 of 28 layers (0.6B: width 1024, 1.7B: width 2048)."""
    return config.Blip3oConfig(name, config.Qwen3Config(217210, *QWEN3[name]))


PRESETS = {
    "emoji_64": _emoji_64,
    "mid_128": _mid_128,
    "blip3o_next_0_6b": lambda: _next("blip3o_next_0_6b"),
    "blip3o_next_3b": lambda: _next("blip3o_next_3b"),
}
SANA_PRESETS = {
    "sana_0_6b": lambda: config.SanaConfig(
        num_layers=28,
        num_attention_heads=36,
        num_cross_attention_heads=16,
        cross_attention_head_dim=72,
        qk_norm=False,
    ),
    "sana_1_0_1_6b": lambda: config.SanaConfig(qk_norm=False),
    "sana_1_6b": config.SanaConfig,
    "sana_4_8b": lambda: config.SanaConfig(num_layers=60),
}


def preset(name: str) -> config.Blip3oConfig:
    """The named preset; raises InputError naming the nearest one when there is none."""
    require(name in PRESETS, f"Unknown preset {name!r}; {nearest(name, PRESETS)}")
    return PRESETS[name]()
