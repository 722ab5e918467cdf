"""A job: its results are those of Python, whatever happens to it on the way."""

import concurrent.futures
import json
import os
import pathlib
import signal
import tarfile
import threading

import grain
import jax
import numpy as np
import pytest
from asking import PROMPTS, files, generate, manifest
from editing import FLAGS, QUICK
from PIL import Image

import blip3o_jax
from blip3o_jax.cli import main
from blip3o_jax.jobs import images, ledger, lock, work
from blip3o_jax.request import Request
from blip3o_jax.sample.settings import Settings

pytestmark = pytest.mark.usefixtures("small")


def test_a_job_gives_what_python_gives_in_the_order_of_its_prompts(channels, pipeline, capsys):
    assert generate(channels, "--num-images", "2", "--seed", "7") == 0
    assert capsys.readouterr().out == "16 images in made\n"
    expected = pipeline.generate(PROMPTS, seed=7, num_images=2, **QUICK)
    rows = manifest()
    asked = [(f"p{p}", prompt, i) for p, prompt in enumerate(PROMPTS) for i in (0, 1)]
    assert [(row["id"], row["prompt"], row["index"]) for row in rows] == asked
    for row, image in zip(rows, expected, strict=True):
        with Image.open(pathlib.Path("made") / row["file"]) as made:
            np.testing.assert_array_equal(np.asarray(made), np.asarray(image))
        assert row["sha256"] == ledger.digest_of(pathlib.Path("made") / row["file"])
        assert row["checkpoint"] == pipeline.identity


def test_a_finished_job_loads_nothing_and_says_the_same_again(channels, never, capsys):
    assert generate(channels) == 0
    before = files()
    never()
    assert generate(channels) == 0
    assert capsys.readouterr().out == "8 images in made\n" * 2
    assert files() == before


def test_shares_make_the_same_files_as_one_process(channels, capsys):
    assert generate(channels) == 0
    assert generate(channels, "--share", "1/3", out="shared") == 0
    assert capsys.readouterr().out.endswith(
        "Share 1/3 of shared is done; others are at work on the rest.\n"
    )
    assert generate(channels, "--share", "7/8", out="shared") == 0
    assert "Share 7/8 of shared is empty, since the job has 3 parts;" in capsys.readouterr().out
    assert not pathlib.Path("shared/manifest.jsonl").exists()
    assert generate(channels, "--share", "0/3", out="shared") == 0
    assert generate(channels, "--share", "2/3", out="shared") == 0
    assert files("shared") == files()


def test_no_batch_waits_for_what_is_recorded(channels, pipeline, monkeypatch):
    """So that a bucket that answers slowly holds up no device."""
    drawn, waited = threading.Event(), []
    run, record = type(pipeline).run, ledger.record

    def watched(*asked):
        yield from run(*asked)
        drawn.set()

    def slow(*what):
        waited.append(drawn.wait(20))
        record(*what)

    monkeypatch.setattr(type(pipeline), "run", watched)
    monkeypatch.setattr(ledger, "record", slow)
    assert generate(channels, "--num-images", "2") == 0
    assert waited == [True] * 6
    assert len(manifest()) == 16


def test_files_are_read_together_in_order_and_few_ahead():
    begun, together = [], threading.Barrier(3)

    def read(item):
        begun.append(item)
        together.wait(20)
        return item

    results = ledger.ahead(read, range(6), most=3)
    assert next(results) == 0
    assert sorted(begun) == [0, 1, 2]
    assert list(results) == [1, 2, 3, 4, 5]


def test_only_what_was_spoilt_or_deleted_is_made_again(channels, monkeypatch):
    assert generate(channels) == 0
    before, (first, second, *_) = files(), manifest()
    (pathlib.Path("made") / first["file"]).write_bytes(b"spoilt")
    (pathlib.Path("made") / second["file"]).unlink()
    made = []
    encoded = images.encoded
    monkeypatch.setattr(images, "encoded", lambda *a: made.append(a[1].prompt) or encoded(*a))
    assert generate(channels) == 0
    assert sorted(made) == sorted(PROMPTS[:2])
    assert files() == before


