import tarfile

import pytest

from blip3o_jax.data import tars
from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.records import RecordError
from blip3o_jax.data.sources import open_source
from blip3o_jax.errors import InputError


def tar_source(path, **fields):
    return open_source(SourceConfig("webdataset", str(path), **fields))


@pytest.fixture
def pack(tmp_path, made):
    """Writes a tar of members in their order: a number is picture i, other data are as they are."""

    def write(*members):
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for name, data in members:
                made.add(tar, name, made.picture(data) if isinstance(data, int) else data)
        return tmp_path / "a.tar"

    return write


def test_parts_join_by_key_wherever_they_stand(pack, made):
    captions = [(f"{i:04}.txt", f"heart {i}".encode()) for i in (2, 0, 1)]
    source = tar_source(pack(*[(f"{i:04}.png", i) for i in range(3)], *captions))
    records = [source[i] for i in range(len(source))]
    assert [(made.number(r.image), r.caption) for r in records] == [
        (i, f"heart {i}") for i in range(3)
    ]
    assert source.notes == []


def test_names_may_have_dots(pack, made):
    names = ["v1_0", "v1.5_1", "v1.5_2", "scan.03", "a.b/04", "scan.2024.05"]
    source = tar_source(
        pack(*[m for i, n in enumerate(names) for m in ((f"{n}.png", i), (f"{n}.txt", n.encode()))])
    )
    records = [source[i] for i in range(len(source))]
    assert [(made.number(r.image), r.caption) for r in records] == list(enumerate(names))
    assert source.key(1) == "a.tar:v1.5_1"


def test_fields_may_name_extensions(pack, made):
    parts = ("input.png", 10), ("output.png", 20), ("edit.txt", b"swap"), ("caption.txt", b"after")
    tar = pack(
        *[(f"{i}.{n}", d + i if isinstance(d, int) else d) for i in (0, 1) for n, d in parts]
    )
    source = tar_source(tar, image_field="output.png", caption_field="caption.txt")
    records = [source[i] for i in range(len(source))]
    assert [(r.key, made.number(r.image), r.caption) for r in records] == [
        ("a.tar:0", 20, "after"),
        ("a.tar:1", 21, "after"),
    ]
    assert source.notes == [
        "ignored members, .png: 2 (the first: a.tar: 0.input.png)",
        "ignored members, .txt: 2 (the first: a.tar: 0.edit.txt)",
    ]
    # Two sources on one tar have an index each.
    other = tar_source(tar, image_field="INPUT.png", caption_field="edit.txt")
    assert (made.number(other[1].image), other[1].caption) == (11, "swap")
    assert len(list(tar.parent.glob("*.index"))) == 2
    with pytest.raises(
        InputError, match=r"none of the 8 records .* end in input\.png, output\.png"
    ):
        tar_source(tar)


def test_what_a_tar_holds_besides_records_is_counted_and_named(pack, made):
    own = [("0.png", 0), ("0.txt", b"zero"), ("0.cls", b"3"), ("0.seg.png", 9), ("._0.png", b"mac")]
    tar = pack(*own, ("1.cls", b"4"), ("1.jpg", 1), ("1.png", 1), ("1.txt", b"one"))
    with tarfile.open(tar, "a") as archive:
        link = tarfile.TarInfo("2.png")
        link.type = tarfile.SYMTYPE
        archive.addfile(link)
    source = tar_source(tar)
    assert len(source) == 2
    assert source.notes == [
        "ignored members, .cls: 2 (the first: a.tar: 0.cls)",
        "ignored members, hidden files: 1 (the first: a.tar: ._0.png)",
        "ignored members, links and devices: 1 (the first: a.tar: 2.png)",
        "ignored members, seg.png: 1 (the first: a.tar: 0.seg)",
    ]
    with pytest.raises(RecordError, match="several images in the tar; set image_field"):
        source[1]
    assert made.number(tar_source(tar, image_field="png")[1].image) == 1
    assert tar_source(tar).notes == source.notes  # also from the index


def test_what_is_not_read_is_told_in_a_few_lines(pack):
    others = [(f"scan.{i:04}", b"") for i in range(30)] + [(f"scan{i:04}", b"") for i in range(5)]
    notes = tar_source(pack(("0.png", 0), ("0.txt", b"zero"), *others[30:], *others[:30])).notes
    assert len(notes) == tars.KINDS + 1
    assert notes[-2:] == [
        "ignored members, names without an extension: 5 (the first: a.tar: scan0000)",
        "ignored members, others: 19 (the first: a.tar: scan.0011)",
    ]


def test_tars_that_were_appended_to_each_other_keep_their_pairs(pack, made):
    both = [("0.png", 1), ("0.txt", b"one"), ("0.png", 2), ("0.txt", b"two")]
    source = tar_source(pack(*both))
    records = [source[i] for i in range(len(source))]
    assert [(made.number(r.image), r.caption) for r in records] == [(1, "one"), (2, "two")]


def test_a_tar_without_its_end_or_with_more_after_it_is_said(pack):
    tar = pack(("0.png", 0), ("0.txt", b"zero"), ("1.png", 1), ("1.txt", b"one"))
    with tarfile.open(tar) as archive:
        third, last = archive.getmembers()[2], archive.getmembers()[3]
    whole = tar.read_bytes()
    said = "tars without the blocks that end one, perhaps cut between two members: 1"
    for cut, count in ((third.offset, 1), (last.offset_data + tars.BLOCK, 2)):
        tar.write_bytes(whole[:cut])
        source = tar_source(tar)
        assert (len(source), source.notes) == (count, [f"{said} (the first: a.tar)"])
    tar.write_bytes(whole + whole)
    at = last.offset_data + tars.BLOCK
    with pytest.raises(InputError, match=f"goes on after its end at byte {at}, as joined tars do"):
        tar_source(tar)


def test_a_caption_keeps_no_byte_order_mark_and_a_name_may_be_of_any_bytes(pack):
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    source = tar_source(pack((f"{name}.png", 0), (f"{name}.txt", b"\xef\xbb\xbfzero\r\n")))
    assert (source[0].caption, source.key(0)) == ("zero", "a.tar:caf\ufffd")


def test_a_setting_that_a_kind_does_not_read_is_refused():
    for name in ("root", "inputs_field"):
        with pytest.raises(
            InputError, match=f"{name} has no effect on a source of kind 'webdatase"
        ):
            SourceConfig("webdataset", "a.tar", **{name: "x"})
