"""Signals to a process of its own, from its first moment to its last."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blip3o_jax.train import stop

# Each in `handled`, as the command line does it; "ready" when the signal may come.
PHASES = {
    "starting": "with stop.handled(True): print('ready', flush=True); time.sleep(60)",
    # C code that returns to Python in some minutes, as a compiler does
    "compiling": "with stop.handled(True): print('ready', flush=True); "
    "hashlib.pbkdf2_hmac('sha256', b'a', b'b', 300_000_000)",
    "ending": "with stop.handled(True): pass\n    print('ready', flush=True); time.sleep(2)",
}
SCRIPT = """
import hashlib, sys, time
from blip3o_jax.train import stop
stop.PATIENCE = 0.5
try:
    {phase}
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_while_garbage_is_collected_is_not_lost(number, code):
    """What a handler raises in a callback of the collector, Python prints and forgets."""
    phase = f"""
    import gc, os
    collecting = lambda phase, info: phase == "stop" and os.kill(os.getpid(), {number:d})
    with stop.handled():
        gc.callbacks.append(collecting)
        gc.collect()
        gc.callbacks.remove(collecting)
        time.sleep(10)
"""
    command = [sys.executable, "-c", SCRIPT.format(phase=phase)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stderr) == (code, "")


@pytest.mark.parametrize(
    ("phase", "number", "code"),
    [
        ("starting", signal.SIGTERM, 75),
        ("starting", signal.SIGUSR1, 75),
        ("starting", signal.SIGINT, 130),
        ("compiling", signal.SIGTERM, 75),
        ("compiling", signal.SIGINT, 130),
        ("ending", signal.SIGTERM, 0),  # nothing is left to be resumed
    ],
)
def test_a_signal_ends_a_process_with_the_code_that_launchers_know(phase, number, code):
    command = [sys.executable, "-c", SCRIPT.format(phase=PHASES[phase])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.3)
        began = time.monotonic()
        process.send_signal(number)
        process.communicate(timeout=30)
    assert process.returncode == code
    assert time.monotonic() - began < 20


def test_the_command_leaves_with_75_while_it_starts(tmp_path):
    command = [sys.executable, "-m", "blip3o_jax.cli", "train", "--config", "emoji_recital"]
    command += ["--workdir", str(tmp_path / "run")]
    config = tmp_path / "run" / "config.json"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not config.exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=120)
    assert process.returncode == 75, error
    assert "Traceback" not in error
    assert "SIGTERM: the run ends without a save." in error


def test_one_of_several_processes_waits_until_all_know(monkeypatch):
    """Whoever left a wait alone would end with another code than the others."""
    monkeypatch.setattr(stop, "_received", [signal.SIGUSR1])
    assert stop.is_asked()
    monkeypatch.setattr(stop, "_is_one_of_several", lambda: True)
    assert not stop.is_asked()
