"""torch.save's files without torch: written here by hand, good ones and ones that would do
something. Parity is in tests/parity."""

import io
import os
import pickle
import struct
import subprocess
import zipfile

import numpy as np
import pytest
from pickles import Call, Pickler, Storage, name, tensor
from pickles import write as write_pth

from blip3o_jax.convert import pth
from blip3o_jax.convert.pth import load_pth, open_ta_tok
from blip3o_jax.errors import InputError

VALUES = {
    "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "bias": np.array([1, -2], np.float16),
}


def tensors():
    return {key: tensor(str(i), value) for i, (key, value) in enumerate(VALUES.items())}


def write(file, content, **options):
    return write_pth(file, content, [value.tobytes() for value in VALUES.values()], **options)


ARGS = {
    "bottleneck": {
        "name": "b",
        "args": {"bottleneck_dim": 12, "regularizer": {"args": {"codebook_size": 16}}},
    },
    "input_size": 384,
}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda a, s: {"model": {"args": a, "sd": s}},
        lambda a, s: {"args": a, "sd": s},
        lambda a, s: s,
    ],
)
def test_layouts(tmp_path, wrap):
    args, found = open_ta_tok(write(tmp_path / "x.pth", wrap(ARGS, tensors())))
    assert {key: (stored.shape, stored.raw().tobytes()) for key, stored in found.items()} == {
        key: (value.shape, value.tobytes()) for key, value in VALUES.items()
    }
    if args:
        assert args == {"name": "b", "bottleneck_dim": 12, "codebook_size": 16, "input_size": 384}


def test_easydict_is_a_dict(tmp_path):
    """TA-Tok's arguments are one; its attributes are its items again."""
    args = Call(name("easydict", "EasyDict"), {"input_size": 384}, state={"input_size": 384})
    assert open_ta_tok(write(tmp_path / "x.pth", {"model": {"args": args, "sd": tensors()}}))[
        0
    ] == {"input_size": 384}


def test_a_part_of_a_storage(tmp_path):
    whole, part = VALUES["weight"], VALUES["weight"][1:]
    place = Call(
        name("torch._utils", "_rebuild_tensor_v2"),
        Storage("0", whole),
        3,
        (1, 3),
        (3, 1),
        False,
        None,
    )
    (found,) = open_ta_tok(write(tmp_path / "x.pth", {"part": place}))[1].values()
    np.testing.assert_array_equal(found.raw(), part)


def marked(tmp_path):
    return f"touch {tmp_path / 'executed'}"


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda path: Call(name("os", "system"), marked(path)), "os.system"),
        (lambda path: Call(name("posix", "system"), marked(path)), "posix.system"),
        (
            lambda path: Call(name("subprocess", "Popen"), ["touch", str(path / "executed")]),
            "subprocess.Popen",
        ),
        (lambda path: Call(name("builtins", "eval"), "1"), "builtins.eval"),
        (lambda path: Call(name("builtins", "getattr"), {}, "pop"), "builtins.getattr"),
        (lambda path: Call(name("torch", "load"), "x"), "torch.load"),
        (
            lambda path: Call(name("torch.storage", "_load_from_bytes"), b""),
            "torch.storage._load_from_bytes",
        ),
        (lambda path: Call(name("blip3o_jax.convert.pth", "os"), ""), "blip3o_jax.convert.pth.os"),
        (lambda path: name("numpy", "ndarray"), "numpy.ndarray"),
        (lambda path: {"args": name("argparse", "Namespace")}, "argparse.Namespace"),
    ],
)
def test_code_is_never_executed(tmp_path, make, names):
    file = write(
        tmp_path / "x.pth", {"model": {"args": {}, "sd": tensors(), "more": make(tmp_path)}}
    )
    with pytest.raises(InputError, match=f"x.pth is refused: it names {names}, which is not read"):
        load_pth(file)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


def test_the_files_above_do_execute_in_pickle(tmp_path):
    """So that the test before this one means something."""
    stream = io.BytesIO()
    Pickler(stream, 2).dump({"more": Call(name("os", "system"), marked(tmp_path))})
    pickle.loads(stream.getvalue())
    assert (tmp_path / "executed").exists()
    assert os.system is not subprocess.Popen


def place(storage, offset, shape, stride):
    return Call(
        name("torch._utils", "_rebuild_tensor_v2"), storage, offset, shape, stride, False, None
    )


