"""The check of a job for hosts that start with the clone and nothing else, and of what the shipped
configs, their docstrings and the manifests name there."""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from blip3o_jax.resources import shipped_configs
from blip3o_jax.train.read_config import read_config

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
PUBLISHED = {n: path for n, path in shipped_configs().items() if n.endswith(("_3b", "_0_6b"))}
TRAIN = ["train", "--config", "pretrain_3b", "--workdir", "/mnt/run"]
GRPO = ["grpo", "--config", "grpo_3b", "--workdir", "/mnt/run"]
PICTURES = ["generate", "--prompts", "/mnt/prompts.jsonl", "--out", "/mnt/pictures"]


def check(job: list[str]) -> int:
    return runpy.run_path(str(LAUNCH / "check_job.py"))["main"](["--fresh", "--", *job])


def sources(path: str, root: str = "") -> str:
    return f'--config.data.sources=[{{"kind": "jsonl", "path": "{path}", "root": "{root}"}}]'


@pytest.mark.parametrize(
    ("job", "what"),
    [
        ([*TRAIN, "--config.init=jax-3b"], "init jax-3b"),
        ([*TRAIN, "--config.init.sana=runs/a@5"], "init runs/a@5"),
        ([*TRAIN, "--config.data.cache=cache"], "data.cache cache"),
        ([*TRAIN, "--config.data.tokenizer=jax-3b/t.json"], "data.tokenizer jax-3b/t.json"),
        ([*TRAIN, "--config.data.cache=", sources("data/*.jsonl")], "data.sources data/*.jsonl"),
        ([*TRAIN, "--config.data.cache=", sources("/mnt/a", "images")], "data.sources images"),
        (["data", "cache", *TRAIN[1:3], "--out", "/mnt/c", sources("a")], "data.sources a"),
        ([*GRPO, "--config.data.prompts=prompts.jsonl"], "data.prompts prompts.jsonl"),
        ([*PICTURES, "--checkpoint", "jax-3b"], "--checkpoint jax-3b"),
        (["generate", "--prompts", "a.jsonl", *PICTURES[3:]], "--prompts a.jsonl"),
        (["edit", "--edits", "a.jsonl", *PICTURES[3:]], "--edits a.jsonl"),
        (["generate", "a cat"], "--out out"),
    ],
)
def test_what_is_inside_the_clone_is_refused(job, what, capsys):
    assert check(job) == 2
    inside = "is inside the clone, which is new on a host at every start"
    fix = "give a path that begins with /, on a disk that all hosts see"
    assert capsys.readouterr().err == f"{what} {inside}; {fix}.\n"


@pytest.mark.parametrize(
    "job",
    [
        [*TRAIN, "--config.init=emoji_64"],
        [*TRAIN, "--config.init=gs://team/jax-3b", "--config.data.cache=gs://team/cache"],
        [*TRAIN, sources("data/*.jsonl")],  # which no run with a cache opens
        [*PICTURES, "--checkpoint", "emoji_64"],
        ["train", "--config", "emoji_finetune", "--workdir", "/mnt/run"],
    ],
)
def test_what_every_host_has_is_not(job):
    assert check(job) == 0


@pytest.mark.parametrize("name", ["check_job.py", "preflight.py"])
def test_help_begins_with_whole_sentences(name):
    command = [sys.executable, LAUNCH / name, "--help"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, description, *_ = printed.split("\n\n")
    assert description.startswith("Whether a job")
    assert description.endswith(".")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_run_reads_what_the_commands_of_the_docstrings_make(name):
    made = set()
    for path in PUBLISHED.values():
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        made |= set(re.findall(r"(?:to-jax|--out|--workdir) (/\S+)", docstring))
    cfg = read_config(name, [])
    inputs = {*cfg.init.values(), cfg.data.tokenizer.removesuffix("/tokenizer.json")}
    assert inputs | ({cfg.data.cache} - {""}) <= made
    assert check([cfg.record.job, "--config", name, "--workdir", "/mnt/run"]) == 0


@pytest.mark.parametrize("name", ["gke.yaml", "gke_job.yaml"])
def test_a_manifest_names_what_is_on_its_disk(name):
    spec = yaml.safe_load((LAUNCH / name).read_text())["spec"]
    if "replicatedJobs" in spec:
        spec = spec["replicatedJobs"][0]["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert check(container["args"]) == 0
    (mount,) = container["volumeMounts"]
    paths = re.findall(r"(?:^|=)(/\S+)", "\n".join(container["args"]), re.MULTILINE)
    paths += [read_config("pretrain_3b", []).data.cache]
    assert all(path.startswith(f"{mount['mountPath']}/") for path in paths)
    assert len(paths) >= 2
