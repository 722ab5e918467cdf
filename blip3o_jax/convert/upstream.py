"""The parts that BLIP3o-NEXT is made of, as their own authors publish them: Qwen3, SANA and its
autoencoder, TA-Tok. Each opener gives the part's configuration and its tensors under their names in
a BLIP3o checkpoint (docs/model.md §3)."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from blip3o_jax import paths
from blip3o_jax.config import MAX_LAYERS, SiglipConfig, TaTokConfig
from blip3o_jax.convert import folders, lora
from blip3o_jax.convert.config_json import (
    SIGLIP_FACTS,
    SUPPORTED,
    Shapes,
    read_dc_ae,
    read_fields,
    read_sana,
)
from blip3o_jax.convert.folders import Options, Weights, open_weights, unwrapped
from blip3o_jax.convert.pth import open_ta_tok
from blip3o_jax.convert.published import CONFIG_LIMIT, TA_TOK
from blip3o_jax.convert.safetensors_io import Stored
from blip3o_jax.errors import about, require
from blip3o_jax.files import read_json
from blip3o_jax.paths import AnyPath

DIFFUSERS = "diffusion_pytorch_model"
SANA = "SanaTransformer2DModel"
# Nothing in ta_tok.pth says the heads. Those of SigLIP so400m are this wide; TA-Tok's decoder has
# 12, the default of its class, where they divide its width (docs/model.md §2.2, §2.3).
TEACHER, ENCODER_HEAD, DECODER_HEADS, DECODER_HEAD = "so400m", 72, 12, 96
# What SiglipVisionConfig leaves out of a config.json, as it is the default.
SIGLIP_DEFAULTS = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
SIGLIP_DEFAULTS |= {"num_attention_heads": 12, "image_size": 224, "patch_size": 16}
SIGLIP_DEFAULTS |= {"layer_norm_eps": 1e-6, **SIGLIP_FACTS}


@dataclass(frozen=True)
class Upstream:
    """`config` is the part's, or config.json's fields for Qwen3; `files` described it, and the rest
    is as in `Weights`."""

    folder: AnyPath
    config: Any
    tensors: dict[str, Stored]
    files: tuple[AnyPath, ...]
    note: str
    merged: Mapping[str, str]


def _upstream(path: AnyPath, config: Any, file: AnyPath, prefix: str, weights: Weights) -> Upstream:
    tensors = {prefix + name: tensor for name, tensor in weights.tensors.items()}
    return Upstream(path, config, tensors, (file, *weights.files), weights.note, weights.merged)


def _open_diffusers(
    path: str, options: Options, inner: str, title: str, name: str, read: Callable, prefix: str
) -> Upstream:
    """A model of diffusers' class `name` at `path`, or in its folder `inner`."""
    places = (paths.path(path) / inner / "config.json", paths.path(path) / "config.json")
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        lora.refuse_adapter_folder(paths.path(path))
    neither = f"holds no config.json, nor does its folder {inner}"
    require(file is not None, f"{path} {neither}: it is no {title}.")
    # Its class says what it is; the fields are the config's.
    fields = read_json(file, CONFIG_LIMIT)
    with about(file):
        kind = fields.get("_class_name")
        require(kind == name, f"it describes a {kind}, not a {name}.")
    folders.refuse_quantised_config(file.parent, fields)
    with about(file):
        cfg = read(fields)
    # Adapters of a repository lie above its transformer.
    above = [file.parents[1]] if name == SANA and file.parent.name == inner else []
    weights = open_weights(file.parent, DIFFUSERS, fields, options, places=above)
    return _upstream(file.parent, cfg, file, prefix, weights)


def open_sana(path: str, options: Options) -> Upstream:
    """A SANA repository of diffusers, or its folder transformer/."""
    return _open_diffusers(path, options, "transformer", "SANA", SANA, read_sana, "model.sana.")


def open_dc_ae(path: str, options: Options) -> Upstream:
    """An AutoencoderDC of diffusers, or a repository with it in vae/."""
    names = ("vae", "AutoencoderDC", "AutoencoderDC")
    return _open_diffusers(path, options, *names, read_dc_ae, "model.sana_vae.")


def open_qwen3(path: str, options: Options) -> Upstream:
    """A Qwen3 directory of transformers, with or without its head, plain or with BLIP3o's
    vocabulary."""
    lora.refuse_adapter_folder(paths.path(path))
    file = paths.path(path) / "config.json"
    fields = read_json(file, CONFIG_LIMIT)
    with about(file):
        kind = str(fields.get("model_type"))
        is_qwen3 = kind.startswith(("qwen3", "blip3o_qwen")) and "vision_config" not in fields
        require(is_qwen3, f"model_type {kind!r} is another family; {SUPPORTED}.")
        experts = f"it is a Qwen3 with experts, not the dense Qwen3; {SUPPORTED}."
        require("num_experts" not in fields, experts)
    weights = open_weights(file.parent, "model", fields, options, is_qwen3=True)
    return _upstream(file.parent, fields, file, "", weights)


