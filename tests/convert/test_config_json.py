"""config.json: presets survive it, a published one means the published sizes, and everything else
is refused."""

import copy
import dataclasses
import json
import operator

import pytest

from blip3o_jax.config import replace
from blip3o_jax.convert.config_json import EDIT_FLAGS, EMBEDDING, config_from_json, config_to_json
from blip3o_jax.errors import InputError
from blip3o_jax.presets import PRESETS, SANA_PRESETS, preset

# What BLIP3o-NEXT's trainer leaves behind (docs/model.md §4.1, with transformers' and LLaVA's own
# fields).
PUBLISHED = {
    "architectures": ["blip3oQwenForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "diffusion_name_or_path": "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "image_end_tag_id": 151670,
    "image_end_token_id": 217209,
    "image_start_tag_id": 151669,
    "image_start_token_id": 151674,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mm_patch_merge_type": "flat",
    "model_type": "blip3o_qwen",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_image_tokens": 65536,
    "num_key_value_heads": 8,
    "num_scale_tokens": 3,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "scale_end_token_id": 151673,
    "scale_start_token_id": 151671,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SHAPES = {EMBEDDING: (217210, 2048)}


def through_json(cfg):
    text = json.dumps(config_to_json(cfg))
    return config_from_json(
        json.loads(text), {EMBEDDING: (cfg.qwen3.vocab_size, cfg.qwen3.hidden_size)}
    )


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive(name):
    assert through_json(preset(name)) == preset(name)


def defaults_left(cfg, where="cfg"):
    """Names of the fields, at any depth, that have their class's default value."""
    for field in dataclasses.fields(cfg):
        value, name = getattr(cfg, field.name), f"{where}.{field.name}"
        if dataclasses.is_dataclass(value):
            yield from defaults_left(value, name)
        elif value == field.default:
            yield name


@pytest.mark.parametrize("as_channels", [False, True])
def test_every_field_survives(cfg, as_channels):
    changes = {
        "qwen3": {"rope_theta": 2e4, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
        "vocab": {"num_scale_tokens": 2},
        "ta_tok": {"select_layer_id": -1, "stochastic_temperature": 0.5, "pool_scale": 3},
        "sana": {
            "qk_norm": False,
            "interpolation_scale": 2.0,
            "condition_positions": True,
            "few_steps": 4,
            "norm_eps": 1e-5,
            "mlp_ratio": 3.0,
            "attention_head_dim": 4,
            "num_attention_heads": 8,
        },
        "dc_ae": {
            "downsample_block_type": "pixel_unshuffle",
            "upsample_block_type": "pixel_shuffle",
            "scaling_factor": 2.0,
        },
        "ta_tok.encoder": {"layer_norm_eps": 1e-5},
    }
    for part, fields in changes.items():
        cfg = replace(cfg, **{part: dataclasses.replace(operator.attrgetter(part)(cfg), **fields)})
    # A source is beside the noisy latents, or among their channels.
    beside, among = "use_und_image_vae_as_noise", "use_und_image_vae_as_channels"
    flags = dict.fromkeys(EDIT_FLAGS, True) | {beside: not as_channels, among: as_channels}
    channels = {"sana.in_channels": 8} if as_channels else {}
    cfg = replace(cfg, max_sources=1, **flags, **channels)
    left = ["cfg.qwen3.vocab_padding", f"cfg.{beside if as_channels else among}"]
    assert list(defaults_left(cfg)) == left  # the first is in no file
    assert through_json(cfg) == cfg


@pytest.mark.parametrize(
    ("flags", "implied"),
    [
        ({}, 0),
        ({"use_und_image_vae": False}, 0),
        ({"use_und_image_vae": True}, 4),
        ({"use_tar_siglip_features": True}, 4),
        ({"only_use_und_image_vae_as_noise": True}, 4),
        ({"use_tar_siglip_features": True, "use_und_image_vae_as_noise": True}, 1),
        ({"use_und_image_vae_as_noise": True}, 1),
        ({"use_und_image_vae": True, "use_und_image_vae_as_noise": True}, 1),
    ],
)
def test_published_flags_say_how_many_sources_an_edit_may_have(flags, implied):
    """Unless the file does, which it need not where it would say the same."""
    cfg = config_from_json(PUBLISHED | flags, SHAPES)
    assert cfg.max_sources == implied
    assert "max_sources" not in config_to_json(cfg)["blip3o_jax"]
    for other in {0, 1} - {implied}:
        changed = replace(cfg, max_sources=other)
        assert config_to_json(changed)["blip3o_jax"]["max_sources"] == other
        assert through_json(changed) == changed


@pytest.mark.parametrize("name", SANA_PRESETS)
def test_sana_presets_survive(name):
    changed = dataclasses.replace(preset("blip3o_next_3b"), sana=SANA_PRESETS[name]())
    assert through_json(changed) == changed


def test_published_file_means_the_published_model():
    cfg = config_from_json(PUBLISHED, SHAPES, "blip3o_next_3b")
    # whose vocabulary is the embedding's, not the file's 151936
    assert cfg == preset("blip3o_next_3b")
    newer = {
        key: value for key, value in PUBLISHED.items() if key not in ("rope_theta", "rope_scaling")
    }
    newer["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    newer["pad_token_id"] = newer["eos_token_id"] = None
    assert config_from_json(newer, SHAPES, "blip3o_next_3b") == cfg
    # `<image>` was added to the tokenizer after the last resize
    longer = config_from_json(PUBLISHED, {EMBEDDING: (217211, 2048)})
    assert (longer.qwen3.vocab_size, longer.vocab) == (217211, cfg.vocab)
    # Where no tensor was looked at, the ids say how long it is at least.
    assert config_from_json(PUBLISHED, None, "blip3o_next_3b") == cfg
    assert config_from_json(PUBLISHED | {"vocab_size": 217211}, None).qwen3 == longer.qwen3


def test_field_names_are_those_of_the_spec():
    """S4.1 for the ids, §2.4 and §2.5 for the diffusers objects."""
    fields = config_to_json(preset("blip3o_next_3b"))
    ids = [
        key for key in PUBLISHED if key.startswith(("image_", "scale_", "num_image", "num_scale"))
    ]
    assert len(ids) == 8
    assert {key: fields[key] for key in ids} == {key: PUBLISHED[key] for key in ids}
    assert fields["sana"] == {
        **{
            "attention_bias": False,
            "attention_head_dim": 32,
            "caption_channels": 2304,
            "cross_attention_dim": 2240,
        },
        **{
            "cross_attention_head_dim": 112,
            "dropout": 0.0,
            "guidance_embeds": False,
            "in_channels": 32,
            "interpolation_scale": None,
        },
        **{
            "mlp_ratio": 2.5,
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "num_attention_heads": 70,
            "num_layers": 20,
        },
        **{
            "num_cross_attention_heads": 20,
            "out_channels": 32,
            "patch_size": 1,
            "qk_norm": "rms_norm_across_heads",
            "sample_size": 32,
        },
        **{"guidance_embeds_scale": 0.1, "timestep_scale": 1.0},
    }
    vae = fields["sana_vae"]
    assert (
        vae["encoder_block_types"]
        == vae["decoder_block_types"]
        == ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
    )
    assert (
        vae["encoder_qkv_multiscales"]
        == vae["decoder_qkv_multiscales"]
        == [[], [], [], [5], [5], [5]]
    )
    assert (vae["downsample_block_type"], vae["upsample_block_type"], vae["scaling_factor"]) == (
        "Conv",
        "interpolate",
        0.41407,
    )


def changed(fields, path, value):
    """A copy with one value set, or removed when it is `...`."""
    fields = copy.deepcopy(fields)
    node = fields
    *parents, last = path.split("/")
    for key in parents:
        node = node[key]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return fields


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "model_type",
            "qwen2_5_vl",
            "'qwen2_5_vl' is a BLIP3o of 4B or 8B on Qwen2.5-VL; supported is BLIP3o-NEXT",
        ),
        ("vision_config", {"depth": 32}, "'blip3o_qwen' is a BLIP3o of 4B or 8B"),
        (
            "image_start_tag_id",
            ...,
            "no image_start_tag_id, so model_type 'blip3o_qwen' is not BLIP3o-NEXT",
        ),
        ("model_type", "llama", "'llama' is another family"),
        ("model_type", ..., "None is another family"),
        ("use_und_image_vae", "yes", "use_und_image_vae is 'yes', which makes no sense as bool"),
        ("hidden_size", ..., "has no hidden_size"),
        ("hidden_size", "2048", "hidden_size is '2048', which makes no sense as int"),
        ("hidden_size", True, "hidden_size is True"),
        ("num_key_value_heads", 0, "num_key_value_heads is 0"),
        ("num_key_value_heads", 5, "16 query heads do not divide by 5"),
        ("num_hidden_layers", 10**9, "num_hidden_layers is 1000000000"),
        ("rope_theta", ..., "rope_theta is None"),
        ("rope_theta", float("nan"), "rope_theta is nan"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "scaled"),
        ("rope_scaling", [3], "scaled"),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e6}}, "scaled"),
        ("rope_parameters", {"rope_theta": 1e6, "partial_rotary_factor": 0.5}, "scaled"),
        (
            "rope_parameters",
            {"rope_type": "default", "rope_theta": 10000.0},
            "rope_theta is 1000000 and rope_parameters has 10000.0",
        ),
        ("pad_token_id", 217210, "pad_token_id 217210 is outside the vocabulary of 217210 rows"),
        ("hidden_act", "gelu", "hidden_act = 'gelu'; this model has 'silu'"),
        ("attention_bias", True, "attention_bias = True"),
        ("image_end_token_id", 217210, "image_end_token_id = 217210; this model has 217209"),
        ("num_image_tokens", 65535, "image_end_token_id = 217209; this model has 217208"),
        ("image_start_token_id", -1, "image_start_token_id is -1"),
        ("sana", 3, "sana is a JSON int"),
        ("sana_vae", [], "sana_vae is a JSON list"),
        ("vision_tower", {}, "vision_tower.encoder is a JSON NoneType"),
        ("vision_tower", None, "vision_tower.encoder is a JSON NoneType"),
        ("blip3o_jax", {"colour": 1}, "blip3o_jax is"),
        ("blip3o_jax", {"max_prompt_tokens": 0}, "max_prompt_tokens is 0"),
        ("blip3o_jax", {"max_sources": -1}, "max_sources is -1"),
    ],
)
def test_a_published_file_that_cannot_work_is_refused(path, value, message):
    with pytest.raises(InputError, match=message):
        config_from_json(changed(PUBLISHED, path, value), SHAPES)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sana/num_layers", ..., "sana has no num_layers"),
        ("sana/num_layer", 3, "unknown key 'num_layer' in sana; did you mean 'num_layers'"),
        ("sana/guidance_embeds", True, "sana has guidance_embeds = True; this model has False"),
        (
            "sana/qk_norm",
            "layer_norm",
            "qk_norm = 'layer_norm'; this model has 'rms_norm_across_heads'",
        ),
        ("sana/cross_attention_dim", 2241, "cross_attention_dim = 2241; this model has 2240"),
        ("sana/num_cross_attention_heads", 19, "SANA: width 2240 is not 19 cross heads x 112"),
        ("sana/in_channels", 16, "SANA takes 16 channels, its inputs have 32"),
        ("sana/interpolation_scale", "1", "interpolation_scale is '1'"),
        ("sana/mlp_ratio", 0, "mlp_ratio is 0"),
        ("sana/mlp_ratio", 1e29, "mlp_ratio is 1e.29"),
        (
            "sana_vae/attention_head_dim",
            1000,
            "DC-AE: width 512 does not divide into heads of 1000",
        ),
        (
            "vision_tower/decoder_num_attention_heads",
            7,
            "TA-Tok: width 1152 does not divide by the decoder's 7 heads",
        ),
        ("sana_vae/decoder_block_types", ["ResBlock"] * 6, "sana_vae has decoder_block_types"),
        ("sana_vae/encoder_block_types", ["ResBlock", 3], "block_types is 3"),
        ("sana_vae/encoder_qkv_multiscales", [[]] * 17, "qkv_multiscales is"),
        ("sana_vae/encoder_block_out_channels", ..., "sana_vae has no block_out_channels"),
        ("sana_vae/decoder_act_fns", "relu", "decoder_act_fns = 'relu'"),
        ("vision_tower/encoder/hidden_act", "gelu", "vision_tower.encoder has hidden_act = 'gelu'"),
        (
            "vision_tower/bottleneck_token_num",
            100,
            "bottleneck_token_num = 100; this model has 729",
        ),
        ("vision_tower/select_layer_id", 1, "select_layer_id 1 must lie in"),
        ("vision_tower/codebook_size", 5, "65536 image tokens but a codebook of 5"),
    ],
)
def test_nested_objects_that_cannot_work_are_refused(path, value, message):
    fields = config_to_json(preset("blip3o_next_3b"))
    with pytest.raises(InputError, match=message):
        config_from_json(changed(fields, path, value), SHAPES)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 500000, "rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 1}},
        {"rope_theta": 5e5, "rope_scaling": None, "rope_parameters": {}},
    ],
)
def test_the_base_of_the_rotary_embedding_is_read(rope):
    fields = {key: x for key, x in PUBLISHED.items() if not key.startswith("rope")}
    assert config_from_json({**fields, **rope}, SHAPES).qwen3.rope_theta == 5e5


