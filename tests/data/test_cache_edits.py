"""Edits from a cache: their codes and latents and those of every source, as without it."""

import functools
import json

import jax
import numpy as np
import pytest
from tiny import SMALL

from blip3o_jax.cli import main
from blip3o_jax.config import replace
from blip3o_jax.convert.random_weights import random_checkpoint, random_params
from blip3o_jax.data import cache, feed
from blip3o_jax.data.records import Record
from blip3o_jax.data.transform import Tally
from blip3o_jax.errors import InputError
from blip3o_jax.jobs.train import open_feed
from blip3o_jax.presets import preset
from blip3o_jax.train import losses
from blip3o_jax.train.read_config import read_config
from blip3o_jax.train.start import build_model

# Two sources for the prompt and for the cross-attention.
EDITING = SMALL | {"max_sources": 2, "use_und_image_vae": True}


def picture(made, folder, i):
    (folder / f"{i}.png").write_bytes(made.picture(i, (40, 24)))
    return f"{i}.png"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, made):
    """A config over eight captions and twelve edits of 1, 2, 1, 2, ... sources, of which edit 3 has
    none left on disk and edit 5 has three; and its cache."""
    folder = tmp_path_factory.mktemp("edits")
    random_checkpoint(folder / "weights", replace(preset("emoji_64"), **EDITING))
    made.tar(folder / "a.tar", range(0, 80, 10))
    lines = []
    for i in range(12):
        count = 3 if i == 5 else 1 + i % 2
        before = [picture(made, folder, 100 + 10 * i + k) for k in range(count)]
        line = {"instruction": f"make it red {i}", "input_images": before}
        lines.append(json.dumps(line | {"output_image": picture(made, folder, 5 + i)}))
    (folder / "130.png").unlink()
    (folder / "b.jsonl").write_text("\n".join(lines))
    sources = [
        {"kind": "webdataset", "path": str(folder / "a.tar")},
        {"kind": "jsonl", "path": str(folder / "b.jsonl")},
    ]
    config = {
        "stage": "joint",
        "model": EDITING,
        "init": str(folder / "weights"),
        "batch_size": 8,
        "num_steps": 2,
        "joint": {"trainable_sana": "all"},
        "mesh": {"data": 8},
        "data": {"sources": sources, "heldout": 2},
    }
    code = (
        "from types import SimpleNamespace\n"
        f"def get_config():\n    return SimpleNamespace(to_dict=lambda: {config!r})\n"
    )
    (folder / "config.py").write_text(code)
    sizes = ("--shard-records", "8", "--batch-size", "8")
    places = ("--config", str(folder / "config.py"), "--out", str(folder / "cache"))
    assert main(["data", "cache", *places, *sizes]) == 0
    return folder


def config(folder, *overrides):
    return read_config(str(folder / "config.py"), [f"--config.{item}" for item in overrides])


def test_a_cached_edit_holds_the_encodings_of_every_source(folder):
    cfg = config(folder, f"data.cache={folder / 'cache'}")
    captions, edits = feed.open_sources(cfg.data, cfg.blip3o())
    shape = (2, 2, cfg.blip3o().dc_ae.latent_channels)
    for i, count in ((0, 1), (1, 2), (5, 3)):
        record = edits[i]
        assert record["caption"] == f"make it red {i}"
        assert record["source_codes"].shape == (count, 4)
        assert record["source_codes"].dtype == np.int32
        assert record["source_latents"].shape == (count, *shape)
        assert record["latents"].shape == shape
    # In order, and none another's: a picture that is a source is encoded as one that is a result.
    flat = [edits[i]["source_latents"] for i in (0, 1, 2, 4, 5)]
    flat = np.concatenate(flat).reshape(-1, np.prod(shape))
    assert len(np.unique(flat.round(5), axis=0)) == len(flat) == 8
    assert "source_codes" not in captions[0]


