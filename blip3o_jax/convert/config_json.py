"""The checkpoint's config.json and Blip3oConfig, both ways.

The top level is transformers' Qwen3Config with the ids that BLIP3o adds (docs/model.md §4.1).
Published files say nothing of the other networks, since the PyTorch code fetches them from
elsewhere: then they are SANA 1.5 1.6B, its DC-AE and TA-Tok, as in our defaults. Files written here
say it in three more objects named after the PyTorch attributes: "sana" and "sana_vae" in the field
names of diffusers' SanaTransformer2DModel and AutoencoderDC, "vision_tower" in those of TA-Tok's
arguments and transformers' SiglipVisionConfig.
"""

import dataclasses
import json
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Any

from blip3o_jax.config import (
    Blip3oConfig,
    DcAeConfig,
    Qwen3Config,
    SanaConfig,
    SiglipConfig,
    TaTokConfig,
    VocabConfig,
)
from blip3o_jax.errors import InputError, nearest

EMBEDDING = "model.embed_tokens.weight"
SUPPORTED = "supported is BLIP3o-NEXT, which stands on Qwen3, SANA and TA-Tok"
# beginnings of model_type; the first two also name the BLIP3o of 4B and 8B
FAMILIES = ("blip3o_qwen", "llava_qwen", "qwen3")
MAX_LAYERS, MAX_STAGES = 1024, 16

# Facts of the architecture that have no field here: written, and a file that says otherwise is
# refused.
QWEN3_FACTS = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}
SIGLIP_FACTS = {
    "model_type": "siglip_vision_model",
    "num_channels": 3,
    "hidden_act": "gelu_pytorch_tanh",
    "attention_dropout": 0.0,
}
SANA_FACTS = {
    "patch_size": 1,
    "dropout": 0.0,
    "attention_bias": False,
    "norm_elementwise_affine": False,
    "guidance_embeds": False,
    "guidance_embeds_scale": 0.1,
    "timestep_scale": 1.0,
}
DC_AE_FACTS = {
    "in_channels": 3,
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "decoder_conv_act_fn": "relu",
    "encoder_out_shortcut": True,
    "decoder_in_shortcut": True,
}
QK_NORM = "rms_norm_across_heads"
# one field here, one for each half in diffusers
DC_AE_SHARED = ("block_types", "block_out_channels", "qkv_multiscales")
# fields of Blip3oConfig that PyTorch has no name for
OURS = ("name", "max_prompt_tokens", "connector_eps")
# What the editing checkpoints say at the top level, and others leave out.
EDIT_FLAGS = (
    "use_und_image_vae",
    "use_und_image_vae_as_noise",
    "only_use_und_image_vae_as_noise",
    "use_tar_siglip_features",
)


def _siglip_json(cfg: SiglipConfig) -> dict[str, Any]:
    return {**dataclasses.asdict(cfg), **SIGLIP_FACTS}


def ta_tok_json(cfg: TaTokConfig) -> dict[str, Any]:
    derived = {"input_size": cfg.encoder.image_size, "bottleneck_token_num": cfg.num_tokens}
    return {**dataclasses.asdict(cfg), **derived, "encoder": _siglip_json(cfg.encoder)}


