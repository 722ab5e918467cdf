"""What `convert to-jax` converts: a complete checkpoint, one with groups of tensors missing, or the
upstream parts of one."""

import dataclasses
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from blip3o_jax.config import Blip3oConfig, replace
from blip3o_jax.convert import upstream, vocabulary
from blip3o_jax.convert.config_json import (
    EMBEDDING,
    config_from_json,
    config_to_json,
    dc_ae_json,
    read_qwen3,
    sana_json,
    ta_tok_json,
)
from blip3o_jax.convert.published import (
    LM_HEAD,
    TA_TOK,
    Match,
    about,
    by_published_name,
    match,
    published_rules,
    read_fields,
    resolve_lm_head,
)
from blip3o_jax.convert.rules import to_torch
from blip3o_jax.convert.safetensors_io import Stored, open_tensors
from blip3o_jax.convert.vocabulary import Made
from blip3o_jax.errors import InputError
from blip3o_jax.models.blip3o import Blip3o, parts_of
from blip3o_jax.text import load_tokenizer

# Group -> the flag that fills it, and how its tensors begin in a BLIP3o checkpoint.
GROUPS = {
    "qwen3": ("ar", ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")),
    "sana": ("dit", ("model.sana.",)),
    "dc_ae": ("vae", ("model.sana_vae.",)),
    "ta_tok": ("tokenizer", (TA_TOK,)),
}
OPENERS = {
    "qwen3": upstream.open_qwen3,
    "sana": upstream.open_sana,
    "dc_ae": upstream.open_dc_ae,
    "ta_tok": upstream.open_tokenizer,
}
NESTED = {
    "sana": ("sana", sana_json),
    "dc_ae": ("sana_vae", dc_ae_json),
    "ta_tok": ("vision_tower", ta_tok_json),
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
LICENCE = re.compile(r"(licen[cs]e|notice|copying|copyright|use_policy)", re.IGNORECASE)

log = logging.getLogger(__name__)


@dataclass
class Source:
    """A model's tensors by published name, unread, and all that goes with them.

    `match` says which fill which parameters; `ignored` has the reason for every tensor that does
    not; `made` how those came about that no file holds. `carried`: file name in the result -> the
    file to copy; `texts`: -> what to write. `files` are all that were read.
    """

    config: Blip3oConfig
    match: Match
    tensors: dict[str, Stored | Made]
    ignored: dict[str, str]
    folders: dict[str, Path]
    carried: dict[str, Path] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)
    files: set[Path] = field(default_factory=set)


def open_source(
    directory: Path | None, flags: dict[str, str | None], new_vocabulary: str | None, name: str
) -> Source:
    """Opens a checkpoint, or the upstream parts that `flags` (ar, dit, vae, tokenizer) name; `name`
    is for a model that has none.

    Nothing is read yet but headers and small files. InputError for everything that is missing,
    superfluous or contradictory.
    """
    if new_vocabulary not in (None, *vocabulary.MODES):
        raise InputError(
            f"--new-vocabulary is {' or '.join(vocabulary.MODES)}, not {new_vocabulary!r}."
        )
    if directory is None:
        return _from_parts(flags, new_vocabulary, name)
    if new_vocabulary:
        raise InputError(
            "--new-vocabulary belongs to a plain Qwen3 given by --ar; a BLIP3o checkpoint "
            "has its vocabulary."
        )
    return _from_checkpoint(directory, flags)


def _open_parts(flags: dict[str, str | None]) -> dict[str, upstream.Upstream]:
    named = {group: flags.get(flag) for group, (flag, _) in GROUPS.items()}
    return {group: OPENERS[group](path) for group, path in named.items() if path}


def _from_checkpoint(directory: Path, flags: dict[str, str | None]) -> Source:
    """A checkpoint in the published layout.

    A flag fills a group that it lacks, and overrides nothing.
    """
    file, fields = directory / "config.json", read_fields(directory)
    stored, parts, added = by_published_name(open_tensors(directory)), _open_parts(flags), {}
    # Each group of tensors is either in the checkpoint or in the files that a flag names.
    for group, (flag, begins) in GROUPS.items():
        held = next((name for name in stored if name.startswith(begins)), None)
        if held and group in parts:
            raise InputError(
                f"--{flag} fills what a checkpoint lacks, and {directory} holds {held!r}."
            )
        if not held and group not in parts:
            raise InputError(
                f"{directory} holds no tensor of {group}; name the files of its authors "
                f"with --{flag}."
            )
        if group in parts and group in NESTED and NESTED[group][0] not in fields:
            key, to_json = NESTED[group]
            added[key] = json.loads(json.dumps(to_json(parts[group].config)))
    for part in parts.values():
        stored |= by_published_name(part.tensors)

    # The config describes all of them.
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    with about(file):
        cfg = config_from_json({**fields, **added}, shapes, directory.resolve().name)
    for group, part in parts.items():
        if group in NESTED and getattr(cfg, group) != part.config:
            raise InputError(
                f"{file} describes another {group} than --{GROUPS[group][0]} {part.folder}."
            )
    tied, repeated = resolve_lm_head(cfg.qwen3.tie_word_embeddings, stored)
    cfg = replace(cfg, **{"qwen3.tie_word_embeddings": tied})

    # config.json stays as it is where it says enough.
    source = _finish(directory, cfg, stored, repeated, {"checkpoint": directory, **_folders(parts)})
    source.files |= {file, *(path for part in parts.values() for path in part.files)}
    if any(default != getattr(cfg, group) for group, default in _defaults(cfg, added).items()):
        source.texts["config.json"] = json.dumps({**fields, **added}, indent=2) + "\n"
    else:
        source.carried["config.json"] = file
    source.carried |= _beside(directory, TOKENIZER_FILES)
    return source


def _defaults(cfg: Blip3oConfig, keys: Iterable[str]) -> dict[str, Any]:
    """What a config.json without the objects `keys` means, by group: the published networks."""
    groups = {group for group, (key, _) in NESTED.items() if key in keys}
    fields = dataclasses.fields(cfg)
    return {field.name: field.default_factory() for field in fields if field.name in groups}


def _from_parts(flags: dict[str, str | None], new_vocabulary: str | None, name: str) -> Source:
    """The four upstream parts; their connector has no weights yet, and gets those that training
    would start with."""
    if flags.get("vae") is None and flags.get("dit") and (Path(flags["dit"]) / "vae").is_dir():
        flags = {**flags, "vae": flags["dit"]}
    if missing := [flag for flag, _ in GROUPS.values() if not flags.get(flag)]:
        raise InputError(
            f"Name a checkpoint to convert, or all of its parts: --{missing[0]} is missing."
        )
    parts = _open_parts(flags)
    ar, codes = parts["qwen3"], parts["ta_tok"].config.codebook_size
    stored: dict[str, Any] = {}
    for part in parts.values():
        stored |= by_published_name(part.tensors)
    if EMBEDDING not in stored:
        raise InputError(f"{ar.folder}: tensor {EMBEDDING!r} is missing.")
    tied, repeated = resolve_lm_head(bool(ar.config.get("tie_word_embeddings", True)), stored)
    # A plain Qwen3 gets the image tokens: in its tokenizer, its embedding and its head.
    tokenizer, texts, new = ar.folder / "tokenizer.json", {}, {}
    vocab = vocabulary.known_vocabulary(load_tokenizer(tokenizer), codes)
    if vocab and new_vocabulary:
        raise InputError(
            f"{tokenizer} has the image tokens already, so --new-vocabulary has nothing to make."
        )
    if vocab is None and not new_vocabulary:
        raise InputError(
            f"{ar.folder} is a plain Qwen3 without image tokens; say how to make them with "
            "--new-vocabulary mean (or another)."
        )
    if vocab is None:
        texts["tokenizer.json"], vocab = vocabulary.extend_tokenizer(tokenizer, codes)
        keys = ("embedding.weight", "embedding_proj.weight", "embedding_proj.bias")
        inputs = [stored.get(f"{TA_TOK}bottleneck.regularizer.{key}") for key in keys]
        for key in (EMBEDDING, LM_HEAD):
            if key in stored and key not in repeated:
                stored[key] = vocabulary.extend_matrix(
                    stored[key], vocab, new_vocabulary, lambda: vocabulary.codebook(*inputs)
                )
                first = vocab.image_start_tag_id + len(vocabulary.TAGS)
                new[key] = f"rows from {first} on are new: {new_vocabulary}"
                log.info("%s: %s (%d image tokens).", key, new[key], codes)

    # The four configs make one; the connector belongs to none of the parts.
    shapes = {key: tensor.shape for key, tensor in stored.items()}
    with about(ar.folder / "config.json"):
        qwen3 = read_qwen3({**ar.config, "tie_word_embeddings": tied}, shapes)
        networks = {group: parts[group].config for group in NESTED}
        cfg = Blip3oConfig(name=name, qwen3=qwen3, vocab=vocab, **networks)
    if not any(key.startswith("model.diffusion_connector.") for key in stored):
        stored |= _fresh_connector(cfg)
        new["model.diffusion_connector.*"] = "initialised at random, as training begins with it"
        log.info("diffusion_connector: %s.", new["model.diffusion_connector.*"])

    source = _finish(ar.folder, cfg, stored, repeated, _folders(parts))
    source.files |= {*(path for part in parts.values() for path in part.files), tokenizer}
    source.texts, source.made = texts, new
    fields = config_to_json(cfg, stored[EMBEDDING].dtype.name)
    source.texts["config.json"] = json.dumps(fields, indent=2) + "\n"
    stale = {"added_tokens.json", *texts} if "tokenizer.json" in texts else set()
    source.carried |= _beside(ar.folder, [file for file in TOKENIZER_FILES if file not in stale])
    return source


def _fresh_connector(cfg: Blip3oConfig) -> dict[str, Made]:
    params = Blip3o(cfg).init(jax.random.key(vocabulary.SEED), ("diffusion_connector",))
    rules = [rule for rule in published_rules(cfg) if rule.path.startswith("diffusion_connector/")]
    return {
        name: Made(name, value.shape, value.dtype, lambda value=value: value)
        for name, value in to_torch(rules, params).items()
    }


def _folders(parts: dict[str, upstream.Upstream]) -> dict[str, Path]:
    return {GROUPS[group][0]: part.folder for group, part in parts.items()}


def _beside(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    return {name: folder / name for name in names if (folder / name).is_file()}


def _finish(
    where: Path,
    cfg: Blip3oConfig,
    stored: dict[str, Any],
    repeated: dict[str, str],
    folders: dict[str, Path],
) -> Source:
    """Compares names and shapes, and finds the licences beside the weights."""
    needed = {name: tensor for name, tensor in stored.items() if name not in repeated}
    matched = match(where, cfg, needed, parts_of(cfg))
    source = Source(cfg, matched, stored, {**matched.ignored, **repeated}, folders)
    source.files |= {tensor.file for tensor in stored.values() if tensor.file}
    for label, folder in folders.items():
        source.files |= set(folder.glob("*.safetensors.index.json"))
        beside = [folder, folder.parent] if folder.name in ("transformer", "vae") else [folder]
        files = (file for place in beside for file in place.iterdir() if file.is_file())
        for file in sorted(file for file in files if LICENCE.match(file.name)):
            name = file.name if label == "checkpoint" else f"{label}-{file.name}"
            source.carried.setdefault(name, file)
    return source
