"""What tests/fuzz.py damages: of each kind of file that people bring, small valid ones, and the
readers that a command has for it.

A builder of `BUILDERS` takes an empty folder and gives (seeds, reader). A reader takes a file's
bytes and raises InputError, or says whether anything in it is of use.
"""

import functools
import io
import itertools
import json
import struct
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from blip3o_jax.errors import InputError


class Seed(NamedTuple):
    """A valid file: `pack` gives the bytes of its `document`, JSON that may hold bytes; of None
    where the file has no such thing."""

    pack: Callable[[Any], bytes]
    document: Any = None


def constant(data: bytes) -> Seed:
    return Seed(lambda _: data)


def as_json(document: Any) -> bytes:
    return json.dumps(document).encode()


def as_lines(rows: list) -> bytes:
    return b"\n".join(map(as_json, rows if isinstance(rows, list) else [rows]))


def picture(mode: str = "RGB", kind: str = "png", **options) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.linear_gradient("L").resize((8, 8)).convert(mode).save(file, kind, **options)
    return file.getvalue()


def every(*readers: Callable[[], bool]) -> bool:
    """Whether any of the readers, which all run, can use the file; the first InputError of one."""
    results, errors = [], []
    for read in readers:
        try:
            results.append(read())
        except InputError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return any(results)


# Pictures.
def pictures(folder: Path, variants: list[dict]):
    from blip3o_jax.data.records import Record, RecordError
    from blip3o_jax.data.transform import image_arrays
    from blip3o_jax.pictures import Limits, array
    from blip3o_jax.presets import preset

    model, file = preset("emoji_64"), folder / "picture"

    def read(data: bytes) -> bool:
        file.write_bytes(data)
        try:
            image_arrays(Record("", ("",), data), model, "original", Limits(aspect=20))
        except RecordError:
            array(file)
            return False
        return bool(array(file).size)

    return [constant(picture(**variant)) for variant in variants], read


# Data sources and prompts.
def source(folder: Path, suffix: str, setup: tuple[str, list[Seed], tuple[dict, ...]]):
    """Opens a source under each of the settings; reads, tokenises and decodes its records."""
    kind, seeds, settings = setup
    from tiny import text

    from blip3o_jax.data import origin, survey
    from blip3o_jax.data.config import SourceConfig
    from blip3o_jax.data.records import RecordError
    from blip3o_jax.data.sources import open_source
    from blip3o_jax.data.transform import image_arrays
    from blip3o_jax.pictures import Limits
    from blip3o_jax.presets import preset

    model, tokenizer, limits = preset("emoji_64"), text(), Limits(aspect=20)
    for number in range(3):
        (folder / f"{number}.png").write_bytes(picture())

    def read_record(records, number: int) -> bool:
        seen = survey.look(records, number, tokenizer, model.image_size, "shared", limits)
        try:
            image_arrays(records[number], model, "original", limits)
        except RecordError:
            return False
        return not seen.problem

    def read_with(path: Path, setting: dict) -> bool:
        spec = SourceConfig(kind, str(path), **setting)
        records = open_source(spec)
        origin.look(spec)
        usable = [read_record(records, number) for number in range(min(len(records), 20))]
        return any(usable)

    counter = itertools.count()

    def read(data: bytes) -> bool:
        # Files written within a tick of the clock have the same state.
        path = folder / f"{next(counter)}.{suffix}"
        path.write_bytes(data)
        try:
            return every(*(partial(read_with, path, setting) for setting in settings))
        finally:
            for file in folder.glob(f"{path.name}*"):
                file.unlink()

    return seeds, read


