"""Field names of editing sets, as jsonl with paths and as parquet with structs or bytes."""

import json

import pytest

from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.records import RecordError
from blip3o_jax.data.sources import open_source
from blip3o_jax.errors import InputError

# What each set calls its instruction, source images and result; and what else it holds.
LAYOUTS = {
    "x2i2": ("instruction", "input_images", "output_image", {}),
    "x2i2_reflect": ("used_instruction", "input_images", "image", {"instruction": "not this"}),
    "sharegpt_4o": ("input_prompt", "input_image", "output_image", {}),
    "nano_150k": ("instruction", "input_images", "output_image", {"id": "7"}),
    "plain": ("instruction", "source_image", "target_image", {}),
    "plain_by_prompt": ("prompt", "source_image", "target_image", {}),
    "instruct_pix2pix": (
        *("edit_prompt", "original_image", "edited_image"),
        {"original_prompt": "a heart", "edited_prompt": "a blue heart"},
    ),
    "magicbrush": ("instruction", "source_img", "target_img", {"turn_index": 1, "mask_img": None}),
    "ultraedit": (
        *("edit_prompt", "source_image", "edited_image"),
        {"source_caption": "a heart", "target_caption": "a blue heart", "mask_image": None},
    ),
}


def row(layout, sources, result):
    text, before, after, others = LAYOUTS[layout]
    return others | {text: "make it blue ", before: sources, after: result}


def read(record, made):
    """(instruction, numbers of the source images, number of the result)."""
    return record.caption, [made.number(i) for i in record.inputs], made.number(record.image)


def write_parquet(path, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_jsonl_of_every_layout_opens_without_settings(layout, tmp_path, made):
    made.jsonl(tmp_path / "unused.jsonl", range(3))
    lines = [json.dumps(row(layout, source, "2.png")) for source in ("0.png", ["1.png", "0.png"])]
    (tmp_path / "edits.jsonl").write_text("\n".join(lines))
    source = open_source(SourceConfig("jsonl", str(tmp_path / "edits.jsonl")))
    assert read(source[0], made) == ("make it blue", [0], 2)
    assert read(source[1], made) == ("make it blue", [1, 0], 2)


@pytest.mark.parametrize("form", ["struct", "bytes", "path"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parquet_of_every_layout_opens_without_settings(layout, form, tmp_path, made):
    (tmp_path / "pictures").mkdir()
    made.jsonl(tmp_path / "pictures" / "unused.jsonl", range(3))

    def image(i):
        data = {"bytes": made.picture(i), "path": "elsewhere.png"}
        return {"struct": data, "bytes": data["bytes"], "path": f"{i}.png"}[form]

    write_parquet(tmp_path / "one.parquet", [row(layout, image(0), image(2))])
    write_parquet(tmp_path / "two.parquet", [row(layout, [image(1), image(0)], image(2))])
    root = str(tmp_path / "pictures")
    sources = [
        open_source(SourceConfig("parquet", str(tmp_path / name), root=root))
        for name in ("one.parquet", "two.parquet")
    ]
    assert read(sources[0][0], made) == ("make it blue", [0], 2)
    assert read(sources[1][0], made) == ("make it blue", [1, 0], 2)


def test_a_struct_without_bytes_names_a_file_beside_the_parquet(tmp_path, made):
    made.jsonl(tmp_path / "unused.jsonl", range(3))
    images = [{"bytes": None, "path": f"{i}.png"} for i in (0, 2)]
    write_parquet(tmp_path / "a.parquet", [row("plain", *images)])
    source = open_source(SourceConfig("parquet", str(tmp_path / "a.parquet")))
    assert read(source[0], made) == ("make it blue", [0], 2)
    (tmp_path / "0.png").unlink()
    with pytest.raises(RecordError, match=r"0\.png cannot be read \(No such file"):
        source[0]


def test_an_edit_without_source_images_is_bad_and_no_caption(tmp_path, made):
    image = made.picture(2)
    rows = [row("x2i2", sources, image) for sources in ([image], [], None, [None])]
    write_parquet(tmp_path / "a.parquet", rows)
    source = open_source(SourceConfig("parquet", str(tmp_path / "a.parquet")))
    assert len(source[0].inputs) == 1
    for i, reason in ((1, "no image in"), (2, "no bytes in"), (3, "no bytes in")):
        with pytest.raises(RecordError, match=f"{reason} the column 'input_images'"):
            source[i]
    lines = [json.dumps(row("x2i2", sources, "2.png")) for sources in ([], None, [3])]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = open_source(SourceConfig("jsonl", str(tmp_path / "a.jsonl")))
    for i in range(3):
        with pytest.raises(RecordError, match="'input_images' is not a list of paths"):
            source[i]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            ("instruction", "source_image", "input_image", "target_image"),
            "'input_image' and 'source_image' are both there; set inputs_field of the source",
        ),
        (
            ("instruction", "source_image", "target_image", "output_image"),
            "'output_image' and 'target_image' are both there; set image_field of the source",
        ),
        # a benchmark, a set for reinforcement learning, and names nobody uses
        (("instruction", "input_image", "key"), "no WORD 'output_image'; set image_field"),
        (("instruction", "target_image"), "no WORD 'input_images'; set inputs_field"),
        (("source_image", "target_image"), "no WORD 'instruction'; set caption_field"),
        (("prompt", "media", "metadata"), "no WORD 'image'; set image_field"),
        (("what", "from", "to"), "no WORD 'caption'; set caption_field"),
    ],
)
def test_what_cannot_be_told_is_said(fields, reason, tmp_path):
    """Of a line it is a bad record; of parquet, the whole file's error."""
    values = dict.fromkeys(fields, "x")
    (tmp_path / "a.jsonl").write_text(json.dumps(values))
    write_parquet(tmp_path / "a.parquet", [values])
    source = open_source(SourceConfig("jsonl", str(tmp_path / "a.jsonl")))
    with pytest.raises(RecordError) as bad:
        source[0]
    assert reason.replace("WORD", "field") in str(bad.value)
    with pytest.raises(InputError) as error:
        open_source(SourceConfig("parquet", str(tmp_path / "a.parquet")))
    assert reason.replace("WORD", "column") in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "a.parquet"))


def test_an_error_lists_the_fields_and_the_usual_names(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"instruction": "x", "input_image": "0.png"}))
    with pytest.raises(RecordError) as error:
        open_source(SourceConfig("jsonl", str(tmp_path / "a.jsonl")))[0]
    usual = "output_image, target_image, target_img, edited_image, image"
    assert f"(it has 'input_image', 'instruction'; usual: {usual})" in str(error.value)


def test_parquet_follows_the_names_of_a_source(tmp_path, made):
    image = {name: made.picture(i) for i, name in enumerate(("before", "after", "image"))}
    write_parquet(tmp_path / "a.parquet", [image | {"what": "swap", "caption": "no"}])
    names = {"image_field": "after", "caption_field": "what", "inputs_field": "before"}
    source = open_source(SourceConfig("parquet", str(tmp_path / "a.parquet"), **names))
    assert read(source[0], made) == ("swap", [0], 1)


def test_a_caption_with_a_field_more_stays_a_caption(tmp_path, made):
    made.jsonl(tmp_path / "unused.jsonl", range(3))
    line = {"image": "2.png", "caption": "a heart", "source_image": "https://example.org/2.png"}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    record = open_source(SourceConfig("jsonl", str(tmp_path / "a.jsonl")))[0]
    assert read(record, made) == ("a heart", [], 2)
