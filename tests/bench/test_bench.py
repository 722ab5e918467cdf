"""`bench`: limits and ratios by hand, a run of our side, and against PyTorch that both do the same
work."""

import functools
import json

import jax
import numpy as np
import pytest
from editing import checkpoint
from tiny import SMALL, TEXT_ONLY

from blip3o_jax import flops, presets
from blip3o_jax.bench import first_picture, stages, timing
from blip3o_jax.cli import main
from blip3o_jax.config import replace
from blip3o_jax.convert.random_weights import random_checkpoint, random_params
from blip3o_jax.jobs import bench
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.parallel.mesh import make_mesh
from blip3o_jax.presets import preset
from blip3o_jax.sample import generate


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


def test_rows_of_few_steps_are_a_table_that_says_who_takes_how_many():
    plain = timing.row({"ours": [1.0], "well": [3.0]}, limit=0.5, amount=0, unit="s")
    few = timing.row(
        {"ours": [1.0], "guided": [8.0], "well": [12.0]}, limit=0.5, amount=0, unit="s"
    )
    steps = {"ours": "4 steps", "guided": "30 guided steps", "well": "30 guided steps"}
    rows = {"denoise": {"devices": 1} | plain}
    rows |= {"few_steps_denoise": {"devices": 1, "steps": steps} | few}
    first, second = timing.table(rows).split("\n\n")
    assert first.splitlines() == [
        "| stage | devices | unit | blip3o_jax | PyTorch done well | ours is | limit | reached |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| denoise | 1 | s | 1 | 3 | 3.00× | 0.5 | 50 % |",
    ]
    head, _, row = second.splitlines()
    assert head == (
        "| stage | devices | unit | blip3o_jax, 4 steps | blip3o_jax, 30 guided steps | ours is | "
        "PyTorch done well, 30 guided steps | ours is | limit | reached |"
    )
    assert row == "| few_steps_denoise | 1 | s | 1 | 8 | 8.00× | 12 | 12.00× | 0.5 | 50 % |"


def test_the_limit_of_few_steps_is_that_of_one_forward_each():
    cfg = replace(preset("emoji_64"), sana={"few_steps": 4})
    work = stages.make(cfg, batch_size=2, num_inference_steps=10)
    assert (work.config, work.few_steps) == (preset("emoji_64"), 4)
    sizes = {"sana": 1000, "span_embed": 100}
    _, guided = stages.phases(work, "denoise", sizes)
    once, few = stages.phases(work, "few_steps_denoise", sizes)
    assert (guided.passes, guided.bytes) == (10, 4 * 1000)
    assert (few.passes, few.bytes) == (4, 4 * 1100)
    assert (once.flops, few.flops) == flops.denoise(cfg, 2)
    assert 0.5 < few.flops / guided.flops < 0.8  # half the rows, and every one with a condition


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


def bench_tiny(capsys, *options: str, agrees: bool | None = None) -> dict:
    """The report of one repeat of two rows on the tiny preset, whose results are `agrees`."""
    sizes = ["--batch-size", "2", "--num-inference-steps", "2", "--repeats", "1"]
    assert main(["bench", "--preset", "tiny", *sizes, *options]) == 0
    *lines, report = capsys.readouterr().out.splitlines()
    assert ("Results agree." in lines) == bool(agrees)
    report = json.loads(report)
    assert report["agree"] is agrees
    return report


@pytest.fixture
def few_steps(monkeypatch):
    """The tiny preset with a diffusion part of three steps."""
    model = replace(preset("emoji_64"), name="tiny", **SMALL)
    few = replace(model, sana={"few_steps": 3})
    monkeypatch.setitem(presets.PRESETS, "tiny", lambda: few)
    return few


def test_a_checkpoint_of_few_steps_has_both_ways_and_an_ordinary_one_has_not(
    capsys, two_devices, few_steps, monkeypatch
):
    rows = [*stages.FEW_STEPS, "denoise", "train_step"]
    report = bench_tiny(capsys, "--stages", ",".join(rows), agrees=True)
    assert list(report["stages"]) == rows
    for name in stages.FEW_STEPS:
        row = report["stages"][name]
        assert row["steps"] == {"ours": "3 steps", "guided": "30 guided steps"}
        assert (row["unit"], row["value"]) == ("s", row["seconds"])
        assert row["ratio"].keys() == {"guided"}
    # Both write the same tokens, whose pixels differ.
    assert report["agreement"].keys() == {"few_steps_text_to_image, ours"}
    agreement = report["agreement"]["few_steps_text_to_image, ours"]
    assert agreement.keys() == {"tokens", "rounds"}
    assert agreement["tokens"]["identical"] == 1
    for name in ("denoise", "train_step"):
        assert "steps" not in report["stages"][name]
        assert report["stages"][name]["seconds"].keys() == {"ours"}
    few_steps = replace(few_steps, sana={"few_steps": 0})
    monkeypatch.setitem(presets.PRESETS, "tiny", lambda: few_steps)
    assert main(["bench", "--preset", "tiny", "--stages", "few_steps_denoise"]) == 2
    assert "unknown stage 'few_steps_denoise'" in capsys.readouterr().err


