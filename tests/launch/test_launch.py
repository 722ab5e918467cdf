"""The launchers as far as they can be held without a cloud: shellcheck, fields, a gcloud that a
script plays, flags that XLA knows."""

import math
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from blip3o_jax.train.stop import RESTART

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), *LAUNCH.glob("env/*.env")])
# Plays a cloud: writes its arguments down, and answers as the lines of a file say, one a question.
GCLOUD = """#!/usr/bin/env bash
echo "$*" >> "$CLOUD/calls"
answer() {
  head -n 1 "$CLOUD/$1"
  sed -i 1d "$CLOUD/$1"
}
case "$*" in
  *describe*) answer states ;;
  *"cat blip3o.exit"*) answer codes ;;
esac
"""
JOB = ["train", "--config", "pretrain_3b:v5e:4x4", "--workdir", "/mnt/runs/a b"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(path):
    subprocess.run(["bash", "-n", path], check=True)
    shellcheck = shutil.which("shellcheck") or Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [shellcheck, "--external-sources", path],
        cwd=LAUNCH.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout + done.stderr == ""


def tpu_vm(cloud: Path, states: list[str], codes: list[str], *options: str):
    """(exit code, what the script printed, its gcloud calls) with a cloud that answers so."""
    cloud.mkdir(exist_ok=True)
    (cloud / "gcloud").write_text(GCLOUD)
    (cloud / "gcloud").chmod(0o755)
    (cloud / "calls").write_text("")
    (cloud / "states").write_text("".join(f"{state}\n" for state in states))
    (cloud / "codes").write_text("".join(f"{code}\n" for code in codes))
    where = {"PATH": f"{cloud}:{os.environ['PATH']}", "CLOUD": str(cloud), "POLL_SECONDS": "0"}
    command = [
        "bash",
        LAUNCH / "tpu_vm.sh",
        "--name",
        "mine",
        "--zone",
        "z1",
        "--type",
        "v5litepod-16",
        "--runtime",
        "r1",
        *options,
    ]
    done = subprocess.run(
        [*command, "--", *JOB],
        env={**os.environ, **where},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr, (cloud / "calls").read_text().splitlines()


def runs(calls: list[str]) -> list[str]:
    return [call for call in calls if "--worker=all" in call and "blip3o-jax train" in call]


def verbs(calls: list[str]) -> list[str]:
    found = (re.search(r"queued-resources (\w+)", call) for call in calls)
    return [match[1] for match in found if match and match[1] != "describe"]


def test_a_slice_is_asked_for_installed_and_run_on_all_hosts(tmp_path):
    code, _, calls = tpu_vm(
        tmp_path / "cloud", ["", "", "WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE"], ["0"], "--spot"
    )
    assert code == 0
    assert verbs(calls) == ["create"]
    assert "--accelerator-type v5litepod-16" in calls[1]
    assert calls[1].count("--spot") == 1
    copied = next(i for i, call in enumerate(calls) if " scp " in call)
    (run,) = runs(calls)
    assert copied < calls.index(run)
    assert r"--config pretrain_3b:v5e:4x4 --workdir /mnt/runs/a\ b" in run
    assert "preflight.py --config pretrain_3b:v5e:4x4" in run


def test_an_interrupted_run_starts_again_and_a_preempted_slice_is_made_again(tmp_path):
    states = ["ACTIVE", "ACTIVE", "ACTIVE", "SUSPENDED", "SUSPENDED", "", "ACTIVE", "ACTIVE"]
    code, printed, calls = tpu_vm(tmp_path / "cloud", states, [str(RESTART), "", "0"])
    assert code == 0, printed
    assert len(runs(calls)) == 3
    assert verbs(calls) == ["delete", "create"]


@pytest.mark.parametrize(
    ("code", "state", "starts"), [("2", "ACTIVE", 1), ("1", "ACTIVE", 1), ("1", "SUSPENDED", 2)]
)
def test_a_wrong_run_ends_with_its_code_but_not_one_whose_hosts_were_taken(
    tmp_path, code, state, starts
):
    states = ["ACTIVE", state, "ACTIVE", "ACTIVE"]
    ended, printed, calls = tpu_vm(tmp_path / "cloud", states, [code, "0"])
    assert len(runs(calls)) == starts, printed
    assert ended == (int(code) if starts == 1 else 0)


def test_restarts_are_bounded(tmp_path):
    code, _, calls = tpu_vm(
        tmp_path / "cloud", ["ACTIVE"] * 9, [str(RESTART)] * 9, "--max-restarts", "2"
    )
    assert code == RESTART
    assert len(runs(calls)) == 3


def test_a_dry_run_calls_nothing_and_a_wrong_argument_is_a_sentence(tmp_path):
    code, printed, calls = tpu_vm(tmp_path / "cloud", [], [], "--dry-run")
    assert (code, calls) == (0, [])
    assert printed.count("gcloud compute tpus tpu-vm ssh mine") == 3
    for wrong, sentence in (
        (["--nam"], "Unknown argument"),
        (["--max-restarts", "x"], "is a number"),
    ):
        code, printed, calls = tpu_vm(tmp_path / "cloud", [], [], *wrong)
        assert (code, calls) == (2, [])
        assert sentence in printed


def test_the_jobset_agrees_with_its_slice_and_with_the_exit_codes():
    document = yaml.safe_load((LAUNCH / "gke.yaml").read_text())
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = document["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert (
        job["parallelism"] * chips
        == job["completions"] * chips
        == math.prod(int(side) for side in topology.split("x"))
    )
    assert container["resources"]["requests"] == container["resources"]["limits"]
    config = {variable["name"]: variable["value"] for variable in container["env"]}["CONFIG"]
    assert config.endswith(f":{topology}")
    # What ends the run for good are its own codes; an interruption starts it again.
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy wants it
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [1, 2],
    }
    assert RESTART not in rule["onExitCodes"]["values"]
    (ends,) = document["spec"]["failurePolicy"]["rules"]
    assert (ends["action"], ends["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }


def environment(name: str, variable: str) -> str:
    command = f'source {LAUNCH / "env" / name}; printf %s "${variable}"'
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=True
    ).stdout


def test_xla_knows_the_flags_for_gpus():
    """It ends a process that is given an unknown one."""
    flags, code = (
        environment("gpu.env", "XLA_FLAGS"),
        "import jax; print(jax.jit(lambda x: x + 1)(1))",
    )
    assert len(flags.split()) == 5
    for given, works in ((flags, True), (f"{flags} --xla_gpu_enable_wonders=true", False)):
        variables = {**os.environ, "XLA_FLAGS": given, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False
        )
        assert (done.returncode == 0) == works, done.stderr


def test_slurm_starts_again_after_the_code_for_it_only(tmp_path):
    """srun and scontrol played by scripts: the first step is preflight, the second the run."""
    calls = tmp_path / "calls"
    for name in ("srun", "scontrol"):
        (tmp_path / name).write_text(
            f'#!/usr/bin/env bash\necho "{name} $*" >> {calls}\n[[ $* != *"blip3o-jax '
            'train"* ]] || exit "$CODE"\n'
        )
        (tmp_path / name).chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(LAUNCH.parent),
        "SLURM_NTASKS": "32",
        "SLURM_JOB_ID": "7",
    }
    for code, requeued in ((0, False), (2, False), (RESTART, True)):
        calls.write_text("")
        command = ["bash", LAUNCH / "slurm.sbatch", "pretrain_3b", "/runs/a", "--config.seed=1"]
        done = subprocess.run(
            command,
            env={**os.environ, **variables, "CODE": str(code)},
            check=False,
            capture_output=True,
        )
        assert done.returncode == code
        preflight, run, *rest = calls.read_text().splitlines()
        assert preflight.endswith(
            "launch/preflight.py --config pretrain_3b --workdir /runs/a --processes 32"
        )
        assert run.endswith(
            "blip3o-jax train --config pretrain_3b --workdir /runs/a --config.seed=1"
        )
        assert rest == (["scontrol requeue 7"] if requeued else [])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_memory_stays_with_a_process_on_a_cpu():
    """The second time the kernel is asked for no page."""
    code = """if True:
        import resource
        def faults(size):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            taken = b"x" * size
            del taken
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        print(faults(1 << 26), faults(1 << 26))
    """
    command = f'source {LAUNCH / "env" / "cpu.env"}; exec "$0" -c "$1"'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, code], capture_output=True, text=True, check=True
    )
    first, second = map(int, done.stdout.split())
    assert second < 5 < first
