"""What a cache remembers of its sources' files, and what it says when they are others."""

import os
import pathlib

import numpy as np
import pytest

from blip3o_jax.data import origin
from blip3o_jax.data.config import SourceConfig

# what a kind's files end in, as conftest calls what writes them
KINDS = {"webdataset": "tar", "jsonl": "jsonl", "parquet": "parquet"}


def source(folder, kind) -> SourceConfig:
    return SourceConfig(kind, str(folder / f"*.{KINDS[kind]}"))


@pytest.fixture(params=KINDS)
def spec(request, made, tmp_path):
    """Two files of a kind in tmp_path/a, of pictures 10 to 12 and 20 to 22."""
    kind = request.param
    (tmp_path / "a").mkdir()
    for first in (10, 20):
        path = tmp_path / "a" / f"{first}.{KINDS[kind]}"
        getattr(made, KINDS[kind])(path, range(first, first + 3))
    return source(tmp_path / "a", kind)


def age(path, seconds=3600):
    """Gives a file another time of its last change."""
    time = os.stat(path).st_mtime_ns + seconds * 10**9
    os.utime(path, ns=(time, time))


def test_files_are_known_whatever_their_time_and_folder(spec, tmp_path):
    there = origin.look(spec)
    names = [f"{first}.{KINDS[spec.kind]}" for first in (10, 20)]
    assert [file["name"] for file in there] == names
    assert [file["size"] for file in there] == [
        (tmp_path / "a" / name).stat().st_size for name in names
    ]
    assert len({file["digest"] for file in there}) == 2
    age(tmp_path / "a" / names[0])
    (tmp_path / "a").rename(tmp_path / "b")
    moved = source(tmp_path / "b", spec.kind)
    here = origin.look(moved, there)
    assert origin.compare(there, here) is None
    assert here[0]["time"] != there[0]["time"]
    assert origin.look(spec) == []  # they are gone, which says nothing of the cache


def test_a_changed_caption_a_lost_record_and_other_files_are_told(spec, made, tmp_path):
    there, kind = origin.look(spec), KINDS[spec.kind]
    first, second = (tmp_path / "a" / file["name"] for file in there)
    # A caption of the same length.
    before = first.read_bytes()
    changed = before.replace(b"a red heart 11", b"a red house 11")
    if spec.kind != "parquet":  # whose footer is written anew by whoever writes it
        assert len(changed) == len(before)
        first.write_bytes(changed)
        age(first)
        size = len(before)
        told = origin.compare(there, origin.look(spec, there))
        assert told == f"changed: 10.{kind}, {size} bytes then, {size} now"
        first.write_bytes(before)
        age(first)
        assert origin.compare(there, origin.look(spec, there)) is None
    # A record less.
    getattr(made, kind)(first, range(10, 12))
    age(first)
    told = origin.compare(there, origin.look(spec, there))
    assert told.startswith(f"changed: 10.{kind}, {there[0]['size']} bytes then, ")
    # Files that are there no more, or were not.
    first.rename(tmp_path / "a" / f"30.{kind}")
    second.rename(tmp_path / "a" / f"31.{kind}")
    told = origin.compare(there, origin.look(spec, there))
    assert told == f"gone: 10.{kind} and 1 more; new: 30.{kind} and 1 more"


def test_nothing_is_read_of_a_file_whose_size_and_time_are_the_same(spec, monkeypatch):
    there = origin.look(spec)

    def digest(*given):
        raise AssertionError("read")

    monkeypatch.setattr(origin, "digest", digest)
    assert origin.look(spec, there) == there
    # Nor of one that differs in size or name.
    grown = pathlib.Path(spec.path).parent / there[0]["name"]
    grown.write_bytes(grown.read_bytes() + bytes(512))
    (size, new), name = (there[0]["size"], there[0]["size"] + 512), there[0]["name"]
    told = f"changed: {name}, {size} bytes then, {new} now"
    assert origin.compare(there, origin.look(spec, there)) == told
    assert origin.compare(there[1:], origin.look(spec, there[1:])) == f"new: {name}"


def test_rewritten_parquet_with_another_caption_is_another(made, tmp_path):
    """Whose sizes are the same: the footer has the columns' bounds."""
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    made.parquet(path, range(4))
    spec = SourceConfig("parquet", str(path))
    there, table = origin.look(spec), pq.read_table(path)
    texts = [text.replace("heart 3", "house 3") for text in table["text"].to_pylist()]
    pq.write_table(table.set_column(1, "text", [texts]), path, row_group_size=4)
    assert pq.read_table(path)["text"].to_pylist()[3] == "a red house 3"
    age(path)
    assert "changed: a.parquet" in origin.compare(there, origin.look(spec, there))


def test_a_data_set_of_tfds_is_known_by_blocks_of_its_split(tmp_path):
    spec = SourceConfig("array_record", str(tmp_path))
    rng, path = np.random.default_rng(0), tmp_path / "x-train.array_record-00000-of-00001"
    contents = rng.bytes(1 << 20)
    path.write_bytes(contents)
    (tmp_path / "x-test.array_record-00000-of-00001").write_bytes(b"another split")
    there = origin.look(spec)
    assert [file["name"] for file in there] == [path.name]
    for at in (0, len(contents) - 1):
        path.write_bytes(contents[:at] + bytes([contents[at] ^ 1]) + contents[at + 1 :])
        age(path)
        assert "changed" in origin.compare(there, origin.look(spec, there))
