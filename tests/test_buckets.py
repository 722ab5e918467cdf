"""Buckets as the only disk, on loopback: a server with the interface of GCS (fake-gcs-server) and
one with that of S3 (moto). What is read, written, killed and resumed there has the bytes of a
local disk."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from clouds import contents, run
from editing import FLAGS, checkpoint
from etils import epath
from orbax.checkpoint._src.path import gcs_utils
from tiny import TEXT_ONLY, from_step, practice, rows_at

import blip3o_jax
from blip3o_jax import checkpoints, cli, executables, paths, training_checkpoint
from blip3o_jax.convert import orbax_io
from blip3o_jax.data import cache
from blip3o_jax.errors import InputError
from blip3o_jax.train import loop, owner
from blip3o_jax.train.workdir import own_workdir

HERE = Path(__file__).resolve().parent
LONGEST = 240.0  # seconds of a process


def killed(code: str, folder: paths.AnyPath, until, seed: int) -> None:
    """Runs Python in a process of its own, and kills it a moment after `until()` holds."""
    environment = os.environ | {"PYTHONPATH": f"{HERE}:{HERE.parent}"}
    command = [sys.executable, "-c", code, str(folder)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    begin = time.monotonic()
    while not until() and process.poll() is None and time.monotonic() < begin + LONGEST:
        time.sleep(0.05)
    time.sleep(random.Random(seed).uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    error = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, error.decode()[-2000:]


def test_objects_are_read_and_written_as_files_are(bucket, tmp_path):
    for root in (bucket / "a" / "b", tmp_path / "b"):
        for name in ("x.json", "y.txt", "c/z.json"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            paths.write_text(root / name, f"1234 {name}")
        assert [str(x.relative_to(root)) for x in sorted(root.glob("*"))] == [
            "c",
            "x.json",
            "y.txt",
        ]
        assert [x.name for x in root.glob("*/*.json")] == ["z.json"]
        assert sorted(x.name for x in root.rglob("*.json")) == ["x.json", "z.json"]
        assert [(root / x).is_dir() for x in ("c", "x.json", "d")] == [True, False, False]
        assert [(root / x).is_file() for x in ("c", "x.json", "d")] == [False, True, False]
        file = root / "x.json"
        assert file.stat().st_size == len("1234 x.json")
        assert paths.read_ranges(file, [(1, 3), (4, 99), (2, 2)]) == [b"23", b" x.json", b""]
        with file.open("rb") as stream:
            assert stream.seek(-4, 2) == 7
            assert stream.read() == b"json"
        paths.append_text(file, "\nfive")
        with file.open("rb") as stream:
            assert list(stream) == [b"1234 x.json\n", b"five"]
        # One of two creates a file; touching it changes its state alone.
        assert [paths.create(root / "n", text) for text in (b"1", b"2")] == [True, False]
        before = paths.state(root / "n")
        time.sleep(1.1)  # S3 has seconds
        paths.touch(root / "n")
        assert (root / "n").read_text() == "1"
        assert paths.state(root / "n") != before
        # Missing is missing.
        for ask in (file.parent.joinpath("no").read_bytes, file.parent.joinpath("no").stat):
            with pytest.raises(FileNotFoundError) as caught:
                ask()
            assert caught.value.strerror == "No such file or directory"
            assert caught.value.filename == str(root / "no")
        with pytest.raises(FileNotFoundError):
            (root / "no").unlink()
        (root / "no").unlink(missing_ok=True)
        paths.remove_folder(root, "n")
        assert not root.exists()
        assert paths.files_below(root) == []


@pytest.mark.parametrize("name", ["run[1]", "r*n", "run?", "a run #1"])
def test_a_folder_is_removed_by_its_name_alone(bucket, name):
    """Which is none of a pattern, as fsspec takes it: run[1] stands for run1 there."""
    for folder in ("run1", "ran", name):
        for file in ("checkpoints/5/d/data", f"checkpoints/5/{orbax_io.MARKER}", "own"):
            paths.write_text(bucket / folder / file, "x")
    orbax_io.teach_buckets()
    gcs_utils.rmtree(epath.Path(bucket / name / "checkpoints" / "5"))
    assert set(contents(bucket / name)) == {"own"}
    paths.remove_folder(bucket / name, "own")
    assert {file.split("/")[0] for file in contents(bucket)} == {"run1", "ran"}
    assert len(contents(bucket)) == 6


def test_an_object_appears_whole_or_not_at_all(bucket):
    def broken(size: int):
        yield bytes(size)
        raise KeyError("reason")

    for size in (1, 60 << 20):  # within one request, and over several
        with pytest.raises(KeyError):
            paths.write_chunks(bucket / "file", broken(size))
        assert not (bucket / "file").exists()
    paths.write_chunks(bucket / "file", [b"1" * (60 << 20), b"2"])
    assert (bucket / "file").stat().st_size == (60 << 20) + 1


def test_a_folder_is_copied_with_its_marker_last(bucket, tmp_path):
    paths.write_text(tmp_path / "marker", "m")
    (tmp_path / "inner").mkdir()
    paths.write_text(tmp_path / "inner" / "x", "x")
    target, seen = bucket / "copy", []
    copy_file = paths.copy_file

    def watched(source, copy):
        seen.append(source.name)
        assert paths.is_unfinished(target)
        copy_file(source, copy)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "copy_file", watched)
        paths.copy_folder(tmp_path, target, "marker")
    assert seen == ["x", "marker"]
    assert contents(target) == contents(tmp_path)
    paths.move_folder(target, bucket / "moved", "marker")
    assert contents(bucket) == {f"moved/{name}": data for name, data in contents(tmp_path).items()}


def train(workdir) -> None:
    """A run of six checkpoints."""
    every = {"log_every": 5, "eval_every": 30, "checkpoint_every": 5, "num_steps": 30}
    cfg = practice(**every)
    with own_workdir(cfg, workdir):
        loop.run(cfg, workdir, loop.supervised(cfg, from_step(rows_at), rows_at(10**6), None))


def weights(workdir) -> dict[str, np.ndarray]:
    leaves = training_checkpoint.open_weights(training_checkpoint.newest(workdir))
    return {path: next(leaf.layers(False)) for path, leaf in leaves.items()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "local"
    train(workdir)
    return workdir


def test_a_run_killed_in_a_bucket_resumes_as_if_it_had_not_been(bucket, uninterrupted, caplog):
    workdir = bucket / "run"
    begun = workdir / "checkpoints" / "10"
    code = "import sys; from test_buckets import train; train(sys.argv[1])"
    killed(code, workdir, begun.exists, seed=1)
    whole = {int(x.name) for x in training_checkpoint.complete(workdir / "checkpoints")}
    assert whole & {5, 10}
    # What a kill leaves behind at the worst: a checkpoint without its marker.
    paths.write_text(workdir / "checkpoints" / "25" / "model" / "d" / "half", "written")
    with caplog.at_level("INFO"):
        train(workdir)
    assert f"Resumed at step {max(whole)}." in caplog.text
    assert "checkpoints/25 was not written to its end and is removed." in caplog.text
    ours, theirs = weights(workdir), weights(uninterrupted)
    assert ours.keys() == theirs.keys()
    for path, values in theirs.items():
        np.testing.assert_array_equal(ours[path], values, path)
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (workdir, uninterrupted)
    ]
    steps, losses = ([[line.get(x) for line in own] for own in lines] for x in ("step", "loss"))
    assert steps[0] == steps[1]
    assert losses[0] == losses[1]
    # Nothing is left but the run and its two newest checkpoints, each with its marker.
    kept = {"checkpoints", "config.json", "metrics.jsonl", "parameters.txt", "tokenizer.json"}
    assert {name.split("/")[0] for name in contents(workdir)} == kept
    folder = workdir / "checkpoints"
    assert sorted(file.parent.name for file in folder.glob("*/commit_success.txt")) == ["25", "30"]
    assert len(list(folder.iterdir())) == 2
    # A byte that changed since is noticed, and the checkpoint set aside.
    damaged = max(paths.files_below(folder / "30" / "model"), key=paths.state)
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert training_checkpoint.open_manager(workdir).latest_step() == 25
    assert sorted(x.name for x in folder.iterdir()) == ["25", "30.broken-0"]


def test_a_run_owns_its_workdir_in_a_bucket(bucket, monkeypatch):
    monkeypatch.setattr(owner, "HEARTBEAT", 0.2)
    monkeypatch.setattr(owner, "SILENCE", 5.0)
    with owner.own(bucket / "run"):
        first = paths.state(bucket / "run" / "owner.json")
        with (
            pytest.raises(InputError, match=r"run is in use by process \d+ on "),
            owner.own(bucket / "run"),
        ):
            pass
        # One of another host, which cannot be asked, lives as long as its file changes.
        monkeypatch.setattr(owner, "_boot", lambda: "")
        with (
            pytest.raises(InputError, match=r"run is in use by process \d+ on "),
            owner.own(bucket / "run"),
        ):
            pass
        assert paths.state(bucket / "run" / "owner.json") != first
    assert contents(bucket) == {}


def test_a_cache_in_a_bucket_is_read_from_copies(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    records = [{"key": str(i), "caption": f"c{i}", "codes": np.arange(i)} for i in range(5)]
    files = [bucket / "cache" / f"{i}.array_record" for i in range(2)]
    for file, own in zip(files, (records[:3], records[3:]), strict=True):
        cache.write_shard(file, own)
    source = cache.CachedSource(files, [3, 2], None)
    assert len(source) == 5
    assert list((tmp_path / "home").rglob("*.array_record")) == []
    assert [source[i]["caption"] for i in (0, 2)] == ["c0", "c2"]
    assert len(list((tmp_path / "home").rglob("*.array_record"))) == 1
    np.testing.assert_array_equal(source[4]["codes"], np.arange(4))


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A tiny checkpoint in the published layout."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    checkpoint(folder, TEXT_ONLY)
    return folder


def test_a_checkpoint_is_converted_from_bucket_to_bucket(bucket, local, tmp_path, capfd):
    paths.copy_folder(local, bucket / "tiny", "config.json")
    for root, source in ((bucket, bucket / "tiny"), (tmp_path, local)):
        assert run(capfd, "convert", "to-jax", source, root / "jax")[0] == 0
        assert run(capfd, "convert", "to-torch", root / "jax", root / "back")[0] == 0
    # The same bytes, but for times and names of folders in what converts and Orbax say.
    says = {"convert.json", "hashes.json"}
    says |= {f"params/{name}" for name in ("_CHECKPOINT_METADATA", "commit_success.txt")}
    for name, differing in (("jax", says), ("back", {"convert.json"})):
        ours, theirs = contents(bucket / name), contents(tmp_path / name)
        assert ours.keys() == theirs.keys()
        assert {x for x in ours if ours[x] != theirs[x]} <= differing
        opened = checkpoints.open(bucket / name)
        assert opened.verify() == (opened.identity, True)
    assert opened.identity == checkpoints.open(tmp_path / "back").identity
    refused = "exists; name another folder or add --overwrite."
    assert refused in run(capfd, "convert", "to-jax", bucket / "tiny", bucket / "jax")[1]
    # One that a killed conversion left is no checkpoint, and the same command makes it whole.
    paths.write_text(bucket / "jax" / paths.UNFINISHED, "")
    partial = "jax was not written to its end, or is being written; convert it again."
    assert partial in run(capfd, "convert", "verify", bucket / "jax")[1]
    assert run(capfd, "convert", "to-jax", bucket / "tiny", bucket / "jax")[0] == 0
    assert run(capfd, "convert", "verify", bucket / "jax")[0] == 0


def test_compiled_programs_are_taken_from_a_bucket(bucket, local, monkeypatch):
    folder, read, pictures = bucket / "cache", [], []
    monkeypatch.setattr("jax._src.compilation_cache._cache_checked", True)  # it is not in use
    monkeypatch.setattr("jax._src.compilation_cache._cache_used", False)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(folder))
    pickled = executables.pickle.loads
    monkeypatch.setattr(executables.pickle, "loads", lambda x: read.append(x) or pickled(x))
    try:
        for count in (0, 3):
            model = blip3o_jax.load(local, devices=jax.devices()[:1], batch_size=1)
            picture = np.asarray(*model.generate("a b", num_inference_steps=2))
            assert len(read) == count
            assert len(paths.files_below(folder / executables.FOLDER)) == 3
            pictures.append(picture)
        np.testing.assert_array_equal(*pictures)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


COLORS = ("red", "blue", "green", "pink")
PROMPTS = [f"two {color} hearts {number}" for color in COLORS for number in range(10)]


def generate(root, checkpoint_folder, *more: str) -> list[str]:
    """The command of a job whose prompts and results are below `root`."""
    words = ["generate", "--prompts", root / "prompts.txt", "--checkpoint", checkpoint_folder]
    words += ["--out", root / "out", "--batch-size", "8", *FLAGS, *more]
    return [str(word) for word in words]


def test_a_job_killed_in_a_bucket_makes_the_same_pictures(bucket, local, tmp_path, capfd):
    paths.copy_folder(local, bucket / "tiny", "config.json")
    for root in (bucket, tmp_path):
        paths.write_text(root / "prompts.txt", "\n".join(PROMPTS))
    assert run(capfd, *generate(tmp_path, local))[0] == 0
    words = generate(bucket, bucket / "tiny")
    code = f"from blip3o_jax.cli import main; main({words!r})"
    killed(code, bucket, (bucket / "out" / "job" / "done" / "000000.jsonl").exists, seed=2)
    assert run(capfd, *words, "--seed", "1")[1].startswith("blip3o-jax: ")
    assert run(capfd, *words)[0] == 0
    ours, theirs = contents(bucket / "out"), contents(tmp_path / "out")
    assert {x for x in ours.keys() ^ theirs.keys() if not x.startswith("job/")} == set()
    # A row says where its prompt stands.
    rows = ours["manifest.jsonl"].replace(str(bucket).encode(), str(tmp_path).encode())
    ours["manifest.jsonl"] = rows
    assert {x for x in ours if x[:4] != "job/" and ours[x] != theirs[x]} == set()
    assert sum(x.endswith(".png") for x in ours) == 40
    assert cli.main(generate(bucket, bucket / "tiny", "--status")) == 0
    status = json.loads(capfd.readouterr().out)
    assert (status["done"], status["failed"], status["at_work"]) == (40, 0, [])
