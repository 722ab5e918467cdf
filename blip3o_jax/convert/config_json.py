"""The checkpoint's config.json and Blip3oConfig, both ways.

The top level is transformers' Qwen3Config with the ids that BLIP3o adds (docs/model.md §4.1).
Published files say nothing of the other networks: then they are SANA 1.5 1.6B, its DC-AE and
TA-Tok, as in our defaults. Files written here say it in three more objects named after the PyTorch
attributes: "sana" and "sana_vae" in the field names of diffusers' SanaTransformer2DModel and
AutoencoderDC, "vision_tower" in those of TA-Tok's arguments and transformers' SiglipVisionConfig.
"""

import dataclasses
import json
import reprlib
from collections.abc import Mapping
from typing import Any

from blip3o_jax import config
from blip3o_jax.config import Blip3oConfig, DcAeConfig, SanaConfig, TaTokConfig, VocabConfig, typed
from blip3o_jax.errors import InputError, nearest, require

EMBEDDING = "model.embed_tokens.weight"
SUPPORTED = "supported is BLIP3o-NEXT, which stands on Qwen3, SANA and TA-Tok"
# beginnings of model_type; the first two also name the BLIP3o of 4B and 8B
FAMILIES = ("blip3o_qwen", "llava_qwen", "qwen3")

# Facts of the architecture that have no field here: written, and a file that says otherwise is
# refused.
QWEN3_FACTS = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}
SIGLIP_FACTS = {"model_type": "siglip_vision_model", "num_channels": 3}
SIGLIP_FACTS |= {"hidden_act": "gelu_pytorch_tanh", "attention_dropout": 0.0}
SANA_FACTS = {"patch_size": 1, "dropout": 0.0, "attention_bias": False}
SANA_FACTS |= {"norm_elementwise_affine": False, "guidance_embeds": False}
SANA_FACTS |= {"guidance_embeds_scale": 0.1, "timestep_scale": 1.0}
DC_AE_FACTS = {"in_channels": 3, "decoder_norm_types": "rms_norm", "decoder_act_fns": "silu"}
DC_AE_FACTS |= {"decoder_conv_act_fn": "relu"}
DC_AE_FACTS |= {"encoder_out_shortcut": True, "decoder_in_shortcut": True}
QK_NORM = "rms_norm_across_heads"
# one field here, one for each half in diffusers
DC_AE_SHARED = ("block_types", "block_out_channels", "qkv_multiscales")
# Kinds of resampling: what all words but one mean, and that one.
RESAMPLING_WORDS = {"downsample_block_type": ("Conv", "pixel_unshuffle")}
RESAMPLING_WORDS |= {"upsample_block_type": ("pixel_shuffle", "interpolate")}
# fields of Blip3oConfig that PyTorch has no name for
OURS = ("name", "max_prompt_tokens", "connector_eps")
# and those of them that are written only where they say something
OURS_OF_EDITS = ("max_sources", "use_und_image_vae_as_channels")
OURS_OF_SANA = {"condition_positions": False, "few_steps": 0}
# What the editing checkpoints say at the top level, and others leave out.
EDIT_FLAGS = ("use_und_image_vae", "use_und_image_vae_as_noise")
EDIT_FLAGS += ("only_use_und_image_vae_as_noise", "use_tar_siglip_features")
Shapes = Mapping[str, tuple[int, ...]]  # of tensors by published name


def _ta_tok_json(cfg: TaTokConfig) -> dict[str, Any]:
    derived = {"input_size": cfg.encoder.image_size, "bottleneck_token_num": cfg.num_tokens}
    derived["encoder"] = {**dataclasses.asdict(cfg.encoder), **SIGLIP_FACTS}
    return {**dataclasses.asdict(cfg), **derived}


def sana_json(cfg: SanaConfig) -> dict[str, Any]:
    """In the field names of diffusers' SanaTransformer2DModel."""
    fields = dataclasses.asdict(cfg)
    # Keys that diffusers does not know are written only where they say something.
    fields = {key: x for key, x in fields.items() if x or key not in OURS_OF_SANA}
    derived = {"cross_attention_dim": cfg.hidden_size, "qk_norm": QK_NORM if cfg.qk_norm else None}
    return {**fields, **derived, **SANA_FACTS}


def dc_ae_json(cfg: DcAeConfig) -> dict[str, Any]:
    """In the field names of diffusers' AutoencoderDC."""
    fields = dataclasses.asdict(cfg)
    for name in DC_AE_SHARED:
        fields[f"encoder_{name}"] = fields[f"decoder_{name}"] = fields.pop(name)
    return {**fields, **DC_AE_FACTS}


def _vocab_json(cfg: VocabConfig) -> dict[str, Any]:
    last_scale = cfg.scale_start_token_id + cfg.num_scale_tokens - 1
    ends = {"scale_end_token_id": last_scale, "image_end_token_id": cfg.image_end_token_id}
    return {**dataclasses.asdict(cfg), **ends}


