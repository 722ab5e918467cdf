import dataclasses
import json
import os
import re
import signal

import jax
import numpy as np
import pytest
from tiny import batch_at, config, from_step, practice, rows_at

from blip3o_jax import checkpoints, training_checkpoint
from blip3o_jax.convert.random_weights import random_params
from blip3o_jax.errors import InputError
from blip3o_jax.scenes.exercises import name_ids
from blip3o_jax.train import loop, start
from blip3o_jax.train.config import ProfileConfig


def test_named_image_tokens_start_as_their_words():
    table = np.random.default_rng(0).standard_normal((10, 64)).astype(np.float32)
    named = np.asarray(start.name_tokens(table, 6, np.array([2, -1, 5])))
    np.testing.assert_array_equal(named[[0, 1, 2, 3, 4, 5, 7, 9]], table[[0, 1, 2, 3, 4, 5, 7, 9]])
    for row, word in ((6, 2), (8, 5)):
        np.testing.assert_allclose(
            named[row], 0.9 * table[word] + 0.19**0.5 * table[row], rtol=1e-5
        )


def test_codes_are_named_by_words_of_the_tokenizer(tokenizer):
    ids = name_ids(tokenizer)
    assert len(ids) == tokenizer.vocab.num_image_tokens
    assert [tokenizer.tokenizer.id_to_token(int(ids[i])) for i in (0, 4, 5)] == [
        "Ġapple",
        "Ġapple",
        "Ġbanana",
    ]
    assert (ids >= 0).sum() > 150
    assert ids[-1] == -1


def train(cfg, workdir, batch_of=None):
    """(losses of all steps, weights) of a run of the tiny model."""
    batch_of = batch_of or (batch_at if cfg.stage == "joint" else rows_at)
    workdir.mkdir(exist_ok=True)
    heldout = batch_at(10**6) if cfg.stage == "joint" else rows_at(10**6)

    def load_part(name: str, part: str) -> dict:
        # `init` of all parts would compile for a minute, and `equal_meshes` has it
        return random_params(cfg.blip3o())[part]

    loop.run(cfg, workdir, loop.supervised(cfg, from_step(batch_of), heldout, load_part))
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    weights = checkpoints.open(workdir).load(("qwen3",) if cfg.stage == "pretrain_ar" else None)
    return [row["loss"] for row in rows if "loss" in row], weights


def leaves(tree):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_same_bits(tree, other):
    for name, leaf in leaves(tree).items():
        np.testing.assert_array_equal(leaf, leaves(other)[name], err_msg=name)


def test_a_joint_run_moves_all_that_is_trained_and_says_what_it_sees(tmp_path):
    losses, params = train(
        config(
            mesh={"data": 4, "fsdp": 2},
            num_steps=2,
            profile=ProfileConfig(1, 1),
            init=dict.fromkeys(("ta_tok", "sana", "dc_ae"), "random"),
        ),
        tmp_path / "run",
    )
    assert np.isfinite(losses).all()
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    parts = ("qwen3", "diffusion_connector", "sana")
    wanted = {
        "ce",
        "flow",
        "accuracy_text",
        "accuracy_image",
        "learning_rate",
        "data_wait_ms",
        "step_ms",
        "images_per_s",
        "goodput",
    }
    wanted |= {f"{kind}/{part}" for kind in ("grad_norm", "update_ratio") for part in parts}
    assert wanted <= rows[1].keys()
    assert min(rows[1][f"update_ratio/{part}"] for part in parts) > 0
    assert rows[1]["loss"] == pytest.approx(rows[1]["ce"] + rows[1]["flow"], rel=1e-6)
    assert "heldout/flow" in rows[2]
    assert (tmp_path / "run" / "sheet-000002.png").exists()
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert np.std(params["qwen3"]["norm"]["scale"]) > 0
    table = (tmp_path / "run" / "parameters.txt").read_text()
    assert table.startswith("Trained\n")
    assert (
        len(re.findall(r"^\| \w+/.*\(.*'fsdp'", table.partition("Frozen")[0], re.MULTILINE)) >= 20
    )
    assert "| dc_ae/" in table.partition("Frozen")[2]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return train(practice(), tmp_path_factory.mktemp("whole"))


