from types import SimpleNamespace

import numpy as np
import pytest

from blip3o_jax.cli import build_parser, main
from blip3o_jax.data import mixture
from blip3o_jax.errors import MAX_SEED, InputError, check_seed
from blip3o_jax.jobs.options import settings_of
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.pipeline import Pipeline
from blip3o_jax.presets import preset
from blip3o_jax.sample.generate import sample_key
from blip3o_jax.sample.settings import EditSettings

COMMANDS = [["generate", "a cat"], ["edit", "a.png", "make it blue"], ["evaluate", "scenes"]]
RUNS = [
    ["train", "--config", "emoji_joint", "--workdir", "w"],
    ["grpo", "--config", "emoji_grpo", "--workdir", "w"],
    ["data", "check", "--config", "sft_3b", "--out", "w"],
    ["data", "stats", "--config", "sft_3b"],
    ["data", "cache", "--config", "sft_3b", "--out", "w"],
    ["plan", "--config", "emoji_joint"],
]


@pytest.mark.parametrize("seed", [0, 7, MAX_SEED, np.uint32(MAX_SEED), np.int64(7)])
def test_a_seed_of_32_bits_is_the_whole_key(seed):
    check_seed(seed)
    assert sample_key(seed, "a cat", 3)[::2] == (seed, 3)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**32 + 7, 2**63, 1.0, True, "7", None])
def test_any_other_seed_is_refused(seed):
    sentence = "The seed is a whole number from 0 to 4294967295, not "
    pipeline = SimpleNamespace(model=Blip3o(preset("emoji_64")))
    for call, given in ((Pipeline.samples, (["a cat"],)), (Pipeline.edit, ("a.png", "x"))):
        with pytest.raises(InputError) as error:
            call(pipeline, *given, seed=seed)
        assert str(error.value) == f"{sentence}{seed!r}."


@pytest.mark.parametrize("seed", [-1, 2**32 + 7, 2**63])
@pytest.mark.parametrize("argv", [*COMMANDS, *RUNS], ids=" ".join)
def test_every_command_says_the_range(argv, seed, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overridable = argv in RUNS
    # --seed of a command, seed of a run
    asked = [f"--config.seed={seed}"] if overridable else ["--seed", str(seed)]
    assert main([*argv, *asked]) == 2
    name = "seed" if overridable else "--seed"
    sentence = f"blip3o-jax: {name} is a whole number from 0 to 4294967295, not {seed}.\n"
    assert capsys.readouterr().err == sentence
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("task", ["edits", "drift"])
def test_the_evaluation_of_edits_has_the_same_range(task):
    args = build_parser().parse_args(["evaluate", task, "--seed", "-1"])
    with pytest.raises(InputError, match="--seed is a whole number from 0 to 4294967295, not -1"):
        settings_of(args, EditSettings)


def test_the_seed_of_the_embedded_world_has_the_same_range(capsys):
    argv = ["train", "--config", "emoji_joint", "--workdir", "w", "--config.data.seed=-1"]
    assert main(argv) == 2
    assert "data.seed is a whole number from 0 to 4294967295, not -1" in capsys.readouterr().err


def test_the_last_seed_orders_every_source_of_a_mixture():
    source = type("Source", (), {"blocks": None, "__len__": lambda self: 5})()
    readers = [lambda i, epoch, k=k: (k, i) for k in range(2)]
    rows = mixture.mixture(readers, [source, source], (1, 1), MAX_SEED)
    assert sorted(rows[i] for i in range(10)) == [(k, i) for k in range(2) for i in range(5)]
