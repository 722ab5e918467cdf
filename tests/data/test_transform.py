import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.records import RecordError
from blip3o_jax.data.transform import (
    Tally,
    centre_crop,
    decode_image,
    fit_caption,
    prompt_length,
    squash,
)
from blip3o_jax.errors import InputError
from blip3o_jax.jobs.train import open_feed
from blip3o_jax.train.config import DataConfig, TrainConfig


def stripes(width, height):
    """Red grows from left to right, green from top to bottom, both from 0 to 255."""
    x = np.linspace(0, 255, width).astype(np.uint8)
    y = np.linspace(0, 255, height).astype(np.uint8)
    return Image.fromarray(
        np.dstack(
            [
                np.broadcast_to(x, (height, width)),
                np.broadcast_to(y[:, None], (height, width)),
                np.zeros((height, width), np.uint8),
            ]
        )
    )


@pytest.mark.parametrize(("width", "height"), [(200, 100), (100, 200), (50, 25), (128, 128)])
def test_the_crop_is_the_middle_of_the_longer_side(width, height):
    made = centre_crop(stripes(width, height), 64).astype(float)
    assert made.shape == (64, 64, 3)
    for axis, side in ((1, width), (0, height)):
        line = made[32, :, 0] if axis == 1 else made[:, 32, 1]
        cut = (1 - min(width, height) / side) / 2
        assert abs(line[0] - 255 * cut) < 6
        assert abs(line[-1] - 255 * (1 - cut)) < 6


def test_the_original_shows_the_tokenizer_the_whole_frame():
    made = squash(stripes(200, 100), 32).astype(float)
    assert made.shape == (32, 32, 3)
    assert made[16, 0, 0] < 6
    assert made[16, -1, 0] > 249


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_images_of_every_mode_become_rgb(mode):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 10, 10)).convert(mode).save(file, "tiff")
    assert np.asarray(decode_image(file.getvalue())).shape == (8, 8, 3)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d[: len(d) // 2],
        lambda d: b"not an image",
        lambda d: b"",
        lambda d: d[:40] + b"\0" * 40 + d[80:],
    ],
)
def test_a_damaged_image_is_a_bad_record(damage, made):
    data = made.picture(3, size=(200, 200))
    with pytest.raises(RecordError, match="cannot be decoded"):
        decode_image(damage(data))


def test_a_long_caption_is_cut_at_a_token_and_as_late_as_it_can(tokenizer):
    caption = "a red heart left of " * 20
    cut = fit_caption(tokenizer, caption)
    assert caption.startswith(cut)
    assert prompt_length(tokenizer, cut) <= tokenizer.max_prompt_tokens
    longer = caption[: len(cut) + len(caption[len(cut) :].split()[0]) + 1]
    assert prompt_length(tokenizer, longer) > tokenizer.max_prompt_tokens
    assert fit_caption(tokenizer, "a cat") == "a cat"


BAD = {3: {"png": b"no image"}, 9: {"txt": b" "}, 10: {"txt": b"a <|im_end|> cat"}}


@pytest.fixture
def run(tmp_path, made):
    made.tar(tmp_path / "a.tar", range(24), BAD)
    data = DataConfig(sources=(SourceConfig("webdataset", str(tmp_path / "a.tar")),), heldout=2)
    return TrainConfig(stage="joint", batch_size=4, data=data)


def numbers(cfg, tokenizer, count, workdir=None, start=0):
    batches = open_feed(cfg, tokenizer, workdir=workdir).train(start)
    return [n for _ in range(count) for n in next(batches)["images"][:, 0, 0, 0].tolist()]


def changed(cfg, **data):
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **data))


