import json
import os
import subprocess
import sys

import pytest

from blip3o_jax.cli import main


def fails(argv, capsys):
    """The sentence on stderr of a command that must exit with 2."""
    assert main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert "Traceback" not in error
    return error


def test_help_answers_without_importing_jax():
    code = (
        "import sys; from blip3o_jax import cli; cli.build_parser().format_help(); "
        "print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


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
