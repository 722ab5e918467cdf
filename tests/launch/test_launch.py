"""The launchers as far as they can be held without a cloud: shellcheck, fields, a gcloud that a
script plays, flags that XLA knows."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from blip3o_jax.train.stop import RESTART

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), *LAUNCH.glob("env/*.env")])
# Plays a cloud: writes its arguments down, and answers as the lines of a file say, one a question;
# exit codes of several hosts stand on one.
GCLOUD = """#!/usr/bin/env bash
echo "$*" >> "$CLOUD/calls"
answer() {
  head -n 1 "$CLOUD/$1"
  sed -i 1d "$CLOUD/$1"
}
[[ -z ${FAILING:-} || $* != *"$FAILING"* ]] || exit 1
case "$*" in
  *describe*) answer states ;;
  *"cat blip3o.exit"*) answer codes | tr ' ' '\n' | sed 's/./blip3o.exit=&/' ;;
esac
"""
JOB = ["train", "--config", "pretrain_3b:v5e:4x4", "--workdir", "/mnt/runs/a b"]
PICTURES = ["generate", "--prompts", "/mnt/a b.jsonl", "--out", "/mnt/pictures"]
SCORES = ["evaluate", "scenes", "--out", "/mnt/scores"]


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


PYTHON = str(Path(sys.executable).parent)  # which the launchers check the job with


def tpu_vm(cloud: Path, states: list[str], codes: list[str], *options: str, job=JOB):
    """(exit code, what the script printed, its gcloud calls) with a cloud that answers so."""
    cloud.mkdir(exist_ok=True)
    (cloud / "gcloud").write_text(GCLOUD)
    (cloud / "gcloud").chmod(0o755)
    (cloud / "calls").write_text("")
    (cloud / "states").write_text("".join(f"{state}\n" for state in states))
    (cloud / "codes").write_text("".join(f"{code}\n" for code in codes))
    path = f"{cloud}:{PYTHON}:{os.environ['PATH']}"
    where = {"PATH": path, "CLOUD": str(cloud), "POLL_SECONDS": "0"}
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
        [*command, "--", *job],
        env={**os.environ, **where},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr, (cloud / "calls").read_text().splitlines()


def runs(calls: list[str]) -> list[str]:
    job = re.compile("blip3o-jax (train|generate) ")
    return [call for call in calls if "--worker=all" in call and job.search(call)]


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
    ("code", "state", "starts"),
    [
        *(("2", "ACTIVE", 1), ("1", "ACTIVE", 1), ("1", "SUSPENDED", 2)),
        *(("130", "ACTIVE", 1), ("143", "ACTIVE", 2)),
    ],
)
def test_a_wrong_run_ends_with_its_code_but_not_one_whose_hosts_were_taken(
    tmp_path, code, state, starts
):
    states = ["ACTIVE", state, "ACTIVE", "ACTIVE"]
    ended, printed, calls = tpu_vm(tmp_path / "cloud", states, [code, "0"])
    assert len(runs(calls)) == starts, printed
    assert ended == (int(code) if starts == 1 else 0)


@pytest.mark.parametrize(
    ("codes", "end", "starts"),
    [
        ("0 0 0 0", 0, 1),
        ("0 0 1 0", 1, 1),  # the one that ended last knows of requests that failed
        ("134 2 134 134", 2, 1),  # one said what is wrong, and its end took the others along
        ("0 75 134 0", 0, 2),
        ("0 255 0 0", 0, 2),  # a host that wrote no code
        ("0 137 0 0", 137, 1),
    ],
)
def test_the_codes_of_all_hosts_say_whether_pictures_are_made(tmp_path, codes, end, starts):
    states = ["ACTIVE"] * 4
    code, printed, calls = tpu_vm(tmp_path / "cloud", states, [codes, "0 0 0 0"], job=PICTURES)
    assert code == end, printed
    assert len(runs(calls)) == starts
    assert "launch/venv.sh; blip3o-jax generate --prompts /mnt/a\\ b.jsonl" in runs(calls)[0]
    assert not any("preflight" in call for call in calls)  # nothing is joined but by the job
    assert sum('pip install --quiet ".[tpu]"' in call for call in calls) == starts


def test_what_reads_buckets_is_installed_for_a_job_that_names_one(tmp_path):
    job = [*PICTURES[:-1], "gs://bucket/pictures"]
    code, printed, calls = tpu_vm(tmp_path / "cloud", ["ACTIVE"] * 2, ["0"], job=job)
    assert code == 0, printed
    assert sum('pip install --quiet ".[tpu,gcs]"' in call for call in calls) == 1


def test_setup_comes_before_the_package(tmp_path):
    """It may install the Python that launch/venv.sh looks for."""
    _, _, calls = tpu_vm(tmp_path / "cloud", ["ACTIVE"] * 2, ["0"], "--setup", "apt-get it")
    setup, install = (
        next(i for i, call in enumerate(calls) if words in call)
        for words in ("--command=apt-get it", "launch/venv.sh; pip install")
    )
    assert setup < install


@pytest.mark.parametrize("failing", [" scp ", "apt-get it", "pip install"])
def test_an_installation_that_fails_is_not_repeated_unless_the_slice_is_gone(
    tmp_path, monkeypatch, failing
):
    monkeypatch.setenv("FAILING", failing)
    states = ["ACTIVE", "SUSPENDED", *["ACTIVE"] * 9]
    code, printed, calls = tpu_vm(tmp_path / "cloud", states, [], "--setup", "apt-get it")
    assert code == 1
    assert sum(failing in call for call in calls) == 2
    assert runs(calls) == []
    assert "(code 1, the slice is SUSPENDED); start 2 follows" in printed
    assert printed.count("The installation or --setup failed on a host") == 2


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
        (["--project", "--spot"], "--project wants a value"),
    ):
        code, printed, calls = tpu_vm(tmp_path / "cloud", [], [], *wrong)
        assert (code, calls) == (2, [])
        assert sentence in printed


@pytest.mark.parametrize(
    ("job", "sentence"),
    [
        ([*JOB, "--dry-run"], "--dry-run stands behind --"),
        ([*JOB, "--max-restarts=3"], "--max-restarts stands behind --"),
        ([*JOB, "--steps", "3"], "unknown argument --steps"),
        ([*JOB, "--config.batch_sise=4"], "did you mean 'batch_size'"),
        ([*JOB, "--config.batch_size=24"], "batch_size 24 does not divide by the mesh's 16"),
        ([*JOB[:2], "pretrain_3b:v5e:16x16", *JOB[3:]], "--type v5litepod-16 is not v5e:16x16"),
        ([*JOB, "--help"], "--reference-quirks"),
        (["grpo", *JOB[1:]], "is of stage 'joint'"),
        ([*JOB[:4], "runs/mine"], "runs/mine is inside the clone"),
        ([*PICTURES[:4], "pictures"], "pictures is inside the clone"),
        ([*PICTURES, "--overwrite"], "--overwrite would delete what was made"),
        ([*SCORES, "--overwrite"], "--overwrite would delete what was made"),
    ],
)
def test_a_job_that_would_not_start_asks_for_nothing(tmp_path, job, sentence):
    """Neither a slice nor anything else of the cloud."""
    code, printed, calls = tpu_vm(tmp_path / "cloud", ["", "", "ACTIVE"], ["0"], job=job)
    assert (code, calls) == (2, [])
    assert sentence in printed


def test_preflight_is_given_the_config_as_the_job_reads_it(tmp_path):
    """Also where it is written with = and changed."""
    config = "--config=pretrain_3b:v5e:4x4"
    job = ["train", config, "--workdir=/mnt/a b", "--config.data.cache=/c d"]
    code, printed, calls = tpu_vm(tmp_path / "cloud", ["ACTIVE"] * 2, ["0"], job=job)
    assert code == 0, printed
    (run,) = runs(calls)
    options = "--config pretrain_3b:v5e:4x4 --workdir '/mnt/a b' '--config.data.cache=/c d'"
    assert f"python launch/preflight.py {options} && blip3o-jax train" in run


def test_the_scripts_of_a_clone_refuse_what_they_do_not_know():
    for script, words in (("quickstart.sh", ["--out", "x"]), ("test.sh", ["--all", "--fast"])):
        command = ["bash", LAUNCH / script, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert words[-2] in done.stderr


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
    """srun and scontrol played by scripts: the first step is preflight, the second the run. 143 is
    of a SIGTERM before Python runs."""
    calls = tmp_path / "calls"
    for name in ("srun", "scontrol"):
        (tmp_path / name).write_text(
            f'#!/usr/bin/env bash\necho "{name} $*" >> {calls}\n[[ $* != *"blip3o-jax '
            '"* ]] || exit "$CODE"\n[[ $* != *preflight* ]] || exit "$FIRST"\n'
        )
        (tmp_path / name).chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}:{PYTHON}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(LAUNCH.parent),
        "SLURM_NTASKS": "32",
        "SLURM_JOB_ID": "7",
    }
    ends = ((0, 0, False), (2, 2, False), (130, 130, False), (RESTART, RESTART, True))
    for code, end, requeued in (*ends, (143, RESTART, True)):
        calls.write_text("")
        job = ["train", "--config", "pretrain_3b", "--workdir", "/runs/a", "--config.seed=1"]
        command = ["bash", LAUNCH / "slurm.sbatch", *job]
        done = subprocess.run(
            command,
            env={**os.environ, **variables, "CODE": str(code), "FIRST": "0"},
            check=False,
            capture_output=True,
        )
        assert done.returncode == end
        preflight, run, *rest = calls.read_text().splitlines()
        assert preflight.endswith(
            "launch/preflight.py --config pretrain_3b --workdir /runs/a --config.seed=1 "
            "--processes 32"
        )
        assert run.endswith(
            "blip3o-jax train --config pretrain_3b --workdir /runs/a --config.seed=1"
        )
        assert rest == (["scontrol requeue 7"] if requeued else [])
    # Preflight is interrupted, or fails.
    for first, end, requeued in ((1, 1, False), (RESTART, RESTART, True)):
        calls.write_text("")
        env = {**os.environ, **variables, "CODE": "0", "FIRST": str(first)}
        done = subprocess.run(command, env=env, check=False, capture_output=True)
        assert done.returncode == end
        expected = ["scontrol requeue 7"] if requeued else []
        assert calls.read_text().splitlines()[1:] == expected
    # An option of sbatch's behind the script is the job's, and unknown to it: nothing is started.
    calls.write_text("")
    command[-1] = "--nodes=2"
    variables = {**os.environ, **variables, "CODE": "0"}
    done = subprocess.run(command, env=variables, check=False, capture_output=True, text=True)
    assert (done.returncode, calls.read_text()) == (2, "")
    assert "unknown argument --nodes=2" in done.stderr
    # Pictures: no preflight, and a process that ends badly leaves the others at work.
    for name, code, end in (
        *(("generate", 1, 1), ("evaluate", 143, RESTART), ("bench", 143, 143)),
    ):
        jobs = {"evaluate": ["evaluate", "scenes", "--out", "a  b"], "bench": ["bench"]}
        job = jobs.get(name, PICTURES)
        calls.write_text("")
        done = subprocess.run(
            ["bash", LAUNCH / "slurm.sbatch", *job],
            env=variables | {"CODE": str(code), "FIRST": "1"},
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == end, done.stderr
        run, *rest = calls.read_text().splitlines()
        alone = "--kill-on-bad-exit=1" if name == "bench" else "--kill-on-bad-exit=0 --wait=0"
        assert run == f"srun {alone} blip3o-jax {' '.join(job)}"
        assert rest == (["scontrol requeue 7"] if end == RESTART else [])
    done = subprocess.run(command[:2], env=variables, check=False, capture_output=True, text=True)
    assert (done.returncode, calls.read_text()) == (2, f"{run}\n")
    assert "Give a job of blip3o-jax" in done.stderr


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
