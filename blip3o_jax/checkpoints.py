"""One door to a checkpoint of any kind: `open(name)` takes the name of an embedded checkpoint, a
folder in the published layout or of `convert to-jax`, or the workdir of a training run, of which it
takes the newest checkpoint, and that of a step for WORKDIR@STEP. What tells the kinds apart is here
and nowhere else."""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from blip3o_jax import paths, presets, resources, training_checkpoint
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.convert import converted, hashes, lora, orbax_io, published, tokenizer_files, unused
from blip3o_jax.convert.config_json import config_to_json
from blip3o_jax.convert.padding import VOCAB_AXIS, padded, with_rows
from blip3o_jax.errors import InputError, nearest, require
from blip3o_jax.models.blip3o import parts_of
from blip3o_jax.paths import AnyPath
from blip3o_jax.text import Text, load_tokenizer
from blip3o_jax.tree import flatten, unflatten

PUBLISHED, CONVERTED, RUN = "published", "converted", "run"
DIGITS = 12  # of the hash in an identity
Leaves = dict[str, published.PublishedLeaf | orbax_io.Leaf]


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, its weights unread."""

    folder: AnyPath  # what was named
    kind: str
    config: Blip3oConfig  # whose vocabulary is padded only by `padded`
    step: int | None  # of a run
    root: AnyPath  # of the weights and their record of hashes
    files: tuple[AnyPath, ...]  # all that hold weights
    select: Callable[[tuple[str, ...]], Leaves]  # parts -> leaves, InputError when one is missing

    @functools.cached_property
    def leaves(self) -> Leaves:
        """All parameters by path: `.shape`, `.dtype`, `.layers(stacked)` one layer at a time."""
        return self.select(parts_of(self.config))

    @property
    def tokenizer(self) -> AnyPath:
        """As `tokenizer_of`."""
        return _tokenizer(self.folder, self.kind, self.root)

    def padded(self, multiple: int) -> "Checkpoint":
        """The same with rows behind the vocabulary up to a multiple, for a mesh to shard."""
        return dataclasses.replace(self, config=padded(self.config, multiple))

    def load(
        self,
        parts: tuple[str, ...] | None = None,
        dtype: Any = "float32",
        shardings: Callable[[dict], dict] | Mapping | None = None,
    ) -> dict:
        """The parameters of `parts`, or all, as `dtype`; each host reads its own shards.

        shardings: a tree like the parameters', or a function from their shapes to it; without it
        the leaves are numpy arrays. Parts that are not asked for may be missing. InputError, naming
        the file, for what is missing, damaged, not finite or contradictory, and for another part.
        """
        dtype, rows = published.float_dtype(dtype), self.config.qwen3.vocab_rows
        known = parts_of(self.config)
        for part in parts or ():
            require(part in known, f"{self.folder} has no {part!r}, only {', '.join(known)}.")
        leaves = self.select(parts or known)
        if self.kind != RUN:  # whose files `open` compares
            # A part's own, where it has any: of all there may be thousands in a bucket.
            own = [x for x in self.files if x.parent.name.partition(".")[0] in (parts or ())]
            hashes.compare(self.root, own or self.files, is_part=bool(own))
        shapes = {path: with_rows(path, leaf.shape, rows) for path, leaf in leaves.items()}
        # Where each array goes.
        if callable(shardings):
            abstract = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in shapes.items()}
            shardings = shardings(unflatten(abstract))
        placed, arrays = flatten(shardings or {}), {}
        # One leaf in memory at a time, and of it a host's own shards.
        title = f"Reading {self.folder.name}"
        for path, leaf in tqdm(leaves.items(), title, unit="leaf", delay=3, disable=None):
            shape, piece = shapes[path], _reader(leaf, shapes[path], dtype)
            if placed:
                arrays[path] = jax.make_array_from_callback(shape, placed[path], piece)
            else:
                arrays[path] = piece((slice(None),) * len(shape))
        return unflatten(arrays)

    @functools.cached_property
    def identity(self) -> str:
        """NAME@HASH, of a run NAME/STEP@HASH: what an image's metadata name.

        HASH covers every byte of every weight, the step, the config and the tokenizer. The weights'
        own hashes are those recorded when they were written, if sizes and samples still agree, else
        InputError; without a record they are hashed, once for each state of the files.
        """
        weights = self.root, self.files
        return self._identity(hashes.compare(*weights) or hashes.remembered(*weights))

    def verify(self) -> tuple[str, bool]:
        """(identity from every byte, whether a record confirms it); InputError if one denies it."""
        recorded = hashes.compare(self.root, self.files, whole=True)
        weights = recorded or hashes.measure(self.root, self.files)
        if self.kind == CONVERTED:
            unused.verify(self.folder, whole=True)
        return self._identity(weights), recorded is not None

    def _identity(self, weights: dict[str, str]) -> str:
        config = config_to_json(dataclasses.replace(self.config, name=""))
        tokenizer = self.folder / "tokenizer.json"
        text = hashes.hash_file(tokenizer)["sha256"] if tokenizer.is_file() else ""
        contents = json.dumps([self.step, config, text, weights], sort_keys=True)
        name = self.folder.name if self.step is None else f"{self.folder.name}/{self.step}"
        return f"{name}@{hashlib.sha256(contents.encode()).hexdigest()[:DIGITS]}"


def _reader(
    leaf: published.PublishedLeaf | orbax_io.Leaf, shape: tuple[int, ...], dtype: np.dtype
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """A function that reads, once, the values at an index of `shape`: zeros behind those stored."""
    read, pieces = leaf.reader(dtype), {}

    def piece(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(x.indices(size)[:2] for x, size in zip(index, shape, strict=True))
        if bounds not in pieces:
            # What is stored of it, and zeros for the rest.
            limits = zip(bounds, leaf.shape, strict=True)
            inside = [(min(start, size), min(stop, size)) for (start, stop), size in limits]
            values = read(tuple(slice(*ends) for ends in inside))
            missing = [b[1] - b[0] - n for b, n in zip(bounds, values.shape, strict=True)]
            padding = [(0, count) for count in missing]
            pieces[bounds] = np.pad(values, padding) if any(missing) else values
        return pieces[bounds]

    return piece


def embedded() -> dict[str, AnyPath]:
    """Names of the checkpoints that travel with the package, and their folders."""
    return {file.parent.name: file.parent for file in resources.ASSETS.glob("*/config.json")}


def _split(name: str | AnyPath) -> tuple[str, str | None]:
    """(NAME, STEP) of NAME@STEP; without a step, also where a folder has such a name itself."""
    match = re.fullmatch("(.+)@(.*)", str(name))
    if match is None or paths.path(name).exists():
        return str(name), None
    is_known = match[1] in embedded() or paths.path(match[1]).is_dir()
    return match.groups() if is_known else (str(name), None)


def _folder_of_run(workdir: str, step: str | None) -> AnyPath:
    """The folder of a run's checkpoint of a step, by default of the newest; InputError that names
    those that are there."""
    if step is None:
        return training_checkpoint.newest(workdir)
    complete = training_checkpoint.complete(paths.path(workdir).absolute() / "checkpoints")
    folders = {folder.name: folder for folder in complete}
    steps = ", ".join(sorted(folders, key=int))
    require(step in folders, f"{workdir} has no checkpoint of step {step!r}; it has {steps}.")
    return folders[step]


def find(name: str | AnyPath) -> tuple[AnyPath, str]:
    """(folder, kind) of a checkpoint; InputError with the nearest name if there is none."""
    return _find(name)[:2]


def _find(name: str | AnyPath) -> tuple[AnyPath, str, AnyPath]:
    """As `find`, and the folder of the weights, which a run has one of for each step."""
    name, step = _split(given := name)
    folder = embedded().get(name) or paths.path(name)
    partial = f"{name} was not written to its end, or is being written; convert it again."
    require(not paths.is_unfinished(folder), partial)
    if training_checkpoint.is_workdir(folder):  # whose config.json is the run's
        return folder, RUN, _folder_of_run(name, step)
    # A workdir without weights to read is no model, whatever its config.json says.
    has_weights = any(folder.glob("*.safetensors*"))
    begun = f"{name} is a training run without a complete checkpoint as yet."
    require(has_weights or not (folder / "checkpoints").is_dir(), begun)
    require(step is None, f"{given}: {name} is not a training run, so it has no steps.")
    if (folder / "config.json").is_file():
        is_converted = (folder / converted.PARAMS / "_METADATA").is_file()
        return folder, CONVERTED if is_converted else PUBLISHED, folder
    lora.refuse_adapter_folder(folder)
    neither = "neither config.json (a published or converted model) nor checkpoints"
    require(not folder.is_dir(), f"{name} holds {neither} (a training run).")
    absent = f"The weights of {name} are not part of the package; download a checkpoint from the"
    hub = "Hugging Face Hub, e.g. BLIP3o/BLIP3o-NEXT-SFT-3B, and give the path of its folder"
    own = "as it is, or converted once with `blip3o-jax convert to-jax`"
    require(str(name) not in presets.PRESETS, f"{absent} {hub}, {own}.")
    neither = "neither a folder nor an embedded name"
    raise InputError(f"No checkpoint {str(name)!r}, {neither}; {nearest(str(name), embedded())}")


def config_of(name: str | AnyPath) -> Blip3oConfig:
    """The config of a checkpoint as its small files alone describe it; touches no device."""
    folder, kind, root = _find(name)
    if kind == RUN:
        return training_checkpoint.model_config(root)
    return published.read_config(folder)


def tokenizer_of(name: str | AnyPath) -> AnyPath:
    """The tokenizer.json of a checkpoint; InputError when a run has none, and for a slow one."""
    return _tokenizer(*_find(name))


def _tokenizer(folder: AnyPath, kind: str, root: AnyPath) -> AnyPath:
    file = folder / "tokenizer.json"
    if kind != RUN or file.is_file():
        slow = f"{folder} has vocab.json and merges.txt in place of a tokenizer.json; convert it"
        require(not tokenizer_files.is_slow(folder), f"{slow} with `blip3o-jax convert to-jax`.")
        return file
    # a run of version 0.1, or of a stage without text
    data = training_checkpoint.read_config(root).get("data")
    own = data.get("tokenizer", "") if isinstance(data, dict) else None
    require(isinstance(own, str), f"The config of the run {folder} has no data.tokenizer.")
    return resources.find_tokenizer(training_checkpoint.model_config(root).name, own)


def text_of(name: str | AnyPath) -> Text:
    """What prompts of a checkpoint are encoded and checked with; reads no weights."""
    config = config_of(name)
    return Text(load_tokenizer(tokenizer_of(name)), config.vocab, config.max_prompt_tokens)


def open(name: str | AnyPath) -> Checkpoint:
    """The checkpoint of that name; InputError for a missing, damaged or contradictory one."""
    folder, kind, root = _find(name)
    step = None
    if kind == RUN:
        files = training_checkpoint.weight_files(root)
        # A full disk or a lost host may have cut short what was written last.
        hashes.compare(root, files)
        step, config = int(root.name), training_checkpoint.model_config(root)
        leaves = _unpadded(training_checkpoint.open_weights(root), config.qwen3.vocab_size)
        select = functools.partial(_of_run, folder, root, config, leaves)
    elif kind == CONVERTED:
        config, leaves = converted.open_converted(folder)
        files = paths.files_below(folder / converted.PARAMS)
        select = functools.partial(_of_parts, leaves)
    else:
        config, stored = published.open_published(folder)
        files = {tensor.file for tensor in stored.values()}

        def select(parts: tuple[str, ...]) -> Leaves:
            return published.open_leaves(folder, config, stored, parts)[0]

    return Checkpoint(folder, kind, config, step, root, tuple(sorted(files)), select)


def _unpadded(leaves: dict[str, orbax_io.Leaf], size: int) -> dict[str, orbax_io.Leaf]:
    """The leaves without the padding of the vocabulary that a run's mesh needed."""
    for path in VOCAB_AXIS.keys() & leaves.keys():
        shape = leaves[path].shape
        shape = with_rows(path, shape, min(shape[VOCAB_AXIS[path]], size))
        leaves[path] = dataclasses.replace(leaves[path], shape=shape)
    return leaves


