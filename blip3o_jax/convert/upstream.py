"""The parts that BLIP3o-NEXT is made of, as their own authors publish them: Qwen3, SANA and its
autoencoder, TA-Tok. Each opener gives the part's configuration and its tensors under their names in
a BLIP3o checkpoint (docs/model.md §3)."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip3o_jax.config import SiglipConfig, TaTokConfig
from blip3o_jax.convert.config_json import MAX_LAYERS, SUPPORTED, Shapes, read_dc_ae, read_sana
from blip3o_jax.convert.pth import open_ta_tok
from blip3o_jax.convert.published import CONFIG_LIMIT, TA_TOK
from blip3o_jax.convert.safetensors_io import Stored, open_tensors, read_json
from blip3o_jax.errors import about, require

DIFFUSERS = "diffusion_pytorch_model"
# Widths of a head in SigLIP so400m and in TA-Tok's decoder: nothing in ta_tok.pth says them
# (docs/model.md §2.2, §2.3).
TEACHER, ENCODER_HEAD, DECODER_HEAD = "so400m", 72, 96


@dataclass(frozen=True)
class Upstream:
    """`config` is the part's, or config.json's fields for Qwen3; `files` described it."""

    folder: Path
    config: Any
    tensors: dict[str, Stored]
    files: tuple[Path, ...]


def _open_diffusers(
    path: str, inner: str, title: str, name: str, read: Callable, prefix: str
) -> Upstream:
    """A model of diffusers' class `name` at `path`, or in its folder `inner`."""
    places = (Path(path) / inner / "config.json", Path(path) / "config.json")
    file = next((place for place in places if place.is_file()), None)
    neither = f"holds no config.json, nor does its folder {inner}"
    require(file is not None, f"{path} {neither}: it is no {title}.")
    # Its class says what it is; the fields are the config's.
    fields = read_json(file, CONFIG_LIMIT)
    with about(file):
        kind = fields.get("_class_name")
        require(kind == name, f"it describes a {kind}, not a {name}.")
        cfg = read(fields)
    tensors = open_tensors(file.parent, DIFFUSERS).items()
    return Upstream(file.parent, cfg, {prefix + key: tensor for key, tensor in tensors}, (file,))


def open_sana(path: str) -> Upstream:
    """A SANA repository of diffusers, or its folder transformer/."""
    names = ("transformer", "SANA", "SanaTransformer2DModel")
    return _open_diffusers(path, *names, read_sana, "model.sana.")


def open_dc_ae(path: str) -> Upstream:
    """An AutoencoderDC of diffusers, or a repository with it in vae/."""
    names = ("vae", "AutoencoderDC", "AutoencoderDC")
    return _open_diffusers(path, *names, read_dc_ae, "model.sana_vae.")


def open_qwen3(path: str) -> Upstream:
    """A Qwen3ForCausalLM directory of transformers, plain or with BLIP3o's vocabulary."""
    file = Path(path) / "config.json"
    fields = read_json(file, CONFIG_LIMIT)
    with about(file):
        kind = str(fields.get("model_type"))
        is_qwen3 = kind.startswith(("qwen3", "blip3o_qwen")) and "vision_config" not in fields
        require(is_qwen3, f"model_type {kind!r} is another family; {SUPPORTED}.")
        experts = f"it is a Qwen3 with experts, not the dense Qwen3; {SUPPORTED}."
        require("num_experts" not in fields, experts)
    return Upstream(file.parent, fields, open_tensors(file.parent), (file,))


def open_tokenizer(path: str) -> Upstream:
    """TA-Tok's `ta_tok.pth`, or a directory that holds it."""
    file = Path(path) / "ta_tok.pth" if Path(path).is_dir() else Path(path)
    is_file = file.is_file()
    require(is_file, f"{path} is neither TA-Tok's .pth file nor a folder with ta_tok.pth.")
    args, tensors = open_ta_tok(file)
    with about(file):
        cfg = _ta_tok_config(args, {name: stored.shape for name, stored in tensors.items()})
    return Upstream(file.parent, cfg, {TA_TOK + name: x for name, x in tensors.items()}, ())


def _ta_tok_config(args: Mapping[str, Any], shapes: Shapes) -> TaTokConfig:
    """TA-Tok's sizes: its tensors', else its arguments, else its defaults (docs/model.md §2.3)."""
    teacher = str(args.get("teacher") or TEACHER)
    other = f"its encoder is {teacher[:60]!r}; supported is SigLIP2 {TEACHER}."
    require(TEACHER in teacher, other)
    # transformers 4 and 5 name the decoder differently.
    older = any(name.startswith("decoder.vision_model.") for name in shapes)
    decoder = "decoder.vision_model." if older else "decoder."

    def size(name: str, axis: int, rank: int = 2) -> int:
        has_rank = len(shapes.get(name, ())) == rank
        require(has_rank, f"it holds no tensor {name!r} of {rank} axes.")
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
    encoder = SiglipConfig(
        hidden_size=width,
        intermediate_size=size("encoder.encoder.layers.0.mlp.fc1.weight", 0),
        num_hidden_layers=layers("encoder."),
        num_attention_heads=max(1, width // ENCODER_HEAD),
        image_size=given("input_size", SiglipConfig.image_size),
        patch_size=size(f"{patches}.weight", 2, 4),
    )
    temperature = TaTokConfig.stochastic_temperature
    return TaTokConfig(
        encoder=encoder,
        select_layer_id=given("select_layer_id", TaTokConfig.select_layer_id),
        bottleneck_dim=size(f"{codebook}.weight", 1),
        codebook_size=size(f"{codebook}.weight", 0),
        stochastic_temperature=given("stochastic_temperature", temperature, float),
        pool_scale=given("pool_scale", 1),
        decoder_depth=layers(decoder),
        decoder_num_attention_heads=max(1, width // DECODER_HEAD),
        decoder_intermediate_size=size(f"{decoder}encoder.layers.0.mlp.fc1.weight", 0),
        decoder_num_patches=size(f"{decoder}embeddings.position_embedding.weight", 0),
    )
