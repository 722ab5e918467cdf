"""What `convert to-jax` converts: a checkpoint, complete or not, or the upstream parts of one."""

import functools
import json
import logging
import re
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from blip3o_jax import paths
from blip3o_jax.config import Blip3oConfig, replace
from blip3o_jax.convert import published, small_files, tokenizer_files, upstream, vocabulary
from blip3o_jax.convert.config_json import EMBEDDING, NETWORKS, config_to_json, read_qwen3
from blip3o_jax.convert.folders import Options, open_weights
from blip3o_jax.convert.published import LM_HEAD, TA_TOK, by_published_name, published_name, to_text
from blip3o_jax.convert.rules import to_torch
from blip3o_jax.convert.safetensors_io import Stored
from blip3o_jax.convert.vocabulary import Made
from blip3o_jax.errors import about, require
from blip3o_jax.models.blip3o import Blip3o, parts_of
from blip3o_jax.paths import AnyPath
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
    folders: dict[str, AnyPath]
    files: set[AnyPath]  # all that were read
    beside: dict[str, AnyPath | str]  # name in the result -> the file to copy, or the text to write
    unused: dict[str, Stored]  # by published name, the tensors that fill none, but for
    repeated: dict[str, np.dtype]  # those that repeat another
    renamed: dict[str, str]  # published name -> the checkpoint's own, where it has another
    # What was done to names, by the label of their folder, and what was merged into tensors.
    notes: dict[str, str] = field(default_factory=dict)
    merged: dict[str, str] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)  # how those came about that no file holds


def open_source(
    directory: AnyPath | None,
    flags: dict[str, str | None],
    new_vocabulary: str | None,
    name: str,
    options: Options,
) -> Source:
    """Opens a checkpoint, or the upstream parts that `flags` (ar, dit, vae, tokenizer) name; `name`
    is for a model that has none. Reads headers and small files; InputError for everything that is
    missing, superfluous or contradictory."""
    modes = " or ".join(vocabulary.MODES)
    is_mode = new_vocabulary in (None, *vocabulary.MODES)
    require(is_mode, f"--new-vocabulary is {modes}, not {new_vocabulary!r}.")
    # A checkpoint has its vocabulary, parts may need one.
    plain = "--new-vocabulary belongs to a plain Qwen3 given by --ar; a BLIP3o checkpoint has its"
    require(directory is None or new_vocabulary is None, f"{plain} vocabulary.")
    if directory is None:
        source = _from_parts(flags, new_vocabulary, name, options)
    else:
        source = _from_checkpoint(directory, flags, options)
    # Options that nothing obeyed.
    variant = rf"\.{re.escape(options.variant or '')}\b"
    is_there = any(re.search(variant, file.name) for file in source.files)
    no_variant = f"No folder of the source has a variant {options.variant!r}."
    require(options.variant is None or is_there, no_variant)
    nothing = "The source has no adapter beside its weights; --merge-lora has nothing to merge."
    require(bool(source.merged) or not options.merge_lora, nothing)
    return source


def _open_parts(
    flags: dict[str, str | None], options: Options
) -> tuple[dict[str, upstream.Upstream], dict]:
    """(the groups that flags name, their tensors by published name)."""
    named = {group: opener for group, (flag, opener, _) in GROUPS.items() if flags.get(flag)}
    parts = {group: opener(flags[FLAGS[group]], options) for group, opener in named.items()}
    stored: dict[str, Any] = {}
    for part in parts.values():
        stored |= by_published_name(part.tensors)
    return parts, stored


def _from_checkpoint(directory: AnyPath, flags: dict[str, str | None], options: Options) -> Source:
    """A published checkpoint; a flag fills a group that it lacks, and overrides nothing."""
    file, fields = directory / "config.json", published.read_fields(directory)
    weights = open_weights(directory, "model", fields, options, is_qwen3=True)
    stored, (parts, more) = by_published_name(weights.tensors), _open_parts(flags, options)
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
    added = small_files.networks(directory, fields)
    says_enough = not added
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
    source = _finish(directory, cfg, stored, repeated, parts, {"checkpoint": directory}, options)
    source.files |= {file, *weights.files}
    source.notes |= {"checkpoint": weights.note} if weights.note else {}
    source.merged |= weights.merged
    if tokenizer_files.is_slow(directory):
        source.beside["tokenizer.json"] = tokenizer_files.to_tokenizer_json(directory)
    source.beside["config.json"] = file if says_enough else to_text(fields)
    return source


