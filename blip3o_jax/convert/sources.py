"""What `convert to-jax` converts: a checkpoint, complete or not, or the upstream parts of one."""

import functools
import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from blip3o_jax.config import Blip3oConfig, replace
from blip3o_jax.convert import published, upstream, vocabulary
from blip3o_jax.convert.config_json import EMBEDDING, NETWORKS, config_to_json, read_qwen3
from blip3o_jax.convert.published import LM_HEAD, TA_TOK, by_published_name, to_text
from blip3o_jax.convert.rules import to_torch
from blip3o_jax.convert.safetensors_io import open_tensors
from blip3o_jax.convert.vocabulary import Made
from blip3o_jax.errors import about, require
from blip3o_jax.models.blip3o import Blip3o, parts_of
from blip3o_jax.text import load_tokenizer

# Group -> the flag that fills it, what opens its files, and how its tensors begin in a BLIP3o
# checkpoint.
QWEN3 = ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")
GROUPS = {
    "qwen3": ("ar", upstream.open_qwen3, QWEN3),
    "sana": ("dit", upstream.open_sana, "model.sana."),
    "dc_ae": ("vae", upstream.open_dc_ae, "model.sana_vae."),
    "ta_tok": ("tokenizer", upstream.open_tokenizer, TA_TOK),
}
FLAGS = {group: flag for group, (flag, _, _) in GROUPS.items()}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZER_FILES += ("added_tokens.json", "vocab.json", "merges.txt", "generation_config.json")
TOKENIZER_FILES += ("chat_template.jinja", "chat_template.json")
LICENCE = re.compile(r"(licen[cs]e|notice|copying|copyright|use_policy)", re.IGNORECASE)

log = logging.getLogger(__name__)


@dataclass
class Source:
    """A model's parameters by path, unread, and all that goes with them."""

    config: Blip3oConfig
    leaves: dict[str, published.PublishedLeaf]
    ignored: dict[str, str]  # every tensor that fills none, and the reason
    folders: dict[str, Path]
    files: set[Path]  # all that were read
    beside: dict[str, Path | str]  # name in the result -> the file to copy, or the text to write
    made: dict[str, str] = field(default_factory=dict)  # how those came about that no file holds


def open_source(
    directory: Path | None, flags: dict[str, str | None], new_vocabulary: str | None, name: str
) -> Source:
    """Opens a checkpoint, or the upstream parts that `flags` (ar, dit, vae, tokenizer) name; `name`
    is for a model that has none. Reads headers and small files; InputError for everything that is
    missing, superfluous or contradictory."""
    modes = " or ".join(vocabulary.MODES)
    is_mode = new_vocabulary in (None, *vocabulary.MODES)
    require(is_mode, f"--new-vocabulary is {modes}, not {new_vocabulary!r}.")
    if directory is None:
        return _from_parts(flags, new_vocabulary, name)
    # A checkpoint has its vocabulary, parts may need one.
    plain = "--new-vocabulary belongs to a plain Qwen3 given by --ar; a BLIP3o checkpoint has its"
    require(new_vocabulary is None, f"{plain} vocabulary.")
    return _from_checkpoint(directory, flags)


def _open_parts(flags: dict[str, str | None]) -> tuple[dict[str, upstream.Upstream], dict]:
    """(the groups that flags name, their tensors by published name)."""
    named = {group: opener for group, (flag, opener, _) in GROUPS.items() if flags.get(flag)}
    parts = {group: opener(flags[FLAGS[group]]) for group, opener in named.items()}
    stored: dict[str, Any] = {}
    for part in parts.values():
        stored |= by_published_name(part.tensors)
    return parts, stored


def _from_checkpoint(directory: Path, flags: dict[str, str | None]) -> Source:
    """A published checkpoint; a flag fills a group that it lacks, and overrides nothing."""
    file, fields = directory / "config.json", published.read_fields(directory)
    stored, (parts, more) = by_published_name(open_tensors(directory)), _open_parts(flags)
    # Each group of tensors is either in the checkpoint or in the files that a flag names.
    for group, (flag, _, begins) in GROUPS.items():
        held = next((name for name in stored if name.startswith(begins)), None)
        fills = f"--{flag} fills what a checkpoint lacks, and {directory} holds {held!r}."
        require(held is None or group not in parts, fills)
        lacks = f"{directory} holds no tensor of {group}; name the files of its authors with"
        require(held is not None or group in parts, f"{lacks} --{flag}.")
    stored |= more
    # The config describes all of them; without a network's object it means the published one.
    networks = {group: part.config for group, part in parts.items() if group in NETWORKS}
    added, says_enough = {}, True
    for group, network in networks.items():
        key, to_json, _ = NETWORKS[group]
        if key not in fields:
            added[key] = json.loads(json.dumps(to_json(network)))
            says_enough &= network == type(network)()
    fields = {**fields, **added}
    cfg = published.read_config(directory, {name: x.shape for name, x in stored.items()}, fields)
    for group, network in networks.items():
        other = f"{file} describes another {group} than --{FLAGS[group]} {parts[group].folder}."
        require(getattr(cfg, group) == network, other)
    tied, repeated = published.resolve_lm_head(cfg.qwen3.tie_word_embeddings, stored)
    cfg = replace(cfg, **{"qwen3.tie_word_embeddings": tied})
    # config.json stays as it is where it says enough.
    source = _finish(directory, cfg, stored, repeated, parts, {"checkpoint": directory})
    source.files.add(file)
    source.beside["config.json"] = file if says_enough else to_text(fields)
    return source


