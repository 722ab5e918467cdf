"""`blip3o-jax evaluate edits` and `drift` with a tiny random checkpoint: tables, files, sheets."""

import json
import os
import pathlib
import signal
import types

import numpy as np
import pytest
from editing import FLAGS, QUICK, edits
from PIL import Image

from blip3o_jax.cli import main
from blip3o_jax.evaluate import edits as measures
from blip3o_jax.jobs import evaluate, work
from blip3o_jax.sample.settings import EditSettings
from blip3o_jax.scenes.edits import KINDS
from blip3o_jax.scenes.scene import compose
from blip3o_jax.train.stop import RESTART

RESULTS = ("result.json", "images.jsonl", "sheet.png")

pytestmark = pytest.mark.usefixtures("loaded")


def test_evaluation_of_edits_measures_each_one(channels, capsys):
    """Random weights change everything, and the judge's own score says that this is their fault."""
    argv = ["evaluate", "edits", "--num-edits", "6", "--seeds", "1", *FLAGS, "--out", "scores"]
    argv += ["--checkpoint", channels]
    assert main(argv) == 0
    head, *table, line = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert head.split() == ["overall", *KINDS]
    assert table[0].split() == ["count", "6", *"111111"]
    assert table[-2].split() == ["success,", "judge_on_true_renders", "1.00"]
    assert [result["scores"]["overall"][name] for name in ("count", "success")] == [6, 0]
    assert result["judge_on_true_renders"] == 1
    lines = pathlib.Path("scores/images.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == list(KINDS)
    assert Image.open("scores/sheet.png").width > 3 * 128
    # Where no change counts, the sources themselves come back.
    assert main([*argv, "--keep-unchanged", "255", "--out", "same"]) == 0
    same = json.loads(capsys.readouterr().out.splitlines()[-1])["scores"]["overall"]
    assert (same["kept"], same["done"], same["psnr"]) == (1, 0, 58.92)
    assert main(["evaluate", "edits", "--num-edits", "5", "--out", "few"]) == 2


def test_an_evaluation_is_divided_and_the_last_process_scores(channels, monkeypatch, capsys):
    monkeypatch.setattr(work, "SHARD", 2)
    argv = ["evaluate", "edits", "--num-edits", "6", "--seeds", "1", *FLAGS]
    argv += ["--checkpoint", channels]
    assert main([*argv, "--out", "alone"]) == 0
    alone = capsys.readouterr().out
    files = {name: pathlib.Path("alone", name).read_bytes() for name in RESULTS}
    assert main([*argv, "--out", "shared", "--share", "1/2"]) == 0
    assert capsys.readouterr().out.startswith("Share 1/2 of shared is done; others are at work")
    assert not pathlib.Path("shared/result.json").exists()
    assert main([*argv, "--out", "shared", "--share", "0/2"]) == 0
    assert capsys.readouterr().out == alone
    assert {name: pathlib.Path("shared", name).read_bytes() for name in RESULTS} == files
    # Again: only what was spoilt is made, and all is scored again.
    (image, *_) = sorted(pathlib.Path("shared/images").iterdir())
    image.write_bytes(b"spoilt")
    pathlib.Path("shared/result.json").unlink()
    assert main([*argv, "--out", "shared"]) == 0
    assert {name: pathlib.Path("shared", name).read_bytes() for name in RESULTS} == files
    # Others are another evaluation.
    capsys.readouterr()
    assert main([*argv, "--out", "shared", "--keep-unchanged"]) == 2
    assert "keep_unchanged null; this one has keep_unchanged 16.0" in capsys.readouterr().err
    assert main([*argv, "--out", "shared", "--keep-unchanged", "--overwrite"]) == 0
    assert main([*argv, "--out", "x.png"]) == 2
    assert "--out x.png is a picture; name a folder." in capsys.readouterr().err
    # Nor does the help offer one, as that of a command does which writes it.
    whole = ("scenes",), ("edits",), ("drift",), ("geneval", "export"), ("gedit", "export")
    for words in (*(("evaluate", *words) for words in whole), ("generate",), ("edit",)):
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        printed = " ".join(capsys.readouterr().out.split())
        place = ", or NAME.png, .webp or .jpg for one image" if words[0] != "evaluate" else ""
        assert f"--out OUT folder for the results{place} (default: out)" in printed, words


def test_drift_is_measured_over_each_pictures_own_turns(pipeline, channels, capsys):
    argv = ["evaluate", "drift", "--num-pictures", "3", "--turns", "2", *FLAGS, "--out", "drift"]
    argv += ["--checkpoint", channels]
    assert main(argv) == 0
    *table, line = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert [line.split() for line in table[:2]] == [["turn", "turn"], ["1", "2"]]
    assert table[-1].split() == ["psnr", *(f"{row['psnr']:.2f}" for row in result["turns"])]
    assert [row["turn"] for row in result["turns"]] == [1, 2]
    # The same again from Python.
    chains = measures.heldout_chains(3, 2)
    first = [compose(chain[0].before) for chain in chains]
    texts = [[edit.instruction for edit in chain] for chain in chains]
    samples = edits(pipeline, first, texts, settings=EditSettings(**QUICK))
    images = np.stack([sample.image for sample in samples]).reshape(3, 2, 64, 64, 3)
    assert result["turns"] == measures.drift(images, chains)
    sheet = np.asarray(Image.open("drift/sheet.png"))[10:, 26:]  # results above, true ones below
    for y, row in enumerate((images[0], [compose(edit.after) for edit in chains[0]])):
        for x, shown in enumerate([first[0], *row]):
            cell = sheet[136 * y :, 136 * x :][:128:2, :128:2]
            np.testing.assert_array_equal(cell, shown)
    assert main(["evaluate", "drift", "--turns", "0", "--out", "none"]) == 2
    # A turn whose row is gone, or there twice, is made again.
    done = pathlib.Path("drift/job/done/000000.jsonl")
    rows, shown = done.read_text(), pathlib.Path("drift/result.json").read_bytes()
    *most, last = rows.splitlines(keepends=True)
    for damaged in ("".join(most), rows + last):
        done.write_text(damaged)
        assert main(argv) == 0
        assert (done.read_text(), pathlib.Path("drift/result.json").read_bytes()) == (rows, shown)
    # A row that was emptied is named.
    row = json.loads(last)
    done.write_text(json.dumps({name: row[name] for name in row.keys() - {"tokens"}}))
    capsys.readouterr()
    assert main(argv) == 2
    assert "000000.jsonl line 1 is damaged: it is no row of this shard" in capsys.readouterr().err
    assert main([*argv, "--overwrite"]) == 0


def test_a_checkpoint_that_changes_before_the_scores_is_refused(channels, monkeypatch, capsys):
    argv = ["evaluate", "edits", "--num-edits", "6", "--seeds", "1", *FLAGS, "--out", "scores"]
    argv += ["--checkpoint", channels]
    assert main(argv) == 0
    pathlib.Path("scores/result.json").unlink()
    other = types.SimpleNamespace(identity="channels@later")
    monkeypatch.setattr(work, "load_for", lambda _: other)
    capsys.readouterr()
    assert main(argv) == 2
    assert "and is channels@later now; name that one." in capsys.readouterr().err
    assert not pathlib.Path("scores/result.json").exists()


@pytest.mark.parametrize("module", [work, evaluate], ids=["loading", "scoring"])
def test_a_signal_also_before_and_after_the_images_is_answered_as_launchers_know(
    module, channels, monkeypatch, capsys
):
    argv = ["evaluate", "edits", "--num-edits", "6", "--seeds", "1", *FLAGS, "--out", "scores"]
    argv += ["--checkpoint", channels]
    name = "load_for" if module is work else "write_results"

    def ended(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("went on")

    with monkeypatch.context() as broken:
        broken.setattr(module, name, ended)
        with pytest.raises(SystemExit) as end:
            main(argv)
    assert end.value.code == RESTART
    assert not pathlib.Path("scores/result.json").exists()
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["edits"] == 6


def test_a_judge_of_other_sizes_is_known_before_anything_is_made(channels, capsys):
    assert main(["evaluate", "scenes", "--checkpoint", channels, "--out", "scores"]) == 2
    sentence = f"{channels} makes images of 16 px, and the judge looks at 64 px.\n"
    assert capsys.readouterr().err.endswith(sentence)
    assert not pathlib.Path("scores").exists()