def test_a_step_of_edits_from_the_cache_is_the_step_from_the_images(folder, tokenizer):
    plain, cached = config(folder), config(folder, f"data.cache={folder / 'cache'}")
    model = build_model(plain)
    params = random_params(model.config)
    loss = jax.jit(functools.partial(losses.joint_loss, model, plain.joint))
    iterators = [open_feed(cfg, tokenizer).train() for cfg in (plain, cached)]
    counts = set()
    for step in range(3):
        a, b = map(next, iterators)
        assert b.keys() == {
            *("tokens", "start", "codes", "latents"),
            *("num_sources", "source_codes", "source_latents"),
        }
        for key in ("tokens", "start", "num_sources"):
            np.testing.assert_array_equal(a[key], b[key])
        counts.update(b["num_sources"].tolist())
        one, other = (loss(params, batch, jax.random.key(step))[1] for batch in (a, b))
        for key in one:
            np.testing.assert_allclose(one[key], other[key], rtol=1e-6, err_msg=key)
        # Which depends on the codes and on the latents of the sources.
        for name in ("source_codes", "source_latents"):
            swapped = loss(params, b | {name: b[name][::-1]}, jax.random.key(step))[1]
            assert any(abs(one[key] / swapped[key] - 1) > 1e-5 for key in one), name
    assert counts == {0, 1, 2}


def test_batches_from_the_cache_are_a_function_of_the_step(folder, tokenizer):
    cfg = config(folder, f"data.cache={folder / 'cache'}")
    iterator = open_feed(cfg, tokenizer).train()
    whole = [next(iterator) for _ in range(3)]
    resumed = next(open_feed(cfg, tokenizer).train(2))
    for name, values in whole[2].items():
        np.testing.assert_array_equal(resumed[name], values)
    assert not np.array_equal(whole[1]["source_latents"], whole[2]["source_latents"])


def test_bad_edits_are_the_same_with_and_without_the_cache(folder, tokenizer, tmp_path):
    named = []
    for override in ("data.cache=", f"data.cache={folder / 'cache'}"):
        workdir = tmp_path / str(len(named))
        workdir.mkdir()
        iterator = open_feed(config(folder, override), tokenizer, workdir=workdir).train()
        for _ in range(4):
            next(iterator)
        lines = (workdir / "bad_records.0.jsonl").read_text().splitlines()
        named.append({line["key"]: line["reason"] for line in map(json.loads, lines)})
    assert named[0] == named[1]
    assert named[0].keys() == {"b.jsonl:4", "b.jsonl:6"}
    assert named[0]["b.jsonl:6"] == "it has 3 source images, and the model takes 2"
    assert "130.png cannot be read" in named[0]["b.jsonl:4"]


def test_a_cache_of_edits_is_for_models_that_take_them(folder, tokenizer):
    cfg = config(folder, f"data.cache={folder / 'cache'}", "model.max_sources=0")
    with pytest.raises(InputError, match=r"edits of 1 source images, and the model takes 0"):
        open_feed(cfg, tokenizer)


@pytest.mark.parametrize("task", ["train", "data"])
def test_a_cache_holds_no_features_of_source_images(task, folder, tmp_path, capsys):
    argv = {
        "train": ["train", "--workdir", str(tmp_path / "run"), f"--config.data.cache={folder}"],
        "data": ["data", "cache", "--out", str(tmp_path / "run")],
    }[task]
    argv += ["--config", str(folder / "config.py"), "--config.model.use_tar_siglip_features=true"]
    assert main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "use_tar_siglip_features" in error
    assert "data.cache" in error
    assert not (tmp_path / "run").exists()


def test_sources_are_encoded_without_the_results_own_view(tmp_path):
    """Batches of like arrays, sources after results, and each record gets its own back."""

    class Pairs(list):
        blocks = None

        def key(self, i):
            return str(i)

    def encode(pictures):
        assert len({frozenset(picture) for picture in pictures}) == 1
        values = np.array([picture["images"] for picture in pictures])
        return values, values + 0.5

    arrays = {0: {"images": 7, "view": 1}, 1: {"images": 8, "view": 1, "sources": [3, 4]}}
    pairs = Pairs(Record(str(i), ("x",), bytes([i])) for i in arrays)
    tally = Tally(1.0, tmp_path / "bad.jsonl")
    records = cache.encoded_records(
        pairs, range(2), lambda record: arrays[record.image[0]], encode, tally, 4
    )
    plain, edit = records
    assert plain == {"key": "0", "caption": "x", "codes": 7, "latents": 7.5}
    assert (edit["codes"], edit["latents"]) == (8, 8.5)
    np.testing.assert_array_equal(edit["source_codes"], [3, 4])
    np.testing.assert_array_equal(edit["source_latents"], [3.5, 4.5])