def _from_parts(flags: dict[str, str | None], new_vocabulary: str | None, name: str) -> Source:
    """The four upstream parts, with a new connector."""
    if flags.get("vae") is None and flags.get("dit") and (Path(flags["dit"]) / "vae").is_dir():
        flags = {**flags, "vae": flags["dit"]}
    for flag in FLAGS.values():
        missing = f"Name a checkpoint to convert, or all of its parts: --{flag} is missing."
        require(bool(flags.get(flag)), missing)
    parts, stored = _open_parts(flags)
    ar, codes = parts["qwen3"], parts["ta_tok"].config.codebook_size
    require(EMBEDDING in stored, f"{ar.folder}: tensor {EMBEDDING!r} is missing.")
    tied = ar.config.get("tie_word_embeddings", True)
    tied, repeated = published.resolve_lm_head(bool(tied), stored)
    # A plain Qwen3 gets the image tokens: in its tokenizer, its embedding and its head.
    file, made, texts = ar.folder / "tokenizer.json", {}, {}
    vocab = vocabulary.known_vocabulary(load_tokenizer(file), codes)
    plain = f"{ar.folder} is a plain Qwen3 without image tokens; say how to make them with"
    require(vocab or new_vocabulary, f"{plain} --new-vocabulary mean (or another).")
    has = f"{file} has the image tokens already, so --new-vocabulary has nothing to make."
    require(vocab is None or not new_vocabulary, has)
    if vocab is None:
        texts["tokenizer.json"], vocab = vocabulary.extend_tokenizer(file, codes)
        keys = ("embedding.weight", "embedding_proj.weight", "embedding_proj.bias")
        inputs = [stored.get(f"{TA_TOK}bottleneck.regularizer.{key}") for key in keys]
        blocks = functools.partial(vocabulary.codebook, *inputs)
        first = vocab.image_start_tag_id + len(vocabulary.TAGS)
        for key in (EMBEDDING, LM_HEAD):
            if key in stored and key not in repeated:
                stored[key] = vocabulary.extend_matrix(stored[key], vocab, new_vocabulary, blocks)
                made[key] = f"rows from {first} on are new: {new_vocabulary}"
    # The four configs make one.
    networks, shapes = {x: parts[x].config for x in NETWORKS}, {EMBEDDING: stored[EMBEDDING].shape}
    with about(ar.folder / "config.json"):
        qwen3 = read_qwen3({**ar.config, "tie_word_embeddings": tied}, shapes)
        cfg = Blip3oConfig(name=name, qwen3=qwen3, vocab=vocab, **networks)
    # The connector belongs to none of the parts, and gets the weights that training starts with.
    part = "diffusion_connector"
    if not any(key.startswith(f"model.{part}.") for key in stored):
        params = Blip3o(cfg).init(jax.random.key(vocabulary.SEED), (part,))
        rules = [rule for rule in published.published_rules(cfg) if rule.part == part]
        for key, x in to_torch(rules, params).items():
            stored[key] = Made(key, x.shape, x.dtype, lambda x=x: x)
        made[f"model.{part}.*"] = "initialised at random, as training begins with it"
    for key, how in made.items():
        log.info("%s: %s.", key, how)
    # Its own files beside the weights, but for those that the new tokens change.
    source = _finish(ar.folder, cfg, stored, repeated, parts, {})
    source.files.add(file)
    source.made = made
    if "tokenizer.json" in texts:
        source.beside.pop("added_tokens.json", None)  # it says nothing of the new tokens
    texts["config.json"] = to_text(config_to_json(cfg, stored[EMBEDDING].dtype.name))
    source.beside |= texts
    return source


def _finish(
    where: Path,
    cfg: Blip3oConfig,
    stored: dict[str, Any],
    repeated: dict[str, str],
    parts: dict[str, upstream.Upstream],
    folders: dict[str, Path],
) -> Source:
    """Compares names and shapes; finds the tokenizer at `where` and licences beside all weights."""
    needed = {name: tensor for name, tensor in stored.items() if name not in repeated}
    leaves, ignored = published.open_leaves(where, cfg, needed, parts_of(cfg))
    folders = folders | {FLAGS[group]: part.folder for group, part in parts.items()}
    files = {tensor.file for tensor in stored.values() if tensor.file}
    files |= {file for part in parts.values() for file in part.files}
    beside = {name: where / name for name in TOKENIZER_FILES if (where / name).is_file()}
    for label, folder in folders.items():
        files |= set(folder.glob("*.safetensors.index.json"))
        # A diffusers repository has its licence above its models.
        places = [folder, folder.parent] if folder.name in ("transformer", "vae") else [folder]
        for file in sorted(file for place in places for file in place.iterdir()):
            if file.is_file() and LICENCE.match(file.name):
                name = file.name if label == "checkpoint" else f"{label}-{file.name}"
                beside.setdefault(name, file)
    return Source(cfg, leaves, {**ignored, **repeated}, folders, files, beside)
