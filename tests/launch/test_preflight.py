"""Preflight for real: alone, as two processes of a SLURM step on loopback, and with what it must
find wrong."""

import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

PREFLIGHT = Path(__file__).resolve().parents[2] / "launch" / "preflight.py"


def start(workdir, *options: str, **variables: str) -> subprocess.Popen:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "BLIP3O_", "XLA_FLAGS"))
    }
    command = [sys.executable, PREFLIGHT, "--workdir", str(workdir), *options]
    return subprocess.Popen(
        command,
        env=inherited | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process: subprocess.Popen) -> tuple[int, list[str]]:
    """(exit code, its own lines without the host's name in front)."""
    printed, _ = process.communicate(timeout=240)
    host = f"{socket.gethostname()} "
    return process.returncode, [
        line.removeprefix(host) for line in printed.splitlines() if line.startswith(host)
    ]


def slurm(process: int, count: int, job: int) -> dict[str, str]:
    """The variables that srun sets and jax.distributed reads."""
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(process),
        "SLURM_LOCALID": str(process),
    }


def test_two_processes_of_a_slurm_step_add_up(tmp_path):
    job = random.Random(os.getpid()).randrange(1 << 20)  # jax takes the coordinator's port from it
    started = [
        start(tmp_path / "run", "--processes", "2", "--timeout", "120", **slurm(i, 2, job))
        for i in range(2)
    ]
    for i, (code, lines) in enumerate(map(outcome, started)):
        assert code == 0, lines
        assert [line.split(":")[0] for line in lines] == [
            "versions",
            "workdir",
            "data",
            "processes",
            "devices",
            "all_reduce",
        ]
        assert lines[3] == f"processes: ok, this is {i} of 2"
        assert "1 of 2 devices are local" in lines[4]
        assert "2 devices add up" in lines[5]
    assert list(tmp_path.iterdir()) == []  # nothing is left, and the workdir is the run's to make


def test_a_missing_process_is_told_in_time(tmp_path):
    began = time.monotonic()
    code, lines = outcome(
        start(
            tmp_path,
            "--timeout",
            "5",
            **slurm(0, 2, random.Random(os.getpid() + 1).randrange(1 << 20)),
        )
    )
    assert code == 1
    assert lines[-1].startswith("processes: FAILED")
    assert time.monotonic() - began < 90


@pytest.fixture
def config(tmp_path):
    """A config whose only source is a file beside it."""
    values = {
        "stage": "joint",
        "data": {"sources": [{"kind": "jsonl", "path": str(tmp_path / "data" / "*.jsonl")}]},
    }
    file = tmp_path / "mine.py"
    file.write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n    return "
        f"ConfigDict({values!r})\n"
    )
    return file


def test_data_must_be_there_and_devices_as_planned(tmp_path, config):
    code, lines = outcome(start(tmp_path, "--config", str(config)))
    assert code == 1
    assert lines[-1].startswith("data: FAILED")
    assert "data/*.jsonl names no file" in lines[-1]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text(json.dumps({"image": "a.png", "caption": "a"}))
    code, lines = outcome(start(tmp_path, "--config", str(config), "--topology", "v5e:2x2"))
    assert code == 1
    assert lines[2].startswith("data: ok")
    assert "v5e:2x2 has 4 of TPU v5 lite" in lines[-1]


def test_the_prompts_of_grpo_must_be_there(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    argv = ["--config", "grpo_3b", "--config.init=emoji_64", "--config.data.tokenizer="]
    argv += [f"--config.data.prompts={prompts}"]
    code, lines = outcome(start(tmp_path, *argv))
    assert code == 1
    assert f"{prompts} names no file" in lines[-1]
    prompts.write_text('{"prompt": "a cat"}')
    _, lines = outcome(start(tmp_path, *argv))
    assert lines[2] == f"data: ok, {prompts}, emoji_64"


def test_an_embedded_checkpoint_is_there_and_an_absent_one_is_named(tmp_path):
    config = ["--config", "emoji_finetune", "--timeout", "100"]
    code, lines = outcome(start(tmp_path, *config))
    assert code == 0, lines
    assert lines[2] == "data: ok, emoji_64"
    code, lines = outcome(start(tmp_path, *config, "--config.init=emoji_46"))
    assert code == 1
    assert lines[-1].startswith("data: FAILED, No checkpoint 'emoji_46'")
    assert "did you mean 'emoji_64'" in lines[-1]


def test_the_devices_of_the_config_must_be_there(tmp_path):
    """Its own topology, and a batch that divides over them."""
    values = {"stage": "autoencoder", "topology": "v5e:2x2", "batch_size": 6}
    config = tmp_path / "mine.py"
    config.write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n    return "
        f"ConfigDict({values!r})\n"
    )
    options = ["--config", str(config), "--timeout", "100"]
    code, lines = outcome(start(tmp_path, *options))
    assert code == 1
    assert lines[-1].startswith("devices: FAILED, 1 of 1 devices are local, cpu;")
    assert "v5e:2x2 has 4 of TPU v5 lite; name the config's own" in lines[-1]
    elsewhere = [*options, "--config.topology="]
    code, lines = outcome(start(tmp_path, *elsewhere))
    assert (code, lines[4]) == (0, "devices: ok, 1 of 1 devices are local, cpu")
    devices = "--xla_force_host_platform_device_count=4"
    code, lines = outcome(start(tmp_path, *elsewhere, XLA_FLAGS=devices))
    assert code == 1
    assert "batch_size 6 does not divide by the mesh's 4 batch shards" in lines[-1]


@pytest.mark.parametrize(
    ("workdir", "sentence"),
    [("/proc/nothing/here", "cannot be written"), ("ftp://host/run", "not with ftp://")],
)
def test_a_workdir_that_cannot_be_one(workdir, sentence):
    code, lines = outcome(start(workdir))
    assert code == 1
    assert lines[-1].startswith("workdir: FAILED")
    assert sentence in lines[-1]
