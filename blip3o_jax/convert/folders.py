"""A folder of weights as people have it: in a variant, under names that a wrapper changed, with an
adapter beside it; or quantised, which is refused by name."""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from blip3o_jax.convert import lora, safetensors_io
from blip3o_jax.convert.safetensors_io import Stored
from blip3o_jax.errors import InputError, require
from blip3o_jax.paths import AnyPath

# What torch.compile, DataParallel and modules around a model put before every name of it.
WRAPPERS = re.compile(r"(?:(?:_orig_mod|module|model|transformer)\.)*")
BASE = "model."  # before Qwen3's names, but for those of the model without its head
HEAD = "lm_head."
# Ends of names that only such weights have -> what they are.
QUANTISED = {
    r"weight_scale_inv": "FP8",
    r"weight_scale|scale_weight|input_scale": "FP8 or INT8",
    r"qweight|qzeros|g_idx": "GPTQ or AWQ",
    r"absmax|quant_map|quant_state\..*": "4 bits by bitsandbytes",
    r"SCB": "8 bits by bitsandbytes",
}
ADVICE = "name the folder of the weights that it was made from."
UNMERGED = re.compile(r".*\.lora_[AB]\..*|.*\.lora_magnitude_vector.*")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """How folders are read: a variant where there is one; patterns of tensors to do without; and
    whether adapters are merged."""

    variant: str | None = None
    ignore: tuple[str, ...] = ()
    merge_lora: bool = False


@dataclass(frozen=True)
class Weights:
    """A folder's tensors, unread, under their authors' names."""

    tensors: dict[str, Stored]
    note: str = ""  # what was changed about the names
    merged: dict[str, str] = field(default_factory=dict)  # {tensor: what was merged into it}
    files: tuple[AnyPath, ...] = ()  # of adapters


def unwrapped(tensors: Mapping[str, Stored], is_qwen3: bool = False) -> Weights:
    """Names without the prefix that all of them share, if a wrapper may have put it there; Qwen3's
    with `model.`, which those of the model without its head lack."""
    names, prefix = list(tensors), ""
    if names:
        prefix = WRAPPERS.match(names[0])[0]
    while not all(name.startswith(prefix) for name in names):
        prefix = re.sub(r"[^.]*\.$", "", prefix)
    # All of Qwen3's own begin with `model.`, where the head is tied.
    bare = [name.removeprefix(prefix) for name in names]
    added = BASE if is_qwen3 and not any(name.startswith(BASE) for name in bare) else ""
    if added and prefix.endswith(added):
        prefix, added = prefix.removesuffix(added), ""
    notes = [f"begin with {prefix!r}, which is left out"] if prefix else []
    notes += [f"lack {added!r}, which is added"] if added else []
    note = f"all names {' and '.join(notes)}" if notes else ""
    renamed = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix(prefix)
        renamed[inner if inner.startswith(HEAD) else added + inner] = tensor
    return Weights(renamed, note)


def refuse_quantised_config(folder: AnyPath, fields: Mapping[str, Any]) -> None:
    """InputError when the `fields` of a folder's config.json say that its weights are quantised."""
    quantisation = fields.get("quantization_config")
    if isinstance(quantisation, Mapping):
        method = str(quantisation.get("quant_method") or quantisation.get("quant_algo"))[:60]
        raise InputError(f"{folder} is quantised ({method}, says its config.json); {ADVICE}")


def refuse_quantised_tensors(folder: AnyPath, tensors: Iterable[Stored]) -> None:
    """InputError when the tensors of a folder are not floats that stand for themselves."""
    for tensor in tensors:
        ends = QUANTISED.items()
        kinds = (kind for end, kind in ends if re.fullmatch(rf"(.*\.)?({end})", tensor.name))
        kind = "FP8" if tensor.code.startswith("F8_") else next(kinds, None)
        require(kind is None, f"{folder} is quantised to {kind}, as {tensor.name!r} says; {ADVICE}")
        unmerged = f"{folder} holds the matrices of an adapter among its weights, {tensor.name!r};"
        is_plain = UNMERGED.fullmatch(tensor.name) is None
        require(is_plain, f"{unmerged} merge them in PEFT and save the model again.")


def open_weights(
    folder: AnyPath,
    stem: str,
    fields: Mapping[str, Any],
    options: Options,
    is_qwen3: bool = False,
    places: Iterable[AnyPath] = (),
) -> Weights:
    """The tensors of a folder whose config.json has these `fields`; an adapter beside them, or in
    `places`, is merged if the options say so. InputError for what is damaged, quantised or
    ambiguous, and for an adapter that would be passed over."""
    refuse_quantised_config(folder, fields)
    stored = safetensors_io.open_tensors(folder, stem, options.variant)
    refuse_quantised_tensors(folder, stored.values())
    weights = unwrapped(stored, is_qwen3)
    if weights.note:
        log.info("%s: %s.", folder, weights.note)
    # An adapter beside the weights changes what the model is.
    adapters = lora.find_adapters((folder, *places), stem)
    if not adapters:
        return weights
    first = f"{adapters[0]} is a LoRA adapter beside the model"
    choice = "merge it with `convert to-jax --merge-lora`, or move it away."
    require(options.merge_lora, f"{first}, which would be left out; {choice}")
    several = f"{first}, and {adapters[-1].name} is another; leave one of them there."
    require(len(adapters) == 1, several)
    own = {x.name: name for name, x in weights.tensors.items()}
    own |= {name.removeprefix(BASE): name for name in weights.tensors if is_qwen3}
    own |= {name: name for name in weights.tensors}
    tensors, merged = lora.merge(weights.tensors, own, adapters[0])
    config = adapters[0].with_name(lora.CONFIG)
    files = (adapters[0], config) if config.is_file() else (adapters[0],)
    return Weights(tensors, weights.note, merged, files)