WEIGHT = VALUES["weight"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"t": tensor("0", WEIGHT.T)}, "not contiguous"),
        ({"t": tensor("0", WEIGHT, stride=(0, 0))}, "not contiguous"),
        ({"t": place(Storage("0", WEIGHT), 4, (3,), (1,))}, "beyond the end of its storage"),
        (
            {"t": place(Storage("0", WEIGHT), 0, (2**62, 2**62), (2**62, 1))},
            "beyond the end of its storage",
        ),
        ({"t": place(Storage("0", WEIGHT), -1, (1,), (1,))}, "places a tensor in no storage"),
        ({"t": place({"code": "F32"}, 0, (1,), (1,))}, "places a tensor in no storage"),
        (
            {"t": place(Storage("0", np.zeros(99, np.float32)), 0, (9,), (1,))},
            "ta_tok/data/0 has 24 bytes, and 396 are needed",
        ),
        ({"t": place(Storage("7", WEIGHT), 0, (1,), (1,))}, "no entry ta_tok/data/7"),
        ({"t": place(Storage("../0", WEIGHT), 0, (1,), (1,))}, "is not a storage of this file"),
        ({"t": Call(name("torch", "FloatStorage"), 3)}, "its pickle is damaged"),
        ({"t": Call(name("torch", "Size"), 3)}, "its pickle is damaged"),
    ],
)
def test_bad_places_are_refused(tmp_path, content, message):
    with pytest.raises(InputError, match=message) as refusal:
        load_pth(write(tmp_path / "x.pth", content))
    assert str(refusal.value).startswith(str(tmp_path / "x.pth"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "holds a list"),
        ({"sd": [1]}, "should be dictionaries"),
        ({"sd": {"a": 1}}, "'a' is not a tensor"),
        ({"sd": {1: 2}}, "'1' is not a tensor"),
        # A pickle may change what it has made, after the checks.
        (
            {
                "a": Call(
                    name("torch._utils", "_rebuild_parameter"),
                    tensor("0", WEIGHT),
                    state={"offset": 1 << 40},
                )
            },
            "'a' is not a tensor",
        ),
        (
            {
                "a": Call(
                    name("torch._utils", "_rebuild_parameter"),
                    tensor("0", WEIGHT),
                    state={"shape": [1e9]},
                )
            },
            "'a' is not a tensor",
        ),
        (
            {
                "a": Call(
                    name("torch._utils", "_rebuild_parameter"),
                    tensor("0", WEIGHT),
                    state={"code": "F99"},
                )
            },
            "'a' is not a tensor",
        ),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        open_ta_tok(write(tmp_path / "x.pth", content))


def test_damaged_files_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "x.pth"

    def refused(message):
        with pytest.raises(InputError, match=message) as refusal:
            load_pth(file)
        assert str(file) in str(refusal.value)

    refused("cannot be read: No such file")
    write(file, tensors(), compression=zipfile.ZIP_DEFLATED)
    refused(r"data\.pkl is compressed|byteorder is compressed")
    data = write(file, tensors()).read_bytes()
    file.write_bytes(data[:-30])
    refused("is not a zip archive")
    file.write_bytes(b"\x80\x02.")  # torch before 1.6
    refused("since PyTorch 1.6")
    file.write_bytes(data.replace(b"little", b"bigger"))
    refused(r"is refused|is cut short")
    write_pth(file, tensors(), [b"short", b""])
    refused("ta_tok/data/0 has 5 bytes, and 24 are needed")
    write(file, tensors(), extra=[("other/data.pkl", b"")])
    refused("not one of torch.save")
    with pytest.warns(UserWarning, match="Duplicate name"):
        write(file, tensors(), extra=[("ta_tok/data/0", b"")])
    refused("two entries of its archive have one name")
    directory = data.rindex(
        b"PK\x01\x02", 0, data.index(b"ta_tok/data/0", data.index(b"PK\x01\x02"))
    )
    # the entry's place
    file.write_bytes(data[: directory + 42] + struct.pack("<I", len(data)) + data[directory + 46 :])
    refused(r"is refused|is cut short")
    write(file, tensors())
    monkeypatch.setattr(pth, "PICKLE_LIMIT", 10)
    refused("more than names and places take")


def test_a_dict_within_itself(tmp_path):
    file = tmp_path / "x.pth"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(
            "a/data.pkl",
            b"\x80\x02}(X\x02\x00\x00\x00sd}X\x04\x00\x00\x00args}q\x00X\x02\x00\x00\x00meh\x00su.",
        )
    assert open_ta_tok(file) == ({}, {})
