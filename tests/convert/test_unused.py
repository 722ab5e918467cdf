"""What a source holds and the model does not use: kept, and written again byte for byte."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from converting import IGNORED, TA_TOK, convert, refused, same
from safetensors.numpy import load_file, save_file
from tiny import PUBLISHED

from blip3o_jax import checkpoints
from blip3o_jax.cli import main
from blip3o_jax.convert import unused
from blip3o_jax.errors import InputError
from blip3o_jax.verify.compare import compare_checkpoints

# Nothing here is a number that the model could hold.
STRANGE = {
    f"{TA_TOK}encoder.head.mask": np.array([[1, 0], [0, 1]], bool),
    f"{TA_TOK}encoder.head.position_ids": np.arange(-3, 4),
    f"{TA_TOK}encoder.head.double": np.full((2, 3), 1 / 3),
    f"{TA_TOK}encoder.head.scalar": np.array(-0.0, np.float32),
    f"{TA_TOK}encoder.head.empty": np.zeros((0, 4), np.float32),
    f"{TA_TOK}encoder.head.nan": np.array([np.nan, np.inf, -np.inf], ml_dtypes.bfloat16),
    f"{TA_TOK}encoder.encoder.layers.2.mlp.fc1.bias": np.arange(5, dtype=np.float16),
}


@pytest.fixture
def strange(published):
    """With unused tensors of every dtype, under the names of transformers 5."""
    tensors = load_file(published / "model.safetensors") | STRANGE
    older = f"{TA_TOK}decoder.vision_model."
    tensors = {name.replace(older, f"{TA_TOK}decoder."): x for name, x in tensors.items()}
    tensors[f"{TA_TOK}decoder.head.probe"] = np.ones((1, 1, 16), np.float32)
    assert not any(name.startswith(older) for name in tensors)
    save_file(tensors, published / "model.safetensors", metadata={"format": "pt"})
    return published


def test_every_tensor_comes_back_under_its_own_name(strange, tmp_path, capsys):
    report = convert(capsys, "to-jax", strange, tmp_path / "jax")
    unused = {*IGNORED, *STRANGE, f"{TA_TOK}decoder.vision_model.head.probe"}
    assert set(report["ignored"]) == unused
    assert report["tensors"]["kept"] == len(unused) - 1  # the head is the embedding's
    assert "lm_head.weight" not in load_file(tmp_path / "jax" / "unused" / "model.safetensors")
    back = convert(capsys, "to-torch", tmp_path / "jax", tmp_path / "back")
    assert back["restored"] == len(unused)
    same(strange, tmp_path / "back")
    # In shards too, and there again.
    convert(capsys, "to-torch", tmp_path / "jax", tmp_path / "shards", "--max-shard-bytes", "20000")
    same(strange, tmp_path / "shards")
    convert(capsys, "to-jax", tmp_path / "shards", tmp_path / "again")
    convert(capsys, "to-torch", tmp_path / "again", tmp_path / "twice")
    same(strange, tmp_path / "twice")


def test_unused_tensors_are_left_out_when_asked(strange, tmp_path, capsys):
    names = set(load_file(strange / "model.safetensors"))
    convert(capsys, "to-jax", strange, tmp_path / "less", "--drop-unused")
    assert not (tmp_path / "less" / "unused").exists()
    convert(capsys, "to-torch", tmp_path / "less", tmp_path / "back")
    left = set(load_file(tmp_path / "back" / "model.safetensors"))
    assert names - left == {*IGNORED, *STRANGE, f"{TA_TOK}decoder.head.probe"}
    assert left < names
    convert(capsys, "to-jax", strange, tmp_path / "jax")
    report = convert(capsys, "to-torch", tmp_path / "jax", tmp_path / "two", "--drop-unused")
    assert report["restored"] == 0
    # Without the record of names, those of the published files.
    assert set(load_file(tmp_path / "two" / "model.safetensors")) == {
        name.replace(f"{TA_TOK}decoder.", f"{TA_TOK}decoder.vision_model.") for name in left
    }


def test_another_dtype_is_that_of_every_float(strange, tmp_path, capsys):
    tensors = load_file(strange / "model.safetensors")
    nan = f"{TA_TOK}encoder.head.nan"
    assert f"tensor {nan!r} holds NaN or infinity as float16" in refused(
        capsys, "to-jax", strange, tmp_path / "jax", "--dtype", "float16"
    )
    del tensors[nan]
    save_file(tensors, strange / "model.safetensors", metadata={"format": "pt"})
    convert(capsys, "to-jax", strange, tmp_path / "jax", "--dtype", "float16")
    convert(capsys, "to-torch", tmp_path / "jax", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        own = tensor.dtype.name in ("bool", "int64", "float64")
        expected = tensor if own else tensor.astype(np.float16)
        assert (back[name].dtype, back[name].tobytes()) == (expected.dtype, expected.tobytes())


def test_what_is_kept_is_guarded(strange, tmp_path, capsys):
    convert(capsys, "to-jax", strange, tmp_path / "jax")
    file = tmp_path / "jax" / "unused" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "model.safetensors is not what hashes.json beside it recorded" in refused(
        capsys, "to-torch", tmp_path / "jax", tmp_path / "back"
    )
    assert "is not what hashes.json" in refused(capsys, "verify", tmp_path / "jax")
    shutil.rmtree(file.parent)
    sentence = refused(capsys, "to-torch", tmp_path / "jax", tmp_path / "back")
    assert f"{file.parent} is missing" in sentence
    assert "--drop-unused" in sentence
    convert(capsys, "to-torch", tmp_path / "jax", tmp_path / "back", "--drop-unused")


def test_a_stranger_among_the_kept_is_refused(strange, tmp_path, capsys):
    convert(capsys, "to-jax", strange, tmp_path / "jax")
    folder = tmp_path / "jax" / "unused"
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"more": np.zeros(1)}, folder / "model.safetensors")
    (folder / "hashes.json").unlink()
    assert "tensors, and convert.json says" in refused(
        capsys, "to-torch", tmp_path / "jax", tmp_path / "back"
    )
    tensors.pop(next(iter(tensors)))
    tensors["model.norm.weight"] = np.zeros(1, np.float32)
    save_file(tensors, folder / "model.safetensors")
    assert "'model.norm.weight' is a parameter and is kept as an unused tensor too" in refused(
        capsys, "to-torch", tmp_path / "jax", tmp_path / "back"
    )


@pytest.mark.parametrize("record", [[], {}, 3, {"lm_head.weight": []}, {"lm_head.weight": "U8"}])
def test_a_record_that_makes_no_sense_restores_nothing(tmp_path, record):
    origin = {"tensors": record, "repeated": record, "renamed": record}
    assert unused.restored(tmp_path, origin, (PUBLISHED, {}), None) == {}
    assert unused.own_names(origin) == {}


def test_unused_tensors_belong_to_a_run(strange, tmp_path, capsys):
    convert(capsys, "to-jax", strange, tmp_path / "jax")
    assert "--unused is for a run" in refused(
        capsys, "to-torch", tmp_path / "jax", tmp_path / "x", "--unused", tmp_path / "jax"
    )
    assert main(["convert", "verify", str(strange), str(tmp_path / "jax")]) == 0
    report = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert report["bit_identical"] == report["tensors"]
    # Each of them is compared, by its bytes where it is no float.
    tensors = load_file(strange / "model.safetensors")
    converted = checkpoints.open(tmp_path / "jax")
    kept = {name for name in STRANGE if tensors[name].size}
    for name in kept:
        changed = tensors[name].copy()
        changed.reshape(-1).view(np.uint8)[0] ^= 1
        save_file(tensors | {name: changed}, strange / "model.safetensors")
        rows = compare_checkpoints(checkpoints.open(strange), converted)
        assert [x for x, row in rows.items() if not row["agree"]] == [name]
        assert set(STRANGE) < set(rows)
    # One that lacks a tensor is another; one that has none is compared by its parameters.
    left = {x: tensor for x, tensor in tensors.items() if x not in kept}
    save_file(left, strange / "model.safetensors")
    with pytest.raises(InputError, match="these are different models"):
        compare_checkpoints(checkpoints.open(strange), converted)
    convert(capsys, "to-torch", tmp_path / "jax", tmp_path / "less", "--drop-unused")
    rows = compare_checkpoints(checkpoints.open(tmp_path / "less"), converted)
    assert not set(STRANGE) & set(rows)
    assert all(row["agree"] for row in rows.values())
