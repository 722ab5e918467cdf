"""The names and shapes of the published 3B checkpoint, one by one, from the tables of docs/model.md
§3. Nothing is allocated."""

import itertools
import math
import re

import pytest

from blip3o_jax.config import replace
from blip3o_jax.convert.published import ignored_tensors, published_name, published_rules
from blip3o_jax.convert.rules import torch_shapes
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.presets import preset

# A line: name with {first-last} or {one,other}, then its shape. `name.*` stands for weight and
# bias, the bias as long as the weight's first axis.
QWEN3 = """
model.embed_tokens.weight 217210 2048
model.layers.{0-27}.{input_layernorm,post_attention_layernorm}.weight 2048
model.layers.{0-27}.self_attn.q_proj.weight 2048 2048
model.layers.{0-27}.self_attn.{k_proj,v_proj}.weight 1024 2048
model.layers.{0-27}.self_attn.o_proj.weight 2048 2048
model.layers.{0-27}.self_attn.{q_norm,k_norm}.weight 128
model.layers.{0-27}.mlp.{gate_proj,up_proj}.weight 6144 2048
model.layers.{0-27}.mlp.down_proj.weight 2048 6144
model.norm.weight 2048
"""
CONNECTOR = """
model.diffusion_connector.0.* 2304 2048
model.diffusion_connector.2.* 2304 2304
model.diffusion_connector.3.weight 2304
"""
SANA = """
patch_embed.proj.* 2240 32 1 1
time_embed.emb.timestep_embedder.linear_1.* 2240 256
time_embed.emb.timestep_embedder.linear_2.* 2240 2240
time_embed.linear.* 13440 2240
caption_projection.linear_1.* 2240 2304
caption_projection.linear_2.* 2240 2240
caption_norm.weight 2240
transformer_blocks.{0-19}.scale_shift_table 6 2240
transformer_blocks.{0-19}.attn1.{to_q,to_k,to_v}.weight 2240 2240
transformer_blocks.{0-19}.attn2.{to_q,to_k,to_v}.* 2240 2240
transformer_blocks.{0-19}.{attn1,attn2}.{norm_q,norm_k}.weight 2240
transformer_blocks.{0-19}.{attn1,attn2}.to_out.0.* 2240 2240
transformer_blocks.{0-19}.ff.conv_inverted.* 11200 2240 1 1
transformer_blocks.{0-19}.ff.conv_depth.* 11200 1 3 3
transformer_blocks.{0-19}.ff.conv_point.weight 2240 5600 1 1
scale_shift_table 2 2240
proj_out.* 32 2240
"""


def _res(block, c):
    return f"{block}.conv1.* {c} {c} 3 3\n{block}.conv2.weight {c} {c} 3 3\n{block}.norm.* {c}\n"


def _vit(block, c):
    return f"""
{block}.attn.{{to_q,to_k,to_v}}.weight {c} {c}
{block}.attn.to_qkv_multiscale.0.proj_in.weight {3 * c} 1 5 5
{block}.attn.to_qkv_multiscale.0.proj_out.weight {3 * c} 32 1 1
{block}.attn.to_out.weight {c} {2 * c}
{block}.attn.norm_out.* {c}
{block}.conv_out.conv_inverted.* {8 * c} {c} 1 1
{block}.conv_out.conv_depth.* {8 * c} 1 3 3
{block}.conv_out.conv_point.weight {c} {4 * c} 1 1
{block}.conv_out.norm.* {c}
"""


DC_AE = f"""
encoder.conv_in.* 128 3 3 3
{_res("encoder.down_blocks.0.{0,1}", 128)}{_res("encoder.down_blocks.1.{0,1}", 256)}{_res("encoder.down_blocks.2.{0,1}", 512)}
encoder.down_blocks.0.2.conv.* 256 128 3 3
encoder.down_blocks.1.2.conv.* 512 256 3 3
encoder.down_blocks.2.2.conv.* 512 512 3 3
{_vit("encoder.down_blocks.3.{0-2}", 512)}{_vit("encoder.down_blocks.{4,5}.{0-2}", 1024)}
encoder.down_blocks.3.3.conv.* 1024 512 3 3
encoder.down_blocks.4.3.conv.* 1024 1024 3 3
encoder.conv_out.* 32 1024 3 3
decoder.conv_in.* 1024 32 3 3
decoder.up_blocks.0.0.conv.* 128 256 3 3
decoder.up_blocks.1.0.conv.* 256 512 3 3
decoder.up_blocks.2.0.conv.* 512 512 3 3
decoder.up_blocks.3.0.conv.* 512 1024 3 3
decoder.up_blocks.4.0.conv.* 1024 1024 3 3
{_res("decoder.up_blocks.0.{1-3}", 128)}{_res("decoder.up_blocks.1.{1-3}", 256)}{_res("decoder.up_blocks.2.{1-3}", 512)}
{_vit("decoder.up_blocks.3.{1-3}", 512)}{_vit("decoder.up_blocks.4.{1-3}", 1024)}{_vit("decoder.up_blocks.5.{0-2}", 1024)}
decoder.norm_out.* 128
decoder.conv_out.* 3 128 3 3
"""


