import json
import os
import tarfile

import numpy as np
import pytest

from blip3o_jax.data import tars
from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.records import RecordError
from blip3o_jax.data.sources import open_source
from blip3o_jax.errors import InputError
from blip3o_jax.scenes import builder, prompts, scene
from blip3o_jax.scenes.config import WorldConfig


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tar_source(folder, pattern="*.tar", **fields):
    return open_source(SourceConfig("webdataset", str(folder / pattern), **fields))


def test_tars_are_read_at_random_across_files(tmp_path, made):
    made.tar(tmp_path / "b.tar", range(5, 9))
    made.tar(tmp_path / "a.tar", range(5))
    source = tar_source(tmp_path)
    assert len(source) == 9
    for i in (8, 0, 4, 5):
        record = source[i]
        assert (made.number(record.image), record.caption) == (i, f"a red heart {i}")
    assert source[5].key == source.key(5) == "b.tar:00005"


def test_members_of_a_record_may_be_of_any_name_kind_and_order(tmp_path, made):
    long = "deep/" + "x" * 150
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        made.add(tar, "._00.png", b"of a Mac")
        made.add(tar, "00.txt", b"first\n")
        made.add(tar, "00.seg.png", b"another part")
        made.add(tar, "00.JPG", made.picture(1, kind="jpeg"))
        made.add(tar, f"{long}.webp", made.picture(2, kind="webp"))
        made.add(tar, f"{long}.json", json.dumps({"caption": "long"}).encode())
        made.add(tar, f"{long}.txt", b"second")
    source = tar_source(tmp_path)
    assert [source[i].caption for i in range(len(source))] == ["first", "second"]
    assert source.key(1) == f"a.tar:{long}"
    by_json = tar_source(tmp_path, caption_field="caption")
    assert by_json[1].caption == "long"
    with pytest.raises(RecordError, match="no json in the tar"):
        by_json[0]


def test_a_record_that_lacks_a_part_keeps_its_number(tmp_path, made):
    made.tar(
        tmp_path / "a.tar", range(4), {1: {"txt": None}, 2: {"png": None}, 3: {"txt": b"\xff"}}
    )
    source = tar_source(tmp_path)
    assert len(source) == 4
    for i, reason in ((1, "no txt"), (2, "no image"), (3, "not UTF-8")):
        with pytest.raises(RecordError, match=reason):
            source[i]


def test_the_index_is_kept_and_made_anew_when_the_tar_changes(tmp_path, made, monkeypatch):
    tar = tmp_path / "a.tar"
    made.tar(tar, range(3))
    before = tars.open_index(str(tar))[0]
    assert (tmp_path / "a.tar.index").is_file()
    read = tars.read_headers
    monkeypatch.setattr(tars, "read_headers", lambda *_: pytest.fail("read again"))
    np.testing.assert_array_equal(tars.open_index(str(tar))[0], before)
    monkeypatch.setattr(tars, "read_headers", read)
    made.tar(tar, range(7))
    assert len(tars.open_index(str(tar))[0]) == 7
    stat = tar.stat()
    made.tar(tar, range(10, 17))  # the same size, a moment later
    os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert tars.open_index(str(tar))[0]["key"][0] == b"00010"
    index = (tmp_path / "a.tar.index").read_bytes()
    (tmp_path / "a.tar.index").write_bytes(index[:-3])
    assert len(tars.open_index(str(tar))[0]) == 7


def test_an_index_that_cannot_stand_beside_the_tar_stands_in_the_cache_folder(
    tmp_path, made, monkeypatch
):
    tar = tmp_path / "a.tar"
    made.tar(tar, range(3))
    store = tars._store

    def beside_is_read_only(file, *index):
        if file.parent == tmp_path:
            raise PermissionError(13, "Permission denied")
        store(file, *index)

    monkeypatch.setattr(tars, "_store", beside_is_read_only)
    assert len(tars.open_index(str(tar))[0]) == 3
    assert not (tmp_path / "a.tar.index").exists()
    assert len(list((tmp_path / "cache").rglob("*.index"))) == 1
    monkeypatch.setattr(tars, "read_headers", lambda *_: pytest.fail("read again"))
    assert len(tars.open_index(str(tar))[0]) == 3


@pytest.mark.parametrize("part", ["header", "data", "last"])
def test_a_tar_cut_short_is_an_error(part, tmp_path, made):
    made.tar(tmp_path / "a.tar", range(6))
    index, _ = tars.read_headers(str(tmp_path / "a.tar"))
    cut = {
        "header": index["image"][3][0] - 300,
        "data": index["image"][3][0] + 10,
        "last": index["text"][5][0] + 5,
    }[part]
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[:cut])
    with pytest.raises(InputError, match=r"a\.tar is (truncated|damaged)"):
        tars.read_headers(str(tmp_path / "a.tar"))


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path, made):
    made.tar(tmp_path / "a.tar", range(6))
    at = int(tars.read_headers(str(tmp_path / "a.tar"))[0]["image"][3][0]) - 512
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[at : at + 64] = b"\xa5" * 64
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(InputError, match=f"damaged at byte {at}, after 3 records"):
        tars.read_headers(str(tmp_path / "a.tar"))


def test_a_compressed_tar_is_refused(tmp_path, made):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        made.add(tar, "0.png", made.picture(0))
    with pytest.raises(InputError, match="uncompressed"):
        tar_source(tmp_path)


