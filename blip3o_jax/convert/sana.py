"""The tables of diffusers' SanaTransformer2DModel and of BLIP3o's diffusion_connector."""

from blip3o_jax.config import SanaConfig
from blip3o_jax.convert.rules import CONV, HEADS_IN, HEADS_OUT, Rule, linear, norm, under

POINT_WISE = "o i () () -> i o"  # a 1x1 convolution as a Linear
MODULATIONS = "(m e) d -> d m e"


def _attention(cfg: SanaConfig, name: str, qkv_bias: str | None) -> list[Rule]:
    """Self- (attn1) or cross-attention (attn2), whose biases differ."""
    return [
        *linear(f"{name}.to_out.0", f"{name}/to_out", HEADS_IN),
        *linear(f"{name}.to_q {name}.to_k {name}.to_v", pattern=HEADS_OUT, bias=qkv_bias),
        *(norm(f"{name}.norm_q {name}.norm_k") if cfg.qk_norm else []),
    ]


def sana_rules(cfg: SanaConfig) -> list[Rule]:
    """Every parameter of SanaTransformer2DModel, without a checkpoint's prefix."""
    # One block of a stack that the model scans.
    block = [
        Rule("scale_shift_table", "scale_shift_table"),
        *_attention(cfg, "attn1", qkv_bias=None),
        *_attention(cfg, "attn2", qkv_bias="(n h) -> n h"),
        *linear("ff.conv_inverted", pattern=POINT_WISE),
        *linear("ff.conv_depth", pattern=CONV),
        *linear("ff.conv_point", pattern=POINT_WISE, bias=None),
    ]
    embedder = "time_embed.emb.timestep_embedder"
    # Ours: without them diffusers' module gives the velocity at a noise level.
    span = linear("span_embed.linear_1") + linear("span_embed.linear_2", bias=None)
    return [
        *(span if cfg.few_steps else []),
        *linear("patch_embed.proj", "patch_embed", POINT_WISE),
        *linear(f"{embedder}.linear_1", "time_embed/linear_1"),
        *linear(f"{embedder}.linear_2", "time_embed/linear_2"),
        *linear("time_embed.linear", pattern=MODULATIONS, bias="(m e) -> m e"),
        *linear("caption_projection.linear_1 caption_projection.linear_2"),
        *norm("caption_norm"),
        *under("transformer_blocks.{}.", "transformer_blocks/", block),
        Rule("scale_shift_table", "scale_shift_table"),
        *linear("proj_out"),
    ]


def connector_rules() -> list[Rule]:
    """Sequential(Linear, GELU, Linear, RMSNorm) -> Connector; 1 is the activation."""
    return [*linear("0", "linear_1"), *linear("2", "linear_2"), *norm("3", "norm")]
