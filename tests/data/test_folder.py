"""A folder of pictures, each with its caption beside it: as a source, in a run, as a sheet."""

import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from blip3o_jax.cli import main
from blip3o_jax.data import feed, origin
from blip3o_jax.data.config import DataConfig, SourceConfig
from blip3o_jax.data.records import RecordError
from blip3o_jax.data.sources import open_source
from blip3o_jax.data.survey import Seen, summary
from blip3o_jax.errors import InputError
from blip3o_jax.jobs.train import open_feed
from blip3o_jax.presets import preset
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.train.stages import STAGES


@pytest.fixture
def folder(tmp_path, made):
    """Six pictures, two of them below; one is damaged, one has no caption; and two other files."""
    folder = tmp_path / "own [1]"  # brackets are no pattern
    (folder / "more").mkdir(parents=True)
    for name, number in {"a": 10, "b": 20, "c": 30, "more/a": 40, "more/z.1": 50}.items():
        (folder / f"{name}.png").write_bytes(made.picture(number))
        (folder / f"{name}.txt").write_text(f"\ufeffa red heart {number}\n", encoding="utf-8")
    (folder / "d.JPG").write_bytes(made.picture(60, kind="jpeg"))
    (folder / "b.png").write_bytes(b"no picture")
    (folder / ".hidden.png").write_bytes(made.picture(70))
    (folder / "notes.md").write_text("about them")
    (folder / "more" / "lost.txt").write_text("a caption without a picture")
    return folder


def test_a_folder_is_a_source_of_pictures_with_the_text_beside_them(folder, made):
    source = open_source(SourceConfig("folder", f"{folder}{os.sep}"))
    keys = ["a.png", "b.png", "c.png", "d.JPG", "more/a.png", "more/z.1.png"]
    assert [source.key(i) for i in range(len(source))] == keys
    assert [made.number(source[i].image) for i in (0, 2, 4, 5)] == [10, 30, 40, 50]
    assert [source[i].captions for i in (0, 5)] == [("a red heart 10",), ("a red heart 50",)]
    with pytest.raises(RecordError, match=r"d\.txt cannot be read \(No such file"):
        source[3]
    assert source.notes == ["ignored files: 2 (the first: more/lost.txt)"]
    (folder / "c.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(RecordError, match=r"c\.txt is not UTF-8"):
        source[2]


def test_extensions_of_a_folder_are_those_that_the_source_names(folder, made):
    (folder / "a.input.png").write_bytes(made.picture(80))
    (folder / "a.label").write_text("eighty")
    spec = SourceConfig("folder", str(folder), image_field="input.png", caption_field="label")
    source = open_source(spec)
    assert [source.key(i) for i in range(len(source))] == ["a.input.png"]
    assert (made.number(source[0].image), source[0].caption) == (80, "eighty")


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("no", "'no' is not a folder of pictures"),
        ("gs://own/pictures", "is in a bucket; a folder is read from a disk"),
        (".", r"'\.' \(folder\) holds no records"),
    ],
)
def test_a_folder_that_cannot_be_read_is_one_sentence(path, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=sentence):
        open_source(SourceConfig("folder", path))


def test_a_cache_knows_the_pictures_and_captions_of_a_folder(folder):
    spec = SourceConfig("folder", str(folder))
    there = origin.look(spec)
    assert [file["name"] for file in there if "more" in file["name"]] == [
        "more/a.png",
        "more/a.txt",
        "more/z.1.png",
        "more/z.1.txt",
    ]
    (folder / "notes.md").write_text("other notes")
    assert origin.compare(there, origin.look(spec, there)) is None
    (folder / "a.txt").write_text("a blue heart")
    (folder / "e.png").write_bytes(b"a new one")
    changes = origin.compare(there, origin.look(spec, there))
    assert changes == "changed: a.txt, 18 bytes then, 12 now; new: e.png"


def batches(folder, workdir=None, **data):
    sources = (SourceConfig("folder", str(folder)),)
    data = DataConfig(sources=sources, heldout=1, **data)
    cfg = TrainConfig(stage="autoencoder", batch_size=5, data=data)
    return open_feed(cfg, None, workdir=workdir)