def sana_json(cfg: SanaConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(cfg)
    if not cfg.condition_positions:  # a key that diffusers does not know
        del fields["condition_positions"]
    derived = {"cross_attention_dim": cfg.hidden_size, "qk_norm": QK_NORM if cfg.qk_norm else None}
    return {**fields, **derived, **SANA_FACTS}


def dc_ae_json(cfg: DcAeConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(cfg)
    for name in DC_AE_SHARED:
        fields[f"encoder_{name}"] = fields[f"decoder_{name}"] = fields.pop(name)
    return {**fields, **DC_AE_FACTS}


def _vocab_json(cfg: VocabConfig) -> dict[str, Any]:
    ends = {
        "scale_end_token_id": cfg.scale_start_token_id + cfg.num_scale_tokens - 1,
        "image_end_token_id": cfg.image_end_token_id,
    }
    return {**dataclasses.asdict(cfg), **ends}


def config_to_json(cfg: Blip3oConfig, dtype: str = "float32") -> dict[str, Any]:
    """The contents of config.json; `dtype` is that of the weights beside it."""
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
        "sana": sana_json(cfg.sana),
        "sana_vae": dc_ae_json(cfg.dc_ae),
        "vision_tower": ta_tok_json(cfg.ta_tok),
        "blip3o_jax": {name: getattr(cfg, name) for name in OURS},
    }
    return json.loads(json.dumps(fields))  # tuples become lists


def _typed(value: Any, kind: Any, name: str) -> Any:
    """`value` from JSON as a dataclass annotation has it; InputError when it is of another type or
    beyond all sense."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType and value is None:
        return None
    if origin is types.UnionType:
        return _typed(value, arguments[0], name)
    if origin is tuple and isinstance(value, list) and len(value) <= MAX_STAGES:
        return tuple(_typed(item, arguments[0], name) for item in value)
    if kind is float and type(value) in (int, float) and 0 < value < 1e9:
        return float(value)
    if kind is int and type(value) is int:
        least = 0 if "layers_per_block" in name or name.endswith("_id") else 1
        most = MAX_LAYERS if "layers" in name or "depth" in name else 2**31 - 1
        if least <= value <= most or name == "select_layer_id":
            return value
    if kind in (str, bool) and type(value) is kind:
        return value
    kind = getattr(kind, "__name__", kind)
    raise InputError(f"{name} is {reprlib.repr(value)}, which makes no sense as {kind}.")


def _read(cls, fields: Any, section: str, **given) -> Any:
    """`cls` from the JSON object `fields`, whose keys are the class's field names but for those in
    `given`."""
    if not isinstance(fields, Mapping):
        raise InputError(f"{section} is a JSON {type(fields).__name__} and should be an object.")
    for field in dataclasses.fields(cls):
        if field.name not in given:
            if field.name not in fields:
                raise InputError(f"{section} has no {field.name}.")
            given[field.name] = _typed(fields[field.name], field.type, field.name)
    return cls(**given)


def _agree(fields: Mapping[str, Any], expected: Mapping[str, Any], section: str) -> None:
    """InputError when `fields` has a key that `expected` lacks, or another value under it."""
    expected = json.loads(json.dumps(expected))
    for name, value in fields.items():
        if name.startswith("_"):  # _class_name, _diffusers_version, ...
            continue
        if name not in expected:
            raise InputError(f"unknown key {name!r} in {section}; {nearest(name, expected)}")
        if value != expected[name]:
            raise InputError(
                f"{section} has {name} = {reprlib.repr(value)}; this model has "
                f"{reprlib.repr(expected[name])}."
            )


def _read_ta_tok(fields: Any) -> TaTokConfig:
    inner = fields.get("encoder") if isinstance(fields, Mapping) else None
    encoder = _read(SiglipConfig, inner, "vision_tower.encoder")
    cfg = _read(TaTokConfig, fields, "vision_tower", encoder=encoder)
    _agree(fields["encoder"], _siglip_json(encoder), "vision_tower.encoder")
    _agree(fields, {**ta_tok_json(cfg), "encoder": fields["encoder"]}, "vision_tower")
    return cfg


def read_sana(fields: Any) -> SanaConfig:
    """From diffusers' field names, as in SanaTransformer2DModel's own config.json."""
    has_norm = isinstance(fields, Mapping) and fields.get("qk_norm") is not None
    if isinstance(fields, Mapping):
        fields = {"condition_positions": False, **fields}
    cfg = _read(SanaConfig, fields, "sana", qk_norm=has_norm)
    _agree(fields, {"condition_positions": False, **sana_json(cfg)}, "sana")
    return cfg


def read_dc_ae(fields: Any) -> DcAeConfig:
    """From diffusers' field names, as in AutoencoderDC's own config.json."""
    names = fields if isinstance(fields, Mapping) else {}
    shared = {x: fields[f"encoder_{x}"] for x in DC_AE_SHARED if f"encoder_{x}" in names}
    cfg = _read(DcAeConfig, {**fields, **shared} if names else fields, "sana_vae")
    theirs = {name: value for name, value in fields.items() if name not in DC_AE_SHARED}
    _agree(theirs, dc_ae_json(cfg), "sana_vae")
    return cfg


def read_qwen3(
    fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None
) -> Qwen3Config:
    """transformers 5 keeps rope_theta inside rope_parameters; the vocabulary is as long as the
    embedding, where its shape is known."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if (
        not isinstance(rope, Mapping)
        or rope.get("rope_type", rope.get("type", "default")) != "default"
    ):
        raise InputError(
            f"the rotary embedding is scaled ({reprlib.repr(rope)}), which is not supported."
        )
    fields = {"tie_word_embeddings": True, "rope_theta": rope.get("rope_theta"), **fields}
    if shapes is not None:
        if len(shapes.get(EMBEDDING, ())) != 2:
            raise InputError(f"the files hold no matrix {EMBEDDING}.")
        fields["vocab_size"] = shapes[EMBEDDING][0]
    _agree({name: fields[name] for name in QWEN3_FACTS if name in fields}, QWEN3_FACTS, "it")
    return _read(Qwen3Config, fields, "it", vocab_padding=0)


