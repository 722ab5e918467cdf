"""The cache of a mixture: each record's codes and latents, and those of an edit's source images, so
that training encodes no image.

A folder holds `cache.json`, which says what the records depend on, and shards
SSS-NNNNN-of-NNNNN.array_record of source SSS. Record i of a source stays record i, and one that
cannot be used is stored with its reason, so a run reads the same order with and without the cache.
"""

import contextlib
import hashlib
import json
import logging
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import islice
from typing import NamedTuple

import numpy as np
from flax import serialization
from flax.traverse_util import flatten_dict

from blip3o_jax import paths
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.data import origin
from blip3o_jax.data.config import DataConfig, SourceConfig
from blip3o_jax.data.records import Record, RecordError, Source
from blip3o_jax.data.shards import open_shards
from blip3o_jax.data.transform import Tally
from blip3o_jax.errors import InputError, first_line, require
from blip3o_jax.paths import AnyPath

FORMAT, MAX_SHARDS = 1, 10**5
log = logging.getLogger(__name__)
# what identifies a source; its weight may change
PLACE = ("kind", "path", "root", "split", "image_field", "caption_field")
MOVED = ("path", "root", "files")  # what may differ where the files are the same


def weights_hash(params: dict) -> str:
    """SHA-256 of a tree's paths, shapes and float32 values."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(params, sep="/").items()):
        array = np.ascontiguousarray(leaf, np.float32)
        digest.update(f"{path}{array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()


def describe(model: Blip3oConfig, data: DataConfig, params: dict) -> dict:
    """What a cache's codes and latents depend on besides the records, as cache.json stores it;
    params of `ta_tok` and `dc_ae`."""
    tokenizer, autoencoder = params["ta_tok"], params["dc_ae"]["encoder"]
    description = {
        "format": FORMAT,
        "image_size": model.image_size,
        "crop": data.crop,
        "limits": data.limits._asdict(),
        "ta_tok": {"config": asdict(model.ta_tok), "weights": weights_hash(tokenizer)},
        "dc_ae": {"config": asdict(model.dc_ae), "weights": weights_hash(autoencoder)},
    }
    return json.loads(json.dumps(description))


def place_of(spec: SourceConfig) -> dict:
    """What a source is known by in cache.json; `inputs_field` only where it is set."""
    inputs_field = {"inputs_field": spec.inputs_field} if spec.inputs_field else {}
    return {name: getattr(spec, name) for name in PLACE} | inputs_field


def source_entry(spec: SourceConfig, source: Source) -> dict:
    """A source in cache.json, with its blocks, which decide its order, and its files."""
    blocks = None if source.blocks is None else [int(start) for start in source.blocks]
    return place_of(spec) | {"records": len(source), "blocks": blocks, "files": origin.look(spec)}


def _source_difference(there: dict, here: dict) -> str | None:
    """How two descriptions of a source differ, in words; None when they do not, wherever it lies
    (a cache that does not say its files knows its source by the place)."""
    if "files" in there and (changes := origin.compare(there["files"], here["files"])):
        return f"of {there['path']!r} {changes}"
    moved = MOVED if "files" in there else ("files",)
    one, two = ({k: v for k, v in entry.items() if k not in moved} for entry in (there, here))
    return None if one == two else difference(one, two) or "other fields"


class Shard(NamedTuple):
    """One file: the records `numbers` of source `source`."""

    name: str
    source: int
    numbers: range


def shards(sizes: list[int], shard_records: int) -> list[Shard]:
    """The shards of sources with `sizes` records."""
    result = []
    for source, size in enumerate(sizes):
        starts = range(0, size, shard_records)
        for k, start in enumerate(starts):
            name = f"{source:03d}-{k:05d}-of-{len(starts):05d}.array_record"
            result.append(Shard(name, source, range(start, min(size, start + shard_records))))
    return result


def begin(folder: AnyPath, description: dict) -> None:
    """Makes the folder and writes its description; InputError when it holds another cache or
    something else."""
    # A description, unless there is one.
    file = folder / "cache.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            names = sorted(path.name for path in folder.glob("*"))
            # Another host may write the description meanwhile.
            if others := [n for n in names if not n.startswith((".", "bad_records", file.name))]:
                raise InputError(f"{folder} holds {others[0]} and no cache.json; name another.")
            paths.write_text(file, json.dumps(description, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}.") from error
    # Which is this one.
    there = read_description(str(folder))
    own, theirs = ({k: v for k, v in x.items() if k != "sources"} for x in (description, there))
    if own != theirs:
        differs = difference(theirs, own) or "other fields"
        raise InputError(f"{folder} holds a cache with other settings ({differs}); name another.")
    # ... and of these sources.
    cached, sources = there["sources"], description["sources"]
    differs = f"{len(cached)} sources there and {len(sources)} here"
    if len(cached) == len(sources):
        differs = next(filter(None, map(_source_difference, cached, sources)), None)
    require(not differs, f"{folder} holds a cache of other sources ({differs}); name another.")


def encoded_records(
    source: Source,
    numbers: range,
    decode: Callable[[Record], dict],
    encode: Callable[[list[dict]], tuple],
    tally: Tally,
    batch_size: int,
) -> Iterator[dict]:
    """The cached records of some record numbers, in order: encoded, or with the reason why not;
    `decode` gives a record's image arrays, `encode` the codes and latents of a list of them."""

    def load(number: int) -> dict:
        tally.add(read=1)
        try:
            record = source[number]
            row = {"key": record.key, "caption": record.caption, "arrays": decode(record)}
            return row | ({"captions": list(record.captions)} if len(record.captions) > 1 else {})
        except RecordError as error:
            tally.bad(source.key(number), str(error))
            return {"key": source.key(number), "error": str(error)}

    # Decoded by threads, encoded a batch at a time; records keep their order.
    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(numbers), batch_size):
            records = list(pool.map(load, numbers[start : start + batch_size]))
            good = [record for record in records if "arrays" in record]
            encoded = _encode_records([record.pop("arrays") for record in good], encode)
            for record, arrays in zip(good, encoded, strict=True):
                record |= arrays
            yield from records


