import argparse
import json
import os
import shlex
import signal
import subprocess
import sys

import pytest
from editing import checkpoint

from blip3o_jax import __version__
from blip3o_jax.cli import EXAMPLES, JOBS, build_parser, main, parse
from blip3o_jax.evaluate.exporters.table import BENCHMARKS
from blip3o_jax.jobs.options import settings_of
from blip3o_jax.resources import shipped_configs
from blip3o_jax.sample.settings import EditSettings, Settings


def fails(argv, capsys):
    """The sentence on stderr of a command that must exit with 2."""
    assert main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert "Traceback" not in error
    return error


LEAVES = [
    *(
        ["generate"],
        ["edit"],
        ["serve"],
        ["compile"],
        ["train"],
        ["grpo"],
        ["evaluate", "scenes"],
        ["evaluate", "drift"],
        ["evaluate", "edits"],
        ["plan"],
        ["bench"],
    ),
    *(["convert", "to-jax"], ["convert", "to-torch"], ["convert", "verify"]),
    *(["data", "check"], ["data", "stats"], ["data", "preview"], ["data", "cache"]),
]
OFFICIAL = [["evaluate", name, action] for name in BENCHMARKS for action in ("export", "import")]


def leaves(parser, words=()):
    """The words of every command without subcommands."""
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not groups:
        return [list(words)]
    commands = groups[0].choices.items()
    return [leaf for name, child in commands for leaf in leaves(child, (*words, name))]


