"""The manifests of GKE: their fields beside each other, and the pod's own script, run here."""

import math
import os
import re
import subprocess
import time
from pathlib import Path

import yaml

from blip3o_jax.cli import parse
from blip3o_jax.train.stop import RESTART

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


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
    assert parse(container["args"]).config.endswith(f":{topology}")
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


def test_the_image_is_what_the_jobset_starts():
    """Its folder, with all that a wheel is built from, and the launcher's files."""
    (replicated,) = yaml.safe_load((LAUNCH / "gke.yaml").read_text())["spec"]["replicatedJobs"]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    assert f"WORKDIR {container['workingDir']}" in lines
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    for name in copied:
        assert (LAUNCH.parent / name).exists()
    started = re.findall(r"(launch)/[\w./]+", container["command"][2])
    assert {"pyproject.toml", "blip3o_jax", "configs", *started} <= copied
    assert 'RUN pip install --no-cache-dir ".[tpu]"' in lines


def test_a_pod_hands_a_sigterm_on_to_preflight(tmp_path):
    """The pod's own shell script, with a preflight that waits and a run that says it ran."""
    document = yaml.safe_load((LAUNCH / "gke.yaml").read_text())
    (replicated,) = document["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    # check_job.py says what preflight is given; nothing for pictures.
    python = '[[ $1 != *check_job.py ]] || { printf %s "$OPTIONS"; exit; }\n'
    python += 'echo "$@" >&2; sleep "$SECONDS_OF_IT"; exit "$FIRST"'
    for name, body in (("python", python), ("blip3o-jax", 'echo "ran $*"')):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\ntrap 'exit 75' TERM\n{body}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OPTIONS": "--workdir '/runs/a b'"}
    command = [*container["command"], "train", "a  b"]
    for seconds, first, signalled, code in ((0, 0, False, 0), (0, 1, False, 1), (3, 0, True, 75)):
        env = {**os.environ, **variables, "SECONDS_OF_IT": str(seconds), "FIRST": str(first)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, cwd=LAUNCH.parent, env=env, **pipes) as shell:
            time.sleep(1 if signalled else 0)
            if signalled:
                shell.terminate()
            printed, errors = shell.communicate(timeout=30)
        assert shell.returncode == code
        assert printed == ("ran train a  b\n" if code == 0 else "")
        assert "launch/preflight.py --workdir /runs/a b\n" in errors
    env |= {"OPTIONS": "", "FIRST": "1"}
    done = subprocess.run(command, cwd=LAUNCH.parent, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ran train a  b\n")


def test_pods_that_work_alone_have_all_shares():
    job = yaml.safe_load((LAUNCH / "gke_job.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed"
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    args = parse(container["args"])
    assert args.job == "generate"
    index, _, count = args.share.partition("/")
    assert index == "$(JOB_COMPLETION_INDEX)"  # which Kubernetes puts in
    assert int(count) == spec["completions"] == spec["parallelism"]
    # One host a pod: its chips are all of the topology.
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert math.prod(int(side) for side in topology.split("x")) == chips
    # Failed requests end a pod, a wrong input the job; an interruption neither.
    assert pod["restartPolicy"] == "Never"
    assert spec["backoffLimitPerIndex"] > 0
    ignored, wrong, failed = spec["podFailurePolicy"]["rules"]
    assert ignored["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert [rule["action"] for rule in (ignored, wrong, failed)] == [
        *("Ignore", "FailJob", "FailIndex")
    ]
    assert [rule["onExitCodes"]["values"] for rule in (wrong, failed)] == [[2], [1]]
    assert pod["volumes"][0]["name"] == container["volumeMounts"][0]["name"]