def as_tar(document: Any) -> bytes:
    """A record of png and txt, and one of png and json, whose name has a dot."""
    file = io.BytesIO()
    members = [("0.png", picture()), ("0.txt", b"a cat"), ("v1.5.png", picture())]
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in [*members, ("v1.5.json", as_json(document))]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def as_parquet(row: dict) -> bytes:
    """Two row groups of rows with and without values."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    empty = dict.fromkeys(row)
    pq.write_table(pa.Table.from_pylist([row, row, empty, row]), file, row_group_size=2)
    return file.getvalue()


TALK = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a cat"}]
EDIT = {"instruction": "x", "input_images": ["0.png"], "output_image": "1.png"}
ROWS = [
    {"image": "0.png", "caption": "a cat"},
    {"image": ["1.png"], "captions": ["a cat", "a dog"]},
    {"image": "2.png", "conversations": TALK},
    EDIT,
]
IMAGE = {"bytes": picture(), "path": "0.png"}
TABLES = [
    {"image": IMAGE, "caption": "a cat"},
    {"images": [{"path": "0.png"}], "conversations": TALK},
    {"input_image": [IMAGE], "edit_prompt": "a cat", "edited_image": IMAGE},
]
CSV = b'\xef\xbb\xbfid,prompt\n1,"a cat\nand a dog"\n2,a tree\n'


def prompts(folder: Path, suffix: str, seed: Seed):
    from tiny import text

    from blip3o_jax.jobs.prompts import read_prompts

    file, tokenizer = folder / f"prompts.{suffix}", text()

    def read(data: bytes) -> bool:
        file.write_bytes(data)
        return all(tokenizer.encode_prompt(row.text) for row in read_prompts(str(file)))

    return [seed], read


def edits(folder: Path):
    import numpy as np
    from tiny import text

    from blip3o_jax.jobs.edit import check, check_within
    from blip3o_jax.jobs.prompts import read_edits

    file, tokenizer, codes = folder / "edits.jsonl", text(), np.zeros((1, 16), int)
    (folder / "0.png").write_bytes(picture())
    (folder / "mask.png").write_bytes(picture(mode="RGBA"))

    def read(data: bytes) -> bool:
        file.write_bytes(data)
        for row in read_edits(str(file)):
            tokenizer.encode_edit(row.text, codes.repeat(len(row.paths), axis=0))
            for path in row.paths:
                check(path, str(folder / "out"))
            if row.within is not None:
                check_within(row.within, row.paths[0])
        return True

    row = {"image": "0.png", "instruction": "a hat", "within": "mask.png"}
    return [Seed(as_lines, [row])], read


# Checkpoints.
def checkpoint(folder: Path, name: str):
    """A published checkpoint with another file `name`, as commands and `convert` read it."""
    import jax
    import numpy as np
    from converting import tiny_tokenizer
    from tiny import PUBLISHED

    from blip3o_jax import checkpoints
    from blip3o_jax.convert.folders import Options
    from blip3o_jax.convert.published import save_published
    from blip3o_jax.convert.sources import open_source
    from blip3o_jax.models.blip3o import Blip3o

    if not hasattr(Blip3o.abstract, "cache_info"):  # as tests/conftest.py does: tracing is slow
        Blip3o.abstract = functools.cache(Blip3o.abstract)
    shapes = Blip3o(PUBLISHED).abstract()
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    tiny_tokenizer(extended=True).save(str(folder / "tokenizer"))
    limit = 1e5 if name.endswith(".index.json") else 5e9
    save_published(folder / "tiny", PUBLISHED, params, folder / "tokenizer", max_shard_bytes=limit)
    file = folder / "tiny" / name
    data = file.read_bytes()

    def read_text() -> bool:
        return bool(checkpoints.text_of(file.parent).encode_prompt("word1"))

    def load() -> bool:
        return "qwen3" in checkpoints.open(file.parent).load()

    def convert() -> bool:
        source = open_source(file.parent, {}, None, "tiny", Options())
        return all(x.size for leaf in source.leaves.values() for x in leaf.layers(True))

    def read(data: bytes) -> bool:
        file.write_bytes(data)
        (folder / "tiny" / "hashes.json").unlink(missing_ok=True)
        return every(read_text, load, convert)

    if not name.endswith(".safetensors"):
        return [Seed(as_json, json.loads(data))], read
    (length,) = struct.unpack("<Q", data[:8])

    def as_safetensors(header: Any) -> bytes:
        text = as_json(header)
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return [Seed(as_safetensors, json.loads(data[8 : 8 + length]))], read


def run_config(folder: Path):
    """The config of a run, in its workdir and in a checkpoint."""
    from dataclasses import asdict

    from tiny import practice

    from blip3o_jax import checkpoints, training_checkpoint
    from blip3o_jax.train.workdir import open_workdir

    cfg = practice()
    root = folder / "run" / "checkpoints" / "5"
    for name in training_checkpoint.LAST_FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()

    def read_checkpoint() -> bool:
        return bool(checkpoints.text_of(folder / "run").encode_prompt("a cat"))

    def read(data: bytes) -> bool:
        (root / "config" / "metadata").write_bytes(data)
        (folder / "run" / "config.json").write_bytes(data)
        return every(read_checkpoint, lambda: open_workdir(cfg, folder / "run").is_dir())

    return [Seed(as_json, json.loads(json.dumps(asdict(cfg))))], read


def cache_json(folder: Path):
    from blip3o_jax.data import cache
    from blip3o_jax.data.config import DataConfig, SourceConfig
    from blip3o_jax.data.sources import open_source

    (folder / "0.png").write_bytes(picture())
    (folder / "a.jsonl").write_bytes(as_lines(ROWS[:1] * 3))
    spec = SourceConfig("jsonl", str(folder / "a.jsonl"))
    sources = [cache.source_entry(spec, open_source(spec))]
    settings = {"format": 1, "crop": "shared", "ta_tok": {"config": {"depth": 1}, "weights": "a"}}
    settings["limits"] = DataConfig().limits._asdict()
    description = settings | {"shard_records": 2, "sources": sources}
    (folder / "cache").mkdir()
    for shard in cache.shards([3], 2):
        records = [{"key": str(number), "error": "x"} for number in shard.numbers]
        cache.write_shard(folder / "cache" / shard.name, records)

    def read_records() -> bool:
        source = cache.open_cached(str(folder / "cache"), spec)
        return [source.key(number) for number in range(len(source))] == ["0", "1", "2"]

    def read(data: bytes) -> bool:
        (folder / "cache" / "cache.json").write_bytes(data)
        resume = partial(cache.begin, folder / "cache", description)
        check = partial(cache.check_cache, str(folder / "cache"), settings)
        return every(read_records, lambda: resume() is None, lambda: check() is None)

    return [Seed(as_json, description)], read


PNG = [{}, {"mode": "P", "transparency": 3}, {"mode": "RGBA"}, {"mode": "I;16"}, {"mode": "1"}]
JPEG = [{}, {"mode": "CMYK"}, {"mode": "L", "progressive": True}]
GIF = [{"mode": "P"}, {"mode": "P", "transparency": 3}]
TIFF = [{"mode": mode} for mode in ("RGB", "L", "F", "I;16", "CMYK", "LA")]
TIFF += [{"compression": x} for x in ("tiff_lzw", "jpeg", "tiff_adobe_deflate", "packbits")]
OTHERS = (
    "dds",
    "dib",
    "icns",
    "ico",
    "im",
    "jpeg2000",
    "pcx",
    "ppm",
    "qoi",
    "sgi",
    "spider",
    "tga",
)
FORMATS = {
    "png": PNG,
    "jpeg": JPEG,
    "webp": [{}, {"mode": "RGBA", "lossless": True}],
    "tiff": TIFF,
    "gif": GIF,
    "bmp": [{}, {"mode": "L"}, {"mode": "1"}],
    "avif": [{}, {"mode": "RGBA"}],
}
OTHER_PICTURES = [{"kind": kind} for kind in OTHERS]
OTHER_PICTURES += [{"kind": kind, "mode": "1"} for kind in ("msp", "xbm")]
OTHER_PICTURES += [{"kind": "blp", "mode": "P"}]
TAR = Seed(as_tar, {"caption": ["a cat", "a dog"]})
LINES, ARRAY = Seed(as_lines, ROWS), Seed(as_json, ROWS)
SOURCES = {
    "tar": ("webdataset", [TAR], ({}, {"caption_field": "caption"})),
    "parquet": ("parquet", [Seed(as_parquet, row) for row in TABLES], ({},)),
    "jsonl": ("jsonl", [LINES, ARRAY], ({}, {"inputs_field": "input_images"})),
}
PROMPTS = {
    "csv": constant(CSV),
    "txt": constant(b"a cat\r\na dog\n"),
    "jsonl": Seed(as_lines, [{"prompt": "a cat"}]),
}
KINDS = {
    "safetensors": partial(checkpoint, name="model.safetensors"),
    "index": partial(checkpoint, name="model.safetensors.index.json"),
    "config.json": partial(checkpoint, name="config.json"),
    "run config": run_config,
    "cache.json": cache_json,
    **{x: partial(source, suffix=x, setup=setup) for x, setup in SOURCES.items()},
    **{f"prompts.{x}": partial(prompts, suffix=x, seed=seed) for x, seed in PROMPTS.items()},
    "edits.jsonl": edits,
    **{
        kind: partial(pictures, variants=[{"kind": kind, **variant} for variant in variants])
        for kind, variants in FORMATS.items()
    },
    "other pictures": partial(pictures, variants=OTHER_PICTURES),
}
