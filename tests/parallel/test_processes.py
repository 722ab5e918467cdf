"""Which process of how many this is, by the variables of launchers; and two that JAX joins, each
of which works alone."""

import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from blip3o_jax.errors import InputError
from blip3o_jax.parallel.processes import share
from blip3o_jax.train.stop import RESTART

OWN = ("SLURM_", "BLIP3O_", "TPU_WORKER", "MEGASCALE_", "CUDA_VISIBLE")


@pytest.fixture
def variables(monkeypatch):
    """Sets the environment's variables of launchers to these alone; SLURM's without its prefix."""

    def set_variables(**values):
        for name in os.environ:
            if name.startswith(OWN):
                monkeypatch.delenv(name)
        for name, value in values.items():
            full_name = name if name.startswith(OWN) else f"SLURM_{name}"
            monkeypatch.setenv(full_name, str(value))

    return set_variables


def array(task: int, first: int, last: int, step: int, count: int) -> dict[str, int]:
    """Variables of a SLURM array's task."""
    values = {"ID": task, "MIN": first, "MAX": last, "STEP": step, "COUNT": count}
    return {f"ARRAY_TASK_{name}": value for name, value in values.items()}


def step(rank: int, size: int, **more) -> dict[str, int]:
    """Variables that srun gives a task."""
    return {"STEP_NODELIST": "node", "PROCID": rank, "STEP_NUM_TASKS": size, "NTASKS": size, **more}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (0, 1)),
        (array(3, 0, 7, 1, 8), (3, 8)),
        (array(1, 1, 8, 1, 8), (0, 8)),  # --array=1-8
        (array(12, 4, 12, 4, 3), (2, 3)),  # --array=4-15:4
        (array(5, 5, 5, 1, 1), (0, 1)),  # --array=5, what is left of 0-7
        (array(4, 3, 5, 1, 3), (1, 3)),  # --array=3-5, the same
        (step(5, 32), (5, 32)),
        (array(2, 0, 3, 1, 4) | step(1, 8), (17, 32)),  # an array whose tasks are steps of 8
        (array(2, 0, 3, 1, 4) | step(0, 1), (2, 4)),
        # The batch script itself is no step, and a shell of salloc's is one of one task.
        ({"PROCID": 0, "NTASKS": 32}, (0, 1)),
        (step(0, 1, NTASKS=8), (0, 1)),
    ],
)
def test_a_share_is_read_from_slurm(variables, values, expected):
    variables(**values)
    assert share() == expected
    assert share("1/3") == (1, 3)  # what is asked for goes first


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_tasks_of_an_array_have_all_shares_once(variables, count):
    def of_task(task: int) -> tuple[int, int]:
        variables(**array(task, 3, 3 + 2 * (count - 1), 2, count))
        return share()

    assert [of_task(3 + 2 * i) for i in range(count)] == [(i, count) for i in range(count)]


@pytest.mark.parametrize(
    "values",
    [
        array(4, 0, 4, 1, 3),  # --array=0,1,4: no task knows what the others are
        array(0, 0, 4, 1, 3),
        array(3, 0, 4, 2, 3),
        array(0, 0, 4, 0, 5),
        {"ARRAY_TASK_ID": 3},
    ],
)
def test_an_array_with_gaps_is_refused(variables, values):
    variables(**values)
    with pytest.raises(InputError, match=re.escape("take --array=0-N")):
        share()
    assert share("0/2") == (0, 2)


@pytest.mark.parametrize("values", [step("x", 2), step(0, "two"), step(2, 2), step("\u00b2", 2)])
def test_what_a_step_says_of_itself_is_a_number_below_another(variables, values):
    variables(**values)
    with pytest.raises(InputError, match=r"SLURM_PROCID=\S+ and SLURM_STEP_NUM_TASKS="):
        share()


@pytest.mark.parametrize("wrong", ["2/2", "1", "1/", "-1/2", "a/b", f"0/{'9' * 5000}"])
def test_a_share_is_a_number_below_another(wrong):
    with pytest.raises(InputError, match="I from 0 to N-1"):
        share(wrong)


@pytest.mark.parametrize(
    ("gpus", "on_node", "tasks", "node", "rank", "expected"),
    [
        ("0,1,2,3,4,5,6,7", 8, "8(x4)", 3, 5, "5"),
        ("0,1,2,3,4,5,6,7", 8, "2(x2),4", 1, 1, "4,5,6,7"),
        ("0,1,2,3,4,5,6,7", 8, "2(x2),4", 2, 1, "2,3"),
        ("0", 8, "8", 0, 5, None),  # SLURM has bound each task to its own
        ("0,1", 4, "2", 0, 1, None),
        ("", "", "8", 0, 5, None),  # a node without
        ("0,1", 2, "4", 0, 3, None),
    ],
)
def test_tasks_that_see_all_gpus_of_a_node_divide_them(
    variables, monkeypatch, gpus, on_node, tasks, node, rank, expected
):
    updates = {}
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    more = {"STEP_TASKS_PER_NODE": tasks, "NODEID": node, "LOCALID": rank}
    variables(**step(9, 32, **more), GPUS_ON_NODE=on_node, CUDA_VISIBLE_DEVICES=gpus)
    assert share() == (9, 32)
    assert updates.get("jax_cuda_visible_devices") == expected


WORK = """
import sys, time
from blip3o_jax.train import stop
def work():
    from blip3o_jax.parallel.processes import share, wait_for_others
    index, count = share()
    with stop.watch(together=False) as leaves:
        for _ in range(index * 1000):
            print("at work", flush=True)
            if leaves(0):
                break
            time.sleep(0.1)
    print("done", flush=True)
    wait_for_others()
with stop.handled(process=True):
    work()
"""


def test_joined_processes_end_when_each_is_done_or_interrupted():
    """The first one, which serves the others, waits for them; a SIGTERM ends the second alone."""
    port = random.Random(os.getpid()).randrange(20000, 30000)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(OWN)}
    inherited |= {"BLIP3O_COORDINATOR": f"localhost:{port}", "BLIP3O_NUM_PROCESSES": "2"}
    inherited["PYTHONPATH"] = str(Path(__file__).parents[2])
    both = [
        subprocess.Popen(
            [sys.executable, "-c", WORK],
            env=inherited | {"BLIP3O_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    first, second = both
    try:
        assert first.stdout.readline() == "done\n"
        assert second.stdout.readline() == "at work\n"
        with pytest.raises(subprocess.TimeoutExpired):
            first.wait(3)
        second.send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=60) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, RESTART], outputs
