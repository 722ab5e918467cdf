"""A checkpoint in the published PyTorch layout: config.json, safetensors, tokenizer.json. Names and
shapes are those of docs/model.md §3; one parameter at a time is read or written."""

import fnmatch
import functools
import itertools
import json
import logging
import os
import shutil
import tempfile
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from blip3o_jax import paths
from blip3o_jax.config import Blip3oConfig, replace
from blip3o_jax.convert import (
    config_json,
    folders,
    hashes,
    rules,
    safetensors_io,
    small_files,
    ta_tok,
)
from blip3o_jax.convert.config_json import EMBEDDING, Shapes, config_to_json
from blip3o_jax.convert.dc_ae import dc_ae_rules
from blip3o_jax.convert.qwen3 import qwen3_rules
from blip3o_jax.convert.rules import Rule, Shape, under
from blip3o_jax.convert.safetensors_io import Entry, Stored, row_blocks
from blip3o_jax.convert.sana import connector_rules, sana_rules
from blip3o_jax.errors import InputError, about, require
from blip3o_jax.files import read_json
from blip3o_jax.models.blip3o import Blip3o, parts_of
from blip3o_jax.moved import refuse
from blip3o_jax.paths import AnyPath
from blip3o_jax.tree import flatten

CONFIG_LIMIT = 1 << 20  # bytes
LM_HEAD = "lm_head.weight"
TA_TOK = "model.vision_tower.vision_tower."
DTYPES = ("float16", "bfloat16", "float32")
UNUSED = "the PyTorch code of the editing models makes it and never calls it"
NEVER_CALLED = {"model.und_image_vae_as_noise_connector.*": UNUSED}

__getattr__ = functools.partial(refuse, "convert.published")
log = logging.getLogger(__name__)


def published_rules(cfg: Blip3oConfig) -> list[Rule]:
    """The names of all parameters, with their prefixes (docs/model.md §3.1)."""
    table = under("", "qwen3/", qwen3_rules(cfg.qwen3))
    for part in parts_of(cfg):
        if part.endswith("_connector"):
            table += under(f"model.{part}.", f"{part}/", connector_rules())
    table += under("model.sana.", "sana/", sana_rules(cfg.sana))
    table += under("model.sana_vae.", "dc_ae/", dc_ae_rules(cfg.dc_ae))
    return table + under(TA_TOK, "ta_tok/", ta_tok.ta_tok_rules(cfg.ta_tok))


def published_name(name: str) -> str:
    """The name of §3 for a name in a file, which may come from another version of transformers."""
    inner = name.removeprefix(TA_TOK)
    return name if inner == name else TA_TOK + ta_tok.published_name(inner)


def ignored_tensors(cfg: Blip3oConfig, names: Iterable[str]) -> dict[str, str]:
    """{name: reason} of the published `names` that the model does not need."""
    patterns = {TA_TOK + pattern: reason for pattern, reason in ta_tok.ignored(cfg.ta_tok).items()}
    patterns |= NEVER_CALLED
    pairs = ((name, pattern) for name in names for pattern in patterns)
    return {name: patterns[x] for name, x in pairs if fnmatch.fnmatchcase(name, x)}


