"""A run that goes on with another config: what is taken, what is refused, and what is asked for."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from tiny import OPTIMIZER, from_step, practice, rows_at

from blip3o_jax import checkpoints
from blip3o_jax.cli import main
from blip3o_jax.data.config import DataConfig, SourceConfig
from blip3o_jax.errors import InputError
from blip3o_jax.jobs.grpo import keep_identities
from blip3o_jax.train import loop
from blip3o_jax.train.config import ProfileConfig, TrainConfig
from blip3o_jax.train.metrics import MetricWriter
from blip3o_jax.train.optimizer import schedule
from blip3o_jax.train.resume import changes, holds_other_arrays, is_free, is_moved
from blip3o_jax.train.workdir import open_workdir, own_workdir

CONSTANT = dataclasses.replace(OPTIMIZER, final_learning_rate=OPTIMIZER.learning_rate)


def train(cfg, workdir, allowed=()):
    """{step: loss} and the weights of a run, resumed where the workdir holds a checkpoint."""
    open_workdir(cfg, workdir, allowed)
    loop.run(cfg, workdir, loop.supervised(cfg, from_step(rows_at), rows_at(10**6), None))
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    return losses, checkpoints.open(workdir).load(("qwen3",))


def test_a_finished_run_trains_on_with_its_moments_on_another_mesh(tmp_path, caplog):
    caplog.set_level("INFO")
    train(practice(optimizer=CONSTANT, mesh={"fsdp": 8}), tmp_path / "run")
    train(practice(optimizer=CONSTANT, mesh={"fsdp": 8}), tmp_path / "run")
    assert f"The run in {tmp_path / 'run'} is finished, at step 6" in caplog.text
    longer = practice(
        optimizer=CONSTANT, num_steps=8, mesh={"data": 2, "fsdp": 2, "tensor": 2}, accumulate=2
    )
    with pytest.raises(InputError, match=r"of another config \(num_steps: 6 there, 8 here\)"):
        train(longer, tmp_path / "run")
    losses, params = train(longer, tmp_path / "run", ("num_steps",))
    assert "Resumed with mesh.fsdp 2, not 8." in caplog.text
    assert "Resumed with num_steps 8, not 6." in caplog.text
    # As one that was that long from its start, the mesh's rounding apart.
    whole_losses, whole = train(longer, tmp_path / "whole")
    assert list(losses) == [1, 2, 3, 4, 5, 6, 7, 8]
    np.testing.assert_allclose(list(losses.values()), list(whole_losses.values()), rtol=1e-5)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(whole), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["num_steps"] == 8
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rates = [row["learning_rate"] for row in map(json.loads, lines) if "loss" in row]
    assert rates == pytest.approx([0.0] + [0.01] * 7)
    with pytest.raises(InputError, match=r"num_steps 6 is below step 8, which the run in .* has"):
        train(practice(optimizer=CONSTANT), tmp_path / "run", ("num_steps",))


def test_the_new_course_of_the_learning_rate_is_printed(tmp_path, caplog):
    caplog.set_level("INFO")
    open_workdir(practice(num_steps=100), tmp_path)
    (tmp_path / "checkpoints").mkdir()
    now = practice(num_steps=200, log_every=7)
    open_workdir(now, tmp_path, ("num_steps",))
    line = next(line for line in caplog.messages if line.startswith("Learning rate: "))
    rates = re.findall(r"(\S+) at step (\d+)", line)
    expected = {n: float(schedule(now.optimizer, 200)(n - 1)) for n in (1, 50, 100, 150, 200)}
    assert {int(n): float(rate) for rate, n in rates} == pytest.approx(expected, rel=1e-2)
    assert "Resumed with log_every 7, not 1." in caplog.messages


SOURCES = (SourceConfig("webdataset", "/a/cats/*.tar"), SourceConfig("jsonl", "/a/dogs.jsonl"))


def mine(**data):
    return TrainConfig(stage="joint", data=DataConfig(**{"sources": SOURCES, **data}))


def moved(*paths):
    pairs = zip(SOURCES, paths, strict=True)
    return mine(sources=tuple(dataclasses.replace(one, path=path) for one, path in pairs))


@pytest.mark.parametrize(
    ("now", "keys", "free"),
    [
        ({"mesh": {"data": 2}, "topology": "v5e:4x4"}, ["mesh.data", "topology"], True),
        ({"accumulate": 2, "remat": "dots"}, ["accumulate", "remat"], True),
        ({"profile": ProfileConfig(3, 2)}, ["profile.start", "profile.steps"], True),
        ({"keep_checkpoints": 9, "eval_every": 3}, ["eval_every", "keep_checkpoints"], True),
        (mine(reader_threads=2), ["data.reader_threads"], True),
        (moved("/b/cats/*.tar", "/b/dogs.jsonl"), 2, True),
        (moved("/a/birds/*.tar", "/a/dogs.jsonl"), ["data.sources.0.path"], False),
        (moved("/a/cats/*.tar", "/a/more.jsonl"), ["data.sources.1.path"], False),
        (mine(sources=SOURCES[:1]), ["data.sources.1.kind", "data.sources.1.path"], False),
        (mine(heldout=8), ["data.heldout"], False),
        (mine(crop="original"), ["data.crop"], False),
        ({"seed": 1}, ["seed"], False),
        ({"batch_size": 32}, ["batch_size"], False),
        ({"dtype": "bfloat16"}, ["dtype"], False),
        ({"optimizer": OPTIMIZER}, ["optimizer.learning_rate", "optimizer.eps"], False),
    ],
    ids=str,
)
def test_keys_that_change_no_number_are_taken_and_others_are_not(now, keys, free):
    before = mine()
    now = dataclasses.replace(before, **now) if isinstance(now, dict) else now
    differing = changes(before, now)
    assert len(differing) == keys if isinstance(keys, int) else set(keys) <= set(differing)
    listed = differing if isinstance(keys, int) else keys
    assert {is_free(key, *differing[key]) for key in listed} == {free}


def test_files_of_a_pattern_are_the_same_where_their_folders_are():
    for before, now in (
        ("d/train/????.tar", "d/val/????.tar"),
        ("x/train/*/*.tar", "x/val/*/*.tar"),
    ):
        assert not is_moved(before, now)
        assert is_moved(before, f"/mnt/{before}")
    assert not is_moved("d/a/[0-9].tar", "d/b/[0-9].tar")


def test_halves_and_methods_that_hold_other_arrays_are_told_apart():
    assert holds_other_arrays("grpo.train", "diffusion", "joint")
    assert not holds_other_arrays("grpo.train", "alternating", "joint")
    assert holds_other_arrays("grpo.diffusion.method", "ram", "flow_grpo")
    assert not holds_other_arrays("grpo.diffusion.method", "ram", "nft")


def test_reinforcement_goes_on_beside_the_weights_that_it_began_with(tmp_path):
    cfg = TrainConfig(stage="grpo", init="emoji_64")
    keep_identities(tmp_path, cfg)
    keep_identities(tmp_path, cfg)
    file = tmp_path / "init.json"
    assert json.loads(file.read_text()) == {"qwen3": checkpoints.open("emoji_64").identity}
    file.write_text('{"qwen3": "joint/20@0123"}')
    with pytest.raises(InputError, match=r"began with joint/20@0123, and emoji_64 is emoji_64@"):
        keep_identities(tmp_path, cfg)


@pytest.mark.parametrize("damage", [b"\0" * 9, b'{"step": \xff}'])
def test_what_a_crash_has_spoilt_stops_no_run(tmp_path, damage):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 2}\n{"step": 3}\n{"step": 2}')
    MetricWriter(tmp_path, step=2)
    assert file.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    (tmp_path / "config.json").write_bytes(damage)
    with (
        pytest.raises(InputError, match=r"config.json is no config of a run"),
        own_workdir(practice(), tmp_path),
    ):
        pass


def test_what_changes_the_arrays_is_never_taken(tmp_path):
    open_workdir(practice(), tmp_path)
    without = practice(optimizer=dataclasses.replace(OPTIMIZER, ema_decay=0.0))
    sentence = r"optimizer\.ema_decay: 0\.9 there, 0\.0 here\), whose checkpoints hold other arrays"
    with pytest.raises(InputError, match=sentence):
        open_workdir(without, tmp_path, ("optimizer",))
    slower = practice(optimizer=dataclasses.replace(OPTIMIZER, learning_rate=1e-3), seed=3)
    hint = r"or resume with --allow optimizer\.learning_rate,seed\.$"
    with pytest.raises(InputError, match=hint):
        open_workdir(slower, tmp_path, ("num_steps",))
    with pytest.raises(InputError, match="--allow sed: there is no such config key; did you mean"):
        open_workdir(slower, tmp_path, ("sed",))
    open_workdir(slower, tmp_path, ("optimizer", "seed"))
    open_workdir(slower, tmp_path)  # the same command again, as a launcher gives it


def test_the_command_takes_the_permission(tmp_path, capsys):
    open_workdir(practice(), tmp_path / "run")
    argv = ["train", "--config", "emoji_recital", "--workdir", str(tmp_path / "run")]
    assert main([*argv, "--allow", "num_steps,seed"]) == 2
    assert "is of another config (" in capsys.readouterr().err
    assert main([*argv, "--allow", "num_steps,sed"]) == 2
    assert "--allow sed: there is no such config key" in capsys.readouterr().err


def test_a_start_that_fails_leaves_the_config_as_it_was(tmp_path):
    open_workdir(practice(), tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with (
        pytest.raises(InputError, match="no such mesh"),
        own_workdir(practice(seed=1), tmp_path, ("seed",)),
    ):
        raise InputError("no such mesh")
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0