def _siglip_layer(layer, hidden):
    return f"""
{layer}.{{layer_norm1,layer_norm2}}.* 1152
{layer}.self_attn.{{q_proj,k_proj,v_proj,out_proj}}.* 1152 1152
{layer}.mlp.fc1.* {hidden} 1152
{layer}.mlp.fc2.* 1152 {hidden}
"""


def _siglip_head(head, hidden):
    return f"""
{head}.probe 1 1 1152
{head}.attention.in_proj_weight 3456 1152
{head}.attention.in_proj_bias 3456
{head}.attention.out_proj.* 1152 1152
{head}.layernorm.* 1152
{head}.mlp.fc1.* {hidden} 1152
{head}.mlp.fc2.* 1152 {hidden}
"""


TA_TOK = f"""
encoder.embeddings.patch_embedding.* 1152 3 14 14
encoder.embeddings.position_embedding.weight 729 1152
{_siglip_layer("encoder.encoder.layers.{0-25}", 4304)}
encode_task_layer.0.* 1152 1152
decode_task_layer.{{0,2}}.* 1152 1152
bottleneck.in_linear.* 1536 1152
bottleneck.out_linear.* 1536 1536
bottleneck.regularizer.embedding.weight 65536 1536
bottleneck.regularizer.embedding_proj.* 1536 1536
decoder.vision_model.embeddings.patch_embedding.* 1152 1536
decoder.vision_model.embeddings.position_embedding.weight 256 1152
{_siglip_layer("decoder.vision_model.encoder.layers.{0-2}", 3072)}
decoder.vision_model.post_layernorm.* 1152
"""
TA_TOK_UNUSED = f"""
{_siglip_layer("encoder.encoder.layers.26", 4304)}
encoder.post_layernorm.* 1152
{_siglip_head("encoder.head", 4304)}{_siglip_head("decoder.vision_model.head", 3072)}
"""
TA_TOK_BUFFERS = "scale_layer.{shift,scale} 1 3 1 1"


def alternatives(braces):
    first, dash, last = braces.partition("-")
    return map(str, range(int(first), int(last) + 1)) if dash else braces.split(",")


def table(text, prefix=""):
    """{name: shape} of the lines of `text`."""
    found = {}
    for line in filter(None, text.split("\n")):
        pattern, *sizes = line.split()
        shape = tuple(map(int, sizes))
        fixed = re.split(r"\{[^}]*\}", pattern)
        for choice in itertools.product(
            *(alternatives(braces) for braces in re.findall(r"\{([^}]*)\}", pattern))
        ):
            name = prefix + "".join(
                part + chosen for part, chosen in itertools.zip_longest(fixed, choice, fillvalue="")
            )
            found |= (
                {f"{name[:-1]}weight": shape, f"{name[:-1]}bias": shape[:1]}
                if name.endswith(".*")
                else {name: shape}
            )
    return found


PREFIX = "model.vision_tower.vision_tower."
PARTS = {  # our tables, their entries and numbers of parameters (§2.1 to §2.6, §3)
    "qwen3": (table(QWEN3), 310, 1_854_256_128),
    "diffusion_connector": (table(CONNECTOR), 5, 10_033_920),
    "sana": (table(SANA, "model.sana."), 476, 1_604_641_952),
    "dc_ae": (table(DC_AE, "model.sana_vae."), 375, 312_250_275),
    "ta_tok": (table(TA_TOK, PREFIX), 485, None),
}


def size(shapes):
    return sum(map(math.prod, shapes.values()))


@pytest.fixture(scope="module")
def shapes():
    """Torch shapes of the 3B model by our part."""
    cfg = preset("blip3o_next_3b")
    abstract, rules = Blip3o(cfg).abstract(), published_rules(cfg)
    assert torch_shapes(rules, abstract).keys() == {
        rule for part in PARTS for rule in PARTS[part][0]
    }
    return {
        part: torch_shapes(
            [rule for rule in rules if rule.path.startswith(f"{part}/")], {part: abstract[part]}
        )
        for part in PARTS
    }


@pytest.mark.parametrize("part", PARTS)
def test_names_and_shapes(shapes, part):
    expected, entries, parameters = PARTS[part]
    assert shapes[part] == expected
    assert len(expected) == entries
    assert parameters is None or size(expected) == parameters


def test_the_rest_of_ta_tok_is_known(shapes):
    """What is read and what is ignored make up the published tower, 591,032,000 parameters and two
    buffers."""
    unused, buffers = table(TA_TOK_UNUSED, PREFIX), table(TA_TOK_BUFFERS, PREFIX)
    assert size(shapes["ta_tok"]) + size(unused) == 591_032_000
    cfg = preset("blip3o_next_3b")
    names = [*shapes["ta_tok"], *unused, *buffers, *shapes["sana"], *shapes["qwen3"]]
    assert set(ignored_tensors(cfg, names)) == {*unused, *buffers}
    assert all(published_name(name) == name for name in names)


def test_the_untied_head_is_named():
    cfg = replace(preset("blip3o_next_0_6b"), **{"qwen3.tie_word_embeddings": False})
    rules = [rule for rule in published_rules(cfg) if rule.path.startswith("qwen3/")]
    found = torch_shapes(rules, Blip3o(cfg).abstract(("qwen3",)))
    assert found["lm_head.weight"] == (217210, 1024)
    assert len(found) == 311