def open_tokenizer(path: str, options: Options) -> Upstream:
    """TA-Tok's `ta_tok.pth`, or a directory that holds it."""
    file = paths.path(path) / "ta_tok.pth" if paths.path(path).is_dir() else paths.path(path)
    require(file.is_file(), f"{path} is neither TA-Tok's .pth file nor a folder with ta_tok.pth.")
    args, tensors = open_ta_tok(file)
    weights = unwrapped(tensors)
    with about(file):
        shapes = {name: stored.shape for name, stored in weights.tensors.items()}
        cfg = _ta_tok_config(args, shapes, file.parent)
    return _upstream(file.parent, cfg, file, TA_TOK, weights)


def _teacher(args: Mapping[str, Any], where: AnyPath) -> SiglipConfig | None:
    """The encoder that TA-Tok is built around, as its config.json in a folder of its name beside
    ta_tok.pth describes it; None for so400m without one, whose sizes are known."""
    teacher = str(args.get("teacher") or args.get("ckpt_path") or TEACHER)
    name = teacher.rstrip("/").rpartition("/")[2]
    file = where / name / "config.json"
    if re.fullmatch(r"[\w.-]+", name) is None or not file.is_file():
        place = f"its sizes are not known; put its config.json into {where}, in a folder {name!r}"
        other = f"its encoder is {teacher[:60]!r}, and {place[:300]}."
        require(TEACHER in teacher, other)
        return None
    fields = read_json(file, CONFIG_LIMIT)
    with about(file):
        inner = fields.get("vision_config", fields)
        require(isinstance(inner, Mapping), "its vision_config is not an object.")
        fields = {**SIGLIP_DEFAULTS, **inner}
        for key, fact in SIGLIP_FACTS.items():
            require(fields[key] == fact, f"it has {key} = {fields[key]!r}; supported is {fact!r}.")
        return read_fields(SiglipConfig, fields, "it")


def _ta_tok_config(args: Mapping[str, Any], shapes: Shapes, where: AnyPath) -> TaTokConfig:
    """TA-Tok's sizes: its tensors', else those of its encoder's own config, else its arguments,
    else its defaults (docs/model.md §2.3)."""
    teacher = _teacher(args, where)
    # transformers 4 and 5 name the decoder differently.
    older = any(name.startswith("decoder.vision_model.") for name in shapes)
    decoder = "decoder.vision_model." if older else "decoder."

    def size(name: str, axis: int, rank: int = 2) -> int:
        require(len(shapes.get(name, ())) == rank, f"it holds no tensor {name!r} of {rank} axes.")
        return shapes[name][axis]

    def given(name: str, default: float | None, kind: type = int) -> Any:
        value = args.get(name, default)
        sound = type(value) in (kind, int) and -1e9 < value < 1e9
        require(sound, f"its argument {name} is {str(value)[:60]!r}.")
        return kind(value)

    def layers(prefix: str) -> int:
        pattern = re.escape(prefix) + r"encoder\.layers\.(\d+)\."
        matches = (re.match(pattern, name) for name in shapes)
        count = max((int(match[1][:9]) + 1 for match in matches if match), default=0)
        require(0 < count <= MAX_LAYERS, f"it holds {count} layers named {pattern!r}.")
        return count

    # Sizes from the shapes; only what shapes cannot tell comes from the arguments.
    patches, codebook = "encoder.embeddings.patch_embedding", "bottleneck.regularizer.embedding"
    width = size(f"{patches}.weight", 0, 4)
    usual = teacher or SiglipConfig()
    heads = teacher.num_attention_heads if teacher else max(1, width // ENCODER_HEAD)
    encoder = SiglipConfig(
        hidden_size=width,
        intermediate_size=size("encoder.encoder.layers.0.mlp.fc1.weight", 0),
        num_hidden_layers=layers("encoder."),
        num_attention_heads=heads,
        image_size=given("input_size", usual.image_size),
        patch_size=size(f"{patches}.weight", 2, 4),
        layer_norm_eps=usual.layer_norm_eps,
    )
    # The encoder's own config and its tensors describe one model.
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "patch_size"):
        ours, theirs = getattr(encoder, key), getattr(teacher or encoder, key)
        other = f"its tensors have {key} {ours}, and its encoder's config.json says {theirs}."
        require(ours == theirs, other)
    decoder_heads = max(1, width // DECODER_HEAD) if width % DECODER_HEADS else DECODER_HEADS
    temperature = TaTokConfig.stochastic_temperature
    return TaTokConfig(
        encoder=encoder,
        select_layer_id=given("select_layer_id", TaTokConfig.select_layer_id),
        bottleneck_dim=size(f"{codebook}.weight", 1),
        codebook_size=size(f"{codebook}.weight", 0),
        stochastic_temperature=given("stochastic_temperature", temperature, float),
        pool_scale=given("pool_scale", 1),
        decoder_depth=layers(decoder),
        decoder_num_attention_heads=decoder_heads,
        decoder_intermediate_size=size(f"{decoder}encoder.layers.0.mlp.fc1.weight", 0),
        decoder_num_patches=size(f"{decoder}embeddings.position_embedding.weight", 0),
    )
