"""From the upstream parts to a model: what fills what, and a plain Qwen3's new vocabulary."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from converting import ARGS, EMBEDDING, TA_TOK, argv, tiny_tokenizer
from pickles import write_state
from reading import load
from safetensors.numpy import load_file, save_file

from blip3o_jax import checkpoints, pipeline
from blip3o_jax.cli import main
from blip3o_jax.config import VocabConfig
from blip3o_jax.text import load_tokenizer
from blip3o_jax.tree import flatten


def convert(capsys, *argv):
    assert main(["convert", "to-jax", *map(str, argv)]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def refused(capsys, *argv):
    capsys.readouterr()
    assert main(["convert", "to-jax", *map(str, argv)]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_plain_qwen3_needs_to_be_told(parts, tmp_path, capsys):
    assert (
        "is a plain Qwen3 without image tokens; say how to make them with --new-vocabulary"
        in refused(capsys, *argv(parts), tmp_path / "jax")
    )
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]


@pytest.mark.parametrize("mode", ["mean", "projected-codebook"])
def test_parts_make_a_model(parts, params, cfg, tmp_path, capsys, mode):
    report = convert(capsys, *argv(parts), "--new-vocabulary", mode, tmp_path / "jax")
    assert report["source"].keys() == {"ar", "dit", "vae", "tokenizer"}
    assert set(report["made"]) == {EMBEDDING, "model.diffusion_connector.*"}
    assert set(report["ignored"]) == {
        TA_TOK + name
        for name in (
            "teacher.weight",
            "scale_layer.scale",
            *(f"encoder.encoder.layers.2.{n}" for n in ("layer_norm1.weight", "mlp.fc1.bias")),
        )
    }
    loaded, made = load(tmp_path / "jax")
    assert loaded.vocab == cfg.vocab
    assert (loaded.qwen3.vocab_size, loaded.sana, loaded.dc_ae) == (
        cfg.vocab.size,
        cfg.sana,
        cfg.dc_ae,
    )
    assert loaded.name == "jax"
    given, flat = flatten(params), flatten(made)
    for path, leaf in flat.items():
        if path.split("/")[0] in ("sana", "dc_ae", "ta_tok"):
            # One head is as wide as the encoder here, where conftest has two: the same numbers
            # under another shape.
            assert leaf.tobytes() == given[path].tobytes(), path
        elif path.startswith("qwen3/") and "embed" not in path:
            np.testing.assert_array_equal(
                leaf, given[path].astype(ml_dtypes.bfloat16).astype(np.float32)
            )
    old, new = (
        given["qwen3/embed_tokens/embedding"].astype(ml_dtypes.bfloat16).astype(np.float32),
        flat["qwen3/embed_tokens/embedding"],
    )
    # Qwen's own rows, those of the two tags included
    np.testing.assert_array_equal(new[:22], old[:22])
    np.testing.assert_allclose(new[22:25], np.broadcast_to(old[:22].mean(0), (3, 24)), atol=5e-3)
    images = new[25:]
    if mode == "mean":
        np.testing.assert_allclose(images, np.broadcast_to(new[:25].mean(0), (16, 24)), atol=5e-3)
        assert (images == images[0]).all()
    else:
        lengths = np.linalg.norm(images, axis=1)
        assert np.sqrt(np.mean(lengths**2)) == pytest.approx(
            np.sqrt(np.mean(np.linalg.norm(old[:22], axis=1) ** 2)), rel=1e-2
        )
        spread = np.linalg.svd(images, compute_uv=False)
        # as many directions as a code has, but for the rounding
        assert spread[11] > 20 * spread[12]
    connector = made["diffusion_connector"]
    np.testing.assert_array_equal(connector["norm"]["scale"], np.full(28, 5.5**0.5, np.float32))
    assert connector["linear_1"]["kernel"].std() > 0
    names = {file.name for file in (tmp_path / "jax").iterdir()}
    assert names == {
        *("params", "unused", "config.json", "convert.json", "hashes.json"),
        *("tokenizer.json", "generation_config.json"),
        *("ar-LICENSE", "dit-LICENSE.txt", "vae-LICENSE.txt"),
    }
    tokenizer = load_tokenizer(tmp_path / "jax" / "tokenizer.json")
    assert tokenizer.encode("word4<im_start><S0><I15>", add_special_tokens=False).ids == [
        4,
        20,
        22,
        40,
    ]
    added = tokenizer.get_added_tokens_decoder()
    assert [added[i].special for i in (20, 21, 22, 25)] == [True, True, False, False]
    assert pipeline.load(tmp_path / "jax", batch_size=8).text.vocab == cfg.vocab
    assert checkpoints.config_of(tmp_path / "jax") == load(tmp_path / "jax")[0]
    again = convert(capsys, *argv(parts), "--new-vocabulary", mode, tmp_path / "again")
    assert again["made"] == report["made"]
    np.testing.assert_array_equal(
        flatten(load(tmp_path / "again")[1])["qwen3/embed_tokens/embedding"], new
    )


def test_a_qwen3_with_the_vocabulary_keeps_it(parts, tensors, tmp_path, capsys):
    tiny_tokenizer(extended=True).save(str(parts["--ar"] / "tokenizer.json"))
    assert "vocabulary of 30 rows is smaller than the ids need" in refused(
        capsys, *argv(parts), tmp_path / "jax"
    )
    qwen3 = {
        name: value
        for name, value in tensors.items()
        if name.startswith(("model.embed", "model.layers", "model.norm"))
    }
    save_file(qwen3, parts["--ar"] / "model.safetensors")
    assert "has nothing to make" in refused(
        capsys, *argv(parts), "--new-vocabulary", "mean", tmp_path / "jax"
    )
    report = convert(capsys, *argv(parts), tmp_path / "jax")
    assert set(report["made"]) == {"model.diffusion_connector.*"}
    loaded, made = load(tmp_path / "jax")
    assert isinstance(loaded.vocab, VocabConfig)
    np.testing.assert_array_equal(made["qwen3"]["embed_tokens"]["embedding"], tensors[EMBEDDING])


def without(folder, prefix):
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: value for name, value in tensors.items() if not name.startswith(prefix)},
        folder / "model.safetensors",
    )


def test_a_flag_fills_what_a_checkpoint_lacks(checkpoint, parts, params, tmp_path, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / "lacking")
    assert "--dit fills what a checkpoint lacks, and" in refused(
        capsys, folder, tmp_path / "jax", "--dit", parts["--dit"]
    )
    without(folder, "model.sana.")
    assert "holds no tensor of sana; name the files of its authors with --dit" in refused(
        capsys, folder, tmp_path / "jax"
    )
    report = convert(capsys, folder, tmp_path / "jax", "--dit", parts["--dit"])
    assert report["source"] == {
        "checkpoint": str(folder),
        "dit": str(parts["--dit"] / "transformer"),
    }
    assert (tmp_path / "jax" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    made, given = (flatten(load(tmp_path / "jax")[1]), flatten(load(checkpoint)[1]))
    assert all(np.array_equal(made[path], leaf) for path, leaf in given.items())
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(fields | {"sana": fields["sana"] | {"sample_size": 4}})
    )
    assert "describes another sana than --dit" in refused(
        capsys, folder, tmp_path / "other", "--dit", parts["--dit"]
    )
    del fields["sana"]
    (folder / "config.json").write_text(json.dumps(fields))  # which means the published SANA
    convert(capsys, folder, tmp_path / "other", "--dit", parts["--dit"])
    assert (
        json.loads((tmp_path / "other" / "config.json").read_text())["sana"]
        == json.loads((checkpoint / "config.json").read_text())["sana"]
    )


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.pop("--tokenizer"), "--tokenizer is missing"),
        (
            lambda p: p.update({"--tokenizer": p["--ar"]}),
            "neither TA-Tok's .pth file nor a folder with ta_tok.pth",
        ),
        (
            lambda p: p.update({"--tokenizer": p["--ar"] / "config.json"}),
            "is not a zip archive as torch.save",
        ),
        (
            lambda p: p.update({"--dit": p["--dit"] / "vae", "--vae": p["--dit"]}),
            "it describes a AutoencoderDC, not a SanaTransformer2DModel",
        ),
        (lambda p: p.update({"--dit": p["--ar"].parent, "--vae": p["--dit"]}), "it is no SANA"),
        (lambda p: p.update({"--dit": p["--dit"] / "transformer"}), "--vae is missing"),
        (
            lambda p: rewrite(p["--ar"] / "config.json", model_type="qwen2_5_vl"),
            "'qwen2_5_vl' is another family",
        ),
        (lambda p: rewrite(p["--ar"] / "config.json", num_experts=8), "a Qwen3 with experts"),
        (lambda p: rewrite(p["--ar"] / "config.json", hidden_size=32), "and config.json implies"),
        (
            lambda p: rewrite(p["--dit"] / "transformer" / "config.json", num_layers=3),
            "transformer: tensor 'transformer_blocks.2.",
        ),
        (lambda p: (p["--ar"] / "tokenizer.json").unlink(), "No tokenizer at"),
        (
            lambda p: (p["--dit"] / "vae" / "diffusion_pytorch_model.safetensors").unlink(),
            "needs either diffusion_pytorch_model.safetensors",
        ),
        (
            lambda p: write_state(p["--tokenizer"], {}, {"teacher": "another"}),
            "its encoder is 'another'",
        ),
        (
            lambda p: write_state(p["--tokenizer"], {}, ARGS),
            "no tensor 'encoder.embeddings.patch_embedding.weight' of 4 axes",
        ),
    ],
)
def test_bad_parts_leave_nothing(parts, tmp_path, capsys, damage, message):
    damage(parts)
    assert message in refused(capsys, *argv(parts), "--new-vocabulary", "mean", tmp_path / "jax")
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]


def test_a_checkpoint_has_its_vocabulary(checkpoint, tmp_path, capsys):
    assert "belongs to a plain Qwen3" in refused(
        capsys, checkpoint, tmp_path / "jax", "--new-vocabulary", "mean"
    )
