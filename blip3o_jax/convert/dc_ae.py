"""The table between diffusers' AutoencoderDC and models/dc_ae.py."""

from blip3o_jax.config import DcAeConfig
from blip3o_jax.convert.rules import CONV, Rule, linear, norm, under

RES_BLOCK = [
    *linear("conv1", pattern=CONV),
    *linear("conv2", pattern=CONV, bias=None),
    *norm("norm", bias=True),
]


def _efficient_vit_block(scales: int) -> list[Rule]:
    rules = linear("attn.to_q attn.to_k attn.to_v attn.to_out", bias=None)
    for i in range(scales):
        for way in ("in", "out"):
            source = f"attn.to_qkv_multiscale.{i}.proj_{way}"
            rules += linear(source, f"attn/multiscale{i}_{way}", CONV, bias=None)
    return [
        *rules,
        *norm("attn.norm_out", bias=True),
        *linear("conv_out.conv_inverted conv_out.conv_depth", pattern=CONV),
        *linear("conv_out.conv_point", pattern=CONV, bias=None),
        *norm("conv_out.norm", bias=True),
    ]


def _blocks(cfg: DcAeConfig, stage: int, count: int, source: str, first: int) -> list[Rule]:
    """A stage's `count` blocks; theirs count from `first`, together with the resampling layer."""
    is_res = cfg.block_types[stage] == "ResBlock"
    block = RES_BLOCK if is_res else _efficient_vit_block(len(cfg.qkv_multiscales[stage]))
    prefixes = ((f"{source}.{first + i}.", f"stage{stage}_block{i}/") for i in range(count))
    return [rule for theirs, ours in prefixes for rule in under(theirs, ours, block)]


def _resampled(name: str, layers: tuple[int, ...]) -> list[Rule]:
    """The outermost convolution, inside a resampling layer when the first stage has no layers."""
    return linear(name if layers[0] > 0 else f"{name}.conv", pattern=CONV)


def dc_ae_rules(cfg: DcAeConfig) -> list[Rule]:
    """Every parameter of AutoencoderDC, without a checkpoint's prefix."""
    last = len(cfg.block_out_channels) - 1
    # Each stage of the encoder ends with its downsampling ...
    layers = cfg.encoder_layers_per_block
    encoder = [*_resampled("conv_in", layers), *linear("conv_out", pattern=CONV)]
    for stage, count in enumerate(layers):
        source = f"down_blocks.{stage}"
        encoder += _blocks(cfg, stage, count, source, first=0)
        if count > 0 and stage < last:
            encoder += linear(f"{source}.{count}.conv", f"stage{stage}_down/conv", CONV)
    # ... and each of the decoder begins with its upsampling.
    layers = cfg.decoder_layers_per_block
    decoder = [*linear("conv_in", pattern=CONV), *norm("norm_out", bias=True)]
    decoder += _resampled("conv_out", layers)
    for stage, count in enumerate(layers):
        source, has_up = f"up_blocks.{stage}", count > 0 and stage < last
        decoder += _blocks(cfg, stage, count, source, first=int(has_up))
        if has_up:
            decoder += linear(f"{source}.0.conv", f"stage{stage}_up/conv", CONV)
    return [*under("encoder.", "encoder/", encoder), *under("decoder.", "decoder/", decoder)]
