"""Floating-point operations of every part, from its config: a multiply-add is two, norms and
activations are not counted.

XLA's own count (`cost_analysis`) has the body of a scan once, however often it runs, so it agrees
with these for unrolled or single-layer stacks only.
"""

from blip3o_jax.config import (
    Blip3oConfig,
    DcAeConfig,
    Qwen3Config,
    SanaConfig,
    SiglipConfig,
    TaTokConfig,
)


def qwen3(cfg: Qwen3Config, tokens: int, context: float, logits: int = 0) -> int:
    """A forward of `tokens` tokens, all rows of the batch together, each attending to `context`
    keys; then `logits` logits of each."""
    width, queries, keys = (
        cfg.hidden_size,
        cfg.num_attention_heads * cfg.head_dim,
        cfg.num_key_value_heads * cfg.head_dim,
    )
    projections = 2 * width * queries + 2 * width * keys + 3 * width * cfg.intermediate_size
    layer = 2 * projections + 4 * queries * context
    return round(tokens * (cfg.num_hidden_layers * layer + 2 * width * logits))


def decode(cfg: Blip3oConfig, batch: int, prompt: int) -> int:
    """Prefill of `prompt` tokens a row, then the image tokens, with logits of the image range only.

    A cached token sees what is written.
    """
    tokens, codes = cfg.ta_tok.num_tokens, cfg.vocab.num_image_tokens
    written = qwen3(cfg.qwen3, batch * tokens, prompt + (tokens + 1) / 2, codes)
    return qwen3(cfg.qwen3, batch * prompt, (prompt + 1) / 2) + written


def connector(cfg: Blip3oConfig, tokens: int) -> int:
    """Of `tokens` hidden states."""
    width = cfg.sana.caption_channels
    return 2 * tokens * width * (cfg.qwen3.hidden_size + width)


def sana_condition(cfg: SanaConfig, tokens: int) -> int:
    """The caption projection of `tokens` condition tokens, and every block's keys and values of
    them: needed once an image."""
    return (
        2
        * tokens
        * cfg.hidden_size
        * (cfg.caption_channels + cfg.hidden_size + 2 * cfg.num_layers * cfg.hidden_size)
    )


def sana(cfg: SanaConfig, rows: int, condition: int, without: int = 0) -> int:
    """A forward of `rows` latents, with keys and values of a condition of `condition` tokens each
    given, but for `without` of them, whose cross-attention is given."""
    width, pixels = cfg.hidden_size, cfg.sample_size**2
    # projections; the state and its product with the queries
    own = 4 * width * width + 2 * width * cfg.attention_head_dim
    cross = 2 * width * width + 2 * width * condition
    mlp = 3 * width * cfg.mlp_hidden + 9 * 2 * cfg.mlp_hidden
    layer = pixels * (rows * (own + mlp) + (rows - without) * cross)
    time = 256 * width + width * width + 6 * width * width
    ends = pixels * width * (cfg.in_channels + cfg.out_channels)
    return 2 * (cfg.num_layers * layer + rows * (time + ends))


def denoise(cfg: Blip3oConfig, batch: int) -> tuple[int, int]:
    """Of `batch` images with guidance, two rows each: (what is needed once, a step).

    Without positions the unconditional half's tokens are all equal, so that one stands for them.
    """
    condition, positions = cfg.num_condition_tokens, cfg.sana.condition_positions
    tokens = 2 * batch * condition if positions else batch * condition + 1
    once = connector(cfg, tokens) + sana_condition(cfg.sana, tokens)
    return once, sana(cfg.sana, 2 * batch, condition, without=0 if positions else batch)


def _dc_ae_block(cfg: DcAeConfig, stage: int) -> int:
    """Multiply-adds a pixel of one block."""
    width = cfg.block_out_channels[stage]
    if cfg.block_types[stage] == "ResBlock":
        return 2 * 9 * width * width
    scales = cfg.qkv_multiscales[stage]
    inner = width // cfg.attention_head_dim * cfg.attention_head_dim
    wide = inner * (1 + len(scales))
    multiscale = sum(3 * inner * (size * size + cfg.attention_head_dim) for size in scales)
    attention = 3 * width * inner + multiscale + 2 * wide * cfg.attention_head_dim + wide * width
    gated = 8 * width * width + 9 * 8 * width + 4 * width * width
    return attention + gated


