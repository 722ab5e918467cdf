"""What `convert` cannot do, or what was damaged, is refused by name and leaves nothing behind."""

import errno
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from converting import convert, refused
from safetensors.numpy import load_file, save_file

from blip3o_jax import checkpoints
from blip3o_jax.convert import orbax_io, safetensors_io


def set_tensors(**changes):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors") | changes
        save_file(
            {name: value for name, value in tensors.items() if value is not None},
            folder / "model.safetensors",
        )

    return damage


def set_config(**changes):
    def damage(folder):
        (folder / "config.json").write_text(
            json.dumps(json.loads((folder / "config.json").read_text()) | changes)
        )

    return damage


def cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def no_shard(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "model-1.safetensors"}})
    )


def twice(folder):
    text = (folder / "config.json").read_text().rstrip()
    (folder / "config.json").write_text(text[:-1] + ', "hidden_size": 24}')


NORM = "model.layers.1.self_attn.k_norm.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "model.safetensors is damaged or cut short"),
        (
            no_shard,
            "model.safetensors.index.json places 'model.norm.weight' in "
            "model-1.safetensors, which is missing",
        ),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "needs either model.safetensors or model.safetensors.index.json",
        ),
        (twice, "the key 'hidden_size' is there twice"),
        (set_tensors(**{NORM: None}), f"tensor '{NORM}' is missing"),
        (
            set_tensors(**{NORM: np.ones(9, np.float32)}),
            f"tensor '{NORM}' has shape (9,), and config.json implies (8,)",
        ),
        (
            set_tensors(**{NORM: np.full(8, np.nan, ml_dtypes.bfloat16)}),
            f"tensor '{NORM}' holds NaN",
        ),
        (set_tensors(**{NORM: np.ones(8, np.float32)}), f"tensor '{NORM}' is float32 and"),
        (set_tensors(**{NORM: np.ones(8, np.int32)}), f"tensor '{NORM}' has dtype I32"),
        (
            set_tensors(**{"model.stray": np.ones(8, np.float32)}),
            "tensor 'model.stray' is not part of the model",
        ),
        (set_config(hidden_size=32), "and config.json implies"),
        (set_config(model_type="qwen2_5_vl"), "BLIP3o of 4B or 8B on Qwen2.5-VL"),
        (set_config(model_type="llava_qwen", n_query=64), "BLIP3o of 4B or 8B on Qwen2.5-VL"),
    ],
)
def test_bad_checkpoints_leave_nothing(published, tmp_path, capsys, damage, message):
    damage(published)
    before = sorted(tmp_path.iterdir())
    sentence = refused(capsys, "to-jax", published, tmp_path / "jax")
    assert message in sentence
    assert str(published) in sentence
    assert sorted(tmp_path.iterdir()) == before


def test_a_result_is_replaced_only_when_known(published, tmp_path, capsys, monkeypatch):
    target = tmp_path / "jax"
    target.mkdir()
    (target / "mine").write_text("x")
    assert "exists" in refused(capsys, "to-jax", published, target)
    assert "holds other files (no convert.json)" in refused(
        capsys, "to-jax", published, target, "--overwrite"
    )
    assert (target / "mine").read_text() == "x"
    (target / "mine").unlink()
    convert(capsys, "to-jax", published, target)
    convert(capsys, "to-jax", published, target, "--overwrite")
    assert "is for JAX already" in refused(capsys, "to-jax", target, tmp_path / "other")
    assert "lie in each other" in refused(capsys, "to-jax", published, published / "inside")
    assert "lie in each other" in refused(capsys, "to-torch", target, target, "--overwrite")
    assert "lie in each other" in refused(capsys, "to-torch", target, tmp_path, "--overwrite")
    # What a run's result takes from is a source too.
    (tmp_path / "run").mkdir()
    found = {tmp_path / "run": checkpoints.RUN, target: checkpoints.CONVERTED}
    monkeypatch.setattr(checkpoints, "find", lambda name: (Path(name), found[Path(name)]))
    again = ("to-torch", tmp_path / "run", target, "--unused", target, "--overwrite")
    assert "lie in each other" in refused(capsys, *again)
    assert (target / "params").is_dir()


def test_a_full_disk_leaves_nothing(published, tmp_path, capsys, monkeypatch):
    convert(capsys, "to-jax", published, tmp_path / "jax")
    before = sorted(tmp_path.iterdir())

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(orbax_io, "write", full)
    assert "other cannot be written: No space left on device" in refused(
        capsys, "to-jax", published, tmp_path / "other"
    )
    monkeypatch.setattr(safetensors_io, "_write", full)
    assert "other cannot be written: No space left on device" in refused(
        capsys, "to-torch", tmp_path / "jax", tmp_path / "other"
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 10))
    for source in (("to-torch", tmp_path / "jax"), ("to-jax", published)):
        assert "its disk has 1e-08 GB free" in refused(capsys, *source, tmp_path / "other")
    assert sorted(tmp_path.iterdir()) == before


def without_values_and_hashes(folder):
    (folder / "params" / "qwen3.norm.scale" / "0").unlink()
    (folder / "hashes.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: shutil.rmtree(folder / "params" / "qwen3.norm.scale"),
            "parameter qwen3/norm/scale is missing",
        ),
        (
            lambda folder: (folder / "params" / "qwen3.norm.scale" / "0").unlink(),
            "qwen3.norm.scale/0 is missing",
        ),
        (without_values_and_hashes, "qwen3.norm.scale lacks values"),
        (set_config(hidden_size=32), "has shape"),
        (lambda folder: (folder / "config.json").unlink(), "holds neither config.json"),
    ],
)
def test_damaged_conversions_are_named(published, tmp_path, capsys, damage, message):
    convert(capsys, "to-jax", published, tmp_path / "jax")
    damage(tmp_path / "jax")
    assert message in refused(capsys, "to-torch", tmp_path / "jax", tmp_path / "back")
    assert not (tmp_path / "back").exists()
