"""A checkpoint in the published PyTorch layout: config.json, safetensors (one file, or shards and
an index), tokenizer.json.

Names and shapes are those of docs/model.md §3. Reading and writing hold one parameter at a time
beside the result.
"""

import contextlib
import fnmatch
import functools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from blip3o_jax.config import Blip3oConfig, replace
from blip3o_jax.convert import hashes, ta_tok
from blip3o_jax.convert.config_json import EMBEDDING, check_family, config_from_json, config_to_json
from blip3o_jax.convert.dc_ae import dc_ae_rules
from blip3o_jax.convert.qwen3 import qwen3_rules
from blip3o_jax.convert.rules import (
    Rule,
    Shape,
    gather,
    in_memory,
    leaf_shapes,
    tensor_to_leaf,
    torch_shapes,
    torch_tensors,
    under,
)
from blip3o_jax.convert.safetensors_io import (
    Entry,
    Stored,
    Tensors,
    open_tensors,
    read_json,
    row_blocks,
    write_tensors,
)
from blip3o_jax.convert.sana import connector_rules, sana_rules
from blip3o_jax.errors import InputError
from blip3o_jax.models.blip3o import Blip3o, parts_of
from blip3o_jax.moved import refuse
from blip3o_jax.tree import flatten

CONFIG_LIMIT = 1 << 20  # bytes
LM_HEAD = "lm_head.weight"
TA_TOK = "model.vision_tower.vision_tower."
DTYPES = ("float16", "bfloat16", "float32")
NEVER_CALLED = {
    "model.und_image_vae_as_noise_connector.*": "the PyTorch code of the editing models "
    "makes it and never calls it"
}

__getattr__ = functools.partial(refuse, "convert.published")

log = logging.getLogger(__name__)


def published_rules(cfg: Blip3oConfig) -> list[Rule]:
    """The names of all parameters, with their prefixes (docs/model.md §3.1)."""
    rules = under("", "qwen3/", qwen3_rules(cfg.qwen3))
    for part in parts_of(cfg):
        if part.endswith("_connector"):
            rules += under(f"model.{part}.", f"{part}/", connector_rules())
    return [
        *rules,
        *under("model.sana.", "sana/", sana_rules(cfg.sana)),
        *under("model.sana_vae.", "dc_ae/", dc_ae_rules(cfg.dc_ae)),
        *under(TA_TOK, "ta_tok/", ta_tok.ta_tok_rules(cfg.ta_tok)),
    ]


def published_name(name: str) -> str:
    """The name of §3 for a name in a file, which may come from another version of transformers."""
    inner = name.removeprefix(TA_TOK)
    return name if inner == name else TA_TOK + ta_tok.published_name(inner)


def ignored_tensors(cfg: Blip3oConfig, names: Iterable[str]) -> dict[str, str]:
    """{name: reason} of the published `names` that the checkpoint has and the model does not
    need."""
    patterns = {TA_TOK + pattern: reason for pattern, reason in ta_tok.ignored(cfg.ta_tok).items()}
    return {
        name: reason
        for name in names
        for pattern, reason in (patterns | NEVER_CALLED).items()
        if fnmatch.fnmatchcase(name, pattern)
    }


