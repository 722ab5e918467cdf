"""The parts that BLIP3o-NEXT is made of, as their own authors publish them: Qwen3, SANA and its
autoencoder, TA-Tok.

Each opener gives the part's configuration and its tensors under the names that they have in a
BLIP3o checkpoint (docs/model.md §3).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip3o_jax.config import SiglipConfig, TaTokConfig
from blip3o_jax.convert.config_json import MAX_LAYERS, SUPPORTED, read_dc_ae, read_sana
from blip3o_jax.convert.pth import open_ta_tok
from blip3o_jax.convert.published import CONFIG_LIMIT, TA_TOK, about
from blip3o_jax.convert.safetensors_io import Stored, open_tensors, read_json
from blip3o_jax.errors import InputError

DIFFUSERS = "diffusion_pytorch_model"
# Widths of a head in SigLIP so400m and in TA-Tok's decoder: nothing in ta_tok.pth says them
# (docs/model.md §2.2, §2.3).
TEACHER, ENCODER_HEAD, DECODER_HEAD = "so400m", 72, 96


@dataclass(frozen=True)
class Upstream:
    """`config` is the part's, or config.json's fields for Qwen3; `tensors` by the name in a BLIP3o
    checkpoint; `files` described them."""

    folder: Path
    config: Any
    tensors: dict[str, Stored]
    files: tuple[Path, ...]


def _within(path: str, inner: str, name: str) -> Path:
    """`path` itself, or its folder `inner` as in a diffusers repository; InputError when neither
    holds config.json."""
    folder = Path(path)
    for candidate in (folder / inner, folder):
        if (candidate / "config.json").is_file():
            return candidate
    raise InputError(f"{path} holds no config.json, nor does its folder {inner}: it is no {name}.")


def open_sana(path: str) -> Upstream:
    """A SANA repository of diffusers, or its folder transformer/."""
    folder = _within(path, "transformer", "SANA")
    return _open_diffusers(folder, "SanaTransformer2DModel", read_sana, "model.sana.")


def open_dc_ae(path: str) -> Upstream:
    """An AutoencoderDC of diffusers, or a repository with it in vae/."""
    folder = _within(path, "vae", "AutoencoderDC")
    return _open_diffusers(folder, "AutoencoderDC", read_dc_ae, "model.sana_vae.")


def _open_diffusers(folder: Path, name: str, read: Callable, prefix: str) -> Upstream:
    """A model of diffusers' class `name`, whose tensors have a prefix in a BLIP3o checkpoint."""
    file = folder / "config.json"
    fields = read_json(file, CONFIG_LIMIT)
    with about(file):
        if fields.get("_class_name") != name:
            raise InputError(f"it describes a {fields.get('_class_name')}, not a {name}.")
        cfg = read(fields)
    tensors = open_tensors(folder, DIFFUSERS).items()
    return Upstream(folder, cfg, {prefix + key: tensor for key, tensor in tensors}, (file,))


def open_qwen3(path: str) -> Upstream:
    """A Qwen3ForCausalLM directory of transformers, plain or with BLIP3o's vocabulary."""
    file = Path(path) / "config.json"
    fields = read_json(file, CONFIG_LIMIT)
    kind = str(fields.get("model_type"))
    if not kind.startswith(("qwen3", "blip3o_qwen")) or "vision_config" in fields:
        raise InputError(f"{file}: model_type {kind!r} is another family; {SUPPORTED}.")
    if "num_experts" in fields:
        raise InputError(f"{file}: it is a Qwen3 with experts, not the dense Qwen3; {SUPPORTED}.")
    return Upstream(file.parent, fields, open_tensors(file.parent), (file,))


def open_tokenizer(path: str) -> Upstream:
    """TA-Tok's `ta_tok.pth`, or a directory that holds it."""
    file = Path(path) / "ta_tok.pth" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise InputError(f"{path} is neither TA-Tok's .pth file nor a folder with ta_tok.pth.")
    args, tensors = open_ta_tok(file)
    with about(file):
        cfg = _ta_tok_config(args, {name: stored.shape for name, stored in tensors.items()})
    tensors = {TA_TOK + name: stored for name, stored in tensors.items()}
    return Upstream(file.parent, cfg, tensors, ())


def _layers(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    matches = (re.match(pattern, name) for name in shapes)
    count = max((int(match[1][:9]) + 1 for match in matches if match), default=0)
    if not 0 < count <= MAX_LAYERS:
        raise InputError(f"it holds {count} layers named {pattern!r}.")
    return count


def _ta_tok_config(args: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> TaTokConfig:
    """TA-Tok's sizes: those of its tensors where they tell, else its arguments, else the defaults
    of its class (docs/model.md §2.3)."""
    if args.get("teacher") and TEACHER not in str(args["teacher"]):
        raise InputError(
            f"its encoder is {str(args['teacher'])[:60]!r}; supported is SigLIP2 {TEACHER}."
        )
    # transformers 4 and 5 name the decoder differently.
    older = any(name.startswith("decoder.vision_model.") for name in shapes)
    decoder = "decoder.vision_model." if older else "decoder."

    def size(name: str, axis: int, rank: int) -> int:
        if len(shapes.get(name, ())) != rank:
            raise InputError(f"it holds no tensor {name!r} of {rank} axes.")
        return shapes[name][axis]

    def given(name: str, kind: type, default):
        value = args.get(name, default)
        if type(value) not in (kind, int) or not -1e9 < value < 1e9:
            raise InputError(f"its argument {name} is {str(value)[:60]!r}.")
        return value

    # Sizes from the shapes; only what shapes cannot tell comes from the arguments.
    width = size("encoder.embeddings.patch_embedding.weight", 0, 4)
    encoder = SiglipConfig(
        hidden_size=width,
        intermediate_size=size("encoder.encoder.layers.0.mlp.fc1.weight", 0, 2),
        num_hidden_layers=_layers(shapes, r"encoder\.encoder\.layers\.(\d+)\."),
        num_attention_heads=max(1, width // ENCODER_HEAD),
        image_size=given("input_size", int, SiglipConfig.image_size),
        patch_size=size("encoder.embeddings.patch_embedding.weight", 2, 4),
    )
    return TaTokConfig(
        encoder=encoder,
        select_layer_id=given("select_layer_id", int, TaTokConfig.select_layer_id),
        bottleneck_dim=size("bottleneck.regularizer.embedding.weight", 1, 2),
        codebook_size=size("bottleneck.regularizer.embedding.weight", 0, 2),
        stochastic_temperature=float(
            given("stochastic_temperature", float, TaTokConfig.stochastic_temperature)
        ),
        pool_scale=given("pool_scale", int, 1),
        decoder_depth=_layers(shapes, re.escape(decoder) + r"encoder\.layers\.(\d+)\."),
        decoder_num_attention_heads=max(1, width // DECODER_HEAD),
        decoder_intermediate_size=size(f"{decoder}encoder.layers.0.mlp.fc1.weight", 0, 2),
        decoder_num_patches=size(f"{decoder}embeddings.position_embedding.weight", 0, 2),
    )