def _edits_json(cfg: Blip3oConfig) -> dict[str, Any]:
    implied = {"max_sources": _max_sources(vars(cfg)), "use_und_image_vae_as_channels": False}
    fields = {name: getattr(cfg, name) for name in OURS_OF_EDITS}
    return {name: value for name, value in fields.items() if value != implied[name]}


def _max_sources(flags: Mapping[str, Any]) -> int:
    """Source images that an edit may have where a file does not say: one beside the noisy latents
    or among their channels, four of every other way of taking them."""
    one = ("use_und_image_vae_as_noise", "use_und_image_vae_as_channels")
    if any(flags.get(name) for name in one):
        return 1
    return 4 if any(flags.get(name) for name in EDIT_FLAGS) else 0


def config_to_json(cfg: Blip3oConfig, dtype: str = "float32") -> dict[str, Any]:
    """The contents of config.json; `dtype` is that of the weights beside it."""
    # The padding belongs to a mesh, not to the model.
    qwen3 = dataclasses.asdict(cfg.qwen3)
    del qwen3["vocab_padding"]
    fields = {
        "model_type": "blip3o_qwen",
        "architectures": ["blip3oQwenForCausalLM"],
        "torch_dtype": dtype,
        **qwen3,
        "rope_scaling": None,
        "max_position_embeddings": 40960,
        **QWEN3_FACTS,
        **_vocab_json(cfg.vocab),
        **{name: True for name in EDIT_FLAGS if getattr(cfg, name)},
        **{key: to_json(getattr(cfg, part)) for part, (key, to_json, _) in NETWORKS.items()},
        "blip3o_jax": {name: getattr(cfg, name) for name in OURS} | _edits_json(cfg),
    }
    return json.loads(json.dumps(fields))  # tuples become lists


def _object(fields: Any, section: str) -> Mapping[str, Any]:
    """`fields` itself; InputError when it is not a JSON object."""
    kind = type(fields).__name__
    require(isinstance(fields, Mapping), f"{section} is a JSON {kind} and should be an object.")
    return fields


def read_fields(cls: type, fields: Any, section: str, **given) -> Any:
    """`cls` from the JSON object `fields` by its field names, but for those that are `given`."""
    fields = _object(fields, section)
    for field in dataclasses.fields(cls):
        if field.name not in given:
            require(field.name in fields, f"{section} has no {field.name}.")
            given[field.name] = typed(fields[field.name], field.type, field.name)
    return cls(**given)


def _agree(fields: Mapping[str, Any], expected: Mapping[str, Any], section: str) -> None:
    """InputError when `fields` has a key that `expected` lacks, or another value under it."""
    expected = json.loads(json.dumps(expected))
    # Not _class_name, _diffusers_version, ...
    for name in (name for name in fields if not name.startswith("_")):
        if name not in expected:
            raise InputError(f"unknown key {name!r} in {section}; {nearest(name, expected)}")
        theirs, ours = reprlib.repr(fields[name]), reprlib.repr(expected[name])
        same = fields[name] == expected[name]
        require(same, f"{section} has {name} = {theirs}; this model has {ours}.")


def _read_ta_tok(fields: Any) -> TaTokConfig:
    # The encoder's fields are an object of their own.
    inner = fields.get("encoder") if isinstance(fields, Mapping) else None
    encoder = read_fields(config.SiglipConfig, inner, "vision_tower.encoder")
    cfg = read_fields(TaTokConfig, fields, "vision_tower", encoder=encoder)
    expected = _ta_tok_json(cfg)
    _agree(inner, expected["encoder"], "vision_tower.encoder")
    _agree(fields, {**expected, "encoder": inner}, "vision_tower")
    return cfg


def read_sana(fields: Any) -> SanaConfig:
    """From diffusers' field names, as in SanaTransformer2DModel's own config.json."""
    fields = OURS_OF_SANA | dict(_object(fields, "sana"))
    cfg = read_fields(SanaConfig, fields, "sana", qk_norm=fields.get("qk_norm") is not None)
    _agree(fields, OURS_OF_SANA | sana_json(cfg), "sana")
    return cfg


def read_dc_ae(fields: Any) -> DcAeConfig:
    """From diffusers' field names, as in AutoencoderDC's own config.json."""
    fields = dict(_object(fields, "sana_vae"))
    # diffusers asks for one word only, and takes every other as the other kind.
    for name, (other, word) in RESAMPLING_WORDS.items():
        if isinstance(kind := fields.get(name), str) and kind != word:
            fields[name] = other
    # Our one field from the encoder's; the decoder's must agree.
    shared = {x: fields[f"encoder_{x}"] for x in DC_AE_SHARED if f"encoder_{x}" in fields}
    cfg = read_fields(DcAeConfig, {**fields, **shared}, "sana_vae")
    theirs = {name: value for name, value in fields.items() if name not in DC_AE_SHARED}
    _agree(theirs, dc_ae_json(cfg), "sana_vae")
    return cfg


# Part -> its object in config.json, written and read.
NETWORKS = {
    "sana": ("sana", sana_json, read_sana),
    "dc_ae": ("sana_vae", dc_ae_json, read_dc_ae),
    "ta_tok": ("vision_tower", _ta_tok_json, _read_ta_tok),
}


