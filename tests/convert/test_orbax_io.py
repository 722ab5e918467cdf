"""Parameters written layer by layer are an ordinary Orbax checkpoint; damage to it is named."""

import errno

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from blip3o_jax.convert import orbax_io
from blip3o_jax.errors import InputError
from blip3o_jax.tree import flatten, unflatten

VALUES = {
    "a/kernel": np.arange(3 * 16 * 5, dtype=np.float32).reshape(3, 16, 5),
    "a/scale": np.arange(48, dtype=np.float16).reshape(3, 16),
    "b": np.arange(24, dtype=np.float32).astype(ml_dtypes.bfloat16),
}
STACKED = {"a/kernel": True, "a/scale": True, "b": False}


@pytest.fixture
def folder(tmp_path):
    """VALUES in files as a mesh of eight along the second axis reads them."""
    orbax_io.save_tree(tmp_path / "params", {path: value.dtype for path, value in VALUES.items()})
    for path, value in VALUES.items():
        shards = (1, 8, 1)[: value.ndim]
        chunks = orbax_io.chunk_shape(value.shape, value.dtype.itemsize, STACKED[path], shards)
        store = orbax_io.create(tmp_path / "params", path, value.shape, value.dtype, chunks)
        for i in range(len(value) if STACKED[path] else 1):
            orbax_io.write(
                store[i] if STACKED[path] else store,
                value[i] if STACKED[path] else value,
                value.dtype,
                path,
            )
    return tmp_path / "params"


def test_plain_orbax_restores_it(folder):
    restored = ocp.StandardCheckpointer().restore(folder)
    assert {path: leaf.dtype for path, leaf in flatten(restored).items()} == {
        path: value.dtype for path, value in VALUES.items()
    }
    assert all(np.array_equal(leaf, VALUES[path]) for path, leaf in flatten(restored).items())


def test_plain_orbax_restores_it_onto_a_mesh(folder):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    specs = {
        "a/kernel": PartitionSpec(None, ("x", "y")),
        "a/scale": PartitionSpec(None, "y"),
        "b": PartitionSpec("x"),
    }
    abstract = {
        path: jax.ShapeDtypeStruct(
            value.shape, value.dtype, sharding=NamedSharding(mesh, specs[path])
        )
        for path, value in VALUES.items()
    }
    restored = flatten(ocp.StandardCheckpointer().restore(folder, unflatten(abstract)))
    for path, value in VALUES.items():
        assert restored[path].sharding == abstract[path].sharding
        np.testing.assert_array_equal(np.asarray(restored[path]), value)
    assert restored["a/kernel"].addressable_shards[0].data.shape == (3, 2, 5)


def test_layers_come_back_one_by_one(folder):
    leaves = orbax_io.open_leaves(folder)
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in leaves.items()} == {
        p: (v.shape, v.dtype) for p, v in VALUES.items()
    }
    for path, value in VALUES.items():
        layers = list(leaves[path].layers(STACKED[path]))
        assert [layer.shape for layer in layers] == (
            [value.shape[1:]] * len(value) if STACKED[path] else [value.shape]
        )
        assert b"".join(layer.tobytes() for layer in layers) == value.tobytes()


def test_files_are_cut_by_layer_and_shard(folder):
    assert {file.name for file in (folder / "a.kernel").iterdir()} == {
        ".zarray",
        *(f"{i}.{j}.0" for i in range(3) for j in range(8)),
    }
    # whole blocks of rows are 64 MB
    assert orbax_io.chunk_shape((217210, 2048), 4, False, (1, 8)) == (8192, 256)
    assert orbax_io.chunk_shape((28, 2048, 16, 128), 2, True, (1, 8, 1, 1)) == (1, 256, 16, 128)
    assert orbax_io.chunk_shape((28, 128), 2, True, (1, 1)) == (1, 128)


def test_an_array_of_many_blocks(tmp_path, monkeypatch):
    """The last block has fewer rows than the others; so has the last shard."""
    monkeypatch.setattr(orbax_io, "BLOCK", 64)
    value = np.arange(23 * 5, dtype=np.float32).reshape(23, 5)
    orbax_io.save_tree(tmp_path / "params", {"a": value.dtype})
    chunks = orbax_io.chunk_shape(value.shape, 4, False, (1, 2))
    assert chunks == (3, 3)
    orbax_io.write(
        orbax_io.create(tmp_path / "params", "a", value.shape, value.dtype, chunks),
        value,
        value.dtype,
        "a",
    )
    (back,) = orbax_io.open_leaves(tmp_path / "params")["a"].layers(False)
    np.testing.assert_array_equal(back, value)
    np.testing.assert_array_equal(
        ocp.StandardCheckpointer().restore(tmp_path / "params")["a"], value
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "a.kernel" / "1.3.0").unlink(),
            r"a\.kernel lacks values or is damaged: .*missing",
        ),
        (
            lambda folder: (folder / "a.kernel" / "1.3.0").write_bytes(b"x"),
            r"a\.kernel lacks values or is damaged",
        ),
        (
            lambda folder: (folder / "b" / ".zarray").write_text("{}"),
            r"b/\.zarray does not describe an array of floats",
        ),
    ],
)
def test_damage_is_named(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message):
        [list(leaf.layers(False)) for leaf in orbax_io.open_leaves(folder).values()]


def test_values_beyond_the_dtype_are_refused(folder):
    store = orbax_io.create(folder, "b", (24,), np.float16, (24,))
    with pytest.raises(InputError, match="tensor 'x' holds NaN or infinity as float16"):
        orbax_io.write(store, np.full(24, 7e4, np.float32), np.dtype(np.float16), "tensor 'x'")


def test_a_full_disk_is_an_os_error(folder):
    """TensorStore's words for it, as it was seen to say them on a full tmpfs."""

    class Full:
        chunk_layout = orbax_io.create(folder, "b", (24,), np.float32, (24,)).chunk_layout

        def __getitem__(self, _):
            return self

        def write(self, _):
            raise ValueError(
                'RESOURCE_EXHAUSTED: Error writing local file "b/0": No space left on '
                "device [os_error_code='28']"
            )

    with pytest.raises(OSError, match="No space left") as error:
        orbax_io.write(Full(), np.zeros(24, np.float32), np.dtype(np.float32), "b")
    assert error.value.errno == errno.ENOSPC