def test_another_job_in_the_same_folder_is_shown_the_difference(channels, capsys, never):
    assert generate(channels) == 0
    before = files()
    never()
    assert generate(channels, "--seed", "1", "--top-k", "5") == 2
    error = capsys.readouterr().err
    assert "made holds a job with seed 0, top_k 1200; this one has seed 1, top_k 5" in error
    pathlib.Path("prompts.jsonl").write_text('{"prompt": "a dog"}')
    assert generate(channels) == 2
    assert "input" in capsys.readouterr().err
    assert files() == before


def test_a_request_that_fails_is_recorded_and_made_once_it_can_be(channels, capsys):
    rows = [{"image": name, "instruction": "make it blue"} for name in ("a.png", "c.png", "b.png")]
    rows.append({"image": "a.png", "instruction": " "})
    pathlib.Path("edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["edit", "--edits", "edits.jsonl", "--checkpoint", channels, *FLAGS, "--out", "made"]
    assert main(argv) == work.FAILED
    said = capsys.readouterr()
    assert said.out == "2 images in made\n"
    failed = "2 requests failed (edits.jsonl line 2, edits.jsonl line 4)"
    assert said.err.endswith(f"blip3o-jax: {failed}; made/manifest.jsonl says why.\n")
    reasons = [row.get("error", "") for row in manifest()]
    assert [bool(reason) for reason in reasons] == [False, True, False, True]
    assert "c.png cannot be read" in reasons[1]
    assert "The instruction is empty" in reasons[3]
    before = files()
    Image.open("b.png").save("c.png")
    assert main(argv) == work.FAILED
    assert [bool(row.get("error")) for row in manifest()] == [False, False, False, True]
    assert before.items() - files().items() == {("manifest.jsonl", before["manifest.jsonl"])}


class AtOnce(concurrent.futures.Executor):
    """Without threads: what is submitted is done."""

    def submit(self, function, *args):
        future = concurrent.futures.Future()
        future.set_result(function(*args))
        return future


def test_a_signal_keeps_what_is_made_and_the_same_command_goes_on(channels, monkeypatch):
    assert generate(channels, out="whole") == 0
    # Otherwise all may be drawn before the fourth is written.
    monkeypatch.setattr(work, "ThreadPoolExecutor", lambda _: AtOnce())
    encoded, made = images.encoded, []

    def encode(args, sample, facts):
        made.append(sample.prompt)
        if len(made) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return encoded(args, sample, facts)

    monkeypatch.setattr(images, "encoded", encode)
    with pytest.raises(SystemExit) as end:
        generate(channels)
    assert end.value.code == 75
    assert not pathlib.Path("made/manifest.jsonl").exists()
    assert len(made) < len(PROMPTS)
    assert generate(channels) == 0
    assert sorted(made) == sorted(PROMPTS)
    assert files() == files("whole")


def test_a_second_job_stays_out_and_a_dead_ones_restart_gets_in(channels, capsys, monkeypatch):
    monkeypatch.setattr(lock, "DEAD", 4.0)
    monkeypatch.setattr(lock, "BEAT", 0.05)
    folder = pathlib.Path("made")
    assert generate(channels) == 0
    with lock.locked(folder, 0, 1):
        for options in (["--share", "0/1"], ["--share", "1/2"], ["--overwrite"]):
            assert generate(channels, *options) == 2
    error = capsys.readouterr().err
    assert error.count(f"Another job is at work on made: process {os.getpid()} on ") == 3
    # Of a process that is gone, and of one on another host that gives no sign of life.
    for life in ({"host": os.uname().nodename, "pid": 2**22 + 1}, {"host": "elsewhere", "pid": 1}):
        path = folder / "job/lock-0-of-1.json"
        path.write_text(json.dumps(life | {"token": "x", "made": 3, "seconds": 2.0}))
        assert generate(channels) == 0
        assert not path.exists()


def test_a_shard_holds_pictures_and_rows_and_is_made_whole_again(channels, monkeypatch):
    assert generate(channels) == 0
    assert generate(channels, "--format", "tar", out="tars") == 0
    shards = sorted(pathlib.Path("tars/shards").iterdir())
    members = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            members |= {name: tar.extractfile(name).read() for name in tar.getnames()}
    pictures = {name: data for name, data in files().items() if name != "manifest.jsonl"}
    assert {name: data for name, data in members.items() if name.endswith("png")} == pictures
    for row in manifest("tars"):
        assert json.loads(members[row["member"].replace(".png", ".json")])["id"] == row["id"]
    assert generate(channels, "--format", "array_record", out="records") == 0
    records = grain.sources.ArrayRecordDataSource(sorted(pathlib.Path("records/shards").iterdir()))
    assert sorted(records) == sorted(pictures.values())
    # A shard that is spoilt is made whole again.
    before = {path: path.read_bytes() for path in shards}
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    assert generate(channels, "--format", "tar", out="tars") == 0
    assert {path: path.read_bytes() for path in shards} == before


@pytest.mark.parametrize(("kind", "suffix"), [("webp", ".webp"), ("jpeg", ".jpg")])
def test_pictures_are_named_for_what_they_are(kind, suffix, channels):
    assert generate(channels, "--format", kind) == 0
    for row in manifest():
        path = pathlib.Path("made") / row["file"]
        assert path.suffix == suffix
        with Image.open(path) as image:
            assert image.format == kind.upper()


def test_the_status_counts_what_is_recorded(channels, capsys):
    assert generate(channels, "--share", "0/3") == 0
    capsys.readouterr()
    # Of a process that was killed.
    life = {"host": os.uname().nodename, "pid": 2**22 + 1, "token": "x", "made": 3, "seconds": 2.0}
    pathlib.Path("made/job/lock-0-of-3.json").write_text(json.dumps(life))
    assert main(["generate", "--status", "--out", "made"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["requests"], status["failed"], status["at_work"]) == (8, 0, [])
    assert 0 < status["done"] < 8
    pathlib.Path("made/job/lock-0-of-3.json").write_text(json.dumps(life | {"host": "elsewhere"}))
    assert main(["generate", "--status", "--out", "made"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["requests_per_s"], status["at_work"][0]["host"]) == (1.5, "elsewhere")
    assert main(["generate", "--status", "--out", "nowhere"]) == 2
    assert "nowhere holds no job" in capsys.readouterr().err


def test_the_status_reads_shards_together(channels, capsys, monkeypatch):
    assert generate(channels) == 0
    recorded, together = ledger.recorded, threading.Barrier(3)

    def wait_and_read(*what):
        together.wait(20)
        return recorded(*what)

    monkeypatch.setattr(ledger, "recorded", wait_and_read)
    assert main(["generate", "--status", "--out", "made"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["done"] == 8


MESHES = [(4, {}, 1), (8, {"data": 2, "tensor": 2}, 4)]


@pytest.mark.parametrize(("batch_size", "mesh", "devices"), MESHES)
def test_batch_mesh_and_shares_change_no_token_and_no_pixel_by_more_than_a_level(
    batch_size, mesh, devices, channels, pipeline, monkeypatch
):
    """Six random splits and orders for each of two meshes."""
    few = jax.devices()[:devices]
    other = blip3o_jax.load(channels, mesh=mesh, devices=few, batch_size=batch_size)
    monkeypatch.setattr(work, "load_for", lambda _: other)
    expected = {
        s.request.id: s
        for s in pipeline.run(
            [Request(p, id=f"p{i}", settings=Settings(**QUICK)) for i, p in enumerate(PROMPTS)]
        )
    }
    rng = np.random.default_rng(batch_size + devices)
    rows = pathlib.Path("prompts.jsonl").read_text().splitlines()
    for out in "abcdef":
        pathlib.Path("prompts.jsonl").write_text("\n".join(rng.permutation(rows)))
        count = int(rng.integers(1, 4))
        for index in rng.permutation(count):
            assert generate(channels, "--share", f"{index}/{count}", out=out) == 0
        for row in manifest(out):
            assert row["tokens"] == expected[row["id"]].tokens.tolist()
            with Image.open(pathlib.Path(out) / row["file"]) as made:
                pixels = np.asarray(made).astype(int)
            assert np.abs(pixels - expected[row["id"]].image).max() <= 1