def by_published_name(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Tensors of a file under the names of §3; InputError when two of them have one name there."""
    renamed: dict[str, Stored] = {}
    for original, tensor in stored.items():
        first = renamed.setdefault(published_name(original), tensor)
        require(first is tensor, f"{tensor} is there twice, also as {first.name!r}.")
    return renamed


def resolve_lm_head(tied: bool, stored: Mapping[str, Stored]) -> tuple[bool, dict[str, str]]:
    """(whether the model is tied, {name: reason} of what is not needed): a tied model's file may
    repeat the embedding as lm_head; when the two differ, the model is not tied."""
    if not tied or LM_HEAD not in stored or EMBEDDING not in stored:
        return tied, {}
    # The two as numbers, a few rows of each in memory at a time.
    head, embedding = stored[LM_HEAD], stored[EMBEDDING]
    pairs = ((head.raw(rows), embedding.raw(rows)) for rows in row_blocks(head.shape, 4))
    # Their bits: the way back makes the one from the other, signs of zeros included.
    same = (np.array_equal(*(x.astype(np.float32).view("u4") for x in pair)) for pair in pairs)
    if head.shape == embedding.shape and all(same):
        return True, {LM_HEAD: "repeats the embedding, to which it is tied"}
    log.warning("%s differs from the embedding, so they are not tied as config.json says.", LM_HEAD)
    return False, {}


@dataclass(frozen=True)
class PublishedLeaf:
    """A parameter in published files, unread, and the tensors by name that make it."""

    rule: Rule
    shape: Shape
    tensors: Mapping[str, Stored]

    @property
    def dtype(self) -> np.dtype:
        return next(iter(self.tensors.values())).dtype

    def layers(self, stacked: bool) -> Iterator[np.ndarray]:
        """The array, or its layers along the first axis, one in memory at a time."""
        for name, tensor in self.tensors.items():
            yield rules.tensor_to_leaf(tensor.read(tensor.dtype), self.shape, self.rule, name)

    def reader(self, dtype: np.dtype) -> Callable[[tuple[slice, ...]], np.ndarray]:
        """The array, read at once, as a function of an index; InputError when it is not finite."""
        values = rules.gather(self.rule, self.shape, lambda name: self.tensors[name].read(dtype))
        return values.__getitem__


Leaves = dict[str, PublishedLeaf]  # by path


def _missing(name: str, stored: Mapping[str, Stored], where: AnyPath) -> str:
    """Says where the tensor of a published name should be, in the words of the files that hold its
    neighbours: their folder, and its own name there."""

    def same_words(one: list[str], two: list[str]) -> int:
        pairs = zip(one, two, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    def nearness(item: tuple[str, Stored]) -> tuple[int, bool]:
        return same_words(name.split("."), item[0].split(".")), item[1].file.parent == where

    neighbours = [item for item in stored.items() if getattr(item[1], "file", None)]
    if not neighbours:
        return f"{where}: tensor {name!r} is missing"
    theirs, tensor = max(neighbours, key=nearness)
    # What is the same at the end of a neighbour's two names; the rest is a prefix.
    ends = theirs.split(".")[::-1], tensor.name.split(".")[::-1]
    same = same_words(*ends)
    ours, own = ("".join(f"{word}." for word in end[same:][::-1]) for end in ends)
    name = own + name.removeprefix(ours) if name.startswith(ours) else name
    return f"{tensor.file.parent}: tensor {name!r} is missing"


def _asked_for(
    stored: Mapping[str, Stored], patterns: Iterable[str], expected: Mapping[str, Shape]
) -> dict[str, str]:
    """{name: reason} of the tensors that `--ignore` names, by the published names or their own."""
    asked = {}
    for pattern in patterns:
        names = [
            name
            for name, tensor in stored.items()
            if any(fnmatch.fnmatchcase(x, pattern) for x in (name, tensor.name))
        ]
        require(len(names) > 0, f"--ignore {pattern!r} matches no tensor of the source.")
        needed = next((name for name in names if name in expected), None)
        cannot = f"--ignore {pattern!r} matches {stored.get(needed)}, which the model needs."
        require(needed is None, cannot)
        asked |= dict.fromkeys(names, f"--ignore {pattern}")
    return asked


@functools.cache  # once a process, however often a checkpoint is opened for one of its parts
def _report(where: str, tensors: int, ignored: int) -> None:
    log.info("%s: %d tensors, %d not needed.", where, tensors, ignored)


def open_leaves(
    where: AnyPath,
    cfg: Blip3oConfig,
    stored: Mapping[str, Stored],
    parts: tuple[str, ...],
    ignore: Iterable[str] = (),
) -> tuple[Leaves, dict[str, str]]:
    """(the parameters of `parts` by path, {name: reason} of the tensors that are not needed);
    InputError unless `stored`, by published name, has every tensor of `parts`, and nothing that is
    neither expected nor ignored, in the expected shapes. where: the folder of the most; ignore:
    patterns of tensors to do without."""
    abstract, table = Blip3o(cfg).abstract(parts_of(cfg)), published_rules(cfg)
    shapes, expected = rules.leaf_shapes(table, abstract), rules.torch_shapes(table, abstract)
    # What is needed is there ...
    chosen = [rule for rule in table if rule.part in parts]
    needed = {name for rule in chosen for name in rule.names(shapes[rule.path])}
    if missing := sorted(needed - set(stored)):
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{_missing(missing[0], stored, where)}{more}.")
    # ... and what is there is needed, or known to be superfluous.
    ignored = _asked_for(stored, ignore, expected) | ignored_tensors(cfg, stored)
    for name, tensor in stored.items():
        if name not in ignored:
            stray = f"{tensor} is not part of the model that config.json describes; if it is not"
            stray += " needed, convert with --ignore."
            require(name in expected, stray)
            shape, implied = tensor.shape, expected[name]
            other = f"{tensor} has shape {shape}, and config.json implies {implied}."
            require(shape == implied, other)
    _report(str(where), len(stored), len(ignored))
    leaves = {}
    for rule in chosen:
        tensors = {name: stored[name] for name in rule.names(shapes[rule.path])}
        leaves[rule.path] = PublishedLeaf(rule, shapes[rule.path], tensors)
    return leaves, ignored


def float_dtype(dtype: Any) -> np.dtype:
    """The numpy dtype of parameters; InputError for one that they cannot have."""
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    require(name in DTYPES, f"Parameters are {', '.join(DTYPES)}, not {name}.")
    return np.dtype(name)


def read_fields(directory: AnyPath) -> dict[str, Any]:
    """The fields of config.json; InputError when it is not a BLIP3o-NEXT's."""
    fields = read_json(directory / "config.json", CONFIG_LIMIT)
    with about(directory / "config.json"):
        config_json.check_family(fields)
    return fields


def read_config(
    directory: AnyPath, shapes: Shapes | None = None, fields: Mapping | None = None
) -> Blip3oConfig:
    """The configuration in a folder's config.json, or of its `fields`, see `config_from_json`; what
    they leave out comes from the small files beside it."""
    fields = read_fields(directory) if fields is None else fields
    fields = small_files.completed(directory, fields)
    with about(directory / "config.json"):
        return config_json.config_from_json(fields, shapes, directory.resolve().name)


def open_published(directory: AnyPath) -> tuple[Blip3oConfig, dict[str, Stored]]:
    """(configuration, unread tensors by published name but for an lm_head that repeats the
    embedding); InputError for another family of models, and for contradicting files."""
    require(directory.is_dir(), f"{directory} is not a directory.")
    fields = read_fields(directory)  # before the weights: another family's need no opening
    weights = folders.open_weights(directory, "model", fields, folders.Options(), is_qwen3=True)
    stored = by_published_name(weights.tensors)
    cfg = read_config(directory, {name: x.shape for name, x in stored.items()}, fields)
    tied, repeated = resolve_lm_head(cfg.qwen3.tie_word_embeddings, stored)
    cfg = replace(cfg, **{"qwen3.tie_word_embeddings": tied})
    return cfg, {name: tensor for name, tensor in stored.items() if name not in repeated}


def check_shapes(where: AnyPath, cfg: Blip3oConfig, leaves: Mapping, parts: tuple = ()) -> None:
    """InputError beginning with `where` unless `leaves` are those of `parts`, or of all parts."""
    trees = leaves, flatten(Blip3o(cfg).abstract(parts or parts_of(cfg)))
    shapes, needed = ({path: tuple(x.shape) for path, x in tree.items()} for tree in trees)
    if differing := dict(shapes.items() ^ needed.items()):
        path = min(differing)
        shape = f"has shape {shapes[path]}" if path in shapes else "is missing"
        implied = f"the config of {cfg.name} implies {needed.get(path)}"
        raise InputError(f"{where}: parameter {path} {shape}, and {implied}.")


def write_published(
    folder: Path,
    cfg: Blip3oConfig,
    leaves: Mapping[str, Any],
    dtype: np.dtype | None,
    max_shard_bytes: float,
    beside: Mapping[str, AnyPath | str],
    more: Mapping[str, tuple[Entry, Any]] = types.MappingProxyType({}),
    names: Mapping[str, str] = types.MappingProxyType({}),
) -> dict[str, Entry]:
    """Writes the published layout into a folder; returns what is known of each tensor.

    leaves: by path, arrays or unread ones, see `torch_tensors`. dtype: of every tensor; None
    keeps each leaf's own. beside: as in `write_beside`; config.json need not be among them. more:
    tensors that are no parameters, written behind those. names: of tensors that have another than
    the published one.
    """
    table, entries = published_rules(cfg), {}
    for rule in table:
        leaf = leaves[rule.path]
        entry = Entry(rule.tensor_shape(leaf.shape), dtype or leaf.dtype)
        entries |= dict.fromkeys(rule.names(leaf.shape), entry)
    twice = min(entries.keys() & more.keys(), default="")
    require(not twice, f"Tensor {twice!r} is a parameter and is kept as an unused tensor too.")
    entries |= {name: entry for name, (entry, _) in more.items()}
    entries = {names.get(name, name): entry for name, entry in entries.items()}
    # The weights and their hashes, then the small files.
    others = (
        (name, x if isinstance(x, Stored) else next(x.layers(False)))
        for name, (_, x) in more.items()
    )
    tensors = itertools.chain(rules.torch_tensors(table, leaves), others)
    tensors = ((names.get(name, name), tensor) for name, tensor in tensors)
    tensors = tqdm(tensors, "Writing", len(entries), unit="tensor", delay=3, disable=None)
    safetensors_io.write_tensors(folder, entries, tensors, max_shard_bytes)
    hashes.record(folder, folder.glob("*.safetensors"))
    fields = config_to_json(cfg, (dtype or leaves["qwen3/norm/scale"].dtype).name)
    write_beside(folder, {"config.json": to_text(fields), **beside})
    return entries


def to_text(fields: Mapping[str, Any]) -> str:
    """JSON as config.json has it."""
    return json.dumps(fields, indent=2) + "\n"


def write_beside(folder: Path, files: Mapping[str, AnyPath | str]) -> None:
    """Small files by name: a path is copied, a text is written."""
    for name, content in files.items():
        data = content.read_bytes() if isinstance(content, AnyPath) else content.encode()
        (folder / name).write_bytes(data)


def save_published(
    directory: str | AnyPath,
    cfg: Blip3oConfig,
    params: Mapping[str, Any],
    tokenizer_file: str | AnyPath | None = None,
    dtype: str = "float32",
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
) -> None:
    """Writes parameters as `dtype` in the published layout, complete or not at all; InputError when
    `directory` exists (with `overwrite`: and is not a checkpoint), when the parameters are not
    those of `cfg`, or for a value that is not finite in `dtype`."""
    directory, dtype = paths.path(directory).absolute(), float_dtype(dtype)
    leaves = flatten(params)
    beside = {"tokenizer.json": paths.path(tokenizer_file)} if tokenizer_file else {}
    # Only a checkpoint is replaced, and only by one that is sound.
    choices = f"{directory} exists already; choose another name, or overwrite it."
    require(overwrite or not directory.exists(), choices)
    is_free = not directory.exists() or (directory / "config.json").is_file()
    require(is_free, f"{directory} exists and is not a checkpoint that could be overwritten.")
    for file in beside.values():
        require(file.is_file(), f"The tokenizer file {file} is missing.")
    check_shapes(directory, cfg, leaves)
    if paths.is_bucket(directory):
        with tempfile.TemporaryDirectory() as folder:
            write_published(Path(folder), cfg, leaves, dtype, max_shard_bytes, beside)
            paths.remove_folder(directory, "config.json")
            paths.copy_folder(Path(folder), directory, "config.json")
        return
    # The new folder is complete before the old one goes.
    temporary = directory.with_name(f".{directory.name}.new-{os.getpid()}")
    old = directory.with_name(f".{directory.name}.old-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        write_published(temporary, cfg, leaves, dtype, max_shard_bytes, beside)
        if directory.exists():
            directory.rename(old)
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
