"""Rewards together: their order and weights, what pauses a run, and what ends it."""

import importlib
import json
import multiprocessing
import os
import threading
import time
from dataclasses import asdict

import numpy as np
import pytest

from blip3o_jax.cli import main
from blip3o_jax.errors import InputError, RewardError
from blip3o_jax.rl.rewards import scoring
from blip3o_jax.rl.rewards.http import Unreachable
from blip3o_jax.rl.rewards.protocol import named
from blip3o_jax.rl.rewards.scoring import scorer
from blip3o_jax.rl.rollout import numbers_of
from blip3o_jax.scenes import prompts
from blip3o_jax.scenes.config import WorldConfig
from blip3o_jax.scenes.scene import compose
from blip3o_jax.train.read_config import read_config, saved_config

DRAWN = [prompts.sample(WorldConfig(seed=1), i) for i in range(2)]
ASKED = [metadata for metadata, _ in DRAWN]
IMAGES = np.stack([compose(scene) for _, scene in DRAWN])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(scoring, "PAUSE", 0.02)
    monkeypatch.setattr(scoring, "TICK", 0.01)


def ask(rewards, timeout, images=IMAGES, watched=(), **options):
    with scorer(rewards, timeout, watched) as score:
        return score(images, ASKED, **options)()


def test_columns_are_in_the_order_of_the_rewards():
    seen = []

    def own(images, texts, metadata, sources):
        seen.append((len(images), texts, metadata, sources))
        return [0.25, float("nan")]

    every = {"own": own, "strict": named("strict"), "scenes": named("scenes")}
    rewards, columns = ask(every, 60.0)
    numbers = numbers_of([columns])
    np.testing.assert_array_equal(rewards, [[0.25, 1, 1], [np.nan, 1, 1]])
    assert seen == [(2, [m["prompt"] for m in ASKED], ASKED, [[], []])]
    assert numbers == {"score": 1.0, "correct": 1.0, "strict": 1.0, "reward/own": 0.25}


def test_what_is_watched_is_logged_and_is_no_reward():
    every = {"own": lambda *_: [0.25, 0.5], "other": lambda *_: [3.0, float("nan")]}
    rewards, columns = ask(every, 60.0, watched=("other",))
    numbers = numbers_of([columns])
    np.testing.assert_array_equal(rewards, [[0.25], [0.5]])
    assert numbers == {"reward/own": 0.375, "watched/other": 3.0}


def wrong(answer):
    def reward(*_):
        if isinstance(answer, Exception):
            raise answer
        return answer

    return reward


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ([1.0], "The reward 'own' gives 1 number for 2 images."),
        ([[1.0, 2.0], [1.0, 2.0]], "The reward 'own' gives 4 numbers for 2 images."),
        ([1.0, float("inf")], "The reward 'own' gives a number that is not finite."),
        (["a", 1.0], "The reward 'own' gives no numbers: could not convert string to float"),
        (KeyError("word"), "The reward 'own' fails: KeyError: 'word'."),
        (InputError("It says no."), "It says no."),
    ],
)
def test_a_reward_that_fails_is_one_sentence(answer, sentence):
    with pytest.raises(RewardError) as error:
        ask({"own": wrong(answer)}, 60.0)
    assert str(error.value).startswith(sentence)


def test_a_reward_that_hangs_is_one_sentence():
    release = threading.Event()
    with pytest.raises(RewardError, match=r"'own' gives no answer in 0\.05 s \(grpo\.reward_time"):
        ask({"own": lambda *_: release.wait(60)}, 0.05)
    release.set()


OWN = """
import os, time

def first_pixel(images, prompts, metadata, sources):
    assert len(images) == len(prompts) == len(metadata) == len(sources)
    return [float(image[0, 0, 0]) for image in images]

def process(images, *_):
    return [float(os.getpid()) for image in images]

def fail(images, *_):
    raise KeyError("word")

def hang(*_):
    time.sleep(600)
"""


