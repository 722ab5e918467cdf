import dataclasses
import json
import re

import numpy as np
import pytest

from blip3o_jax.cli import main
from blip3o_jax.data import cache
from blip3o_jax.data.captions import captions_of
from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.records import Record, RecordError
from blip3o_jax.data.sources import open_source
from blip3o_jax.data.transform import Tally
from blip3o_jax.errors import InputError
from blip3o_jax.jobs.train import open_feed
from blip3o_jax.scenes import builder
from blip3o_jax.scenes.config import WorldConfig
from blip3o_jax.train.config import DataConfig, TrainConfig


def turns(*said, names=("from", "value")):
    return [dict(zip(names, turn, strict=True)) for turn in said]


@pytest.mark.parametrize(
    ("value", "captions"),
    [
        (" a cat\n", ("a cat",)),
        ("", ("",)),
        (["a cat", " ", " a dog "], ("a cat", "a dog")),
        (turns(("human", "<image>\nDescribe it."), ("gpt", "a cat")), ("a cat",)),
        (
            turns(
                ("system", "x"),
                ("user", "Please generate image based on the following caption: a cat"),
                ("assistant", "<image>"),
                names=("role", "content"),
            ),
            ("a cat",),
        ),
    ],
)
def test_captions_are_texts_lists_and_conversations(value, captions):
    assert captions_of(value, "caption") == captions


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (3, "is not text, nor a list of texts"),
        ([], "is not text, nor a list of texts"),
        (["a cat", None], "is not text, nor a list of texts"),
        ([{"raw": "a cat"}], "is not one question and its answer"),
        (turns(("human", "a"), ("gpt", "b")) * 2, "is not one question and its answer"),
        (turns((["human"], "a"), ("gpt", "b")), "is not one question and its answer"),
        (turns(("human", "a"), ("gpt", 3)), "is not one question and its answer"),
        ([{"from": "human"}, "b"], "is not text, nor a list of texts"),
        (["a cat", "a \ud83d hat"], "has a text that is not UTF-8"),
        (["a cat", "a" * 262_145], "has a text of 262145 characters, beyond 262144"),
    ],
)
def test_what_is_no_caption_is_a_bad_record(value, reason):
    with pytest.raises(RecordError, match=f"'caption' {reason}"):
        captions_of(value, "caption")


