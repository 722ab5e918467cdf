"""Memory follows the config, whatever a record holds."""

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from blip3o_jax.cli import main
from blip3o_jax.data import records
from blip3o_jax.data.config import DataConfig, SourceConfig
from blip3o_jax.data.records import RecordError
from blip3o_jax.data.row_groups import RowGroups
from blip3o_jax.data.sources import open_source
from blip3o_jax.data.transform import decode_image
from blip3o_jax.errors import InputError
from blip3o_jax.pictures import Limits
from blip3o_jax.pixels import centre_crop

MB = 1 << 20


def noise(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def resized_whole(image, size):
    width, height = (max(size, int(size * side / min(image.size))) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    whole = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(whole.crop((left, top, left + size, top + size)), int)


@pytest.mark.parametrize("shape", [(130, 33), (33, 130), (64, 64), (31, 17), (517, 131)])
def test_a_crop_is_that_of_the_resized_picture(shape):
    for size in (16, 64, 100):
        np.testing.assert_array_equal(
            centre_crop(noise(*shape), size), resized_whole(noise(*shape), size)
        )


@pytest.mark.parametrize("shape", [(1000, 33), (33, 1000), (1200, 2), (3, 777)])
def test_the_crop_of_a_long_picture_is_the_same_to_one_level(shape):
    for size in (16, 61):
        cropped = centre_crop(noise(*shape), size).astype(int)
        assert np.abs(cropped - resized_whole(noise(*shape), size)).max() <= 1


def test_a_long_picture_takes_no_more_memory_than_its_own_pixels():
    code = """
import resource
from PIL import Image
from blip3o_jax.pixels import centre_crop
image = Image.new("RGB", (60_000, 2), "red")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
pixels = centre_crop(image, 1024)
print(pixels.shape, pixels.min(axis=(0, 1)).tolist(), (peak() - before) >> 10 < 64)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(1024, 1024, 3) [255, 0, 0] True\n"


@pytest.mark.parametrize(
    ("mode", "options", "most"),
    [
        ("RGB", {}, 4),
        ("RGBA", {}, 13),
        ("LA", {}, 13),
        ("P", {"transparency": 0}, 10),
        ("I;16", {"transparency": 0}, 11),
    ],
)
def test_a_picture_takes_a_few_bytes_a_pixel_while_it_is_decoded(mode, options, most, tmp_path):
    """A PNG of a few kilobytes may have 67 million of them."""
    for side in (8, 3072):
        Image.new(mode, (side, side)).save(tmp_path / f"{side}.png", **options)
    code = """
import re, sys
from blip3o_jax.pictures import decode
peaks = []
for name in sys.argv[1:]:
    with open(name, "rb") as file, open("/proc/self/status") as status:
        assert decode(file.read()).mode == "RGB"
        peaks.append(int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1]) << 10)