def test_resuming_gives_the_bits_of_an_uninterrupted_run(uninterrupted, tmp_path, monkeypatch):
    run, save = tmp_path / "run", training_checkpoint.save

    def killed(manager, *args):
        save(manager, *args)
        manager.wait_until_finished()
        raise KeyboardInterrupt

    monkeypatch.setattr(training_checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train(practice(), run)
    monkeypatch.undo()
    losses, params = train(practice(), run)
    assert losses == uninterrupted[0]
    assert_same_bits(params, uninterrupted[1])


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
def test_a_signal_saves_the_step_and_leaves_with_the_code_that_launchers_know(
    uninterrupted, tmp_path, number, code
):
    run = tmp_path / "run"

    def preempted(step):
        if step == 3:
            os.kill(os.getpid(), number)  # while the batch of the fourth step is made
        return rows_at(step)

    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as left:
        train(practice(checkpoint_every=100), run, preempted)
    assert left.value.code == code
    assert signal.getsignal(number) is handler
    assert [child.name for child in (run / "checkpoints").iterdir()] == ["4"]
    losses, params = train(practice(checkpoint_every=100), run)
    assert losses == uninterrupted[0]
    assert_same_bits(params, uninterrupted[1])


def test_a_signal_saves_before_anything_that_takes_long(uninterrupted, tmp_path, monkeypatch):
    run = tmp_path / "run"
    supervised = loop.supervised

    def evaluated_too_late(*args):
        def killed(params):
            raise KeyboardInterrupt  # as by a scheduler whose grace is over

        return dataclasses.replace(supervised(*args), evaluate=killed)

    def preempted(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return rows_at(step)

    cfg = practice(checkpoint_every=100, eval_every=4)
    monkeypatch.setattr(loop, "supervised", evaluated_too_late)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(cfg, run, preempted)
    assert [child.name for child in (run / "checkpoints").iterdir()] == ["4"]
    monkeypatch.undo()
    losses, params = train(cfg, run)
    assert losses == uninterrupted[0]
    assert_same_bits(params, uninterrupted[1])


def test_a_second_interrupt_does_not_wait_for_the_save(tmp_path):
    def impatient(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return rows_at(step)

    with pytest.raises(KeyboardInterrupt):
        train(practice(checkpoint_every=100), tmp_path / "run", impatient)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_sigterm_after_the_last_save_is_75_and_the_next_start_gives_the_result(
    tmp_path, monkeypatch
):
    finish = training_checkpoint.finish

    def preempted(manager):
        finish(manager)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training_checkpoint, "finish", preempted)
    with pytest.raises(SystemExit) as left:
        train(practice(), tmp_path / "run")
    assert (left.value.code, left.value.step) == (75, 6)
    monkeypatch.undo()
    run = loop.supervised(practice(), from_step(rows_at), rows_at(10**6), None)
    result = loop.run(practice(), tmp_path / "run", run)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(rows[-1])
    assert result["heldout/loss"] == pytest.approx(last["heldout/loss"], rel=1e-6)


def test_micro_batches_give_the_steps_of_the_whole_batch(uninterrupted, tmp_path):
    """Rows have different weights, so that a mean of means would differ."""
    losses, params = train(
        practice(accumulate=2, mesh={"data": 2, "fsdp": 2, "tensor": 2}), tmp_path / "run"
    )
    np.testing.assert_allclose(losses, uninterrupted[0], rtol=1e-5)
    for name, leaf in leaves(params).items():
        whole = leaves(uninterrupted[1])[name]
        assert np.linalg.norm(leaf - whole) <= 1e-4 * np.linalg.norm(whole), name


def test_what_does_not_divide_or_belong_is_refused(tmp_path):
    with pytest.raises(
        InputError,
        match="batch_size 12 does not divide by the mesh's 8 batch shards; the nearest that do "
        "are 8 and 16",
    ):
        train(practice(mesh={"data": 8}, batch_size=12), tmp_path / "a")
    with pytest.raises(
        InputError, match="8 batch shards x 2 micro-batches; the nearest that does is 16"
    ):
        train(practice(mesh={"data": 8}, accumulate=2), tmp_path / "a")
    with pytest.raises(InputError, match="does not use"):
        train(practice(init={"vae": "x"}), tmp_path / "b")
