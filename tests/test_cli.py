import argparse
import json
import os
import subprocess
import sys

import pytest

from blip3o_jax.cli import build_parser, main
from blip3o_jax.jobs.options import settings_of
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
        ["train"],
        ["grpo"],
        ["evaluate", "scenes"],
        ["evaluate", "drift"],
        ["evaluate", "edits"],
        ["plan"],
        ["bench"],
    ),
    *(["convert", "to-jax"], ["convert", "to-torch"], ["convert", "verify"]),
    *(["data", "check"], ["data", "stats"], ["data", "cache"]),
]


def leaves(parser, words=()):
    """The words of every command without subcommands."""
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not groups:
        return [list(words)]
    commands = groups[0].choices.items()
    return [leaf for name, child in commands for leaf in leaves(child, (*words, name))]


@pytest.mark.parametrize("words", [[], *LEAVES], ids=" ".join)
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
    assert sorted(leaves(build_parser())) == sorted(LEAVES)


def test_sampling_options_are_the_settings():
    parser = build_parser()
    for words in (["generate", "a cat"], ["evaluate", "scenes"]):
        assert settings_of(parser.parse_args(words)) == Settings()
    options = ["--top-k", "7", "--guidance-scale", "3", "--shift", "0.5", "--top-p", "0.25"]
    args = parser.parse_args(["generate", "a cat", *options, "--num-inference-steps", "4"])
    assert settings_of(args) == Settings(4, 3.0, 7, 0.25, 1.0, 0.5)
    words = ["edit", "a.png", "make it blue"]
    assert settings_of(parser.parse_args(words), EditSettings) == EditSettings()
    args = parser.parse_args([*words, *options, "--renorm-min", "0.5", "--reference-quirks"])
    given = EditSettings(30, 3.0, 7, 0.25, 1.0, 0.5, renorm_min=0.5, reference_quirks=True)
    assert settings_of(args, EditSettings) == given
    assert parser.parse_args(["plan", "--config", "x"]).num_inference_steps == 30


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


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["generate"], "Give prompts"),
        (["generate", ""], "empty"),
        (["generate", "a cat", "--checkpoint", "emoji_46"], "did you mean 'emoji_64'"),
        (["generate", "a cat", "--num-images", "0"], "at least 1"),
        (["generate", "a cat", "--num-inference-steps", "-3"], "at least 1"),
        (["generate", "a cat", "--top-p", "0"], "top_p"),
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
        (["convert", "to-jax", "emoji_64", "x", "--dit", "y"], "y holds no config.json"),
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
        (
            "a.txt",
            "a cat\n\n" + "cat " * 400,
            "a.txt line 3: The prompt 'cat cat cat cat cat cat ...",
        ),
        ("a.jsonl", '{"prompt": "a cat"}\n{"prompt": ""}', "a.jsonl line 2: The prompt is empty"),
        ("a.csv", 'prompt\n"a\ncat"\na <S0>', "a.csv line 4: The prompt 'a <S0>' contains the"),
    ],
)
def test_a_bad_prompt_is_named_before_anything_is_loaded(
    file, contents, sentence, capsys, tmp_path, monkeypatch
):
    def load_for(_):
        raise AssertionError("loaded")

    monkeypatch.setattr("blip3o_jax.jobs.generate.load_for", load_for)
    monkeypatch.chdir(tmp_path)
    (tmp_path / file).write_text(contents)
    assert sentence in fails(["generate", "--prompts", file, "--out", "made"], capsys)
    assert [path.name for path in tmp_path.iterdir()] == [file]


def test_an_output_of_others_is_never_replaced(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "thesis.txt").write_text("years of work")
    assert "--overwrite" in fails(["generate", "a cat", "--out", "made"], capsys)
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