@pytest.mark.parametrize("words", [[], *LEAVES, OFFICIAL[0], OFFICIAL[-1]], ids=" ".join)
def test_help_answers_without_importing_anything_heavy(words):
    code = f"""
import contextlib, sys
before = set(sys.modules)
from blip3o_jax.cli import main
with contextlib.suppress(SystemExit):
    main([*{words}, "--help"])
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print("imported:", *(new - sys.stdlib_module_names - {{"blip3o_jax"}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    usage, *_, imported = done.stdout.splitlines()
    assert usage.startswith(" ".join(["usage: blip3o-jax", *words]))
    assert imported == "imported:"


def test_every_command_declares_its_own_options():
    assert sorted(leaves(build_parser())) == sorted([*LEAVES, *OFFICIAL])


def test_sampling_options_are_the_settings(tmp_path):
    parser, plain = build_parser(), ["--checkpoint", checkpoint(tmp_path / "plain", {})]
    few = {"num_inference_steps": 4}  # of emoji_64, which is the default
    for words in (["generate", "a cat"], ["evaluate", "scenes"]):
        assert settings_of(parser.parse_args([*words, *plain])) == Settings()
        assert settings_of(parser.parse_args(words)) == Settings(**few)
    options = ["--top-k", "7", "--guidance-scale", "3", "--shift", "0.5", "--top-p", "0.25"]
    args = parser.parse_args(["generate", "a cat", *options, "--num-inference-steps", "4"])
    assert settings_of(args) == Settings(4, 3.0, 7, 0.25, 1.0, 0.5)
    words = ["edit", "a.png", "make it blue"]
    assert settings_of(parser.parse_args([*words, *plain]), EditSettings) == EditSettings()
    assert settings_of(parser.parse_args(words), EditSettings) == EditSettings(**few)
    words += [*plain, *options]
    args = parser.parse_args([*words, "--renorm-min", "0.5", "--reference-quirks"])
    given = EditSettings(30, 3.0, 7, 0.25, 0.0, 0.5, renorm_min=0.5, reference_quirks=True)
    assert settings_of(args, EditSettings) == given
    assert parser.parse_args(["plan", "--config", "x"]).num_inference_steps is None


@pytest.mark.parametrize(
    ("argv", "unknown"),
    [
        (["generate", "a cat", "--config.seed=1"], "--config.seed=1"),
        (["bench", "--config.seed=1"], "--config.seed=1"),
        (["train", "--config", "emoji_joint", "--workdir", "x", "--stteps"], "--stteps"),
        (["data", "check", "--config", "x", "--out", "y", "--limits", "3"], "--limits"),
    ],
)
def test_an_unknown_option_is_refused(argv, unknown, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert f"unknown argument {unknown}" in capsys.readouterr().err


RUN = ["train", "--config", "emoji_joint", "--workdir", "x"]


@pytest.mark.parametrize(
    ("argv", "end"),
    [
        (["generate", "a cat", "--steps", "9"], "--steps; did you mean --num-inference-steps?"),
        (["generate", "a cat", "--sed=9"], "--sed=9; did you mean --seed?"),
        (["evaluate", "scenes", "--promts", "9"], "--promts; did you mean --num-prompts?"),
        ([*RUN, "--steps", "9"], "--steps; settings of a run are changed with --config.KEY=VALUE"),
        ([*RUN, "--work-dir", "y"], "--work-dir; did you mean --workdir?"),
        (["data", "check", "--config", "x", "--out", "y", "more"], "unknown argument more"),
    ],
)
def test_an_unknown_option_suggests_what_is_like_it(argv, end, capsys):
    with pytest.raises(SystemExit):
        main(argv)
    assert capsys.readouterr().err.strip().endswith(end)


def test_every_job_has_an_example_that_parses(capsys):
    """And the help of a config names those that are shipped."""
    for job in JOBS:
        with pytest.raises(SystemExit):
            main([job, "--help"])
        printed = " ".join(capsys.readouterr().out.split())
        line = EXAMPLES[job]
        assert f"example: {line}" in printed
        program, *words = shlex.split(line)
        assert (program, parse(words).job) == ("blip3o-jax", job)
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert ", ".join(shipped_configs()) in printed


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "blip3o_jax", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == __version__


def test_a_shell_completes_jobs_options_choices_and_files(tmp_path):
    pytest.importorskip("shtab")  # of the extra [test] too
    command = [sys.executable, "-m", "blip3o_jax", "--print-completion"]
    script, other = (
        subprocess.run([*command, shell], capture_output=True, text=True, check=True).stdout
        for shell in ("bash", "zsh")
    )
    assert other.startswith("#compdef blip3o-jax\n")
    (tmp_path / "prompts.txt").touch()
    expected = {
        "ge": ["generate"],
        "convert to-": ["to-jax", "to-torch"],
        "convert to-torch --dt": ["--dtype"],
        "convert to-jax a b --dtype b": ["bfloat16"],
        "generate --num": ["--num-images", "--num-inference-steps"],
        "generate --prompts pro": ["prompts.txt"],
        "train --config a.py --workd": ["--workdir"],
        "generate --seed ": [],
    }
    for line, words in expected.items():
        typed = f"COMP_WORDS=(blip3o-jax {line.rpartition(' ')[0]} '{line.rpartition(' ')[2]}')"
        last = f"{typed}; COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _shtab_blip3o_jax"
        reply = ["bash", "-c", f'{script}\n{last}; printf "%s\\n" "${{COMPREPLY[@]}}"']
        done = subprocess.run(reply, capture_output=True, text=True, cwd=tmp_path, check=True)
        assert done.stdout.split() == words, line


def test_a_reader_that_has_seen_enough_is_no_traceback():
    """As `blip3o-jax ... | head -1`, where the parser prints and where a job does."""
    pytest.importorskip("shtab")
    job = "from blip3o_jax import cli; cli._run_job = lambda args: print('a line') or 0"
    code = f"{job}; raise SystemExit(cli.main(['bench']))"
    for argv in (["-m", "blip3o_jax", "--print-completion", "zsh"], ["-c", code]):
        with subprocess.Popen(
            [sys.executable, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            process.stdout.close()
            assert process.stderr.read() == ""
        assert process.returncode == 128 + signal.SIGPIPE


def test_completion_without_its_library_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as stop:
        main(["--print-completion", "zsh"])
    assert stop.value.code == 2
    end = "error: --print-completion needs shtab: pip install 'blip3o-jax[completion]'\n"
    assert capsys.readouterr().err.endswith(end)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["generate"], "Give prompts"),
        (["generate", ""], "empty"),
        (["generate", "a cat", "--checkpoint", "emoji_46"], "did you mean 'emoji_64'"),
        (["generate", "a cat", "--checkpoint", "blip3o_next_3b"], "e.g. BLIP3o/BLIP3o-NEXT-SFT-3B"),
        (["generate", "a cat", "--num-images", "0"], "at least 1"),
        (["generate", "a cat", "--num-inference-steps", "-3"], "from 1 to 1000, not -3."),
        (["generate", "a cat", "--top-p", "0"], "top_p"),
        (["generate", "a cat", "--guidance-scale", "inf"], "from 0 to 1000, not inf."),
        (["evaluate", "edits", "--temperature", "nan"], "from 0 to 1000, not nan."),
        (["evaluate", "edits", "--keep-unchanged", "inf"], "from 0 to 255, not inf."),
        (["bench", "--num-inference-steps", "1001"], "from 1 to 1000, not 1001."),
        (["plan", "--config", "pretrain_3b", "--price", "nan"], "--price is a number of at least"),
        (["convert", "verify", "x", "y", "--tolerance", "inf"], "above 0, not inf."),
        (["generate", "a cat", "--batch-size", "0"], "at least 1"),
        (["generate", "a cat", "--mesh", "pipes=2"], "data=N"),
        (["generate", "cat " * 400], "more than the 64 allowed"),
        (["generate", "--prompts", "nowhere.txt"], "cannot be read"),
        (["evaluate", "scenes", "--num-prompts", "0"], "at least"),
        (["train", "--config", "emoji_jiont", "--workdir", "x"], "did you mean 'emoji_joint'"),
        (
            ["train", "--config", "emoji_joint", "--workdir", "x"],
            "No checkpoint 'runs/autoencoder'",
        ),
        (["convert", "to-torch", "nowhere", "x"], "No checkpoint"),
        (["convert", "to-torch", "emoji_64", "x"], "emoji_64 is in the published layout already"),
        (["convert", "to-torch", "emoji_64", "x", "--max-shard-bytes", "0"], "at least 1"),
        (["convert", "to-jax", "nowhere", "x"], "No checkpoint 'nowhere'"),
        (["convert", "to-jax", "x"], "--ar is missing"),
        (["convert", "to-jax", "nowhere", "x", "--mesh", "fsdp=-1"], "sizes are positive"),
        (
            ["convert", "to-jax", "emoji_64", "x", "--mesh", "fsdp=7"],
            "does not divide by the mesh's fsdp=7",
        ),
        (["convert", "to-jax", "emoji_64", "x", "--dit", "y"], "--dit y: there is no such"),
        (["convert", "to-jax", "emoji_64", "x", "--dit", "/dev"], "/dev holds no config.json"),
        (["convert", "to-jax", "emoji_64", "x", "--tokenizer", "y"], "--tokenizer y: there is no"),
    ],
)
def test_bad_input_is_one_sentence_exit_2_and_nothing_left(
    argv, sentence, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert sentence in fails(
        [*argv, "--out", "made"] if argv[0] in ("generate", "evaluate") else argv, capsys
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "contents", "sentence"),
    [
        ("a.txt", "\n\n" + "cat " * 400, "a.txt line 3: The prompt 'cat cat cat cat cat cat ..."),
        ("a.jsonl", '\n{"prompt": ""}', "a.jsonl line 2: The prompt is empty"),
        ("a.csv", 'prompt\n"a\n<S0>"\n', "a.csv line 3: The prompt 'a <S0>' contains the"),
    ],
)
def test_a_bad_prompt_of_a_file_is_named_and_nothing_is_loaded_for_it(
    file, contents, sentence, capsys, tmp_path, monkeypatch
):
    def load_for(_):
        raise AssertionError("loaded")

    monkeypatch.setattr("blip3o_jax.jobs.work.load_for", load_for)
    monkeypatch.chdir(tmp_path)
    (tmp_path / file).write_text(contents)
    assert main(["generate", "--prompts", file, "--out", "made"]) == 1
    said = capsys.readouterr()
    assert said.out == "0 images in made\n"
    assert said.err.startswith(f"blip3o-jax: 1 request failed ({file} line ")
    assert sentence in json.loads((tmp_path / "made/manifest.jsonl").read_text())["error"]


def test_an_output_of_others_is_never_replaced(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "thesis.txt").write_text("years of work")
    assert "name another folder" in fails(["generate", "a cat", "--out", "made"], capsys)
    assert "not overwritten" in fails(["generate", "a cat", "--out", "made", "--overwrite"], capsys)
    (tmp_path / "file").write_text("x")
    assert "not a folder" in fails(["generate", "a cat", "--out", "file"], capsys)
    assert (tmp_path / "made" / "thesis.txt").read_text() == "years of work"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_that_cannot_be_written(capsys, tmp_path):
    tmp_path.chmod(0o500)
    assert "cannot be written" in fails(
        ["generate", "a cat", "--out", str(tmp_path / "made")], capsys
    )


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", json.dumps({"model_type": "llava"}).encode()]
)
def test_a_damaged_checkpoint_is_named(content, capsys, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_bytes(content)
    assert "config.json" in fails(
        [
            "generate",
            "a cat",
            "--checkpoint",
            str(tmp_path / "broken"),
            "--out",
            str(tmp_path / "made"),
        ],
        capsys,
    )
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]