def test_an_edit_has_one_instruction(tmp_path, made):
    made.jsonl(tmp_path / "unused.jsonl", range(2))
    row = {"input_image": "0.png", "output_image": "1.png", "instruction": ["make it blue"]}
    rows = [row, row | {"instruction": ["make it blue", "add a hat"]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(SourceConfig("jsonl", str(tmp_path / "a.jsonl")))
    assert source[0].captions == ("make it blue",)
    with pytest.raises(RecordError, match="2 texts in 'instruction', where an edit has one"):
        source[1]


def records_of(kind, path, made, **fields):
    source = open_source(SourceConfig(kind, str(path), **fields))
    records = [source[i] for i in range(len(source))]
    return [(made.number(record.image), record.captions) for record in records]


def test_parquet_as_hugging_face_writes_it(tmp_path, made):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder, file = tmp_path / "pictures", tmp_path / "a.parquet"
    folder.mkdir()
    for i in range(2):
        (folder / f"{i}.png").write_bytes(made.picture(i))
    pictures = [{"bytes": made.picture(i), "path": None} for i in range(2)]
    talk = turns(("human", "<image>"), ("gpt", "a cat"))
    for column, images in {
        "image": [{"bytes": None, "path": f"{i}.png"} for i in range(2)],
        "images": [[picture] for picture in pictures],
        "jpg": [made.picture(i) for i in range(2)],
        "file_name": ["0.png", "1.png"],
    }.items():
        pq.write_table(pa.table({column: images, "captions": [["a", "b"], ["c"]]}), file)
        expected = [(0, ("a", "b")), (1, ("c",))]
        assert records_of("parquet", file, made, root=str(folder)) == expected
    pq.write_table(pa.table({"image": pictures, "conversations": [talk, talk]}), file)
    assert records_of("parquet", file, made) == [(0, ("a cat",)), (1, ("a cat",))]
    pq.write_table(pa.table({"images": [pictures, []], "text": ["a", "b"]}), file)
    source = open_source(SourceConfig("parquet", str(file)))
    for i, count in ((0, 2), (1, 0)):
        reason = f"{count} images in 'images', where an example has one"
        with pytest.raises(RecordError, match=reason):
            source[i]


@pytest.mark.parametrize("form", ["lines", "array", "indented", "bom"])
def test_llava_is_read_as_lines_and_as_an_array(form, tmp_path, made):
    made.jsonl(tmp_path / "unused.jsonl", range(3))
    talk = turns(("human", "Describe it.\n<image>"), ("gpt", "café \u2028 a cat, [1]"))
    rows = [{"id": i, "image": f"{i}.png", "conversations": talk} for i in range(3)]
    written = json.dumps(rows, ensure_ascii=False, indent=2 if form == "indented" else None)
    if form == "lines":
        written = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    encoding = "utf-8-sig" if form == "bom" else "utf-8"
    (tmp_path / "a.json").write_text(written, encoding=encoding, newline="")
    expected = [(i, ("café \u2028 a cat, [1]",)) for i in range(3)]
    assert records_of("jsonl", tmp_path / "a.json", made) == expected
    source = open_source(SourceConfig("jsonl", str(tmp_path / "a.json")))
    assert source.key(2) == "a.json:3"


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ('[{"image": "0.png"}', "it has no end"),
        ("[1, 2]\n[3]", "there is more after its end"),
        ("[1,", "it has no end"),
        (b"[\xff]", ".*invalid start byte"),
        ("[nope]", "Expecting value.*"),
    ],
)
def test_a_damaged_array_is_one_sentence(written, reason, tmp_path):
    written = written.encode() if isinstance(written, str) else written
    (tmp_path / "a.json").write_bytes(written)
    with pytest.raises(InputError, match=rf"a\.json is not a JSON array: {reason}\.$"):
        open_source(SourceConfig("jsonl", str(tmp_path / "a.json")))


def test_captions_of_a_tars_json_may_be_several(tmp_path, made):
    several = {"json": json.dumps({"captions": ["a", "b"], "label": 3}).encode()}
    made.tar(tmp_path / "a.tar", [7], {7: several})
    assert records_of("webdataset", tmp_path / "a.tar", made, caption_field="captions") == [
        (7, ("a", "b"))
    ]
    source = open_source(SourceConfig("webdataset", str(tmp_path / "a.tar"), caption_field="label"))
    with pytest.raises(RecordError, match="'label' is not text"):
        source[0]


def test_a_folder_of_tfds_without_a_shard_is_refused(tmp_path):
    builder.open_source(tmp_path, "train", WorldConfig(train=4, heldout=2))
    folder = next(tmp_path.glob("emoji_scenes/*/*"))
    spec = SourceConfig("array_record", str(folder), caption_field="prompt")
    (shard,) = folder.glob("*train*")
    shard.write_bytes(b"")
    with pytest.raises(RecordError, match="cannot be read"):
        open_source(spec)[0]
    shard.unlink()
    with pytest.raises(InputError, match=f"lacks 1 of 1 files of 'train': .* {shard.name}; copy"):
        open_source(spec)


