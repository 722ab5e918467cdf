"""LoRA adapters beside a model: found, named, and merged into the weights that they change.

PEFT writes `adapter_model.safetensors` and `adapter_config.json`, diffusers
`pytorch_lora_weights.safetensors`; a weight W becomes W + alpha / rank * B A.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from blip3o_jax.convert import safetensors_io
from blip3o_jax.convert.safetensors_io import Stored, finite
from blip3o_jax.errors import InputError, about, require
from blip3o_jax.files import parse_json, read_json
from blip3o_jax.paths import AnyPath

CONFIG, CONFIG_LIMIT = "adapter_config.json", 1 << 20  # bytes
PEFT, DIFFUSERS = "adapter_model", "pytorch_lora_weights"
METADATA = "lora_adapter_metadata"  # diffusers' key in a file's own metadata
# What stands before a module's name: of PEFT's wrapper, and of a diffusers pipeline's model.
WRAPPERS = ("base_model.model.", "transformer.")
HALF = re.compile(r"(.+)\.(lora_A|lora_B|lora_down|lora_up|alpha)(?:\.default)?(?:\.weight)?")
ROLES = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up", "alpha": "alpha"}
# Settings that make an adapter more than B A, and the value that each has in a plain one.
VARIANTS = {"use_dora": False, "use_qalora": False, "lora_bias": False, "fan_in_fan_out": False}
VARIANTS |= {"layer_replication": None, "modules_to_save": None, "bias": "none"}


@dataclass(frozen=True)
class Merged(Stored):
    """A weight in a file and the two matrices of an adapter that are added when it is read."""

    down: Stored  # [rank, inputs], of a convolution with its window behind
    up: Stored  # [outputs, rank]
    scale: float

    def raw(self, rows: slice | None = None, carried: bool = False) -> np.ndarray:
        weight = super().raw(rows).astype(np.float32)
        down, up = self.down.read(np.float32), self.up.read(np.float32)
        up = up[rows if rows is not None else slice(None)].reshape(-1, len(down))
        weight += self.scale * (up @ down.reshape(len(down), -1)).reshape(weight.shape)
        return finite(weight, self.dtype, f"{self} with the adapter {self.down.file}")


def find_adapters(places: Iterable[AnyPath], stem: str) -> list[AnyPath]:
    """The adapters among the files of folders, by their names or else by their tensors';
    `STEM.safetensors`, its shards and its variants are a model's own."""
    adapters = []
    for folder in places:
        for name in (f"{PEFT}.bin", f"{DIFFUSERS}.bin"):
            pickled = f"{folder / name} is an adapter in a pickle; save it as .safetensors."
            require(not (folder / name).is_file(), pickled)
        for file in sorted(folder.glob("*.safetensors")):
            if not re.fullmatch(rf"{stem}([.-].*)?\.safetensors", file.name):
                is_named = file.stem in (PEFT, DIFFUSERS)
                is_one = is_named or any(map(HALF.fullmatch, safetensors_io.open_file(file)))
                adapters += [file] if is_one else []
    return adapters


def refuse_adapter_folder(folder: AnyPath) -> None:
    """InputError when a folder that should hold a model holds an adapter alone."""
    files = (CONFIG, f"{PEFT}.safetensors", f"{DIFFUSERS}.safetensors")
    if not (folder / "config.json").is_file() and any((folder / x).is_file() for x in files):
        base = ""
        if (folder / CONFIG).is_file():
            fields = read_json(folder / CONFIG, CONFIG_LIMIT)
            base = f" of {str(fields.get('base_model_name_or_path'))[:100]!r}"
        raise InputError(
            f"{folder} is a LoRA adapter{base} and no model; put its files beside those of the "
            "model, and add --merge-lora."
        )