def test_stages_of_pictures_read_a_folder_and_count_what_cannot_be_used(folder, tmp_path):
    opened = batches(folder, tmp_path)
    batch = next(opened.train())
    for stage in ("autoencoder", "tokenizer"):  # as `plan` takes it
        planned = STAGES[stage].batch(opened.model, opened.data, 5)
        assert {k: (x.shape, x.dtype) for k, x in planned.items()} == {
            k: (x.shape, x.dtype) for k, x in batch.items()
        }
    assert batch.keys() == {"images"}
    # The next record stands in for a bad one; the first is held out.
    assert sorted(batch["images"][:, 0, 0, 0].tolist()) == [30, 30, 40, 40, 50]
    assert opened.heldout(8)["images"][:, 0, 0, 0].tolist() == [10]
    lines = (tmp_path / "bad_records.0.jsonl").read_text().splitlines()
    reasons = {line["key"]: line["reason"] for line in map(json.loads, lines)}
    assert reasons.keys() == {"b.png", "d.JPG"}
    assert reasons["b.png"].startswith("the image cannot be decoded")
    # `data check` counts reasons without their numbers; those in names stay.
    bad = [Seen(key, reason) for key, reason in reasons.items()]
    counts = summary([*bad, Seen("e", "7 of 1,024 p13.txt is not UTF-8")], 64, 64, 1)
    assert "N of N p13.txt is not UTF-8" in counts["reasons"]
    with pytest.raises(InputError, match=r"cannot be used, more than data\.max_bad_fraction 0\.0"):
        next(batches(folder, max_bad_fraction=0.0).train())


def test_pictures_are_cropped_as_for_the_joint_stage(folder, tokenizer):
    file = io.BytesIO()
    ramp = np.zeros((64, 128, 3), np.uint8)
    ramp[..., 0] = np.arange(128)
    Image.fromarray(ramp).save(file, "png")
    for name in ("a", "c", "more/a", "more/z.1"):
        (folder / f"{name}.png").write_bytes(file.getvalue())
    own = batches(folder).heldout(1)["images"]
    np.testing.assert_array_equal(own[0], ramp[:, 32:96])
    data = DataConfig(sources=(SourceConfig("folder", str(folder)),), heldout=1)
    joint = feed.Feed(data, preset("emoji_64"), "captions", tokenizer)
    np.testing.assert_array_equal(joint.heldout(1)["images"], own)


def test_a_preview_shows_pictures_and_counts_those_that_cannot(folder, tmp_path, capsys):
    out, sources = tmp_path / "sheet.png", [{"kind": "folder", "path": str(folder)}]
    override = f"--config.data.sources={json.dumps(sources)}"
    argv = ["data", "preview", "--config", "my_pictures", "--out", str(out), override]
    assert main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == {"sheet": str(out), "shown": 4, "bad": 2}
    # The reds of the pictures, each in the middle of its cell; black letters below.
    sheet = np.asarray(Image.open(out))
    width, height = 2 + 224 + 32, 2 + 224 + 48
    assert sheet.shape == (height + 2, 6 * width + 2, 3)
    reds = [int(sheet[height // 2, width * k + width // 2, 0]) for k in range(5)]
    assert reds == [10, 30, 40, 50, 255]
    letters = (sheet[228:-2].min(axis=2) < 128).any(axis=0)
    assert [bool(letters[width * k : width * (k + 1)].any()) for k in range(5)] == [True] * 4 + [
        False
    ]
    assert main(argv) == 2
    assert "add --overwrite" in capsys.readouterr().err
    for name in ("a", "c", "more/a", "more/z.1"):
        (folder / f"{name}.png").unlink()
    assert main([*argv, "--overwrite"]) == 1


def test_a_stage_that_trains_the_encoders_fills_no_cache(folder, tmp_path, capsys):
    sources = [{"kind": "folder", "path": str(folder)}]
    override = f"--config.data.sources={json.dumps(sources)}"
    argv = ["data", "cache", "--config", "my_pictures:autoencoder", "--out", str(tmp_path / "c")]
    assert main([*argv, override]) == 2
    assert "name the config of a joint run" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