print((peaks[1] - peaks[0]) / 3072**2)
"""
    argv = [sys.executable, "-c", code, *(str(tmp_path / f"{side}.png") for side in (8, 3072))]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert most - 1.5 < float(done.stdout) < most + 1.5


def test_pictures_beyond_the_limits_are_bad_records_before_they_are_decoded(made):
    data = made.picture(1, size=(80, 4))
    assert decode_image(data, Limits(320, 20)).size == (80, 4)
    header = data[: data.index(b"IDAT") + 4] + bytes(40)
    with pytest.raises(RecordError, match="damaged"):
        decode_image(header)
    for limits, reason in (
        (Limits(319, 20), "it has more than 319 pixels"),
        (Limits(320, 19.9), "its longer side is more than 19.9 times its shorter"),
    ):
        with pytest.raises(RecordError, match=reason):
            decode_image(header, limits)
    assert DataConfig().limits == Limits(1 << 26, 20)
    assert DataConfig(max_pixels=5, max_aspect=1.5).limits == Limits(5, 1.5)
    for field, value in (("max_pixels", 0), ("max_pixels", 1 << 27), ("max_aspect", 0.5)):
        with pytest.raises(InputError, match=rf"data\.{field} is"):
            DataConfig(**{field: value})


def test_check_counts_what_is_beyond_the_limits(tmp_path, made, capsys):
    made.jsonl(tmp_path / "a.jsonl", range(8))
    for i, size in ((1, (900, 3)), (2, (3, 500)), (3, (100, 101))):
        (tmp_path / f"{i}.png").write_bytes(made.picture(i, size))
    data = {"heldout": 2, "max_pixels": 10_000, "sources": [{"kind": "jsonl"}]}
    data["sources"][0]["path"] = str(tmp_path / "a.jsonl")
    code = "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict("
    (tmp_path / "config.py").write_text(f"{code}{ {'stage': 'joint', 'data': data}!r})\n")
    argv = ["data", "check", "--config", str(tmp_path / "config.py"), "--out", str(tmp_path / "r")]
    assert main(argv) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])["sources"][0]
    assert (report["usable"], report["bad"]) == (5, 3)
    assert report["reasons"] == {
        "the image cannot be decoded (its longer side is more than N times its shorter)": 2,
        "the image cannot be decoded (it has more than N pixels)": 1,
    }


def test_a_file_that_is_too_large_is_a_bad_record(tmp_path, made, monkeypatch):
    made.jsonl(tmp_path / "a.jsonl", range(2))
    made.tar(tmp_path / "a.tar", range(2))
    size = len(made.picture(1))
    for kind in ("jsonl", "webdataset"):
        file = tmp_path / ("a.tar" if kind == "webdataset" else "a.jsonl")
        source = open_source(SourceConfig(kind, str(file)))
        monkeypatch.setattr(records, "MAX_BYTES", size)
        assert made.number(source[1].image) == 1
        monkeypatch.setattr(records, "MAX_BYTES", size - 1)
        with pytest.raises(RecordError, match="more than 0 MB in"):
            source[1]


class Groups:
    """A source whose group g has sizes[g] bytes."""

    paths = ("a.parquet",)

    def __init__(self, memory, *sizes):
        self.memory, self.sizes, self.read = memory, sizes, []
        self.blocks = np.arange(len(sizes))

    def read_group(self, group):
        before = self.memory.bytes
        self.read.append((group, before // MB))
        return SimpleNamespace(nbytes=self.sizes[group] * MB)


def test_row_groups_share_one_budget_of_bytes():
    memory = RowGroups(10)
    a, b = Groups(memory, 3, 3, 3, 5), Groups(memory, 4, 30)
    for group in (0, 1, 2, 0, 1, 3):
        assert memory.table(a, group).nbytes == a.sizes[group] * MB
    # Each is read once; what was used longest ago makes room: 2 and 0 for 3.
    assert a.read == [(0, 0), (1, 3), (2, 6), (3, 6)]
    assert list(memory.tables) == [(a, 1), (a, 3)]
    memory.table(b, 0)
    assert (list(memory.tables), memory.bytes) == ([(a, 3), (b, 0)], 9 * MB)
    memory.table(b, 1)
    assert (list(memory.tables), memory.bytes) == ([(b, 1)], 30 * MB)
    memory.table(a, 0)
    assert (b.read[-1], a.read[-1]) == ((1, 4), (0, 0))


def test_reading_holds_up_neither_what_is_in_memory_nor_other_sources():
    memory = RowGroups(10)
    a, b, c = Groups(memory, 2, 3), Groups(memory, 4, 4), Groups(memory, 5, 5)
    for source in (a, b, c):
        memory.table(source, 0)
    going, reads = threading.Event(), {"a": [], "b": [], "c": []}
    arrived, waits = threading.Semaphore(0), threading.Semaphore(0)
    may_read = memory._may_read

    def may_read_or_waits(source):
        """Called under the lock, which a refused thread leaves only to wait."""
        if not (may := may_read(source)):
            waits.release()
        return may

    memory._may_read = may_read_or_waits

    def slowly(name, source):
        def read_group(group):
            reads[name].append(group)
            arrived.release()
            assert going.wait(30)
            return SimpleNamespace(nbytes=source.sizes[group] * MB)

        return read_group

    for name, source in zip("abc", (a, b, c), strict=True):
        source.read_group = slowly(name, source)
    with ThreadPoolExecutor(5) as pool:
        try:
            first = [pool.submit(memory.table, a, 1) for _ in range(2)]
            assert arrived.acquire(timeout=30)
            assert waits.acquire(timeout=30)  # the second of them, for the first one's table
            assert memory.table(c, 0).nbytes == 5 * MB
            second = pool.submit(memory.table, b, 1)
            assert arrived.acquire(timeout=30)
            # The third would be 11 of 10 megabytes with the other two.
            third = pool.submit(memory.table, c, 1)
            assert waits.acquire(timeout=30)
            assert reads == {"a": [1], "b": [1], "c": []}
        finally:
            going.set()
        tables = [task.result() for task in (*first, second, third)]
    assert [table.nbytes // MB for table in tables] == [3, 3, 4, 5]
    # The third may drop the table of the first before the second takes it, who then reads again.
    assert reads in [{"a": a, "b": [1], "c": [1]} for a in ([1], [1, 1])]
    assert memory.bytes <= 10 * MB


def test_two_who_want_a_group_read_it_once():
    memory = RowGroups(10)
    a = Groups(memory, 2, 3)
    memory.table(a, 0)
    reads, going = [], threading.Event()

    def read_group(group):
        reads.append(group)
        assert going.wait(30)
        return SimpleNamespace(nbytes=3 * MB)

    a.read_group, may_read, waits = read_group, memory._may_read, threading.Event()

    def may_read_or_waits(source):
        if not (may := may_read(source)):
            waits.set()
        return may

    memory._may_read = may_read_or_waits
    with ThreadPoolExecutor(2) as pool:
        tasks = [pool.submit(memory.table, a, 1) for _ in range(2)]
        assert waits.wait(30)
        going.set()
        tables = [task.result() for task in tasks]
    assert tables[0] is tables[1]
    assert reads == [1]


def test_a_group_that_cannot_be_read_leaves_its_source_free():
    memory = RowGroups(10)
    source = Groups(memory, 2)

    def fails(group):
        raise RecordError("damaged")

    read, source.read_group = source.read_group, fails
    with pytest.raises(RecordError, match="damaged"):
        memory.table(source, 0)
    source.read_group = read
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(memory.table, source, 0).result(timeout=30).nbytes == 2 * MB


def test_parquet_sources_read_within_the_budget_and_say_when_it_is_small(tmp_path, made, caplog):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    for name in "ab":
        images = [rng.bytes(MB // 4) for _ in range(24)]
        texts = [f"{name}{i}" for i in range(24)]
        rest = [rng.bytes(MB // 2) for _ in range(24)]
        table = pa.table({"image": images, "text": texts, "unused": rest})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=4)
    groups = RowGroups(3)
    specs = [SourceConfig("parquet", str(tmp_path / f"{name}.parquet")) for name in "ab"]
    sources = [open_source(spec, groups) for spec in specs]
    with caplog.at_level("WARNING"):
        for i in (0, 5, 9, 13, 23, 1):
            for name, source in zip("ab", sources, strict=True):
                assert source[i].caption == f"{name}{i}"
                assert groups.bytes <= 3 * MB
    assert len(groups.tables) == 2
    # Four groups of about a megabyte each, and twice as much for two sources.
    need = [record.getMessage().split(" need ")[1] for record in caplog.records]
    advice = "MB at once: set data.row_group_mb to at least that, or write smaller row groups."
    assert need == [f"5 {advice}", f"9 {advice}"]
