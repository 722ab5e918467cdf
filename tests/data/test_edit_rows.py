"""Edits as training rows: of the embedded world, and of files."""

import json

import numpy as np
import pytest
from tiny import TEXT_ONLY

from blip3o_jax.data.config import DataConfig, SourceConfig
from blip3o_jax.errors import InputError
from blip3o_jax.jobs.train import open_feed
from blip3o_jax.scenes import edits
from blip3o_jax.scenes.config import WorldConfig
from blip3o_jax.scenes.scene import compose
from blip3o_jax.text import targets
from blip3o_jax.train.config import TrainConfig


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("scenes"))


def config(**data):
    return TrainConfig(stage="joint", batch_size=5, data=DataConfig(**data))


def world(tokenizer, data_dir, own=None, **data):
    return open_feed(config(**{"num_train": 16, "edits": 0.6, **data}), tokenizer, data_dir, own)


def test_rows_of_the_world_are_edits_and_prompts_by_their_share(tokenizer, data_dir):
    feed = world(tokenizer, data_dir)
    batches = [next(iterator) for iterator in [feed.train()] for _ in range(3)]
    for batch in batches:
        assert batch["num_sources"].sum() == 3  # of five rows
        assert batch["sources"].shape == (5, 1, 64, 64, 3)
        assert (batch["sources"][batch["num_sources"] == 0] == 0).all()
    # The first edit, of which neither picture is the other.
    row = int(np.flatnonzero(batches[0]["num_sources"])[0])
    edit = edits.draw(WorldConfig(), 0)
    np.testing.assert_array_equal(batches[0]["sources"][row, 0], compose(edit.before))
    np.testing.assert_array_equal(batches[0]["images"][row], compose(edit.after))
    # Its instruction, then the places of 64 codes, which are no targets of the cross-entropy.
    tokens, start = batches[0]["tokens"][row], batches[0]["start"][row]
    vocab, places = feed.model.vocab, tokens >= feed.model.vocab.image_start_token_id
    assert places[:start].sum() == 64
    words = tokenizer.tokenizer.decode(tokens[:start].tolist(), skip_special_tokens=False)
    assert edit.instruction in " ".join(words.split())
    weights = targets(batches[0]["tokens"], batches[0]["start"], vocab)[row]
    assert not weights[:start][places[:start]].any()
    assert weights[:start][~places[:start]].all()


def test_batches_with_edits_are_a_function_of_step_for_any_hosts(tokenizer, data_dir):
    iterator = world(tokenizer, data_dir).train()
    whole = [next(iterator) for _ in range(3)]
    resumed = next(world(tokenizer, data_dir).train(2))
    assert all(np.array_equal(resumed[name], whole[2][name]) for name in resumed)
    parts = [next(world(tokenizer, data_dir, [host]).train(2)) for host in range(5)]
    for name in resumed:
        np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), resumed[name])


def test_heldout_edits_are_never_turned_round(tokenizer, data_dir):
    plain, inverted = (
        world(tokenizer, data_dir, inverted_edits=share).heldout(5) for share in (0.0, 1.0)
    )
    assert all(np.array_equal(plain[name], inverted[name]) for name in plain)
    plain, inverted = (
        next(world(tokenizer, data_dir, inverted_edits=share).train()) for share in (0.0, 1.0)
    )
    assert not np.array_equal(plain["sources"], inverted["sources"])


def pairs(folder, made, oversized=()):
    """A jsonl of edits, picture i to picture i + 100, on non-square pictures."""
    lines = []
    for i in range(8):
        size = (9000, 1) if i in oversized else (64, 32)
        (folder / f"{i}.png").write_bytes(made.picture(i, size))
        (folder / f"{i + 100}.png").write_bytes(made.picture(i + 100, (64, 32)))
        names = {"input_images": [f"{i}.png"], "output_image": f"{i + 100}.png"}
        lines.append(json.dumps({"instruction": "make it red", **names}))
    (folder / "edits.jsonl").write_text("\n".join(lines))
    return SourceConfig("jsonl", str(folder / "edits.jsonl"))


def test_pairs_of_a_file_stay_together(tokenizer, made, tmp_path):
    made.jsonl(tmp_path / "captions.jsonl", range(20, 28))
    sources = pairs(tmp_path, made), SourceConfig("jsonl", str(tmp_path / "captions.jsonl"))
    iterator = open_feed(config(sources=sources, heldout=2), tokenizer).train()
    rows = [row for _ in range(6) for row in zip(*next(iterator).values(), strict=True)]
    names = list(next(open_feed(config(sources=sources, heldout=2), tokenizer).train()))
    counts = {0: 0, 1: 0}
    for row in (dict(zip(names, values, strict=True)) for values in rows):
        count = int(row["num_sources"])
        counts[count] += 1
        if count:
            assert made.number(row["images"]) == made.number(row["sources"][0]) + 100
        else:
            assert not row["sources"].any()
    assert min(counts.values()) > 5


def test_a_world_without_edits_holds_no_sources_and_a_file_may_hold_both(
    tokenizer, made, data_dir, tmp_path
):
    """A step encodes what a batch holds."""
    assert set(next(world(tokenizer, data_dir, edits=0.0).train())) == {"images", "tokens", "start"}
    # A tar holds captions alone.
    made.tar(tmp_path / "a.tar", range(8))
    tar = config(sources=(SourceConfig("webdataset", str(tmp_path / "a.tar")),), heldout=2)
    assert set(next(open_feed(tar, tokenizer).train())) == {"images", "tokens", "start"}
    # One file, which begins with captions.
    made.jsonl(tmp_path / "captions.jsonl", range(20, 28))
    pairs(tmp_path, made)
    lines = [(tmp_path / f"{name}.jsonl").read_text().strip() for name in ("captions", "edits")]
    (tmp_path / "both.jsonl").write_text("\n".join(lines))
    both = config(sources=(SourceConfig("jsonl", str(tmp_path / "both.jsonl")),), heldout=2)
    batches = open_feed(both, tokenizer).train()
    rows = [
        (n, s)
        for _ in range(4)
        for b in [next(batches)]
        for n, s in zip(b["num_sources"], b["sources"], strict=True)
    ]
    assert {int(count) for count, _ in rows} == {0, 1}
    assert all(source.any() == bool(count) for count, source in rows)


def test_a_picture_that_cannot_be_squared_is_one_bad_record(tokenizer, made, tmp_path):
    cfg = config(sources=(pairs(tmp_path, made, oversized=(1,)),), heldout=2, max_aspect=1e4)
    feed = open_feed(cfg, tokenizer, workdir=tmp_path)
    iterator = feed.train()
    for _ in range(4):
        next(iterator)
    (line,) = map(json.loads, (tmp_path / "bad_records.0.jsonl").read_text().splitlines())
    assert line["key"] == "edits.jsonl:2"
    assert "9000 x 1 pixels, more than 8192 on a side" in line["reason"]


def test_edits_need_a_model_that_takes_them(tokenizer, data_dir):
    data = DataConfig(num_train=16, edits=0.5)
    cfg = TrainConfig(stage="joint", batch_size=5, model=TEXT_ONLY, data=data)
    with pytest.raises(InputError, match=r"needs a model that takes some: model.max_sources"):
        open_feed(cfg, tokenizer, data_dir)