def merge(
    tensors: Mapping[str, Stored], own: Mapping[str, str], adapter: AnyPath
) -> tuple[dict[str, Stored], dict[str, str]]:
    """(the tensors with an adapter merged into them, {tensor: how}); `own` gives the tensors' names
    by those that the adapter's authors may call them. InputError for a matrix that belongs to no
    tensor, one without its other half, and kinds of adapters that are more than two matrices."""
    halves: dict[str, dict[str, Stored]] = {}
    for name, stored in safetensors_io.open_file(adapter).items():
        match = HALF.fullmatch(name)
        require(match is not None, f"{stored} is not a matrix of a plain LoRA adapter.")
        halves.setdefault(match[1], {})[ROLES[match[2]]] = stored
    downs = [pair["down"] for pair in halves.values() if "down" in pair]
    alphas = _Alphas(adapter, {down.shape[:1] for down in downs})
    # Each pair of matrices changes one weight.
    merged, how = dict(tensors), {}
    for module, pair in halves.items():
        stored = next(iter(pair.values()))
        require({"down", "up"} <= pair.keys(), f"{stored} lacks its other half.")
        names = [module, *(module.removeprefix(x) for x in WRAPPERS if module.startswith(x))]
        name = next((own[f"{x}.weight"] for x in names if f"{x}.weight" in own), None)
        require(name is not None, f"{stored} is for {module!r}, which the model does not have.")
        weight, down, up = tensors[name], pair["down"], pair["up"]
        require(len(down.shape) > 1 and len(up.shape) > 1, f"{down} and {up} are not matrices.")
        rank, window = down.shape[0], math.prod(down.shape[1:])
        needed = (*weight.shape[:1], rank, math.prod(weight.shape[1:]))
        fits = (*up.shape[:2], window) == needed and math.prod(up.shape[2:]) == 1 and rank > 0
        shapes = f"{down.shape} and {up.shape}, which do not fit {weight} of shape {weight.shape}"
        require(fits, f"{adapter}: the matrices of {module!r} have shapes {shapes}.")
        twice = f"{adapter} has two pairs of matrices for {weight}."
        require(not isinstance(merged[name], Merged), twice)
        scale = alphas.scale(module, rank, pair.get("alpha"))
        merged[name] = Merged(**vars(weight), down=down, up=up, scale=scale)
        how[name] = f"{adapter} is merged with {scale:g} times its matrices of rank {rank}"
    return merged, how


class _Alphas:
    """What an adapter's matrices are multiplied by: its alpha over its rank."""

    def __init__(self, adapter: AnyPath, ranks: set[tuple[int, ...]]):
        self.adapter, self.ranks = adapter, ranks
        self.fields = _settings(adapter)
        with about(adapter):
            for key, plain in VARIANTS.items():
                other = f"its {key} is {self.fields.get(key)!r}, more than a plain LoRA has."
                require(self.fields.get(key) in (plain, None, False, []), other)
            kind = self.fields.get("peft_type", "LORA")
            require(kind == "LORA", f"it is an adapter of kind {kind!r}, not LoRA.")

    def scale(self, module: str, rank: int, alpha: Stored | None) -> float:
        """Of one module's matrices."""
        value = float(alpha.read(np.float32).sum()) if alpha else self._alpha(module, rank)
        require(alpha is None or math.prod(alpha.shape) == 1, f"{alpha} is not one number.")
        return value / (rank**0.5 if self.fields.get("use_rslora") else rank)

    def _alpha(self, module: str, rank: int) -> float:
        patterns = self.fields.get("alpha_pattern") or {}
        alpha = self.fields.get("lora_alpha")
        # Patterns end the module's name, as in PEFT; only plain ones are read.
        for pattern, value in patterns.items() if isinstance(patterns, Mapping) else ():
            plain = re.fullmatch(r"\^?[\w.]+", str(pattern))
            require(bool(plain), f"{self.adapter}: its alpha_pattern {pattern!r} is not a name.")
            if f".{module}".endswith(f".{pattern.lstrip('^')}"):
                alpha = value
                break
        # diffusers writes alphas only since it writes metadata; before, alpha was the rank.
        if alpha is None and self.adapter.stem == DIFFUSERS:
            several = f"{self.adapter} has matrices of several ranks and gives no alpha."
            require(len(self.ranks) == 1, several)
            alpha = rank
        sound = type(alpha) in (int, float) and -1e9 < alpha < 1e9
        says = f"no {CONFIG} gives it" if alpha is None else f"the {CONFIG} gives {alpha!r}"
        require(sound, f"{self.adapter} needs its lora_alpha; {says}.")
        return float(alpha)


def _settings(adapter: AnyPath) -> dict[str, Any]:
    """The fields of adapter_config.json beside an adapter, or of the metadata inside it."""
    file = adapter.with_name(CONFIG)
    if adapter.stem != DIFFUSERS and file.is_file():
        return read_json(file, CONFIG_LIMIT)
    text = safetensors_io.metadata(adapter).get(METADATA, "{}")
    fields = parse_json(f"{adapter}: its {METADATA}", text)
    fields = fields if isinstance(fields, dict) else {}
    return {key.removeprefix("transformer."): value for key, value in fields.items()}
