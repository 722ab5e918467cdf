"""The cache of a mixture: each record's codes and latents, so that a training step encodes no
image.

A folder holds `cache.json`, which says what the records were made with, and shards
SSS-NNNNN-of-NNNNN.array_record of source SSS. Record i of a source stays record i: one that could
not be used is kept with its reason, so a run reads the same order from the cache as without.
"""

import hashlib
import json
import pathlib
from dataclasses import asdict

import numpy as np
from flax import serialization
from flax.traverse_util import flatten_dict

from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.records import RecordError
from blip3o_jax.errors import InputError
from blip3o_jax.train.config import TrainConfig

FORMAT = 1
# what tells sources apart; weights may change
PLACE = ("kind", "path", "root", "split", "image_field", "caption_field")


def weights_hash(params) -> str:
    """SHA-256 of a tree's paths, shapes and float32 values."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(params, sep="/").items()):
        array = np.ascontiguousarray(leaf, np.float32)
        digest.update(f"{path}{array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()


def describe(cfg: TrainConfig, params) -> dict:
    """What a cache's codes and latents depend on besides the records; params of `ta_tok` and
    `dc_ae`."""
    model = cfg.blip3o()
    made_with = {
        "format": FORMAT,
        "image_size": model.image_size,
        "crop": cfg.data.crop,
        "ta_tok": {"config": asdict(model.ta_tok), "weights": weights_hash(params["ta_tok"])},
        "dc_ae": {
            "config": asdict(model.dc_ae),
            "weights": weights_hash(params["dc_ae"]["encoder"]),
        },
    }
    return json.loads(json.dumps(made_with))


def source_entry(spec: SourceConfig, source) -> dict:
    """A source's place in cache.json. Its blocks decide its order, so they are kept too."""
    blocks = None if source.blocks is None else [int(start) for start in source.blocks]
    return {name: getattr(spec, name) for name in PLACE} | {
        "records": len(source),
        "blocks": blocks,
    }


def shard_names(source: int, records: int, shard_records: int) -> list[str]:
    count = -(-records // shard_records)
    return [f"{source:03d}-{shard:05d}-of-{count:05d}.array_record" for shard in range(count)]


def read_description(folder: str) -> dict:
    """cache.json; InputError when the folder holds none that we can read."""
    file = pathlib.Path(folder) / "cache.json"
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"data.cache: {folder} holds no cache ({file.name} cannot be read); make one "
            "by `blip3o-jax data cache`."
        ) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise InputError(
            f"data.cache: {file} is of another format than {FORMAT}; make it anew by "
            "`blip3o-jax data cache`."
        )
    return found


def difference(found: dict, wanted: dict) -> str | None:
    """In words, the first thing in which a cache was made otherwise than `describe` wants; None
    when it fits."""
    found, wanted = (flatten_dict(tree, sep=".") for tree in (found, wanted))
    for name, value in wanted.items():
        if found.get(name) != value:
            short = [str(v)[:12] for v in (found.get(name), value)]
            return f"{name} {short[0]} there, {short[1]} here"
    return None


def check_cache(cfg: TrainConfig, params) -> None:
    """InputError unless `data.cache` was made with these encoders and the run's crop; params of
    `ta_tok` and `dc_ae`."""
    if differs := difference(read_description(cfg.data.cache), describe(cfg, params)):
        raise InputError(
            f"data.cache: {cfg.data.cache} was made with other settings ({differs}); make "
            "a new one by `blip3o-jax data cache`."
        )


def write_shard(file: pathlib.Path, records) -> None:
    """Writes msgpack of each record to a temporary name, then renames it."""
    from array_record.python.array_record_module import ArrayRecordWriter

    temporary = file.with_name(f".{file.name}.part")
    writer = ArrayRecordWriter(str(temporary), "group_size:1")
    for record in records:
        writer.write(serialization.msgpack_serialize(record))
    writer.close()
    temporary.replace(file)


class CachedSource:
    """Records of one source: dicts of key, caption, codes int32 [n], latents float [Y,X,C] as SANA
    takes them; RecordError for bad ones."""

    def __init__(self, files: list[pathlib.Path], blocks: list[int] | None):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.blocks = None if blocks is None else np.array(blocks)
        try:
            self.source = ArrayRecordDataSource([str(file) for file in files])
        except Exception as error:  # array_record's own errors are not public
            raise InputError(
                f"data.cache: a shard in {files[0].parent} is damaged "
                f"({str(error).splitlines()[0]}); delete it."
            ) from error

    def __len__(self) -> int:
        return len(self.source)

    def _record(self, i: int) -> dict:
        return serialization.msgpack_restore(self.source[i])

    def key(self, i: int) -> str:
        return self._record(i)["key"]

    def __getitem__(self, i: int) -> dict:
        record = self._record(i)
        if "error" in record:
            raise RecordError(record["error"])
        return record


def open_cached(folder: str, spec: SourceConfig) -> CachedSource:
    """A source's records in a cache; InputError when it is not in there or not whole."""
    found = read_description(folder)
    places = [{name: entry[name] for name in PLACE} for entry in found["sources"]]
    wanted = {name: getattr(spec, name) for name in PLACE}
    if wanted not in places:
        raise InputError(
            f"data.cache: {folder} holds no source {spec.path!r} of kind {spec.kind!r}; "
            "make another cache with it."
        )
    number = places.index(wanted)
    entry = found["sources"][number]
    files = [
        pathlib.Path(folder) / name
        for name in shard_names(number, entry["records"], found["shard_records"])
    ]
    if missing := [file for file in files if not file.is_file()]:
        raise InputError(
            f"data.cache: {len(missing)} of {len(files)} shards of {spec.path!r} are "
            f"missing in {folder}; run `data cache` to the end."
        )
    source = CachedSource(files, entry["blocks"])
    if len(source) != entry["records"]:
        raise InputError(
            f"data.cache: {folder} holds {len(source)} records of {spec.path!r}, not "
            f"{entry['records']}; make it anew."
        )
    return source