def by_published_name(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Tensors of a file under the names of §3; InputError when two of them have one name there."""
    renamed: dict[str, Stored] = {}
    for original, tensor in stored.items():
        name = published_name(original)
        if name in renamed:
            raise InputError(f"{tensor} is there twice, also as {renamed[name].name!r}.")
        renamed[name] = tensor
    return renamed


def _same_values(a: Stored, b: Stored) -> bool:
    """Whether two matrices hold the same numbers; reads them a few rows at a time."""
    if a.shape != b.shape:
        return False
    pairs = ((x.rows(s.start, s.stop) for x in (a, b)) for s in row_blocks(a.shape, 4))
    return all(np.array_equal(*(rows.astype(np.float32) for rows in pair)) for pair in pairs)


def resolve_lm_head(tied: bool, stored: Mapping[str, Stored]) -> tuple[bool, dict[str, str]]:
    """(whether the model is tied, {name: reason} of what is not needed).

    A tied model's file may repeat the embedding as lm_head, which is then not needed; when the two
    differ, the model is not tied.
    """
    if not tied or LM_HEAD not in stored or EMBEDDING not in stored:
        return tied, {}
    if _same_values(stored[LM_HEAD], stored[EMBEDDING]):
        return True, {LM_HEAD: "repeats the embedding, to which it is tied"}
    log.warning("%s differs from the embedding, so they are not tied as config.json says.", LM_HEAD)
    return False, {}


@dataclass(frozen=True)
class Match:
    """Which tensors fill which parameters: the rules, the parameters' shapes by path, and the
    tensors that are not needed, with the reason."""

    rules: list[Rule]
    shapes: dict[str, Shape]
    ignored: dict[str, str]


def match(
    where: Path, cfg: Blip3oConfig, stored: Mapping[str, Stored], parts: tuple[str, ...]
) -> Match:
    """How tensors by published name fill the parameters of `parts`.

    InputError beginning with `where` unless every tensor of `parts` is stored, and nothing that is
    neither expected nor ignored, in the expected shapes.
    """
    abstract, rules = Blip3o(cfg).abstract(parts_of(cfg)), published_rules(cfg)
    shapes, expected = leaf_shapes(rules, abstract), torch_shapes(rules, abstract)
    chosen = [rule for rule in rules if rule.path.split("/")[0] in parts]
    needed = {name for rule in chosen for name in rule.names(shapes[rule.path])}
    if missing := sorted(needed - set(stored)):
        raise InputError(
            f"{where}: tensor {missing[0]!r} is missing, and {len(missing) - 1} others."
        )
    ignored = ignored_tensors(cfg, stored)
    for name, tensor in stored.items():
        if name in ignored:
            continue
        if name not in expected:
            raise InputError(f"{tensor} is not part of the model that config.json describes.")
        if tensor.shape != expected[name]:
            raise InputError(
                f"{tensor} has shape {tensor.shape}, and config.json implies {expected[name]}."
            )
    return Match(chosen, {rule.path: shapes[rule.path] for rule in chosen}, ignored)


def float_dtype(dtype: Any) -> np.dtype:
    """The numpy dtype of parameters; InputError for one that they cannot have."""
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in DTYPES:
        raise InputError(f"Parameters are {', '.join(DTYPES)}, not {name}.")
    return np.dtype(name)


@contextlib.contextmanager
def about(file: Path):
    """Puts the file's name before the sentence of a InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def read_fields(directory: Path) -> dict[str, Any]:
    """The fields of config.json; InputError when it is not a BLIP3o-NEXT's."""
    file = directory / "config.json"
    fields = read_json(file, CONFIG_LIMIT)
    with about(file):
        check_family(fields)
    return fields


def open_published(directory: Path) -> tuple[Blip3oConfig, dict[str, Stored]]:
    """(configuration, tensors by published name but for an lm_head that repeats the embedding).

    Nothing is read but headers, and the two matrices where they are to be compared. InputError for
    another family of models, and for files that contradict each other.
    """
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory.")
    fields = read_fields(directory)  # before the weights: another family's need no opening
    stored = by_published_name(open_tensors(directory))
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    with about(directory / "config.json"):
        cfg = config_from_json(fields, shapes, directory.resolve().name)
    tied, repeated = resolve_lm_head(cfg.qwen3.tie_word_embeddings, stored)
    cfg = replace(cfg, **{"qwen3.tie_word_embeddings": tied})
    return cfg, {name: tensor for name, tensor in stored.items() if name not in repeated}


@dataclass(frozen=True)
class PublishedLeaf:
    """A parameter in published files, unread: `tensors` by name are those that `rule` makes it
    of."""

    rule: Rule
    shape: Shape
    tensors: Mapping[str, Stored]

    @property
    def dtype(self) -> np.dtype:
        return next(iter(self.tensors.values())).dtype

    def layers(self, stacked: bool) -> Iterator[np.ndarray]:
        """The array, or its layers along the first axis, one in memory at a time."""
        for name, tensor in self.tensors.items():
            yield tensor_to_leaf(tensor.read(tensor.dtype), self.shape, self.rule, name)

    def reader(self, dtype: np.dtype) -> Callable[[tuple[slice, ...]], np.ndarray]:
        """A function of an index of the array, which is read at once; InputError when a value is
        not finite as `dtype`."""
        values = gather(self.rule, self.shape, Tensors(self.tensors, dtype))
        return lambda index: values[index]


def open_leaves(
    directory: Path, cfg: Blip3oConfig, stored: Mapping[str, Stored], parts: tuple[str, ...]
) -> dict[str, PublishedLeaf]:
    """The parameters of `parts` by path; those of other parts may be missing. Errors as `match`."""
    matched = match(directory, cfg, stored, parts)
    log.info("%s: %d tensors, %d not needed.", directory, len(stored), len(matched.ignored))
    leaves = {}
    for rule in matched.rules:
        shape = matched.shapes[rule.path]
        tensors = {name: stored[name] for name in rule.names(shape)}
        leaves[rule.path] = PublishedLeaf(rule, shape, tensors)
    return leaves


def check_shapes(
    where: Path, cfg: Blip3oConfig, leaves: Mapping[str, Any], parts: tuple[str, ...] | None = None
) -> None:
    """InputError beginning with `where` unless the leaves by path are those of `parts`, or of all,
    each of its shape."""
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    abstract = Blip3o(cfg).abstract(parts or parts_of(cfg))
    needed = {path: tuple(leaf.shape) for path, leaf in flatten(abstract).items()}
    differing = [
        path for path in shapes.keys() | needed.keys() if shapes.get(path) != needed.get(path)
    ]
    if differing:
        path = min(differing)
        shape = f"has shape {shapes[path]}" if path in shapes else "is missing"
        raise InputError(
            f"{where}: parameter {path} {shape}, and the config of {cfg.name} implies "
            f"{needed.get(path)}."
        )


def write_published(
    folder: Path,
    cfg: Blip3oConfig,
    leaves: Mapping[str, Any],
    dtype: np.dtype | None,
    max_shard_bytes: float,
    beside: Mapping[str, Path | str],
) -> dict[str, Entry]:
    """Writes the published layout into a folder; returns what is known of each tensor.

    leaves: by path, with `.shape`, `.dtype` and `.layers(stacked)`, one layer in memory at a time.
    dtype: of every tensor; None keeps each leaf's own. beside: files by name, a path to copy or a
    text; config.json is written from `cfg` unless it is among them.
    """
    rules, entries = published_rules(cfg), {}
    for rule in rules:
        leaf = leaves[rule.path]
        entry = Entry(rule.tensor_shape(leaf.shape), dtype or leaf.dtype)
        entries |= dict.fromkeys(rule.names(leaf.shape), entry)

    tensors = torch_tensors(rules, leaves)
    tensors = tqdm(tensors, "Writing", len(entries), unit="tensor", delay=3, disable=None)
    write_tensors(folder, entries, tensors, max_shard_bytes)
    hashes.record(folder, folder.glob("*.safetensors"))

    fields = config_to_json(cfg, (dtype or leaves["qwen3/norm/scale"].dtype).name)
    write_beside(folder, {"config.json": json.dumps(fields, indent=2) + "\n", **beside})
    return entries


def write_beside(folder: Path, files: Mapping[str, Path | str]) -> None:
    """Small files by name: a path is copied, a text is written."""
    for name, content in files.items():
        if isinstance(content, Path):
            shutil.copyfile(content, folder / name)
        else:
            (folder / name).write_text(content, encoding="utf-8")


def save_published(
    directory: str | Path,
    cfg: Blip3oConfig,
    params: Mapping[str, Any],
    tokenizer_file: str | Path | None = None,
    dtype: str = "float32",
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
) -> None:
    """Writes parameters as `dtype` in the published layout, complete or not at all.

    Raises InputError when `directory` exists (with `overwrite`: and is not a checkpoint), when the
    parameters are not those of `cfg`, or for a value that is not finite in `dtype`.
    """
    directory, dtype = Path(directory).absolute(), float_dtype(dtype)
    if directory.exists() and not (overwrite and (directory / "config.json").is_file()):
        choices = "already; choose another name, or overwrite it"
        refusal = "and is not a checkpoint that could be overwritten"
        raise InputError(f"{directory} exists {refusal if overwrite else choices}.")
    if tokenizer_file is not None and not Path(tokenizer_file).is_file():
        raise InputError(f"The tokenizer file {tokenizer_file} is missing.")
    check_shapes(directory, cfg, leaves := in_memory(params))
    temporary = directory.with_name(f".{directory.name}.new-{os.getpid()}")
    old = directory.with_name(f".{directory.name}.old-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        beside = {"tokenizer.json": Path(tokenizer_file)} if tokenizer_file else {}
        write_published(temporary, cfg, leaves, dtype, max_shard_bytes, beside)
        if directory.exists():
            directory.rename(old)
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
