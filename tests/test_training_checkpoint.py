"""Checkpoints that are whole, half there, damaged, or have nowhere to go; of a state of a few
numbers."""

import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from blip3o_jax import training_checkpoint
from blip3o_jax.errors import InputError
from blip3o_jax.parallel.mesh import make_mesh
from blip3o_jax.train import steps
from blip3o_jax.train.config import OptimizerConfig, TrainConfig

CFG = TrainConfig(stage="joint", optimizer=OptimizerConfig(ema_decay=0.9))


def state_at(step, size=8):
    values = jnp.arange(size, dtype=jnp.float32) + step
    state, frozen = steps.init_state(
        CFG, {"qwen3": {"a": {"kernel": values}}, "dc_ae": {"b": {"kernel": -values}}}
    )
    return state | {"step": jnp.int32(step)}, frozen


def save(workdir, *numbers, keep=2, size=8):
    manager = training_checkpoint.open_manager(workdir, keep)
    for step in numbers:
        training_checkpoint.save(
            manager, CFG, *state_at(step, size), {"began": 1.5, "stepping": float(step)}
        )
    training_checkpoint.finish(manager)
    manager.close()


def kept(workdir):
    return sorted(child.name for child in (workdir / "checkpoints").iterdir())


def test_what_is_saved_comes_back_and_the_newest_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3)
    assert kept(tmp_path) == ["2", "3"]
    state, frozen, notes = training_checkpoint.restore(
        training_checkpoint.open_manager(tmp_path), *state_at(0)
    )
    jax.tree.map(np.testing.assert_array_equal, (state, frozen), state_at(3))
    assert notes == {"began": 1.5, "stepping": 3.0}
    newest = training_checkpoint.newest(tmp_path)
    assert training_checkpoint.read_config(newest)["optimizer"]["ema_decay"] == 0.9
    leaves = training_checkpoint.open_weights(newest)
    (values,) = leaves["dc_ae/b/kernel"].layers(False)
    np.testing.assert_array_equal(values, -3.0 - np.arange(8))


def test_any_mesh_reads_what_another_wrote(tmp_path):
    save(tmp_path, 3)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state_at(0))
    for mesh in (make_mesh({"fsdp": 8}), make_mesh({"data": 2}, jax.devices()[:2])):

        def cut(x, mesh=mesh):
            return jax.ShapeDtypeStruct(
                x.shape,
                x.dtype,
                sharding=NamedSharding(mesh, PartitionSpec(*[("data", "fsdp")] * x.ndim)),
            )

        state, frozen, _ = training_checkpoint.restore(
            training_checkpoint.open_manager(tmp_path), *jax.tree.map(cut, target)
        )
        assert state["params"]["qwen3"]["a"]["kernel"].sharding.mesh == mesh
        jax.tree.map(np.testing.assert_array_equal, (state, frozen), state_at(3))


@pytest.mark.parametrize(
    "missing", ["_CHECKPOINT_METADATA", "model/manifest.ocdbt", "optimizer/_METADATA", "config"]
)
def test_a_half_written_or_half_deleted_checkpoint_is_never_chosen(missing, tmp_path):
    save(tmp_path, 1, 2)
    gone = tmp_path / "checkpoints" / "2" / missing
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp-0").mkdir()
    assert training_checkpoint.newest(tmp_path).name == "1"  # readers leave things as they are
    assert kept(tmp_path) == ["1", "2", "3.orbax-checkpoint-tmp-0"]
    manager = training_checkpoint.open_manager(tmp_path, 2)
    assert manager.latest_step() == 1
    assert kept(tmp_path) == ["1", "2.broken-0"]
    training_checkpoint.save(manager, CFG, *state_at(2), {})
    training_checkpoint.finish(manager)
    assert kept(tmp_path) == ["1", "2", "2.broken-0"]


def test_a_damaged_checkpoint_is_named_and_what_to_do(tmp_path):
    save(tmp_path, 1, 2)
    for file in (tmp_path / "checkpoints" / "2" / "model").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    (tmp_path / "checkpoints" / "2" / "hashes.json").unlink()  # as version 0.1 wrote it
    with pytest.raises(InputError, match=r"checkpoints/2 cannot be read: .* Move it away"):
        training_checkpoint.restore(training_checkpoint.open_manager(tmp_path), *state_at(0))
    shutil.move(tmp_path / "checkpoints" / "2", tmp_path / "damaged")
    assert (
        training_checkpoint.restore(training_checkpoint.open_manager(tmp_path), *state_at(0))[0][
            "step"
        ]
        == 1
    )


def cut(file):
    file.write_bytes(file.read_bytes()[:-10])


def empty(file):
    file.write_bytes(b"")


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, empty, flip], ids=lambda f: f.__name__)
@pytest.mark.parametrize("item", ["model", "optimizer"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(
    item, damage, tmp_path, caplog
):
    save(tmp_path, 1, 2)
    files = (tmp_path / "checkpoints" / "2" / item / "ocdbt.process_0" / "d").iterdir()
    damage(max(files, key=lambda file: file.stat().st_size))
    manager = training_checkpoint.open_manager(tmp_path, 2)
    state, frozen, notes = training_checkpoint.restore(manager, *state_at(0))
    jax.tree.map(np.testing.assert_array_equal, (state, frozen), state_at(1))
    assert notes["stepping"] == 1.0
    assert kept(tmp_path) == ["1", "2.broken-0"]
    (line,) = [r.getMessage() for r in caplog.records if r.name.startswith("blip3o_jax")]
    assert f"checkpoints/2/{item}/ocdbt.process_0/d/" in line
    assert line.endswith("It is set aside as 2.broken-0.")
    # The step is saved again under its number.
    training_checkpoint.save(manager, CFG, *state_at(2), {})
    training_checkpoint.finish(manager)
    assert kept(tmp_path) == ["1", "2", "2.broken-0"]


def test_a_run_that_has_damaged_checkpoints_alone_does_not_begin_anew(tmp_path):
    save(tmp_path, 1)
    flip(tmp_path / "checkpoints" / "1" / "notes" / "metadata")
    for _ in range(2):
        sentence = r"holds damaged checkpoints alone \(1\.broken-0\); restore one under its number"
        with pytest.raises(InputError, match=sentence):
            training_checkpoint.open_manager(tmp_path)


def test_a_folder_that_cannot_be_written_is_named():
    with pytest.raises(InputError, match=r"The checkpoints /proc/checkpoints cannot be written: "):
        training_checkpoint.open_manager("/proc")


SAVE = """
import sys
sys.path[:0] = sys.argv[3:]
from pathlib import Path
from test_training_checkpoint import InputError, kept, save
try:
    save(Path(sys.argv[1]), int(sys.argv[2]), size=4_000_000 if sys.argv[2] == "2" else 8)
except InputError as error:
    print(error)
print(*kept(Path(sys.argv[1])))
"""


def test_a_full_disk_is_one_sentence_and_leaves_the_checkpoints_before(tmp_path):
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", tmp_path], capture_output=True
    ).returncode:
        pytest.skip("only root can make a small disk")
    here = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    printed = []
    try:
        for step in "123":  # the second does not fit
            command = [sys.executable, "-c", SAVE, str(tmp_path), step, *here]
            printed += subprocess.run(
                command, capture_output=True, text=True, timeout=120
            ).stdout.splitlines()
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)
    first, sentence, second, third = printed
    assert first == "1"
    assert sentence == (
        f"A checkpoint cannot be written to {tmp_path}/checkpoints: No space left on "
        "device; those before it are whole."
    )
    assert "1" in second.split()
    assert "2" not in second.split()
    assert third == "1 3"