def check_family(fields: Mapping[str, Any]) -> None:
    """InputError unless this is the config.json of a BLIP3o-NEXT."""
    kind = fields.get("model_type")
    qwen2_5 = {"vision_config", "gen_vision_tower", "n_query"} & fields.keys()
    if qwen2_5 or str(kind).startswith("qwen2"):
        raise InputError(f"model_type {kind!r} is a BLIP3o of 4B or 8B on Qwen2.5-VL; {SUPPORTED}.")
    if not str(kind).startswith(FAMILIES):
        raise InputError(f"model_type {kind!r} is another family; {SUPPORTED}.")
    if "image_start_tag_id" not in fields:
        raise InputError(
            f"there is no image_start_tag_id, so model_type {kind!r} is not BLIP3o-NEXT "
            f"here; {SUPPORTED}."
        )


def config_from_json(
    fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None, name: str = "published"
) -> Blip3oConfig:
    """The configuration behind a config.json and the shapes of the tensors beside it (None: not
    looked at); `name` is for files that carry none.

    Keys that PyTorch's trainers leave at the top level and that change nothing here are not looked
    at. Raises InputError for another family of models, a missing or senseless value, and a value
    that this implementation does not support.
    """
    check_family(fields)
    # The ids; their ends follow from them, and have to agree where they are given.
    defaults = {"pad_token_id": VocabConfig.pad_token_id, "eos_token_id": VocabConfig.eos_token_id}
    missing = {key: value for key, value in defaults.items() if fields.get(key) is None}
    vocab = _read(VocabConfig, {**fields, **missing}, "it")
    ends = [key for key in ("scale_end_token_id", "image_end_token_id") if key in fields]
    _agree({key: fields[key] for key in ends}, _vocab_json(vocab), "it")
    # The other networks, where the file describes them.
    readers = (
        ("sana", "sana", read_sana),
        ("sana_vae", "dc_ae", read_dc_ae),
        ("vision_tower", "ta_tok", _read_ta_tok),
    )
    parts = {field: read(fields[key]) for key, field, read in readers if key in fields}
    # What PyTorch has no name for, and the flags of editing checkpoints.
    ours = fields.get("blip3o_jax", {})
    if not isinstance(ours, Mapping) or set(ours) - set(OURS):
        raise InputError(
            f"blip3o_jax is {reprlib.repr(ours)} and should be an object of {', '.join(OURS)}."
        )
    kinds = {field.name: field.type for field in dataclasses.fields(Blip3oConfig)}
    ours = {"name": name, **{key: _typed(value, kinds[key], key) for key, value in ours.items()}}
    flags = [key for key in EDIT_FLAGS if fields.get(key) is not None]
    flags = {key: _typed(fields[key], bool, key) for key in flags}
    return Blip3oConfig(qwen3=read_qwen3(fields, shapes), vocab=vocab, **parts, **ours, **flags)
