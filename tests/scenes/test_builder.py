"""The TFDS dataset: equal bytes from equal settings, random access equal to sampling, no
TensorFlow."""

import json
import sys
from pathlib import Path

import numpy as np

from blip3o_jax.scenes.config import WorldConfig
from blip3o_jax.scenes.prompts import sample
from blip3o_jax.scenes.scene import compose, patch_words


def test_two_builds_are_equal_and_equal_sampling(tmp_path: Path):
    loaded = "tensorflow" in sys.modules
    from blip3o_jax.scenes.builder import open_source

    config = WorldConfig(train=30, heldout=10, seed=5, text=0.2)
    first, second = tmp_path / "a", tmp_path / "b"
    train = open_source(first, "train", config)
    open_source(second, "train", config)
    records = {p.relative_to(first): p.read_bytes() for p in first.rglob("*array_record*")}
    assert len(records) == 2
    assert records == {
        p.relative_to(second): p.read_bytes() for p in second.rglob("*array_record*")
    }

    heldout = open_source(first, "heldout", config)
    assert (len(train), len(heldout)) == (30, 10)
    for source, split, index in (
        (train, "train", 29),
        (train, "train", 0),
        (train, "train", 7),
        (heldout, "heldout", 4),
    ):
        metadata, scene = sample(config, index, split)
        record = source[index]
        assert record["prompt"].decode() == metadata["prompt"]
        assert json.loads(record["metadata"]) == metadata
        np.testing.assert_array_equal(record["image"], compose(scene))
        np.testing.assert_array_equal(record["patches"], patch_words(scene))
    assert [r["prompt"] for r in train.__getitems__([3, 1])] == [
        train[3]["prompt"],
        train[1]["prompt"],
    ]

    assert ("tensorflow" in sys.modules) == loaded


def test_other_settings_have_another_place():
    names = {
        WorldConfig(**c).name
        for c in (
            {},
            {"seed": 1},
            {"text": 0.1},
            {"train": 5},
            {"heldout": 5},
            {"weights": {"colors": 1.0}},
            {"named_ground": 1.0},
        )
    }
    assert len(names) == 7


def test_the_default_world_is_drawn_like_any_other(tmp_path: Path, monkeypatch):
    """TFDS refuses a config that equals one of its class's own and is another object."""
    from blip3o_jax.scenes.builder import EmojiScenes, open_source

    prepared = []
    monkeypatch.setattr(EmojiScenes, "download_and_prepare", lambda b: prepared.append(b))
    monkeypatch.setattr(EmojiScenes, "as_data_source", lambda builder, split: (builder, split))
    for world in (WorldConfig(), None):
        builder, split = open_source(tmp_path, "heldout", world)
        assert (builder.builder_config.world, split) == (WorldConfig(), "heldout")
    assert len(prepared) == 2
