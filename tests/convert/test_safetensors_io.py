"""Shards and indices, held to the safetensors library; every way in which they can be damaged."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from blip3o_jax.convert.safetensors_io import Entry, open_tensors, write_tensors
from blip3o_jax.errors import InputError
from blip3o_jax.files import read_json

SHAPES = {"b": (4, 3), "scalar": (), "a.weight": (5,), "c": (2, 2, 2)}


@pytest.fixture
def values():
    rng = np.random.default_rng(0)
    return {
        name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in SHAPES.items()
    }


def write(folder, values, dtype="float32", limit=1e9):
    write_tensors(
        folder,
        {name: Entry(value.shape, np.dtype(dtype)) for name, value in values.items()},
        values.items(),
        limit,
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_one_file_is_what_the_library_reads(tmp_path, values, dtype):
    write(tmp_path, values, dtype)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    back = load_file(tmp_path / "model.safetensors")
    assert set(back) == set(values)
    for name, value in values.items():
        assert back[name].dtype == np.dtype(dtype)
        np.testing.assert_array_equal(back[name], value.astype(dtype))
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file without it


def test_shards_and_index(tmp_path, values):
    write(tmp_path, values, "float16", limit=30)  # bytes of the tensors: 24, 2, 10, 16
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 52}
    assert index["weight_map"] == {
        "b": files[0],
        "scalar": files[0],
        "a.weight": files[1],
        "c": files[1],
    }
    assert {file: set(load_file(tmp_path / file)) for file in files} == {
        files[0]: {"b", "scalar"},
        files[1]: {"a.weight", "c"},
    }
    tensors = open_tensors(tmp_path)
    assert set(tensors) == set(values)
    assert all(
        tensors[name].read(np.float32).tobytes()
        == values[name].astype(np.float16).astype(np.float32).tobytes()
        for name in values
    )


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path, values):
    write(tmp_path, values, limit=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    assert {name: stored.shape for name, stored in open_tensors(tmp_path).items()} == SHAPES


def test_values_that_the_dtype_cannot_hold_are_refused(tmp_path, values):
    values["c"][0, 0, 0] = 7e4
    with pytest.raises(InputError, match="Tensor 'c' holds NaN or infinity as float16"):
        write(tmp_path, values, "float16")
    write(tmp_path, values, "bfloat16")
    stored = open_tensors(tmp_path)["c"]
    assert stored.read(np.float32)[0, 0, 0] == np.float32(ml_dtypes.bfloat16(7e4))
    with pytest.raises(
        InputError, match=r"model\.safetensors: tensor 'c' holds NaN or infinity as float16"
    ):
        stored.read(np.float16)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_stored_nan_is_refused(tmp_path, values, bad):
    values["b"][3, 2] = bad
    save_file(values, tmp_path / "model.safetensors")
    tensors = open_tensors(tmp_path)
    assert tensors["c"].read(np.float32).shape == (2, 2, 2)
    with pytest.raises(InputError, match=r"model\.safetensors: tensor 'b' holds NaN"):
        tensors["b"].read(np.float32)


def test_integers_are_refused(tmp_path):
    save_file({"ids": np.arange(3)}, tmp_path / "model.safetensors")
    with pytest.raises(
        InputError,
        match=r"model\.safetensors: tensor 'ids' has dtype I64; readable are F16, BF16, F32",
    ):
        open_tensors(tmp_path)["ids"].read(np.float32)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],  # cut short
        lambda data: data[:40],  # cut in the header
        lambda data: data + b"\0",
        lambda data: struct.pack("<Q", len(data)) + data[8:],  # a header longer than the file
        lambda data: struct.pack("<Q", 2**63) + data[8:],
        lambda data: data[:8] + b"!" + data[9:],
        lambda data: data.replace(b"[5]", b"[6]"),
    ],
)
def test_damaged_files_are_refused(tmp_path, values, damage):
    write(tmp_path, values)
    file = tmp_path / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=r"model\.safetensors is damaged or cut short"):
        open_tensors(tmp_path)


def test_a_name_in_a_header_twice_is_refused(tmp_path):
    """The library takes the last of the two."""
    entry = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f"{{{entry},{entry}}}".encode()
    (tmp_path / "model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + b"\0" * 4
    )
    with pytest.raises(
        InputError, match=r"model\.safetensors is damaged or cut short: .*'a'.* twice"
    ):
        open_tensors(tmp_path)


def _edit_index(folder, **changes):
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    places = {name: file for name, file in {**places, **changes}.items() if file is not None}
    index.write_text(json.dumps({"weight_map": places}))


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def _duplicate(folder, values):
    save_file({"b": values["b"], "a.weight": values["a.weight"], "c": values["c"]}, folder / SECOND)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder, values: (folder / SECOND).unlink(),
            f"index.json places 'a.weight' in {SECOND}, which is missing",
        ),
        (_duplicate, f"tensor 'b' is in both {FIRST} and {SECOND}"),
        (
            lambda folder, values: _edit_index(folder, new=FIRST),
            f"index.json places 'new' in {FIRST}, which does not hold it",
        ),
        (
            lambda folder, values: _edit_index(folder, b=None),
            f"index.json does not place 'b' in {FIRST}, which holds it",
        ),
        (
            lambda folder, values: _edit_index(folder, b=SECOND),
            f"index.json does not place 'b' in {FIRST}, which holds it",
        ),
        (
            lambda folder, values: _edit_index(folder, b="../x.safetensors"),
            "places 'b' in '../x.safetensors', which is not the plain name",
        ),
        (
            lambda folder, values: _edit_index(folder, b="/x.safetensors"),
            "places 'b' in '/x.safetensors', which is not the plain name",
        ),
        (
            lambda folder, values: _edit_index(folder, b="x.bin"),
            "places 'b' in 'x.bin', which is not the plain name",
        ),
        (
            lambda folder, values: _edit_index(folder, b=f"{'x' * 300}.safetensors"),
            "places 'b' in xxxxx",
        ),
        (
            lambda folder, values: _edit_index(folder, b=3),
            "places 'b' in 3, which is not the plain name",
        ),
        (
            lambda folder, values: (folder / "model.safetensors.index.json").write_text("{}"),
            "index.json has no weight_map",
        ),
        (
            lambda folder, values: (folder / "model.safetensors.index.json").write_text("{"),
            "index.json is not JSON",
        ),
        (
            lambda folder, values: (folder / "model.safetensors.index.json").unlink(),
            "and has neither",
        ),
        (lambda folder, values: (folder / "model.safetensors").touch(), "and has both"),
    ],
)
def test_contradictory_shards_are_refused(tmp_path, values, damage, message):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    # there, so that only its place can be the reason
    save_file({"b": values["b"]}, tmp_path / "x.safetensors")
    write(folder, values, "float16", limit=30)
    damage(folder, values)
    with pytest.raises(InputError) as refusal:
        open_tensors(folder)
    assert message in str(refusal.value)
    assert str(folder) in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[1]", "is not a JSON object"),
        (b"\xff{}", "is not JSON"),
        (b"[" * 50_000, "is not JSON"),
        (b" " * 60_000, "larger than 50001 bytes"),
        (None, "cannot be read: No such file"),
    ],
)
def test_bad_json_is_refused(tmp_path, text, message):
    file = tmp_path / "config.json"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(InputError, match=message) as refusal:
        read_json(file, 50_001)
    assert str(refusal.value).startswith(str(file))
    assert os.linesep not in str(refusal.value)
