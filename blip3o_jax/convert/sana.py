"""The tables between diffusers' SanaTransformer2DModel and models/sana.py, and between BLIP3o's
diffusion_connector and Connector."""

from blip3o_jax.config import SanaConfig
from blip3o_jax.convert.rules import CONV, HEADS_IN, HEADS_OUT, LINEAR, Rule, linear, norm, under

POINT_WISE = "o i () () -> i o"  # a 1x1 convolution as a Linear
MODULATIONS = "(m e) d -> d m e"


def _attention(cfg: SanaConfig, name: str, qkv_bias: bool) -> list[Rule]:
    rules = linear(f"{name}.to_out.0", f"{name}/to_out", HEADS_IN)
    for part in ("to_q", "to_k", "to_v"):
        rules += linear(
            f"{name}.{part}", f"{name}/{part}", HEADS_OUT, bias="(n h) -> n h" if qkv_bias else None
        )
    if cfg.qk_norm:
        rules += [
            *norm(f"{name}.norm_q", f"{name}/norm_q"),
            *norm(f"{name}.norm_k", f"{name}/norm_k"),
        ]
    return rules


def sana_rules(cfg: SanaConfig) -> list[Rule]:
    """Every parameter of SanaTransformer2DModel, without a checkpoint's prefix."""
    block = [
        Rule("scale_shift_table", "scale_shift_table"),
        *_attention(cfg, "attn1", qkv_bias=False),
        *_attention(cfg, "attn2", qkv_bias=True),
        *linear("ff.conv_inverted", "ff/conv_inverted", POINT_WISE),
        *linear("ff.conv_depth", "ff/conv_depth", CONV),
        *linear("ff.conv_point", "ff/conv_point", POINT_WISE, bias=None),
    ]
    return [
        *linear("patch_embed.proj", "patch_embed", POINT_WISE),
        *linear("time_embed.emb.timestep_embedder.linear_1", "time_embed/linear_1"),
        *linear("time_embed.emb.timestep_embedder.linear_2", "time_embed/linear_2"),
        *linear("time_embed.linear", "time_embed/linear", MODULATIONS, bias="(m e) -> m e"),
        *linear("caption_projection.linear_1", "caption_projection/linear_1"),
        *linear("caption_projection.linear_2", "caption_projection/linear_2"),
        *norm("caption_norm", "caption_norm"),
        *under("transformer_blocks.{}.", "transformer_blocks/", block),
        Rule("scale_shift_table", "scale_shift_table"),
        *linear("proj_out", "proj_out", LINEAR),
    ]


def connector_rules() -> list[Rule]:
    """Sequential(Linear, GELU, Linear, RMSNorm) -> Connector; 1 is the activation."""
    return [*linear("0", "linear_1"), *linear("2", "linear_2"), *norm("3", "norm")]
