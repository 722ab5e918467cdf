"""One owner of a workdir, who may be killed, or be on another host."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from tiny import practice

from blip3o_jax.errors import InputError
from blip3o_jax.train import owner
from blip3o_jax.train.workdir import own_workdir

HOLD = "import sys, time, pathlib; from blip3o_jax.train import owner\n"
HOLD += "with owner.own(pathlib.Path(sys.argv[1])): print('owns', flush=True); time.sleep(60)"


def another(workdir):
    """A process that owns the workdir."""
    command = [sys.executable, "-c", HOLD, str(workdir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"owns\n"
    return process


def test_a_second_start_is_refused_and_a_killed_owner_is_none(tmp_path):
    with another(tmp_path) as process:
        who = f"is in use by process {process.pid} on {socket.gethostname()}; end that run"
        with pytest.raises(InputError, match=who), owner.own(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / "owner.json").exists()
    began = time.monotonic()
    with owner.own(tmp_path):
        assert json.loads((tmp_path / "owner.json").read_text())["process"] == os.getpid()
    assert time.monotonic() - began < 5
    assert not (tmp_path / "owner.json").exists()


def test_a_second_run_leaves_the_checkpoint_that_the_first_is_writing(tmp_path):
    run = tmp_path / "run"
    with own_workdir(practice(), run):
        unfinished = run / "checkpoints" / "5.orbax-checkpoint-tmp-0"
        unfinished.mkdir(parents=True)
        with pytest.raises(InputError, match="is in use by"), own_workdir(practice(), run):
            pass
        assert unfinished.exists()
        assert (run / "config.json").exists()
    assert sorted(path.name for path in run.iterdir()) == [
        *("checkpoints", "config.json", "tokenizer.json")
    ]


@pytest.mark.parametrize("lives", [True, False])
def test_an_owner_on_another_host_lives_as_long_as_its_heart_beats(lives, tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "SILENCE", 1.0)
    file = tmp_path / "owner.json"
    file.write_text(json.dumps({"host": "elsewhere", "process": 7, "boot": "x", "started": "1"}))
    os.utime(file, (1e9, 1e9))  # clocks differ
    if lives:
        threading.Timer(0.3, os.utime, [file, (2e9, 2e9)]).start()
        with pytest.raises(InputError, match="process 7 on elsewhere"), owner.own(tmp_path):
            pass
    else:
        with owner.own(tmp_path):
            assert json.loads(file.read_text())["host"] == socket.gethostname()


def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "HEARTBEAT", 0.05)
    file = tmp_path / "owner.json"
    with owner.own(tmp_path):
        os.utime(file, (1e9, 1e9))
        deadline = time.monotonic() + 20
        while file.stat().st_mtime == 1e9 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert file.stat().st_mtime > 1e9


def test_a_touch_that_is_under_way_leaves_no_owner_behind(tmp_path, monkeypatch):
    """In a bucket it reads the file and writes it again."""
    begun, ended = threading.Event(), threading.Event()

    def touch(file):
        text = file.read_bytes()
        begun.set()
        time.sleep(0.3)
        file.write_bytes(text)
        ended.set()

    monkeypatch.setattr(owner, "HEARTBEAT", 0.01)
    monkeypatch.setattr(owner.paths, "touch", touch)
    with owner.own(tmp_path):
        assert begun.wait(20)
    assert ended.wait(20)
    assert not (tmp_path / "owner.json").exists()