@pytest.fixture
def mixed(tmp_path, made):
    """Eight records of three captions each, of which six are trained on."""
    made.jsonl(tmp_path / "unused.jsonl", range(8))
    rows = [{"image": f"{i}.png", "captions": [f"{i} {c} cats" for c in "abc"]} for i in range(8)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = (SourceConfig("jsonl", str(tmp_path / "a.jsonl")),)
    data = DataConfig(sources=sources, heldout=2)
    return TrainConfig(stage="joint", batch_size=2, seed=5, data=data)


def test_one_caption_is_drawn_by_seed_epoch_and_record(mixed, tokenizer, made):
    def shown(cfg, step=0, count=12):
        iterator = open_feed(cfg, tokenizer).train(step)
        batches = [next(iterator) for _ in range(count)]
        rows = [(batch["images"][b], batch["tokens"][b]) for batch in batches for b in range(2)]
        ids = [(made.number(image), tokens) for image, tokens in rows]
        return [
            (i, next(c for c in "abc" if is_prompt(tokens, f"{i} {c} cats"))) for i, tokens in ids
        ]

    def is_prompt(tokens, caption):
        prompt = tokenizer.encode_prompt(caption)
        return tokens[: len(prompt)].tolist() == prompt

    # Of the stride 4, records 0 and 4 are held out; the others are renumbered.
    trained = [1, 2, 3, 5, 6, 7]
    first = shown(mixed)
    for position, (record, letter) in enumerate(first):
        numbers = 5, 0, position // 6, trained.index(record)
        assert letter == "abc"[np.random.default_rng(numbers).integers(3)]
    assert {letter for _, letter in first} == set("abc")
    assert shown(mixed, step=5, count=7) == first[10:]
    assert shown(dataclasses.replace(mixed, seed=6)) != first


def test_a_cache_holds_every_caption():
    records = [Record("a", ("x", "y"), b""), Record("b", ("z",), b"")]

    def encode(arrays):
        return (np.zeros((len(arrays), 4), np.int32), np.zeros((len(arrays), 2, 2, 1)))

    source = type("Source", (list,), {"key": lambda self, i: self[i].key})(records)
    images = {"images": np.zeros((8, 8, 3), np.uint8)}
    cached = cache.encoded_records(source, range(2), lambda _: dict(images), encode, Tally(0.5), 2)
    assert [(row["caption"], row.get("captions")) for row in cached] == [
        ("x", ["x", "y"]),
        ("z", None),
    ]


def write_config(path, source, **data):
    config = {"stage": "joint", "data": {"sources": [source], "heldout": 2, **data}}
    code = "from ml_collections import ConfigDict\ndef get_config():\n"
    path.write_text(f"{code}    return ConfigDict({config!r})\n")


def test_check_exits_1_when_nothing_is_usable_and_refuses_what_train_refuses(
    tmp_path, made, capsys
):
    made.jsonl(tmp_path / "a.jsonl", range(6))
    source = {"kind": "jsonl", "path": str(tmp_path / "a.jsonl")}
    argv = ["data", "check", "--config", str(tmp_path / "config.py"), "--out", str(tmp_path / "r")]
    write_config(tmp_path / "config.py", source, row_length=100)
    assert main(argv) == 2
    assert "data.row_length 100 does not hold a prompt of" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
    write_config(tmp_path / "config.py", source, heldout=4)
    assert main(argv) == 2
    assert "data.heldout 4 leaves too few" in capsys.readouterr().err
    assert json.loads((tmp_path / "r" / "report.json").read_text())["sources"][0]["usable"] == 6
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(b"")
    write_config(tmp_path / "config.py", source)
    assert main([*argv, "--overwrite"]) == 1
    report = json.loads(capsys.readouterr().out.splitlines()[-1])["sources"][0]
    assert (report["usable"], report["bad"]) == (0, 6)
    assert re.search("it is empty", report["examples"][0]["reason"])


def test_text_that_is_not_utf8_and_a_path_that_is_none_are_bad_records(tmp_path, made):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pa.array([b"\xff", b"a cat"]).view(pa.string())
    table = pa.table({"image": [made.picture(0), made.picture(1)], "text": texts})
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_source(SourceConfig("parquet", str(tmp_path / "a.parquet")))
    with pytest.raises(RecordError, match=r"it cannot be read .*utf-8"):
        source[0]
    assert source[1].caption == "a cat"
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "0\0.png", "caption": "a cat"}))
    with pytest.raises(RecordError, match=r"cannot be read .embedded null byte"):
        open_source(SourceConfig("jsonl", str(tmp_path / "a.jsonl")))[0]
