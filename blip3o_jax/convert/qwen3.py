"""The table between transformers' Qwen3ForCausalLM and models/qwen3.py."""

from blip3o_jax.config import Qwen3Config
from blip3o_jax.convert.rules import HEADS_IN, HEADS_OUT, Rule, linear, norm, under

LAYER = [
    *norm("input_layernorm post_attention_layernorm"),
    *linear("self_attn.q_proj self_attn.k_proj self_attn.v_proj", pattern=HEADS_OUT, bias=None),
    *linear("self_attn.o_proj", pattern=HEADS_IN, bias=None),
    *norm("self_attn.q_norm self_attn.k_norm"),
    *linear("mlp.gate_proj mlp.up_proj mlp.down_proj", bias=None),
]


def qwen3_rules(cfg: Qwen3Config) -> list[Rule]:
    """Every parameter, under the names of Qwen3ForCausalLM and of a BLIP3o checkpoint alike.

    A tied model has no `lm_head.weight`; a file's reader must leave out the copy that some carry.
    """
    rules = [
        Rule("model.embed_tokens.weight", "embed_tokens/embedding"),
        *under("model.layers.{}.", "layers/", LAYER),
        *norm("model.norm", "norm"),
    ]
    return rules if cfg.tie_word_embeddings else [*rules, *linear("lm_head", bias=None)]