def test_what_is_busy_works_in_other_processes_which_end_with_the_run(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("own_rewards")
    monkeypatch.setattr(scoring, "cores", lambda: 2)
    with scoring._processes() as begin:
        images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
        arguments = images, ["a cat"] * 5, [{}] * 5, [[]] * 5
        late = time.monotonic() + 60
        assert scoring._wait(begin(own.first_pixel, arguments), late) == [0, 1, 2, 3, 4]
        assert os.getpid() not in scoring._wait(begin(own.process, arguments), late)
        assert isinstance(scoring._wait(begin(own.fail, arguments), late), KeyError)
        hung = begin(own.hang, arguments)
        assert isinstance(scoring._wait(hung, time.monotonic()), scoring.Late)
        assert len(multiprocessing.active_children()) == 2
    assert multiprocessing.active_children() == []


def test_a_signal_ends_the_waiting(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(scoring.stop, "is_asked", lambda: True)
    with pytest.raises(RewardError, match="'own' was interrupted"):
        ask({"own": lambda *_: release.wait(60)}, 600.0)
    release.set()
    # What is there at once is not lost.
    rewards, _ = ask({"own": lambda *_: [1, 2]}, 600.0)
    np.testing.assert_array_equal(rewards, [[1], [2]])
    with pytest.raises(RewardError, match="It is away"):
        ask({"own": wrong(Unreachable("It is away."))}, 600.0)


def test_a_server_that_is_away_pauses_the_run_and_changes_nothing(caplog):
    answers = [Unreachable("It is away."), Unreachable("It is away."), [1.0, 2.0]]

    def own(*_):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    rewards, _ = ask({"own": own}, 60.0)
    np.testing.assert_array_equal(rewards, [[1], [2]])
    assert caplog.text.count("It is away. The run waits, for 60 s at most, and asks again.") == 2


def test_a_server_that_stays_away_ends_the_run_in_time():
    away = wrong(Unreachable("It is away."))
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"^It is away\.$"):
        ask({"own": away}, 0.2)
    assert time.monotonic() - began < 30
    with pytest.raises(RewardError, match=r"^It is away\.$"):  # at the start of a run, at once
        ask({"own": away}, 1e9, pauses=False)


def test_a_server_that_is_asked_when_the_time_is_over_is_still_said_to_be_away():
    release, calls = threading.Event(), []

    def own(*_):
        calls.append(1)
        if len(calls) == 1:
            raise Unreachable("It is away.")
        release.wait(60)

    with pytest.raises(RewardError, match=r"^It is away\.$"):
        ask({"own": own}, 0.2)
    assert len(calls) == 2
    release.set()


def test_what_can_be_known_is_refused_before_anything_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("blip3o_jax.rl.rewards.http.time.sleep", lambda _: None)
    monkeypatch.setattr("blip3o_jax.rl.rewards.ocr.check_extra", lambda: None)
    config = ["--config", "emoji_grpo", "--config.init=emoji_64"]
    for rewards, sentence in {
        '{"scene": 1}': "There is no reward 'scene'; did you mean 'scenes'?",
        '{"http://": 1}': "The reward server 'http://' names no host;",
        '{"ocr": 1}': "has nothing to say of these prompts; set data.text_fraction above 0.",
        '{"edit_kept": 1}': "has nothing to say of these prompts; set data.edits above 0.",
        '{"http://127.0.0.1:9/": 1}': "The reward server http://127.0.0.1:9/ fails: ",
        '{"scenes": -1}': "grpo.rewards are weights above 0, not -1 (scenes).",
    }.items():
        options = [*config, f"--config.grpo.rewards={rewards}"]
        assert main(["grpo", *options, "--workdir", str(tmp_path / "run")]) == 2
        assert sentence in capsys.readouterr().err
    same = "grpo.watched: 'strict' is not independent of the reward 'scenes'; name a judge of"
    options = [*config, '--config.grpo.rewards={"scenes": 1}', '--config.grpo.watched=["strict"]']
    assert main(["grpo", *options, "--workdir", str(tmp_path / "run")]) == 2
    assert same in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("share", "rewards"),
    [(0, {"scenes": 1}), (0.25, {"scenes": 0.75, "strict": 0.25}), (1.0, {"strict": 1.0})],
)
def test_the_strict_share_of_earlier_configs_keeps_its_meaning(share, rewards, caplog):
    assert read_config("emoji_grpo", []).grpo.rewards == {"scenes": 0.5, "strict": 0.5}
    cfg = read_config("emoji_grpo", [f"--config.grpo.strict={share}"])
    assert cfg.grpo.rewards == rewards
    assert "grpo.strict is now called grpo.rewards" in caplog.text
    # In the workdir of an earlier run too.
    values = json.loads(json.dumps(asdict(cfg)))
    del values["grpo"]["rewards"], values["grpo"]["reward_timeout"]
    values["grpo"]["strict"] = float(share)
    assert saved_config(values) == cfg


def test_pictures_of_another_size_are_refused_by_the_judge():
    sentence = r"The judge of scenes looks at images of \(64, 64, 3\), not \(32, 32, 3\)\."
    with pytest.raises(InputError, match=sentence):
        named("scenes")([np.zeros((32, 32, 3), np.uint8)], ["a cat"], ASKED[:1], [[]])
