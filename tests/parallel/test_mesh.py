import os
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from blip3o_jax.errors import InputError
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.parallel.batches import check_batch, put_batch, put_replicated, rows_of_host
from blip3o_jax.parallel.mesh import cores, make_mesh, mesh_shape, parse_mesh
from blip3o_jax.parallel.parameters import shardings, spec
from blip3o_jax.presets import preset
from blip3o_jax.tree import join, split


def test_mesh_strings():
    assert parse_mesh("data=4,fsdp=2") == {"data": 4, "fsdp": 2}
    assert parse_mesh("") == {}
    assert parse_mesh("data=-1,tensor=2") == {"data": -1, "tensor": 2}
    for wrong in ("date=4", "data", "data=x", "data=0", "data=--1", "data=\u00b2", "data=1,", ","):
        with pytest.raises(InputError, match="is not one of data=N, fsdp=N, tensor=N"):
            parse_mesh(wrong)
    with pytest.raises(InputError, match="is not one of data=N"):
        parse_mesh(f"data={'9' * 5000}")
    with pytest.raises(InputError, match=r"Mesh .data=1,data=2.: data is there twice\."):
        parse_mesh("data=1,data=2")


def test_one_axis_takes_what_is_left():
    assert dict(make_mesh({"fsdp": 2}).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert dict(make_mesh({"data": 2, "fsdp": -1, "tensor": 2}).shape) == {
        "data": 2,
        "fsdp": 2,
        "tensor": 2,
    }


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "data=3 does not fit the 8 of 8 devices that are left; take 8"),
        ({"fsdp": 3}, "fsdp=3 does not fit the 8 of 8 devices that are left; take 2 or 4"),
        (
            {"tensor": 3, "fsdp": 2},
            "tensor=3 does not fit the 4 of 8 devices that are left after fsdp=2; take 2 or 4",
        ),
        (
            {"data": 2, "fsdp": 2},
            "data=2 does not fit the 4 of 8 devices that are left after fsdp=2; take 4",
        ),
        ({"fsdp": 16}, "fsdp=16 does not fit the 8 of 8 devices that are left; take 8"),
        ({"data": -1, "fsdp": -1}, "both data and fsdp are -1"),
        ({"fsdp": 0}, "fsdp=0 is not a valid size"),
        ({"dcn": -1}, "dcn=-1 is not a valid size"),
        ({"fsdp": 2.0}, "fsdp=2.0 is not a valid size"),
        ({"model": 2}, "no axis 'model'"),
        (
            {"fsdp": 4, "dcn": 4},
            "data=2 does not divide over dcn=4 slices; the nearest that does is 4",
        ),
    ],
)
def test_what_does_not_fit_names_the_axis_and_what_does(sizes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        make_mesh(sizes)


def test_slices_are_the_outer_part_of_data():
    """Devices 0 to 3 stand for one slice, 4 to 7 for the other: only steps along `data` from row 1
    to row 2 leave one."""
    ids = np.vectorize(lambda device: device.id)(
        make_mesh({"dcn": 2, "data": 4, "fsdp": 2}).devices
    )
    assert ids.tolist() == [[[0], [1]], [[2], [3]], [[4], [5]], [[6], [7]]]
    inside = np.vectorize(lambda device: device.id // 4)(
        make_mesh({"dcn": 2, "fsdp": 2, "tensor": 2}).devices
    )
    assert inside.tolist() == [[[0, 0], [0, 0]], [[1, 1], [1, 1]]]


def test_devices_that_know_their_slices_are_asked(monkeypatch):
    """In whatever order they are listed; and a mesh of another number of slices is refused."""
    devices = [
        SimpleNamespace(
            id=i, platform="test", device_kind="", process_index=i // 2, slice_index=i % 2
        )
        for i in range(8)
    ]
    monkeypatch.setattr("blip3o_jax.parallel.mesh.Mesh", lambda devices, axes, axis_types: devices)
    slices = [
        [d.slice_index for d in row.ravel()] for row in make_mesh({"dcn": 2, "fsdp": 4}, devices)
    ]
    assert slices == [[0, 0, 0, 0], [1, 1, 1, 1]]
    for device in devices:
        device.platform = "tpu"
    with pytest.raises(InputError, match="dcn=1, but the devices are of 2 slices; take dcn=2"):
        make_mesh({}, devices)


@pytest.mark.parametrize("sizes", [{"fsdp": 32}, {"fsdp": 8, "tensor": 2}])
def test_an_axis_may_be_no_side_of_a_slice(monkeypatch, sizes):
    """Two slices of 8 x 8 chips."""
    devices = [
        SimpleNamespace(
            id=i,
            platform="tpu",
            device_kind="TPU v5 lite",
            process_index=i // 4,
            slice_index=i // 64,
            coords=(i % 8, i // 8 % 8, 0),
            core_on_chip=0,
        )
        for i in range(128)
    ]
    monkeypatch.setattr("blip3o_jax.parallel.mesh.Mesh", lambda devices, axes, axis_types: devices)
    grid = make_mesh({"dcn": 2, **sizes}, devices)
    assert grid.shape == mesh_shape(sizes, 128)
    # Of each copy of the parameters all devices are in one slice.
    assert [len({d.slice_index for d in copy.flat}) for copy in grid] == [1] * len(grid)


def test_a_batch_that_does_not_divide_names_the_nearest_that_do():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    check_batch(12, mesh)
    with pytest.raises(
        InputError,
        match=r"batch_size 12 does not divide by the mesh's 4 batch shards x 2 micro-batches; .* "
        r"are 8 and 16",
    ):
        check_batch(12, mesh, 2)


def test_whole_batches_are_cut_as_far_as_they_divide():
    mesh, rows = make_mesh({"data": 4, "fsdp": 2}), np.arange(24)
    for count, cuts in ((24, (("data", "fsdp"),)), (20, ("data",)), (6, ("fsdp",)), (3, (None,))):
        made = put_replicated(rows[:count], mesh)
        assert made.sharding.spec == PartitionSpec(*cuts)
        np.testing.assert_array_equal(made, rows[:count])


def test_one_process_feeds_the_whole_batch():
    mesh = make_mesh({"data": 2, "tensor": 4})
    assert rows_of_host(8, mesh).tolist() == list(range(8))
    made = put_batch({"x": np.arange(8)}, mesh)["x"]
    assert made.sharding.spec == PartitionSpec(("data", "fsdp"))
    np.testing.assert_array_equal(made, np.arange(8))


def test_every_large_leaf_of_the_full_models_but_the_autoencoder_is_cut():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    abstract = Blip3o(preset("blip3o_next_3b")).abstract()
    placed = shardings(abstract, mesh)
    for part in ("qwen3", "sana", "ta_tok", "diffusion_connector"):
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract[part]):
            sharding = placed[part]
            for key in path:
                sharding = sharding[key.key]
            if leaf.size > 3_000_000:
                assert not sharding.is_fully_replicated, (
                    part,
                    jax.tree_util.keystr(path),
                    leaf.shape,
                )


def test_a_size_that_does_not_divide_names_path_and_axis():
    mesh = make_mesh({"fsdp": 8})
    with pytest.raises(
        InputError,
        match=r"qwen3/embed_tokens/embedding: an axis of 12 does not divide by the mesh's fsdp=8",
    ):
        spec("qwen3/embed_tokens/embedding", (16, 12), mesh)


def test_split_and_join_are_inverse():
    tree = {"a": {"x": 1, "y": 2}, "b": {"z": 3}}
    left, right = split(tree, lambda path: path in ("a/x", "b/z"))
    assert left == {"a": {"x": 1}, "b": {"z": 3}}
    assert right == {"a": {"y": 2}}
    assert join(left, right) == tree


def count_devices(code: str, **environment) -> str:
    """What a process of its own, that nobody told how many devices it has, prints."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    }
    code = (
        "import jax; from blip3o_jax.parallel.mesh import split_cpu_into_devices, cores; "
        f"{code}; print(len(jax.devices()), end='')"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_a_cpu_has_as_many_devices_as_cores_that_the_batch_divides_by():
    count = max(n for n in range(1, cores() + 1) if 12 % n == 0)
    assert count_devices("assert split_cpu_into_devices(12)") == str(count)
    assert count_devices("assert split_cpu_into_devices(1)") == "1"


def test_devices_that_are_told_or_touched_stay():
    assert count_devices("assert not split_cpu_into_devices(4)", JAX_NUM_CPU_DEVICES="3") == "3"
    assert (
        count_devices(
            "assert not split_cpu_into_devices(4)",
            XLA_FLAGS="--xla_force_host_platform_device_count=3",
        )
        == "3"
    )
    assert count_devices("jax.devices(); assert not split_cpu_into_devices(4)") == "1"
