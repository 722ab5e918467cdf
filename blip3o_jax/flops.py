"""Floating-point operations of every part, from its config: a multiply-add is two, norms and
activations are not counted.

XLA's own count (`cost_analysis`) has the body of a scan once, however often it runs, so it agrees
with these for unrolled or single-layer stacks only.
"""

from blip3o_jax import config


def qwen3(cfg: config.Qwen3Config, tokens: int, context: float, logits: int = 0) -> int:
    """A forward of `tokens` tokens, all rows of the batch together, each attending to `context`
    keys; then `logits` logits of each."""
    width, queries = cfg.hidden_size, cfg.num_attention_heads * cfg.head_dim
    keys = cfg.num_key_value_heads * cfg.head_dim
    layer = 2 * width * (2 * queries + 2 * keys + 3 * cfg.intermediate_size)
    layer += 4 * queries * context
    return round(tokens * (cfg.num_hidden_layers * layer + 2 * width * logits))


def decode(cfg: config.Blip3oConfig, batch: int, prompt: int, group: int = 1) -> int:
    """Prefill of `prompt` tokens for each `group` of rows, then the image tokens, each seeing what
    is written, with logits of the image range only."""
    tokens, codes = cfg.ta_tok.num_tokens, cfg.vocab.num_image_tokens
    written = qwen3(cfg.qwen3, batch * tokens, prompt + (tokens + 1) / 2, codes)
    return qwen3(cfg.qwen3, batch // group * prompt, (prompt + 1) / 2) + written


def connector(cfg: config.Blip3oConfig, tokens: int) -> int:
    """Of `tokens` hidden states."""
    return _connector(tokens, cfg.qwen3.hidden_size, cfg.sana.caption_channels)


def source_connectors(cfg: config.Blip3oConfig, images: int) -> int:
    """Of `images` source images: latents to condition tokens, features to the prompt's
    embeddings, where the model has these."""
    total = 0
    if cfg.reference_tokens:
        pixels = images * cfg.sana.sample_size**2
        total += _connector(pixels, cfg.dc_ae.latent_channels, cfg.sana.caption_channels)
    if cfg.use_tar_siglip_features:
        tokens, vision = images * cfg.ta_tok.num_tokens, cfg.ta_tok.encoder.hidden_size
        total += _connector(tokens, vision, cfg.qwen3.hidden_size)
    return total


def _connector(tokens: int, inputs: int, width: int) -> int:
    return 2 * tokens * width * (inputs + width)


def sana_condition(cfg: config.SanaConfig, tokens: int) -> int:
    """The caption projection of `tokens` tokens and their keys and values in every block."""
    width = cfg.hidden_size
    return 2 * tokens * width * (cfg.caption_channels + width + 2 * cfg.num_layers * width)


def sana(
    cfg: config.SanaConfig, rows: int, condition: int, without: int = 0, grids: int = 1
) -> int:
    """A forward of `rows` latents, with keys and values of a condition of `condition` tokens each
    given, but for `without` of them, whose cross-attention is given. Of `grids` latents side by
    side, the first's velocity is computed."""
    width, pixels = cfg.hidden_size, cfg.sample_size**2
    # projections; the state and its product with the queries
    own = 4 * width * width + 2 * width * cfg.attention_head_dim
    cross = 2 * width * width + 2 * width * condition
    mlp = 3 * width * cfg.mlp_hidden + 9 * 2 * cfg.mlp_hidden
    layer = grids * pixels * (rows * (own + mlp) + (rows - without) * cross)
    time = 256 * width + width * width + 6 * width * width
    if cfg.few_steps:
        time += 4 * 256 * width + width * width
    ends = pixels * width * (grids * cfg.in_channels + cfg.out_channels)
    return 2 * (cfg.num_layers * layer + rows * (time + ends))


def denoise(cfg: config.Blip3oConfig, batch: int, guided: bool = True) -> tuple[int, int]:
    """Of `batch` images, with guidance two rows each unless the model guides by itself: (what is
    needed once, a step).

    Without positions the unconditional half's tokens are all equal, so that one stands for them.
    """
    condition, positions = cfg.num_condition_tokens, cfg.sana.condition_positions
    if not guided or cfg.sana.few_steps:
        once = connector(cfg, batch * condition) + sana_condition(cfg.sana, batch * condition)
        return once, sana(cfg.sana, batch, condition)
    tokens = 2 * batch * condition if positions else batch * condition + 1
    once = connector(cfg, tokens) + sana_condition(cfg.sana, tokens)
    return once, sana(cfg.sana, 2 * batch, condition, without=0 if positions else batch)


def _dc_ae_block(cfg: config.DcAeConfig, stage: int) -> int:
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


def _dc_ae(cfg: config.DcAeConfig, rows: int, side: int, layers: tuple[int, ...], taps: int) -> int:
    """One way through the autoencoder.

    `taps` are the multiply-adds of a change of resolution, for each pixel of the coarse side and
    pair of channels.
    """
    widths, last = cfg.block_out_channels, len(layers) - 1
    pixels = [(side * 2 ** (last - stage)) ** 2 for stage in range(last + 1)]
    # Convolutions at the latents and at the image; the latter may change the resolution too.
    total = 9 * cfg.latent_channels * widths[-1] * pixels[-1]
    total += 3 * (9 * widths[0] * pixels[0] if layers[0] else taps * widths[1] * pixels[1])
    for stage, count in enumerate(layers):
        total += count * pixels[stage] * _dc_ae_block(cfg, stage)
        if count and stage < last:
            total += taps * widths[stage] * widths[stage + 1] * pixels[stage + 1]
    return 2 * rows * total


def dc_ae_decode(cfg: config.DcAeConfig, rows: int, side: int) -> int:
    """Latents of `side` x `side` to images."""
    # Four taps at each of four repeated pixels, or nine taps to four times the outputs.
    taps = 16 if cfg.upsample_block_type == "interpolate" else 36
    return _dc_ae(cfg, rows, side, cfg.decoder_layers_per_block, taps)


def dc_ae_encode(cfg: config.DcAeConfig, rows: int, side: int) -> int:
    """Images to latents of `side` x `side`; a halving convolution costs the same in both forms."""
    return _dc_ae(cfg, rows, side, cfg.encoder_layers_per_block, taps=9)


def ta_tok_encode(cfg: config.TaTokConfig, rows: int, features: int = 0) -> int:
    """Images to codes: the layers of the vision transformer that are used, and the nearest code; of
    `features` more images the layers alone."""
    vit, dim, codes = cfg.encoder, cfg.bottleneck_dim, cfg.codebook_size
    width, patches = vit.hidden_size, vit.grid**2
    layer = 2 * width * (2 * width + vit.intermediate_size + patches)
    encoder = patches * (vit.patch_size**2 * 3 * width + cfg.num_encoder_layers * layer)
    choice = cfg.num_tokens * (width * width + width * dim + dim * codes)
    # The codebook is projected once.
    return 2 * ((rows + features) * encoder + rows * choice + codes * dim * dim)


def render(
    cfg: config.Blip3oConfig, batch: int, num_inference_steps: int, guided: bool = True
) -> int:
    """Latents and pixels of `batch` images."""
    once, step = denoise(cfg, batch, guided)
    pixels = dc_ae_decode(cfg.dc_ae, batch, cfg.sana.sample_size)
    return once + num_inference_steps * step + pixels


def text_to_image(
    cfg: config.Blip3oConfig, batch: int, prompt: int, num_inference_steps: int
) -> int:
    """Tokens, latents with guidance and pixels of `batch` images."""
    return decode(cfg, batch, prompt) + render(cfg, batch, num_inference_steps)


def policy_step(
    cfg: config.Blip3oConfig, batch: int, length: int, logits: int, referred: bool, updates: int
) -> int:
    """`updates` of the transformer on `batch` rows of `length` tokens, with that many `logits` of
    each image token: three forwards' worth each, and one of the first policy if it is `referred`
    to."""
    tokens, width = cfg.ta_tok.num_tokens, cfg.qwen3.hidden_size
    forward = qwen3(cfg.qwen3, batch * length, (length + 1) / 2)
    forward += 2 * batch * tokens * width * logits
    return (3 * updates + referred) * forward


def edit(cfg: config.Blip3oConfig, batch: int, prompt: int, num_inference_steps: int) -> int:
    """`batch` edits that nothing guides, as they are by default, with as many source images each as
    the model has places for, which are among the `prompt` tokens."""
    images, side = batch * cfg.max_sources, cfg.sana.sample_size
    features = images if cfg.use_tar_siglip_features else 0
    encoders = ta_tok_encode(cfg.ta_tok, images - features, features)
    if cfg.reads_source_latents:
        encoders += dc_ae_encode(cfg.dc_ae, images, side)
    # SANA, whose condition or grid a source may widen.
    condition = cfg.num_condition_tokens
    once = connector(cfg, batch * condition) + source_connectors(cfg, images)
    condition += cfg.max_sources * side**2 if cfg.reference_tokens else 0
    once += sana_condition(cfg.sana, batch * condition)
    step = sana(cfg.sana, batch, condition, grids=2 if cfg.use_und_image_vae_as_noise else 1)
    pixels = dc_ae_decode(cfg.dc_ae, batch, side)
    return encoders + decode(cfg, batch, prompt) + once + num_inference_steps * step + pixels


def image_encoders(cfg: config.Blip3oConfig, batch: int, sources: int = 0) -> int:
    """Images, and `sources` source images of each, to codes and to latents: what a cache saves of a
    training step."""
    images = batch * sources
    features = images if cfg.use_tar_siglip_features else 0
    codes = ta_tok_encode(cfg.ta_tok, batch + images - features, features)
    images = images if cfg.reads_source_latents else 0
    return codes + dc_ae_encode(cfg.dc_ae, batch + images, cfg.sana.sample_size)


def _conditioned(cfg: config.Blip3oConfig, batch: int, sources: int) -> tuple[int, int]:
    """A forward of SANA's condition, which `sources` of each row may widen, and of all the rest,
    whose grid they may widen."""
    references = sources * cfg.sana.sample_size**2 if cfg.reference_tokens else 0
    condition = cfg.num_condition_tokens + references
    grids = 2 if sources and cfg.use_und_image_vae_as_noise else 1
    once = sana_condition(cfg.sana, batch * condition)
    return once, sana(cfg.sana, batch, condition, grids=grids)


def distill_step(cfg: config.Blip3oConfig, batch: int, length: int, sources: int = 0) -> int:
    """As `joint_step`, of `train.distill`: a forward of the transformer; of SANA three forwards'
    worth for what is trained, two for the velocities that its target is made of, and two for the
    derivative, with respect to which the condition is fixed."""
    rows = qwen3(cfg.qwen3, batch * length, (length + 1) / 2)
    trained = connector(cfg, batch * cfg.num_condition_tokens)
    trained += source_connectors(cfg, batch * sources)
    condition, rest = _conditioned(cfg, batch, sources)
    return rows + 5 * trained + 6 * condition + 7 * rest + image_encoders(cfg, batch, sources)


def joint_step(
    cfg: config.Blip3oConfig, batch: int, length: int, whole_sana: bool = True, sources: int = 0
) -> int:
    """A training step on rows of `length` tokens: three forwards' worth for what is trained (the
    backward pass is two), two for SANA's blocks where only the captions' way into them is trained,
    and one for the frozen tokenizer and autoencoder. Attention is counted as causal, half of the
    square. Every row has places for `sources` source images, which are computed, filled or not."""
    # Qwen3 and the connectors.
    trained = qwen3(cfg.qwen3, batch * length, (length + 1) / 2, cfg.qwen3.vocab_size)
    trained += connector(cfg, batch * cfg.num_condition_tokens)
    trained += source_connectors(cfg, batch * sources)
    diffusion = sum(_conditioned(cfg, batch, sources))
    passes = 3 if whole_sana else 2
    return 3 * trained + passes * diffusion + image_encoders(cfg, batch, sources)