def _encode_records(records: list[dict], encode: Callable[[list[dict]], tuple]) -> Iterator[dict]:
    """Of each record's image arrays, what a cache holds: `transform.ENCODED`."""
    # The results and all their sources, which never have a view of their own, in one list.
    results = [{k: v for k, v in record.items() if k != "sources"} for record in records]
    sources = [{"images": image} for record in records for image in record.get("sources", ())]
    groups = [results, sources] if any("view" in r for r in results) else [results + sources]
    encoded = [pair for group in groups if group for pair in zip(*encode(group), strict=True)]
    # Back to their records.
    count = len(records)
    rest = iter(encoded[count:])
    for record, (codes, latents) in zip(records, encoded[:count], strict=True):
        arrays = {"codes": codes, "latents": latents}
        if own := list(islice(rest, len(record.get("sources", ())))):
            stacked = map(np.stack, zip(*own, strict=True))
            arrays |= dict(zip(("source_codes", "source_latents"), stacked, strict=True))
        yield arrays


def write_shard(file: AnyPath, records: Iterable[dict]) -> None:
    """Writes each record as msgpack to a temporary file, then renames it, or copies it into a
    bucket."""
    if paths.is_bucket(file):
        with tempfile.TemporaryDirectory() as folder:
            write_shard(local := pathlib.Path(folder) / file.name, records)
            paths.copy_file(local, file)
        return
    from array_record.python.array_record_module import ArrayRecordWriter

    temporary = file.with_name(f".{file.name}.part")
    writer = ArrayRecordWriter(str(temporary), "group_size:1")
    for record in records:
        writer.write(serialization.msgpack_serialize(record))
    writer.close()
    temporary.replace(file)


def _require_cache(holds: bool, what: str) -> None:
    require(holds, f"data.cache: {what}; make it with `blip3o-jax data cache`.")


