"""`evaluate NAME export` as a job: killed, divided, moved, repeated, and what it leaves alone."""

import json
import pathlib
import types

import official
import pytest
from official import CASES, Painter, export, read_gedit, read_longtext, tree

from blip3o_jax import checkpoints
from blip3o_jax.cli import main
from blip3o_jax.jobs import benchmarks


@pytest.fixture(autouse=True)
def loaded(monkeypatch, tmp_path):
    official.load_painter(monkeypatch)
    monkeypatch.chdir(tmp_path)


def test_an_export_without_one_image_has_no_end_and_is_mended(tmp_path, monkeypatch, capsys):
    write = pathlib.Path.write_bytes

    def write_most(path, data):
        return path.name == "0101_2.png" or write(path, data)

    prompts, rows = official.longtext(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(pathlib.Path, "write_bytes", write_most)
        assert export("longtext", prompts, tmp_path) == 2
    assert "1 of 640 are missing, such as ['0101_2.png']" in capsys.readouterr().err
    assert not (tmp_path / "out/export.json").exists()
    assert export("longtext", prompts, tmp_path) == 0
    read_longtext(tmp_path / "out/images", rows)


def bytes_of(folder):
    """All files that a scorer or an import reads."""
    names = {name for name in tree(folder) if name.startswith("images/")} | {"export.json"}
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize("name", ["dpg", "gedit"])
def test_an_export_is_divided_and_goes_on_where_it_was_killed(name, tmp_path, capsys):
    """The end is that of one process that was never killed."""
    make, read, _ = CASES[name]
    prompts, rows = make(tmp_path)
    out = tmp_path / "out"
    assert export(name, prompts, tmp_path, "--share", "0/2") == 0
    assert "Share 0/2" in capsys.readouterr().out
    assert not (out / "export.json").exists()
    # As if killed: two shards were not recorded yet, and a file is half written.
    recorded = sorted((out / "job/done").glob("*.jsonl"))
    for file in recorded[-2:]:
        row = json.loads(file.read_text().splitlines()[0])
        (out / row["file"]).write_bytes(b"half")
        file.unlink()
    assert export(name, prompts, tmp_path, "--share", "1/2") == 0
    assert not (out / "export.json").exists()
    assert export(name, prompts, tmp_path) == 0
    read(out / "images", rows)
    divided = bytes_of(out)
    assert export(name, prompts, tmp_path, "--overwrite") == 0
    assert bytes_of(out) == divided
    # Other settings are another export.
    capsys.readouterr()
    assert export(name, prompts, tmp_path, "--seed", "3") == 2
    assert "holds a job with seed 0; this one has seed 3" in capsys.readouterr().err
    # Which replaces this one, and all that it wrote.
    (out / "export.json").unlink()
    assert export(name, prompts, tmp_path, "--model-name", "other", "--overwrite") == 0
    assert not [file for file in tree(out) if "mine/" in file]


@pytest.mark.parametrize("name", ["geneval", "dpg", "gedit"])
def test_what_a_kill_leaves_is_not_among_the_images(name, tmp_path, monkeypatch):
    """A file that is half written would be one too many, for the scorer and another process."""
    prompts, _ = CASES[name][0](tmp_path)
    places, replace = set(), pathlib.Path.replace

    def observed(file, target):
        places.add(file.parent)
        return replace(file, target)

    monkeypatch.setattr(pathlib.Path, "replace", observed)
    assert export(name, prompts, tmp_path) == 0
    assert places == {tmp_path / "out/job"}


def test_an_export_that_was_moved_is_the_same_and_its_sources_come_back(tmp_path, capsys):
    prompts, rows = official.gedit(tmp_path / "prompts")
    assert export("gedit", prompts, tmp_path) == 0
    (tmp_path / "moved").mkdir()
    (tmp_path / "out").rename(tmp_path / "moved/out")
    images = tmp_path / "moved/out/images"
    (images / "mine/fullset/task-0/en/0000_SRCIMG.png").unlink()
    (images / "mine/fullset/task-1/en/0001.png").unlink()
    assert export("gedit", prompts, tmp_path / "moved") == 0
    read_gedit(images, rows)
    assert str(images) in capsys.readouterr().out


def test_an_export_names_the_checkpoint_of_its_images_not_a_later_one(tmp_path, monkeypatch):
    """As a run of training saves the next one meanwhile."""
    identity, lay_out = checkpoints.open("emoji_64").identity, benchmarks.lay_out

    def later(*args):
        other = types.SimpleNamespace(identity="emoji_64@later")
        monkeypatch.setattr(checkpoints, "open", lambda _: other)
        return lay_out(*args)

    monkeypatch.setattr(benchmarks, "lay_out", later)
    prompts, _ = official.longtext(tmp_path)
    assert export("longtext", prompts, tmp_path) == 0
    about = json.loads((tmp_path / "out/export.json").read_text())
    assert about["checkpoint"] == identity


def test_a_request_that_fails_is_named_and_made_by_the_same_command(tmp_path, monkeypatch, capsys):
    run = Painter.run

    def run_most(painter, requests, failed):
        first, *others = requests
        failed(first, "the device caught fire.")
        yield from run(painter, others, failed)

    prompts, rows = official.longtext(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(Painter, "run", run_most)
        assert export("longtext", prompts, tmp_path) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"1 request of {tmp_path}/out failed (the device caught fire), so nothing is" in error
    assert not (tmp_path / "out/export.json").exists()
    assert export("longtext", prompts, tmp_path) == 0
    read_longtext(tmp_path / "out/images", rows)


@pytest.mark.parametrize("name", ["scores/results.jsonl", "images/dpg-bench_results.txt"])
def test_what_a_scorer_wrote_is_not_overwritten(name, tmp_path, capsys):
    prompts, _ = official.geneval2(tmp_path)
    assert export("geneval2", prompts, tmp_path) == 0
    results = tmp_path / "out" / name
    results.parent.mkdir(exist_ok=True)
    results.write_text("scores")
    capsys.readouterr()
    assert export("geneval2", prompts, tmp_path, "--overwrite") == 2
    assert f"out also holds {name}, which its job did not write; move" in capsys.readouterr().err
    # Beside the images, of which a scorer may judge all, it is named too.
    is_beside = name.startswith("images/")
    assert export("geneval2", prompts, tmp_path) == 2 * is_beside
    error = capsys.readouterr().err
    assert ("images: ['dpg-bench_results.txt'] does not belong there." in error) == is_beside
    # Nor do other commands overwrite it.
    assert main(["generate", "a cat", "--out", str(tmp_path / "out"), "--overwrite"]) == 2
    other = "holds a job of `evaluate geneval2 export`, which `generate` does not overwrite;"
    assert other in capsys.readouterr().err
    assert results.read_text() == "scores"
    results.rename(tmp_path / "elsewhere")
    assert export("geneval2", prompts, tmp_path, "--overwrite") == 0
    assert not results.exists()