def dc_ae_decode(cfg: DcAeConfig, rows: int, side: int) -> int:
    """Latents of `side` x `side` to images."""
    widths, layers = cfg.block_out_channels, cfg.decoder_layers_per_block
    total = 9 * cfg.latent_channels * widths[-1] * side * side
    for stage in reversed(range(len(widths))):
        pixels = (side * 2 ** (len(widths) - 1 - stage)) ** 2
        if layers[stage] and stage + 1 < len(widths):
            total += _up(cfg, widths[stage + 1], widths[stage], pixels)
        total += layers[stage] * pixels * _dc_ae_block(cfg, stage)
    pixels = (side * cfg.factor) ** 2
    return (
        2
        * rows
        * (total + (9 * widths[0] * 3 * pixels if layers[0] else _up(cfg, widths[1], 3, pixels)))
    )


def _up(cfg: DcAeConfig, inputs: int, outputs: int, pixels: int) -> int:
    """`pixels` after it: nine taps from a quarter of them to four times the outputs, or four taps
    at each of repeated pixels."""
    return (4 if cfg.upsample_block_type == "interpolate" else 9) * inputs * outputs * pixels


def dc_ae_encode(cfg: DcAeConfig, rows: int, side: int) -> int:
    """Images to latents of `side` x `side`."""
    widths, layers = cfg.block_out_channels, cfg.encoder_layers_per_block
    pixels = (side * cfg.factor) ** 2
    # A halving convolution costs the same in both forms.
    total = 9 * 3 * widths[0] * pixels if layers[0] else 9 * 3 * widths[1] * pixels // 4
    for stage, count in enumerate(layers):
        pixels = (side * 2 ** (len(widths) - 1 - stage)) ** 2
        total += count * pixels * _dc_ae_block(cfg, stage)
        if count and stage + 1 < len(widths):
            total += 9 * widths[stage] * widths[stage + 1] * pixels // 4
    return 2 * rows * (total + 9 * widths[-1] * cfg.latent_channels * side * side)


def siglip(cfg: SiglipConfig, layers: int, rows: int) -> int:
    """The first `layers` layers of the vision transformer."""
    tokens, width = cfg.grid**2, cfg.hidden_size
    layer = 4 * width * width + 2 * width * cfg.intermediate_size + 2 * width * tokens
    return 2 * rows * tokens * (cfg.patch_size**2 * 3 * width + layers * layer)


def ta_tok_encode(cfg: TaTokConfig, rows: int) -> int:
    """Images to codes; the codebook's projection once."""
    width, dim, codes = cfg.encoder.hidden_size, cfg.bottleneck_dim, cfg.codebook_size
    choice = rows * cfg.num_tokens * (width * width + width * dim + dim * codes) + codes * dim * dim
    return siglip(cfg.encoder, cfg.num_encoder_layers, rows) + 2 * choice


def text_to_image(cfg: Blip3oConfig, batch: int, prompt: int, num_inference_steps: int) -> int:
    """Tokens, latents with guidance and pixels of `batch` images."""
    once, step = denoise(cfg, batch)
    return (
        decode(cfg, batch, prompt)
        + once
        + num_inference_steps * step
        + dc_ae_decode(cfg.dc_ae, batch, cfg.sana.sample_size)
    )


def joint_step(cfg: Blip3oConfig, batch: int, length: int, whole_sana: bool = True) -> int:
    """A training step on rows of `length` tokens: three forwards' worth for what is trained (the
    backward pass is two), two for SANA's blocks where only the captions' way into them is trained,
    and one for the frozen tokenizer and autoencoder. Attention is counted as causal, half of the
    square."""
    n = batch * cfg.num_condition_tokens
    trained = qwen3(cfg.qwen3, batch * length, (length + 1) / 2, cfg.qwen3.vocab_size) + connector(
        cfg, n
    )
    diffusion = sana_condition(cfg.sana, n) + sana(cfg.sana, batch, cfg.num_condition_tokens)
    encoders = ta_tok_encode(cfg.ta_tok, batch) + dc_ae_encode(
        cfg.dc_ae, batch, cfg.sana.sample_size
    )
    return 3 * trained + (3 if whole_sana else 2) * diffusion + encoders