def _of_parts(leaves: Leaves, parts: tuple[str, ...]) -> Leaves:
    return {path: leaf for path, leaf in leaves.items() if path.split("/")[0] in parts}


def _of_run(
    folder: AnyPath, root: AnyPath, config: Blip3oConfig, leaves: Leaves, parts: tuple[str, ...]
) -> Leaves:
    """The same of a run, which may be of a stage that trains some parts only."""
    held = tuple(dict.fromkeys(path.split("/")[0] for path in leaves))
    if missing := [part for part in parts if part not in held]:
        stage = f"it is a run of stage {training_checkpoint.read_config(root).get('stage')!r}"
        raise InputError(f"{folder} holds no {missing[0]!r}, only {', '.join(held)}: {stage}.")
    chosen = _of_parts(leaves, parts)
    published.check_shapes(folder, config, chosen, parts)
    return chosen


def keep_tokenizer(workdir: AnyPath, file: AnyPath) -> None:
    """Copies a run's tokenizer into its workdir, so that its checkpoints can be opened anywhere."""
    copy = workdir / "tokenizer.json"
    if not copy.is_file():
        paths.write_bytes(copy, file.read_bytes())
    other = f"{copy}, with which the run began, is not {file}; take a new workdir, or name the copy"
    require(copy.read_bytes() == file.read_bytes(), f"{other} with data.tokenizer.")


def load_part(name: str | AnyPath, part: str) -> dict:
    """One part's parameters in float32 on the host, for instance to start a training run with."""
    return open(name).load((part,))[part]