@pytest.mark.parametrize(
    ("name", "word", "kind"),
    [
        ("downsample_block_type", "pixel_unshuffle", "pixel_unshuffle"),
        ("downsample_block_type", "Conv", "Conv"),
        ("downsample_block_type", "conv", "Conv"),
        ("downsample_block_type", "anything", "Conv"),
        ("upsample_block_type", "interpolate", "interpolate"),
        ("upsample_block_type", "shuffle", "pixel_shuffle"),
    ],
)
def test_diffusers_asks_for_one_word_of_each_resampling(name, word, kind):
    fields = config_to_json(preset("blip3o_next_3b"))
    cfg = config_from_json(changed(fields, f"sana_vae/{name}", word), SHAPES)
    assert getattr(cfg.dc_ae, name) == kind
    with pytest.raises(InputError, match=f"{name} is 3, which makes no sense as str"):
        config_from_json(changed(fields, f"sana_vae/{name}", 3), SHAPES)


@pytest.mark.parametrize("shapes", [{}, {EMBEDDING: (217210,)}])
def test_the_embedding_must_be_there(shapes):
    with pytest.raises(InputError, match=f"no matrix {EMBEDDING}"):
        config_from_json(PUBLISHED, shapes)


def test_versions_of_other_libraries_are_no_unknown_keys():
    fields = config_to_json(preset("blip3o_next_3b"))
    fields["sana"] |= {"_class_name": "SanaTransformer2DModel", "_diffusers_version": "0.33.0.dev0"}
    del fields["sana"]["timestep_scale"]  # a class default that the published file leaves out
    assert config_from_json(fields, SHAPES) == preset("blip3o_next_3b")
