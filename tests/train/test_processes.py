"""Two processes on this machine, as a cluster starts them; and the proofs of a README line, a few
rounds of each."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import practice
from train import equal_meshes

from blip3o_jax.errors import InputError
from blip3o_jax.parallel.processes import start_processes
from blip3o_jax.train.stop import RESTART

HERE = Path(__file__).parent


@pytest.fixture
def command(tmp_path):
    """The command line of a run on the tiny model."""
    cfg = practice()
    values = {
        "stage": "pretrain_ar",
        "model": cfg.model,
        "batch_size": 8,
        "num_steps": 100,
        "checkpoint_every": 1000,
        "log_every": 2,
    }
    values |= {"eval_every": 1000, "data": {"exercises": {"recital": 1.0}, "row_length": 34}}
    # ml_collections knows no key with a dot, as the changes to a model have.
    code = (
        "from types import SimpleNamespace\n"
        f"def get_config():\n    return SimpleNamespace(to_dict=lambda: {values!r})\n"
    )
    (tmp_path / "config.py").write_text(code)
    return [
        sys.executable,
        "-m",
        "blip3o_jax.cli",
        "train",
        "--config",
        str(tmp_path / "config.py"),
        "--workdir",
        str(tmp_path / "run"),
    ]


def slurm(command, count=2):
    """Starts `count` tasks of a SLURM step on this machine, one device each."""
    job = str(random.randrange(1 << 20))
    common = {
        "SLURM_JOB_ID": job,
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
        "SLURM_STEP_NUM_NODES": "1",
    }
    running = []
    for i in range(count):
        env = (
            os.environ | common | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "XLA_FLAGS": ""}
        )
        running.append(
            subprocess.Popen(
                command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    return running


def lines(folder):
    file = folder / "run" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_slurm_tasks_train_as_one_leave_together_and_one_process_goes_on(command, tmp_path):
    running = slurm(command)
    deadline = time.monotonic() + 240
    while (
        len(lines(tmp_path)) < 3
        and time.monotonic() < deadline
        and all(p.poll() is None for p in running)
    ):
        time.sleep(0.1)
    running[1].send_signal(signal.SIGTERM)  # the other one hears of it
    ended = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [RESTART, RESTART], ended
    steps = [line["step"] for line in lines(tmp_path)]
    assert steps == sorted(set(steps))  # one process wrote
    (saved,) = (int(folder.name) for folder in (tmp_path / "run" / "checkpoints").iterdir())
    assert steps[-1] == saved
    for i, (out, error) in enumerate(ended):
        # the result belongs to a run that has ended; Gloo says its own things
        assert "{" not in out
        assert f"Process {i} of 2 on" in error
        assert f"Saved step {saved}; the same command resumes from it." in error
    # one process resumes where two were
    alone = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert alone.returncode == 0, alone.stderr
    assert f"Resumed at step {saved}." in alone.stderr
    assert "heldout/loss" in json.loads(alone.stdout.splitlines()[-1])
    assert [line["step"] for line in lines(tmp_path)][-1] == 100


def test_a_process_whose_others_never_come_says_so(monkeypatch):
    environment = {
        "BLIP3O_COORDINATOR": "127.0.0.1:1",
        "BLIP3O_NUM_PROCESSES": "2",
        "BLIP3O_PROCESS_ID": "1",
    }
    code = "from blip3o_jax.parallel.processes import start_processes; start_processes(3)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 2
    assert found.stderr.startswith("blip3o-jax: Process 1 of 2 on ")
    assert "the others did not come to 127.0.0.1:1 within 3 s." in found.stderr
    for name, value in (environment | {"BLIP3O_PROCESS_ID": "2"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="a number below N"):
        start_processes()


@pytest.mark.parametrize("stage", equal_meshes.STAGES)
def test_two_processes_with_all_axes_and_micro_batches_give_the_steps_of_one_device(stage):
    name, one = list(equal_meshes.PROCESSES)[-1], {"1 device": equal_meshes.VARIANTS["1 device"]}
    found = equal_meshes.differences(3, one, [name], stage)
    assert 0 < max(found[name].values()) < equal_meshes.LIMIT  # other sums, so other bits


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_goes_on_from_a_whole_checkpoint_to_the_same_bits(processes):
    command = [
        sys.executable,
        str(HERE / "kill_rounds.py"),
        "--rounds",
        "2",
        "--processes",
        str(processes),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["rounds"] == 2
    assert report["runs_finished"] >= 1
    assert report["resumed"] >= 1
    assert report["runs_with_other_bits"] == report["resumed_elsewhere_than_newest_whole"] == 0