def _rope_theta(fields: Mapping[str, Any]) -> Any:
    """The base of the rotary embedding, at the top level (transformers 4) or in `rope_parameters`
    (5); InputError when the two differ, of which each version takes another, or for a scaled one,
    which would give wrong angles silently."""
    theta = fields.get("rope_theta")
    for key in ("rope_scaling", "rope_parameters"):
        rope = fields.get(key) or {}
        is_object, names = isinstance(rope, Mapping), {"rope_type", "type", "rope_theta"}
        kind = rope.get("rope_type", rope.get("type", "default")) if is_object else None
        others = [x for name, x in rope.items() if name not in names] if is_object else []
        plain = kind == "default" and all(x is None or x == 1 for x in others)
        scaled = f"the rotary embedding is scaled ({reprlib.repr(rope)}), which is not supported."
        require(plain, scaled)
        inner = rope.get("rope_theta")
        both = f"rope_theta is {theta!r} and {key} has {inner!r}; keep the one that is meant."
        require(None in (theta, inner) or theta == inner, both)
        theta = inner if theta is None else theta
    return theta


def read_qwen3(fields: Mapping[str, Any], shapes: Shapes | None) -> config.Qwen3Config:
    """From transformers 4 or 5; the vocabulary is as long as an embedding of known shape."""
    fields = {"tie_word_embeddings": True, **fields, "rope_theta": _rope_theta(fields)}
    if shapes is not None:
        require(len(shapes.get(EMBEDDING, ())) == 2, f"the files hold no matrix {EMBEDDING}.")
        fields["vocab_size"] = shapes[EMBEDDING][0]
    _agree({name: fields[name] for name in QWEN3_FACTS if name in fields}, QWEN3_FACTS, "it")
    return read_fields(config.Qwen3Config, fields, "it", vocab_padding=0)


def check_family(fields: Mapping[str, Any]) -> None:
    """InputError unless this is the config.json of a BLIP3o-NEXT."""
    kind, name = f"model_type {fields.get('model_type')!r}", str(fields.get("model_type"))
    others = {"vision_config", "gen_vision_tower", "n_query"} & fields.keys()
    on_qwen2_5 = bool(others) or name.startswith("qwen2")
    require(not on_qwen2_5, f"{kind} is a BLIP3o of 4B or 8B on Qwen2.5-VL; {SUPPORTED}.")
    require(name.startswith(FAMILIES), f"{kind} is another family; {SUPPORTED}.")
    plain = f"there is no image_start_tag_id, so {kind} is not BLIP3o-NEXT here; {SUPPORTED}."
    require("image_start_tag_id" in fields, plain)


def config_from_json(
    fields: Mapping[str, Any], shapes: Shapes | None, name: str = "published"
) -> Blip3oConfig:
    """The configuration behind a config.json and the shapes of the tensors beside it (None: not
    looked at); `name` is for files that carry none. InputError for another family of models and for
    a missing, senseless or unsupported value; keys that are not read change nothing here."""
    check_family(fields)
    # The ids; their ends follow from them, and have to agree where they are given.
    missing = [key for key in ("pad_token_id", "eos_token_id") if fields.get(key) is None]
    missing = {key: getattr(VocabConfig, key) for key in missing}
    vocab = read_fields(VocabConfig, {**fields, **missing}, "it")
    ends = {"scale_end_token_id", "image_end_token_id"} & fields.keys()
    _agree({key: fields[key] for key in ends}, _vocab_json(vocab), "it")
    # The other networks, where the file describes them.
    networks = [(part, key, read) for part, (key, _, read) in NETWORKS.items() if key in fields]
    parts = {part: read(fields[key]) for part, key, read in networks}
    # What PyTorch has no name for, and the flags of editing checkpoints.
    ours = fields.get("blip3o_jax", {})
    is_ours = isinstance(ours, Mapping) and set(ours) <= {*OURS, *OURS_OF_EDITS}
    should = f"should be an object of {', '.join(OURS + OURS_OF_EDITS)}"
    require(is_ours, f"blip3o_jax is {reprlib.repr(ours)} and {should}.")
    kinds = {field.name: field.type for field in dataclasses.fields(Blip3oConfig)}
    flags = {key: fields[key] for key in EDIT_FLAGS if fields.get(key) is not None}
    plain = {key: typed(value, kinds[key], key) for key, value in {**ours, **flags}.items()}
    plain = {"name": name, "max_sources": _max_sources(plain)} | plain
    qwen3 = read_qwen3(fields, shapes)
    if shapes is None:  # a file may still have the size of the plain Qwen3
        qwen3 = dataclasses.replace(qwen3, vocab_size=max(qwen3.vocab_size, vocab.size))
    for key in ("pad_token_id", "eos_token_id"):
        number, rows = getattr(vocab, key), qwen3.vocab_size
        source = "is the default, as no file says it, and" if key in missing else "is"
        require(number < rows, f"{key} {number} {source} outside the vocabulary of {rows} rows.")
    return Blip3oConfig(qwen3=qwen3, vocab=vocab, **parts, **plain)
