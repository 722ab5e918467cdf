"""`convert verify`: copies agree, and a changed value, config or model is seen."""

import json
import shutil

import jax
import numpy as np
import pytest
from ml_dtypes import bfloat16
from reading import load
from tiny import PUBLISHED, SMALL

from blip3o_jax import checkpoints
from blip3o_jax.cli import main
from blip3o_jax.config import replace
from blip3o_jax.convert.published import save_published
from blip3o_jax.convert.random_weights import random_checkpoint
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.presets import preset
from blip3o_jax.verify import stages as verify_stages
from blip3o_jax.verify.compare import compare_stages, compare_tensors, rounding
from blip3o_jax.verify.stages import edit_outputs, stage_inputs


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify") / "jax"
    assert main(["convert", "to-jax", "emoji_64", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(published layout, its conversion) of a small random model."""
    folder = tmp_path_factory.mktemp("small")
    random_checkpoint(folder / "torch", replace(preset("emoji_64"), **SMALL))
    assert main(["convert", "to-jax", str(folder / "torch"), str(folder / "jax")]) == 0
    return folder / "torch", folder / "jax"


def report(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_conversion_and_its_way_back_agree_bit_for_bit(converted, tmp_path, capsys):
    back = tmp_path / "torch"
    assert main(["convert", "to-torch", str(converted), str(back)]) == 0
    capsys.readouterr()
    assert (
        main(
            ["convert", "verify", "emoji_64", str(back), "--report", str(tmp_path / "report.json")]
        )
        == 0
    )
    found = report(capsys)
    assert found["passed"]
    assert found["unequal"] == []
    assert found["tensors"] == found["bit_identical"] == 404
    assert found["stages"]["tokens"]["identical"] == 1.0
    edits = {name for name in found["stages"] if name.startswith("edit_")}
    assert bool(edits) == (preset("emoji_64").max_sources > 0)
    assert set(found["stages"]) - edits == {
        "hidden",
        "logits",
        "condition",
        "velocity",
        "latents",
        "picture",
        "codes",
        "tokens",
        "pixels",
    }
    assert len(json.loads((tmp_path / "report.json").read_text())["every_tensor"]) == 404


def test_one_changed_value_is_named_and_seen_in_its_stage(small, tmp_path, capsys):
    published, converted = small
    cfg, params = load(published)
    params = jax.tree.map(np.array, params)
    params["sana"]["proj_out"]["bias"][0] += 1.0
    save_published(tmp_path / "changed", cfg, params)
    assert main(["convert", "verify", str(converted), str(tmp_path / "changed")]) == 1
    found = report(capsys)
    assert found["unequal"] == ["model.sana.proj_out.bias"]
    wrong = {name for name, row in found["stages"].items() if not row["agree"]}
    assert wrong == {"velocity", "pixels"}


def test_a_rounded_conversion_agrees_and_a_wrong_one_does_not(small, tmp_path, capsys):
    """Its stages are those of weights that are rounded alike, within the usual tolerance."""
    published, converted = small
    rounded = tmp_path / "bfloat16"
    argv = ["convert", "to-jax", str(published), str(rounded), "--dtype", "bfloat16"]
    assert main(argv) == 0
    capsys.readouterr()
    assert main(["convert", "verify", str(converted), str(rounded)]) == 0
    found = report(capsys)
    assert found["stages_rounded_to"] == "bfloat16"
    assert found["bit_identical"] < found["tensors"]
    assert all(row.get("max_rel", 0) <= 1e-6 for row in found["stages"].values())


def test_bfloat16_and_float16_agree_in_either_order(small, tmp_path, capsys):
    brain, half = tmp_path / "bfloat16", tmp_path / "float16"
    assert main(["convert", "to-torch", str(small[1]), str(brain), "--dtype", "bfloat16"]) == 0
    assert main(["convert", "to-jax", str(brain), str(half), "--dtype", "float16"]) == 0
    for pair in ((brain, half), (half, brain)):
        assert main(["convert", "verify", *map(str, pair)]) == 0
        assert report(capsys)["stages_rounded_to"] == "bfloat16"


def test_the_report_of_one_checkpoint_is_in_its_file(tmp_path, capsys):
    file = tmp_path / "report.json"
    argv = ["convert", "verify", "emoji_64", "--report", str(file)]
    assert main(argv) == 0
    assert json.loads(file.read_text()) == report(capsys)
    for option in ("--torch", "--stages"):
        assert main([*argv, option]) == 2
        assert "--torch and --stages compare two checkpoints; name B." in capsys.readouterr().err
    assert json.loads(file.read_text())["passed"]


def test_stages_are_run_in_full_precision(small, monkeypatch):
    """GPUs and TPUs round by default; a CPU does not, so the setting itself is asked for."""

    def precision(*_):
        return jax.config.jax_default_matmul_precision

    monkeypatch.setattr(verify_stages, "stage_outputs", precision)
    assert verify_stages.run_stages(checkpoints.open(small[0])) == "highest"


def test_two_checkpoints_are_rounded_to_the_coarser_dtype():
    def rows(*pairs):
        return {str(i): {"dtypes": pair} for i, pair in enumerate(pairs)}

    assert rounding(rows(("float32", "float32"), ("bfloat16", "bfloat16"))) == "float32"
    assert rounding(rows(("float32", "bfloat16"), ("float32", "float32"))) == "bfloat16"
    assert rounding(rows(("float16", "float32"))) == "float16"
    halves = ("float16", "bfloat16")
    assert rounding(rows(halves)) == rounding(rows(halves[::-1])) == "bfloat16"
    assert rounding(rows(("float32", "float16"), ("bfloat16", "float32"))) == "bfloat16"


def test_another_config_is_not_the_same_model(small, tmp_path, capsys):
    published, _ = small
    shutil.copytree(published, tmp_path / "other")
    file = tmp_path / "other" / "config.json"
    fields = json.loads(file.read_text())
    fields["sana_vae"]["scaling_factor"] = 0.5
    file.write_text(json.dumps(fields))
    assert main(["convert", "verify", str(published), str(tmp_path / "other")]) == 1
    found = report(capsys)
    assert found["config_differs_in"] == ["dc_ae"]
    assert found["stages"] == "not run: the configs differ"


def test_dtypes_agree_when_rounding_explains_the_difference():
    exact = np.linspace(-1, 1, 7, dtype=np.float32)
    assert compare_tensors(exact, exact.astype(np.float16))["agree"]
    assert not compare_tensors(exact, (1.01 * exact).astype(np.float16))["agree"]
    assert not compare_tensors(exact, exact[:-1])["agree"]
    assert not compare_tensors(exact, np.nextafter(exact, 2))["agree"]
    # Of the two halves either may be the source's, in either order.
    brain, half = exact.astype(bfloat16), exact.astype(np.float16)
    for one, other in ((brain, brain.astype(np.float16)), (half, half.astype(bfloat16))):
        assert compare_tensors(one, other)["agree"]
        assert compare_tensors(other, one)["agree"]
        assert not compare_tensors((1.01 * one).astype(one.dtype), other)["agree"]
    assert not compare_tensors(brain, brain.view(np.float16))["agree"]


def test_stages_are_held_to_the_tolerance_and_ids_to_identity():
    a = {"velocity": np.array([1.0, -4.0]), "tokens": np.array([1, 2, 3])}
    near = {"velocity": np.array([1.0, -4.0 + 2e-4]), "tokens": np.array([1, 2, 3])}
    rows = compare_stages(a, near, 1e-4)
    assert rows["velocity"]["agree"]
    assert not compare_stages(a, near, 1e-5)["velocity"]["agree"]
    assert not compare_stages(a, {**near, "tokens": np.array([1, 2, 4])}, 1e-4)["tokens"]["agree"]
    assert not compare_stages(a, {**near, "velocity": np.array([1.0, np.nan])}, 1e-4)["velocity"][
        "agree"
    ]


EDITING = {
    "features": {
        "max_sources": 1,
        "use_und_image_vae": True,
        "use_und_image_vae_as_noise": True,
        "use_tar_siglip_features": True,
    },
    "tokens": {"max_sources": 3, "use_und_image_vae": True},
    "channels": {"max_sources": 1, "use_und_image_vae_as_channels": True, "sana.in_channels": 8},
}
CONNECTORS = {
    "und_image_vae_connector": {"edit_condition", "edit_velocity", "edit_guided"},
    "tar_siglip_features_connector": {"edit_hidden"},
}


def test_a_changed_connector_of_edits_is_seen_where_sources_are(tmp_path):
    cfg = replace(PUBLISHED, **EDITING["features"])
    random_checkpoint(tmp_path / "torch", cfg)
    _, params = load(tmp_path / "torch")
    inputs = stage_inputs(cfg)
    # The places of one source are in the prompt.
    places = inputs["edit_prompt"] == cfg.vocab.image_start_token_id
    assert places.sum() == cfg.ta_tok.num_tokens
    before = edit_outputs(Blip3o(cfg), params, inputs)
    for part, stages in CONNECTORS.items():
        changed = jax.tree.map(np.array, params)
        changed[part]["linear_2"]["bias"][0] += 1.0
        rows = compare_stages(before, edit_outputs(Blip3o(cfg), changed, inputs), 1e-4)
        assert {name for name, row in rows.items() if not row["agree"]} == stages


@pytest.mark.parity
@pytest.mark.parametrize("variant", ["tokens", "channels"])
def test_stages_of_edits_are_the_same_in_pytorch(variant, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from blip3o_jax.reference import modules, stages

    random_checkpoint(tmp_path / "torch", replace(PUBLISHED, **EDITING[variant]))
    cfg, params = load(tmp_path / "torch")
    inputs = stage_inputs(cfg)
    given = {name: torch.from_numpy(value) for name, value in inputs.items()}
    theirs = stages.edit_outputs(modules.load(tmp_path / "torch"), given)
    theirs = {name: stages.channels_last(value) for name, value in theirs.items()}
    rows = compare_stages(theirs, edit_outputs(Blip3o(cfg), params, inputs), 1e-4)
    assert [name for name, row in rows.items() if row["agree"]] == list(theirs)
    assert len(theirs) == 4


@pytest.mark.parity
def test_an_editing_checkpoint_is_the_same_in_pytorch(tmp_path, capsys):
    pytest.importorskip("diffusers")
    random_checkpoint(tmp_path / "torch", replace(PUBLISHED, **EDITING["features"]))
    folder = str(tmp_path / "torch")
    assert main(["convert", "verify", folder, folder, "--torch"]) == 0
    found = report(capsys)
    stages = {name for name in found["stages"] if name.startswith("edit_")}
    assert stages == {"edit_hidden", "edit_condition", "edit_velocity", "edit_guided"}
    assert found["stages"]["features"]["agree"]


@pytest.mark.parity
def test_the_embedded_model_is_the_same_in_pytorch(capsys):
    pytest.importorskip("diffusers")
    assert main(["convert", "verify", "emoji_64", "emoji_64", "--torch"]) == 0
    assert report(capsys)["a_in"] == "torch"
