"""TA-Tok's names in PyTorch (csuhan/TA-Tok `ta_tok.pth`, or a BLIP3o checkpoint) and here."""

from blip3o_jax.config import TaTokConfig
from blip3o_jax.convert.rules import CONV, HEADS_IN, HEADS_OUT, Rule, linear, norm, under

# SiglipEncoder's, in the encoder and in the decoder.
LAYER = [
    *norm("layer_norm1 layer_norm2", bias=True),
    *linear("self_attn.q_proj self_attn.k_proj self_attn.v_proj", "", HEADS_OUT, "(n h) -> n h"),
    *linear("self_attn.out_proj", pattern=HEADS_IN),
    *linear("mlp.fc1 mlp.fc2"),
]


def ta_tok_rules(cfg: TaTokConfig) -> list[Rule]:
    """Every parameter of models.ta_tok.TaTok, the decoder's as `published_name` has them."""
    decoder = "decoder.vision_model"
    return [
        *linear("encoder.embeddings.patch_embedding", "encoder/patch_embedding", CONV),
        Rule("encoder.embeddings.position_embedding.weight", "encoder/position_embedding"),
        *under("encoder.encoder.layers.{}.", "encoder/layers/", LAYER),
        *linear("encode_task_layer.0", "encode_task_layer"),
        *linear("bottleneck.in_linear"),
        Rule("bottleneck.regularizer.embedding.weight", "bottleneck/regularizer/embedding"),
        *linear("bottleneck.regularizer.embedding_proj bottleneck.out_linear"),
        *linear(f"{decoder}.embeddings.patch_embedding", "decoder/patch_embedding"),
        Rule(f"{decoder}.embeddings.position_embedding.weight", "decoder/position_embedding"),
        *under(f"{decoder}.encoder.layers.{{}}.", "decoder/layers/", LAYER),
        *norm(f"{decoder}.post_layernorm", "decoder/post_layernorm", bias=True),
        *linear("decode_task_layer.0", "decode_task_layer_0"),
        *linear("decode_task_layer.2", "decode_task_layer_2"),
    ]


def published_name(name: str) -> str:
    """transformers 5 writes `decoder.X` where the published files (transformers 4) have
    `decoder.vision_model.X`; both name one tensor."""
    inner = name.removeprefix("decoder.")
    current = inner == name or inner.startswith("vision_model.")
    return name if current else f"decoder.vision_model.{inner}"


def ignored(cfg: TaTokConfig) -> dict[str, str]:
    """{shell pattern of published tensors that this model does not have: the reason}."""
    unused = "TA-Tok takes the encoder's hidden state before it"
    layers = range(cfg.num_encoder_layers, cfg.encoder.num_hidden_layers)
    return {
        **{f"encoder.encoder.layers.{i}.*": unused for i in layers},
        "encoder.post_layernorm.*": unused,
        "encoder.head.*": "pools the encoder's output, and TA-Tok does not pool",
        "decoder.vision_model.head.*": "pools the decoder's output, and TA-Tok does not pool",
        "teacher.*": "the encoder that TA-Tok learned from, which encoding does not use",
        "scale_layer.*": "buffers that map pixels from [0,1]; this model takes pixels in [-1,1]",
    }