def read_description(folder: str) -> dict:
    """The contents of cache.json; InputError when it is missing or unreadable."""
    file = paths.path(folder) / "cache.json"
    try:
        description = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        description = None
    readable = description is not None
    _require_cache(readable, f"{folder} holds no cache ({file.name} cannot be read)")
    is_ours = isinstance(description, dict) and description.get("format") == FORMAT
    _require_cache(is_ours, f"{file} does not have format {FORMAT}")
    sources, size = description.get("sources"), description.get("shard_records")
    is_whole = isinstance(sources, list) and all(map(_is_entry, sources)) and _is_count(size, 1)
    is_whole = is_whole and sum(-(-entry["records"] // size) for entry in sources) <= MAX_SHARDS
    _require_cache(is_whole, f"{file} is damaged")
    # caches that do not name the limits were made before there were any
    return {"limits": DataConfig().limits._asdict()} | description


def _is_count(number: object, least: int = 0) -> bool:
    return type(number) is int and least <= number < 1 << 63


def _is_entry(entry: object) -> bool:
    """Whether all that is read of a source in cache.json is there, of the types that it has."""
    if not isinstance(entry, dict):
        return False
    path, size, blocks = map(entry.get, ("path", "records", "blocks"))
    files = entry.get("files", [])
    are_files = isinstance(files, list) and all(map(_is_file, files))
    are_blocks = isinstance(blocks, list) and all(map(_is_count, blocks))
    are_blocks = are_blocks or (blocks is None and "blocks" in entry)
    return are_files and are_blocks and isinstance(path, str) and _is_count(size, 1)


def _is_file(file: object) -> bool:
    names, numbers = ("name", "digest"), ("size", "time")
    if not isinstance(file, dict) or not {*names, *numbers} <= file.keys():
        return False
    are_names = all(isinstance(file[name], str | None) for name in names)
    return are_names and all(_is_count(file[name]) for name in numbers)


def difference(there: dict, here: dict) -> str | None:
    """In words, the first setting of `here` that a cache's description `there` does not share; None
    when all agree."""
    before, now = (flatten_dict(tree, sep=".") for tree in (there, here))
    for name, value in now.items():
        if before.get(name) != value:
            old, new = (str(v)[:12] for v in (before.get(name), value))
            return f"{name} {old} there, {new} here"
    return None


def check_cache(folder: str, description: dict) -> None:
    """InputError unless the cache was made with the settings and encoders of `description`."""
    differs = difference(read_description(folder), description)
    _require_cache(not differs, f"{folder} was made with other settings ({differs})")


class CachedSource:
    """Records of one source: dicts of key, caption, codes int32 [n], latents [Y,X,C] as SANA takes
    them, of several captions all `captions`, and of an edit `source_codes` [N,n], `source_latents`
    [N,Y,X,C]; RecordError for bad ones."""

    def __init__(self, files: list[AnyPath], sizes: list[int], blocks: list[int] | None):
        self.folder = files[0].parent
        self.blocks = None if blocks is None else np.array(blocks)
        with self._read():
            self.source = open_shards(files, sizes)

    @contextlib.contextmanager
    def _read(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # array_record's own errors are not public
            damaged = f"a shard in {self.folder} is damaged ({first_line(error)})"
            raise InputError(f"data.cache: {damaged}; delete it.") from error

    def __len__(self) -> int:
        return len(self.source)

    def key(self, i: int) -> str:
        return self._record(i)["key"]

    def _record(self, i: int) -> dict:
        with self._read():
            return serialization.msgpack_restore(self.source[i])

    def __getitem__(self, i: int) -> dict:
        record = self._record(i)
        if "error" in record:
            raise RecordError(record["error"])
        return record


def _find_entry(folder: str, entries: list[dict], spec: SourceConfig) -> int | None:
    """The number of a source among a cache's: that of its place, whose files must not have changed,
    else one whose files are the same, elsewhere."""
    place = place_of(spec)
    for number, entry in enumerate(entries):
        if {k: entry[k] for k in entry if k not in ("records", "blocks", "files")} == place:
            _check_files(folder, entry, spec)
            return number
    fields = {k: v for k, v in place.items() if k not in MOVED}
    for number, entry in enumerate(entries):
        alike = entry.get("files") and all(entry.get(k) == v for k, v in fields.items())
        if alike and origin.compare(entry["files"], origin.look(spec, entry["files"])) is None:
            return number
    return None


def _check_files(folder: str, entry: dict, spec: SourceConfig) -> None:
    """InputError naming what has changed in a source since its cache was made, where its files are
    on this machine."""
    if "files" not in entry:
        unnoticed = "%s does not record the files of %s, whose changes go unnoticed; make it again."
        log.warning(unnoticed, folder, spec.path)
        return
    if here := origin.look(spec, entry["files"]):
        changes = origin.compare(entry["files"], here)
        stale = f"{spec.path!r} has changed since {folder} was made ({changes})"
        _require_cache(not changes, stale)


def open_cached(folder: str, spec: SourceConfig) -> CachedSource:
    """A source's records in a cache; InputError when it is missing or incomplete there."""
    # Which of the cache's sources it is, by its place, else by its files.
    description = read_description(folder)
    entries = description["sources"]
    number = _find_entry(folder, entries, spec)
    source_name = f"source {spec.path!r} of kind {spec.kind!r}"
    _require_cache(number is not None, f"{folder} holds no {source_name}")
    entry = entries[number]
    records = entry["records"]
    # Its shards, all of them and each complete.
    every = shards([entry["records"] for entry in entries], description["shard_records"])
    own = [shard for shard in every if shard.source == number]
    files = [paths.path(folder) / shard.name for shard in own]
    # At once: a damaged cache.json may name many.
    there = {file.name for file in paths.path(folder).iterdir()}
    missing = [file for file in files if file.name not in there]
    lost = f"{len(missing)} of {len(files)} shards of {spec.path!r}"
    _require_cache(not missing, f"{folder} lacks {lost}")
    source = CachedSource(files, [len(shard.numbers) for shard in own], entry["blocks"])
    size = f"{len(source)} of {records} records of {spec.path!r}"
    _require_cache(len(source) == records, f"{folder} holds {size}")
    return source
