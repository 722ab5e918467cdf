"""`bench`: limits and ratios by hand, a run of our side, and against PyTorch that both do the same
work."""

import json

import jax
import numpy as np
import pytest
from tiny import SMALL, TEXT_ONLY

from blip3o_jax import presets
from blip3o_jax.bench import stages, timing
from blip3o_jax.cli import main
from blip3o_jax.config import replace
from blip3o_jax.jobs import bench
from blip3o_jax.parallel.mesh import make_mesh
from blip3o_jax.presets import preset


def test_a_phase_takes_arithmetic_or_reading_whichever_is_longer():
    phases = [
        stages.Phase(passes=2, flops=100.0, bytes=10.0),
        stages.Phase(passes=3, flops=10.0, bytes=100.0),
    ]
    assert timing.limit_seconds(phases, gemm=10.0, bandwidth=lambda size: 20.0) == pytest.approx(
        2 * 10.0 + 3 * 5.0
    )
    assert (
        timing.limit_seconds([stages.Phase(1, 50.0, 0)], gemm=10.0, bandwidth=lambda size: 1.0)
        == 5.0
    )


def test_a_row_takes_medians_and_says_how_many_times_faster_we_are():
    found = timing.row(
        {"ours": [2.0, 1.0, 9.0], "well": [3.0, 4.0, 5.0]}, limit=1.0, amount=10.0, unit="tokens/s"
    )
    assert found["ratio"] == {"well": 2.0}
    assert found["value"] == {"ours": 5.0, "well": 2.5}
    assert (found["limit"], found["share_of_limit"]) == (10.0, 0.5)
    assert "| decode | 2 | tokens/s | 5 | 2.5 | 2.00× | 10 | 50 % |" in timing.table(
        {"decode": {"devices": 2} | found}
    )


def test_the_limit_of_decoding_grows_with_the_weights_read_for_every_token():
    cfg = preset("emoji_64")
    work = stages.make(cfg, batch_size=1, num_inference_steps=2)
    sizes = dict.fromkeys(("layers", "sana", "decoder"), 1000)
    prefill, tokens = stages.phases(work, "decode", sizes)
    assert tokens.passes == cfg.ta_tok.num_tokens == 64
    more = stages.phases(work, "decode", sizes | {"layers": 2000})[1]
    assert more.bytes - tokens.bytes == 4 * 1000
    assert prefill.flops > tokens.flops  # 64 prompt tokens at once against one
    rounds = stages.phases(work, "decode", sizes, rounds=16.0)[1]
    assert rounds.bytes == tokens.bytes
    assert (rounds.passes, rounds.flops * 16) == (16, tokens.flops * 64)


@pytest.fixture
def two_devices(monkeypatch):
    monkeypatch.setattr(
        "blip3o_jax.parallel.mesh.make_mesh", lambda: make_mesh(devices=jax.devices()[:2])
    )


@pytest.fixture
def tiny_preset(monkeypatch):
    """A preset of the smallest parts, whose weights are random as those of `mid_128` are."""
    model = replace(preset("emoji_64"), name="tiny", **SMALL)
    monkeypatch.setitem(presets.PRESETS, "tiny", lambda: model)
    return model


def bench_tiny(capsys, *options: str) -> dict:
    """The report of one repeat of two rows on the tiny preset."""
    sizes = ["--batch-size", "2", "--num-inference-steps", "2", "--repeats", "1"]
    assert main(["bench", "--preset", "tiny", *sizes, *options]) == 0
    *lines, report = capsys.readouterr().out.splitlines()
    assert ("Results agree." in lines) == ("--against" in options)
    return json.loads(report)


def test_our_side_alone(capsys, two_devices, tiny_preset):
    report = bench_tiny(capsys, "--stages", "decode,autoencoder")
    assert set(report["stages"]) == {"decode", "autoencoder"}
    decode = report["stages"]["decode"]
    tokens = 2 * tiny_preset.ta_tok.num_tokens
    assert decode["value"]["ours"] == pytest.approx(tokens / decode["seconds"]["ours"])
    assert decode["share_of_limit"] > 0
    assert 1 <= decode["rounds"] <= tiny_preset.ta_tok.num_tokens
    assert report["agreement"] == {}
    assert report["agree"] is None  # with nothing
    assert decode["devices"] == 2


def test_an_edit_is_measured_of_a_model_that_edits(capsys, two_devices, monkeypatch):
    editing = {name: value for name, value in SMALL.items() if name not in TEXT_ONLY}
    model = replace(preset("emoji_64"), name="tiny", **editing)
    monkeypatch.setitem(presets.PRESETS, "tiny", lambda: model)
    row = bench_tiny(capsys, "--stages", "text_to_image,edit")["stages"]["edit"]
    assert row["seconds"]["ours"] > 0
    # An edit does all that text to image does, over a longer prompt, and encodes its source.
    work = stages.make(model, batch_size=2, num_inference_steps=2)
    sizes = dict.fromkeys(("layers", "sana", "decoder", "encoder", "ta_tok_encoder"), 1000)
    encoding, prefill, *rest = stages.phases(work, "edit", sizes)
    plain, *others = stages.phases(work, "text_to_image", sizes)
    assert encoding.bytes == 4 * 2000
    assert prefill.flops > plain.flops
    assert len(rest) == len(others)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--stages", "decod"], "decode"),
        (["--preset", "mid_128", "--stages", "edit"], "unknown stage 'edit'"),
        (["--batch-size", "0"], "at least 1"),
        (["--batch-size", "5"], "does not divide by the mesh's 2 batch shards"),
        (["--preset", "mid_12"], "mid_128"),
        (["--preset", "blip3o_next_3b"], "random weights up to"),
    ],
)
def test_bad_input_is_one_sentence(options, words, capsys, two_devices):
    assert main(["bench", *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


@pytest.mark.parity
def test_both_sides_do_the_same_work(capsys, two_devices, tiny_preset, monkeypatch):
    monkeypatch.setattr(timing, "read_bytes_per_second", lambda size, threads: 1e10)
    report = bench_tiny(capsys, "--against", "torch")
    assert set(report["stages"]) == set(bench.STAGES) - {"edit", "cached_train_step"}
    assert report["agree"] is True
    assert set(report["stages"]["train_step"]["ratio"]) == {"original", "well"}
    assert {name.split(", ")[1] for name in report["agreement"]} == {"original", "well"}
    worst = max(
        values["max_rel"]
        for rows in report["agreement"].values()
        for values in rows.values()
        if "max_rel" in values
    )
    assert np.isfinite(worst)
    assert worst < bench.TOLERANCE