def _from_parts(
    flags: dict[str, str | None], new_vocabulary: str | None, name: str, options: Options
) -> Source:
    """The four upstream parts, with a new connector."""
    dit = flags.get("dit")
    if dit and flags.get("vae") is None and (paths.path(dit) / "vae").is_dir():
        flags = {**flags, "vae": dit}
    for flag in FLAGS.values():
        missing = f"Name a checkpoint to convert, or all of its parts: --{flag} is missing."
        require(bool(flags.get(flag)), missing)
    parts, stored = _open_parts(flags, options)
    ar, codes = parts["qwen3"], parts["ta_tok"].config.codebook_size
    require(EMBEDDING in stored, f"{ar.folder}: tensor {EMBEDDING!r} is missing.")
    tied = ar.config.get("tie_word_embeddings", True)
    tied, repeated = published.resolve_lm_head(bool(tied), stored)
    # A plain Qwen3 gets the image tokens: in its tokenizer, its embedding and its head.
    file, made, texts = ar.folder / "tokenizer.json", {}, {}
    if tokenizer_files.is_slow(ar.folder):
        file = ar.folder / "vocab.json"
        texts["tokenizer.json"] = tokenizer_files.to_tokenizer_json(ar.folder)
    tokenizer = load_tokenizer(file, texts.get("tokenizer.json"))
    vocab = vocabulary.known_vocabulary(tokenizer, codes)
    plain = f"{ar.folder} is a plain Qwen3 without image tokens; say how to make them with"
    require(vocab or new_vocabulary, f"{plain} --new-vocabulary mean (or another).")
    has = f"{file} has the image tokens already, so --new-vocabulary has nothing to make."
    require(vocab is None or not new_vocabulary, has)
    if vocab is None:
        texts["tokenizer.json"], vocab = vocabulary.extend_tokenizer(file, tokenizer, codes)
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
    source = _finish(ar.folder, cfg, stored, repeated, parts, {}, options)
    source.files.add(file)
    source.made = made
    if new_vocabulary:
        source.beside.pop("added_tokens.json", None)  # it says nothing of the new tokens
    texts["config.json"] = to_text(config_to_json(cfg, stored[EMBEDDING].dtype.name))
    source.beside |= texts
    return source


def _finish(
    where: AnyPath,
    cfg: Blip3oConfig,
    stored: dict[str, Any],
    repeated: dict[str, str],
    parts: dict[str, upstream.Upstream],
    folders: dict[str, AnyPath],
    options: Options,
) -> Source:
    """Compares names and shapes; finds the tokenizer at `where` and licences beside all weights."""
    needed = {name: tensor for name, tensor in stored.items() if name not in repeated}
    leaves, ignored = published.open_leaves(where, cfg, needed, parts_of(cfg), options.ignore)
    folders = folders | {FLAGS[group]: part.folder for group, part in parts.items()}
    files = {tensor.file for tensor in stored.values() if tensor.file}
    files |= {file for part in parts.values() for file in part.files}
    beside = {name: where / name for name in TOKENIZER_FILES if (where / name).is_file()}
    for label, folder in folders.items():
        files |= set(folder.glob("*.safetensors.index*.json"))
        # A diffusers repository has its licence above its models.
        places = [folder, folder.parent] if folder.name in ("transformer", "vae") else [folder]
        for file in sorted(file for place in places for file in place.iterdir()):
            if file.is_file() and LICENCE.match(file.name):
                name = file.name if label == "checkpoint" else f"{label}-{file.name}"
                beside.setdefault(name, file)
    # What is written again on the way back.
    unused = {name: stored[name] for name in ignored}
    dtypes = {name: stored[name].dtype for name in repeated}
    own = {name: x.name for name, x in stored.items() if published_name(x.name) == name != x.name}
    notes = {FLAGS[group]: part.note for group, part in parts.items() if part.note}
    merged = {name: how for part in parts.values() for name, how in part.merged.items()}
    ignored |= repeated
    return Source(cfg, leaves, ignored, folders, files, beside, unused, dtypes, own, notes, merged)