def test_bad_records_are_named_and_the_next_takes_their_place(run, tokenizer, tmp_path):
    shown = numbers(run, tokenizer, 11, tmp_path)  # two epochs of 22 records
    assert sorted(shown) == sorted([*(set(range(24)) - {0, 12} - set(BAD)), 4, 11, 11] * 2)
    lines = [
        json.loads(line) for line in (tmp_path / "bad_records.0.jsonl").read_text().splitlines()
    ]
    reasons = {line["key"]: line["reason"] for line in lines}
    assert len(lines) == len(reasons)  # each once
    assert reasons.keys() == {"a.tar:00003", "a.tar:00009", "a.tar:00010"}
    assert "cannot be decoded" in reasons["a.tar:00003"]
    assert "empty" in reasons["a.tar:00009"]
    assert "control token <|im_end|>" in reasons["a.tar:00010"]
    assert numbers(run, tokenizer, 4, start=7) == shown[28:]


def test_too_many_bad_records_stop_the_run(run, tokenizer):
    with pytest.raises(
        InputError, match=r"3 of \d+ records cannot be used, more than data.max_bad_fraction 0.002"
    ):
        numbers(changed(run, max_bad_fraction=0.002), tokenizer, 11)


def test_the_bound_is_a_share_of_the_records_read(tmp_path):
    tally = Tally(0.01, tmp_path / "bad.jsonl")
    for i in range(10):
        tally.bad(str(i), "x")
    tally.add(read=2000)
    for i in range(10):
        tally.bad(str(i), "x")
    with pytest.raises(InputError, match="21 of 2000"):
        tally.bad("a", "y")
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 11


@pytest.mark.parametrize("action", ["truncate", "drop"])
def test_long_captions_are_cut_or_dropped_and_counted(
    action, run, tokenizer, tmp_path, made, caplog
):
    long = "a red heart left of " * 20
    made.tar(tmp_path / "a.tar", range(24), {5: {"txt": long.encode()}})
    cfg = changed(run, long_captions=action)
    with caplog.at_level("INFO"):
        batches = open_feed(cfg, tokenizer).train()
        rows = [
            row
            for _ in range(11)
            for b in [next(batches)]
            for row in zip(b["images"][:, 0, 0, 0], b["tokens"], b["start"], strict=True)
        ]
    assert f"2 {action.rstrip('e')}" in caplog.text.replace("dropped", "drop")
    of_five = [(tokens, start) for n, tokens, start in rows if n == 5]
    if action == "drop":
        assert not of_five
        assert sum(n == 6 for n, *_ in rows) == 4  # its own two turns and those of the one before
    else:
        expected = tokenizer.encode_prompt(fit_caption(tokenizer, long))
        assert len(of_five) == 2
        for tokens, start in of_five:
            assert tokens[: start + 1].tolist() == expected
            assert start + 1 <= tokenizer.max_prompt_tokens


def test_the_original_crop_adds_the_tokenizers_view(run, tokenizer, tmp_path):
    file = io.BytesIO()
    stripes(200, 100).save(file, "png")
    (tmp_path / "wide.png").write_bytes(file.getvalue())
    (tmp_path / "a.jsonl").write_text(
        (json.dumps({"image": "wide.png", "caption": "a cat"}) + "\n") * 4
    )
    cfg = changed(
        run, sources=(SourceConfig("jsonl", str(tmp_path / "a.jsonl")),), heldout=1, crop="original"
    )
    batch = open_feed(cfg, tokenizer).heldout(4)
    np.testing.assert_array_equal(
        batch["view"][0], squash(stripes(200, 100), cfg.blip3o().ta_tok.encoder.image_size)
    )
    assert abs(int(batch["images"][0, 32, 0, 0]) - 64) < 6
    assert "view" not in open_feed(changed(cfg, crop="shared"), tokenizer).heldout(4)


def test_a_source_without_a_usable_record_stops(run, tokenizer, tmp_path, made):
    made.tar(tmp_path / "a.tar", range(8), {i: {"png": b"no"} for i in range(8)})
    with pytest.raises(InputError, match=r"None of 100 records from a\.tar"):
        numbers(changed(run, max_bad_fraction=1.0), tokenizer, 1)