def test_few_steps_are_those_that_generate_takes_and_the_published_way_knows_no_spans(few_steps):
    model, params = Blip3o(few_steps), random_params(few_steps)
    work = stages.make(few_steps, batch_size=2, num_inference_steps=2)
    mesh = make_mesh(devices=jax.devices()[:1])
    sides = stages.ours(work, jax.device_put(params), mesh)
    given = work.states, work.noise
    few = generate.denoise(model, params, *given, 3, stages.GUIDANCE, 1.0)
    found = sides["ours"]["few_steps_denoise"]()["few_steps_latents"]
    np.testing.assert_allclose(found, few, rtol=0, atol=1e-4 * np.abs(few).max())
    # 30 guided steps of the same weights, of which a published one has no spans.
    ordinary, sana = Blip3o(work.config), params["sana"]
    plain = params | {"sana": {name: sana[name] for name in sana if name != "span_embed"}}
    assert len(plain["sana"]) == len(sana) - 1
    guided = generate.denoise(ordinary, plain, *given, 30, stages.GUIDANCE, 1.0)
    found = sides["guided"]["few_steps_denoise"]()["latents"]
    np.testing.assert_allclose(found, guided, rtol=0, atol=1e-4 * np.abs(guided).max())
    assert np.abs(few - guided).max() > 0.01 * np.abs(guided).max()


def test_our_side_alone(capsys, two_devices, tiny_preset):
    report = bench_tiny(capsys, "--stages", "decode,autoencoder")
    assert set(report["stages"]) == {"decode", "autoencoder"}
    decode = report["stages"]["decode"]
    tokens = 2 * tiny_preset.ta_tok.num_tokens
    assert decode["value"]["ours"] == pytest.approx(tokens / decode["seconds"]["ours"])
    assert decode["share_of_limit"] > 0
    assert 1 <= decode["rounds"] <= tiny_preset.ta_tok.num_tokens
    assert report["agreement"] == {}
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
        (["--checkpoint", "emoji_6"], "emoji_64"),
    ],
)
def test_bad_input_is_one_sentence(options, words, capsys, two_devices):
    assert main(["bench", *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


@pytest.mark.parity
def test_all_sides_do_the_same_work(capsys, two_devices, few_steps, monkeypatch):
    """Of the compiled side: that its graphs are whole, and what they compute; C++ of one of them is
    below."""
    torch = pytest.importorskip("torch")
    whole = {"backend": "aot_eager", "fullgraph": True, "dynamic": False}
    for room in ("compiled", "bench"):
        graph = functools.partial(torch.compile, **whole)
        monkeypatch.setattr(f"blip3o_jax.reference.{room}.compiled", graph)
    monkeypatch.setattr(timing, "read_bytes_per_second", lambda size, threads: 1e10)
    report = bench_tiny(capsys, "--against", "torch", agrees=True)
    assert set(report["stages"]) == set(bench.STAGES) - set(bench.OURS)
    theirs, both = {"original", "well", "compiled"}, {"tokens", "pixels"}
    for name, row in report["stages"].items():
        few = name in stages.FEW_STEPS
        assert set(row["ratio"]) == (theirs | {"guided"} if few else theirs)
        for side in theirs:  # with our guided steps, where there are few
            assert report["agreement"][f"{name}, {side}"]
            if few:
                assert row["steps"][side] == "30 guided steps"
    for side in theirs:
        assert report["agreement"][f"few_steps_text_to_image, {side}"].keys() == both
    assert "pixels" not in report["agreement"]["few_steps_text_to_image, ours"]
    assert "few_steps_denoise, ours" not in report["agreement"]
    worst = max(
        values["max_rel"]
        for rows in report["agreement"].values()
        for values in rows.values()
        if "max_rel" in values
    )
    assert np.isfinite(worst)
    assert worst < bench.TOLERANCE


@pytest.mark.parity
def test_a_compiled_network_shares_its_weights(few_steps, tmp_path):
    torch = pytest.importorskip("torch")
    from blip3o_jax.reference import compiled, modules

    random_checkpoint(tmp_path / "tiny", few_steps)
    ref = modules.load(tmp_path / "tiny", spans=False)
    assert not hasattr(ref.sana, "span_embed")
    assert hasattr(modules.load(tmp_path / "tiny").sana, "span_embed")
    own = compiled.compiled_reference(ref)
    theirs = {weight.data_ptr() for weight in ref.ta_tok.parameters()}
    assert {weight.data_ptr() for weight in own.ta_tok.parameters()} == theirs
    side, channels = few_steps.sana.sample_size, few_steps.dc_ae.latent_channels
    latents = torch.ones(1, channels, side, side)
    with torch.inference_mode():
        before = own.decode(latents)
        conv = ref.vae.decoder.conv_out
        getattr(conv, "conv", conv).bias += 1
        np.testing.assert_allclose(own.decode(latents), before + 1, rtol=0, atol=1e-4)


@pytest.mark.parity
def test_without_a_compiler_it_says_what_to_install(capsys, two_devices, few_steps, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    assert main(["bench", "--preset", "tiny", "--against", "torch"]) == 2
    assert "install g++" in capsys.readouterr().err


def test_a_first_picture_is_the_same_from_programs_on_disk(tmp_path):
    """Which the second process of our side finds, and none of the other side."""
    sides = first_picture.sides(str(checkpoint(tmp_path / "tiny", TEXT_ONLY)), tmp_path)
    pictures = [sides[name]()["pixels"] for name in ("ours", "cold", "ours", "cold")]
    for picture in pictures[1:]:
        np.testing.assert_array_equal(picture, pictures[0])
    kept, *cold = ({x.name for x in (tmp_path / name / "programs").iterdir()} for name in FOLDERS)
    assert len(kept) == 3
    assert cold == [kept, kept]
    found = timing.row({"ours": [2.0], "cold": [8.0]}, limit=0.0, amount=0, unit="s")
    row = {"devices": 1, "steps": stages.steps_of_sides(None, "first_picture", ())} | found
    head, _, line = timing.table({"first_picture": row}).splitlines()
    assert "| blip3o_jax, compiled before | blip3o_jax, nothing compiled | ours is |" in head
    assert line == "| first_picture | 1 | s | 2 | 8 | 4.00× |  |  |"


FOLDERS = ("kept", "cold-0", "cold-1")