def test_parquet_reads_any_row_of_any_group(tmp_path, made):
    made.parquet(tmp_path / "a.parquet", range(10))
    made.parquet(tmp_path / "b.parquet", range(10, 13))
    source = open_source(SourceConfig("parquet", str(tmp_path / "*.parquet")))
    assert len(source) == 13
    assert source.blocks.tolist() == [0, 4, 8, 10]
    for i in (12, 3, 4, 9, 0):
        assert (made.number(source[i].image), source[i].caption) == (i, f"a red heart {i}")
    assert source.key(11) == "b.parquet:1"
    with pytest.raises(InputError, match="no column 'caption'; set caption_field of the source"):
        open_source(SourceConfig("parquet", str(tmp_path / "*.parquet"), caption_field="caption"))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(InputError, match=r"b\.parquet is truncated or not Parquet"):
        open_source(SourceConfig("parquet", str(tmp_path / "*.parquet")))


def test_parquet_without_bytes_or_text_is_a_bad_record(tmp_path, made):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {"picture": [None, made.picture(1), made.picture(2)], "label": ["x", None, "two"]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    source = open_source(
        SourceConfig(
            "parquet", str(tmp_path / "a.parquet"), image_field="picture", caption_field="label"
        )
    )
    with pytest.raises(RecordError, match="no bytes in the column 'picture'"):
        source[0]
    with pytest.raises(RecordError, match="no text in the column 'label'"):
        source[1]
    assert (made.number(source[2].image), source[2].caption) == (2, "two")


def test_jsonl_reads_captions_and_says_what_a_line_lacks(tmp_path, made):
    lines = [
        "",
        "{",
        '{"image": "0.png"}',
        '{"image": "none.png", "caption": "x"}',
        '{"image": 3, "caption": "x"}',
        "[]",
    ]
    made.jsonl(tmp_path / "a.jsonl", range(3), lines)
    source = open_source(SourceConfig("jsonl", str(tmp_path / "a.jsonl")))
    assert len(source) == 8  # the blank line is none
    assert [made.number(source[i].image) for i in (2, 0)] == [2, 0]
    assert source.key(2) == "a.jsonl:3"
    for i, reason in enumerate(
        (
            "not JSON",
            "no field 'caption'",
            "none.png cannot be read",
            "not text",
            "not a JSON object",
        ),
        3,
    ):
        with pytest.raises(RecordError, match=reason):
            source[i]


@pytest.mark.parametrize(
    ("line", "inputs"),
    [
        (
            {
                "instruction": "make it blue",
                "input_images": ["0.png", "1.png"],
                "output_image": "2.png",
            },
            [0, 1],
        ),
        (
            {
                "instruction": "x",
                "used_instruction": "make it blue",
                "input_images": ["1.png"],
                "image": "2.png",
            },
            [1],
        ),
        ({"input_prompt": "make it blue", "input_image": "0.png", "output_image": "2.png"}, [0]),
    ],
)
def test_jsonl_knows_the_editing_sets(line, inputs, tmp_path, made):
    folder = tmp_path / "pictures"
    folder.mkdir()
    made.jsonl(folder / "unused.jsonl", range(3))
    (tmp_path / "edits.jsonl").write_text(json.dumps(line))
    record = open_source(SourceConfig("jsonl", str(tmp_path / "edits.jsonl"), root=str(folder)))[0]
    assert [made.number(image) for image in record.inputs] == inputs
    assert (made.number(record.image), record.caption) == (2, "make it blue")


def test_field_names_of_a_source_come_first(tmp_path, made):
    made.jsonl(tmp_path / "unused.jsonl", range(3))
    line = {"before": "0.png", "after": "2.png", "what": "swap", "caption": "no", "image": "1.png"}
    (tmp_path / "edits.jsonl").write_text(json.dumps(line))
    spec = SourceConfig(
        "jsonl",
        str(tmp_path / "edits.jsonl"),
        image_field="after",
        caption_field="what",
        inputs_field="before",
    )
    record = open_source(spec)[0]
    assert ([made.number(i) for i in record.inputs], made.number(record.image), record.caption) == (
        [0],
        2,
        "swap",
    )


def test_a_folder_of_tfds_gives_its_encoded_images(tmp_path):
    from blip3o_jax.data.transform import decode_image

    world = WorldConfig(train=6, heldout=2, text=0.1)
    builder.open_source(tmp_path, "train", world)
    folder = next(tmp_path.glob("emoji_scenes/*/*"))
    spec = SourceConfig("array_record", str(folder), caption_field="prompt")
    source = open_source(spec)
    metadata, drawn = prompts.sample(world, 4)
    assert (len(source), source[4].caption) == (6, metadata["prompt"])
    np.testing.assert_array_equal(np.asarray(decode_image(source[4].image)), scene.compose(drawn))
    with pytest.raises(InputError, match="no split 'held'; did you mean 'heldout'"):
        open_source(SourceConfig("array_record", str(folder), split="held"))
    with pytest.raises(InputError, match="was not written by TFDS"):
        open_source(SourceConfig("array_record", str(tmp_path)))


def test_no_files_and_no_records_are_errors(tmp_path):
    with pytest.raises(InputError, match="no file at"):
        tar_source(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    with pytest.raises(InputError, match=r"a\.tar' \(webdataset\) holds no records"):
        tar_source(tmp_path, "a.tar")
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no records"):
        open_source(SourceConfig("jsonl", str(tmp_path / "a.jsonl")))
