"""A job whose folder, model, sources or neighbours are not as they should be."""

import hashlib
import json
import pathlib

import pytest
from asking import PROMPTS, files, generate, manifest
from editing import FLAGS
from PIL import Image

from blip3o_jax import paths
from blip3o_jax.cli import main
from blip3o_jax.errors import InputError
from blip3o_jax.jobs import ledger, work
from blip3o_jax.jobs.options import load_for

pytestmark = pytest.mark.usefixtures("small")
LIFE = {"host": "elsewhere", "pid": 1, "token": "x", "made": 3, "seconds": 2.0}  # a lock


def test_a_share_whose_own_requests_failed_says_so_whoever_ends_the_job(channels, capsys):
    rows = [{"prompt": prompt, "id": f"p{i}"} for i, prompt in enumerate(PROMPTS)]
    rows[5]["prompt"] = " "
    pathlib.Path("prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    # What cannot be served comes first.
    assert generate(channels, "--share", "0/2", out="shared") == work.FAILED
    said = capsys.readouterr()
    assert said.out == "Share 0/2 of shared is done; others are at work on the rest.\n"
    sentence = "blip3o-jax: 1 request failed (p5); shared/job/done says why.\n"
    assert said.err.endswith(sentence)
    assert generate(channels, "--share", "1/2", out="shared") == work.FAILED
    assert capsys.readouterr().out == "7 images in shared\n"
    (error,) = [row["error"] for row in manifest("shared") if "error" in row]
    assert error.startswith("prompts.jsonl line 6: The prompt is empty")


def test_a_share_that_was_ended_halfway_leaves_no_manifest_to_the_others(channels, monkeypatch):
    """Its shard is recorded, but not all of it."""
    record, whole = ledger.record, ledger.Rows()

    def record_one(folder, shard, rows):
        whole.update(rows)
        record(folder, shard, dict(list(rows.items())[:1]))

    monkeypatch.setattr(ledger, "record", record_one)
    assert generate(channels, "--share", "0/2") == 0
    monkeypatch.setattr(ledger, "record", record)
    assert generate(channels, "--share", "1/2") == 0
    assert not pathlib.Path("made/manifest.jsonl").exists()
    assert generate(channels, "--share", "0/2") == 0
    assert [row["id"] for row in manifest()] == [f"p{i}" for i in range(8)]
    assert len(whole) > 2


DAMAGED = {
    "not JSON": b'{"requests": 8',
    "not UTF-8 text": b'{"requests": "\xff"}',
    "not a JSON object": b"[]",
    "there twice": b'{"pid": 1, "pid": 2}',
    "not JSON: it is nested": b"[" * 100_000,
}
OTHER = {
    "job/job.json": {
        b'{"requests": "x", "begun": 1}': "its `requests` is no whole number",
        b'{"requests": 8}': "its `begun` is no whole number",
    },
    "job/done/000001.jsonl": {
        b'{"id": "p0"}': "it is no row of this shard",
        b'{"number": "1", "id": "p0"}': "it is no row of this shard",
        b'{"number": 3, "id": "p0", "file": 1}': "it is no row of this shard",
    },
    "job/lock-0-of-1.json": {
        b'{"host": "elsewhere", "pid": "1"}': "it is no lock",
        json.dumps(LIFE | {"pid": 2**80}).encode(): "it is no lock",
        json.dumps(LIFE | {"seconds": None}).encode(): "it is no lock",
    },
}
FIX = {
    "job/job.json": "name another folder, or add --overwrite to make all of it again.",
    "job/done/000001.jsonl": "delete this file and give the job's command again, which makes what",
    "job/lock-0-of-1.json": "delete it, if no process is at work on this job.",
}


@pytest.mark.parametrize("name", OTHER)
def test_a_damaged_file_of_a_job_is_named_with_what_helps(name, channels, capsys, never):
    assert generate(channels) == 0
    never()
    path = pathlib.Path("made") / name
    before = path.read_bytes() if path.exists() else None
    for written, problem in (OTHER[name] | {v: k for k, v in DAMAGED.items()}).items():
        path.write_bytes(written)
        for argv in (["--status"], []):
            assert generate(channels, *argv) == 2
            said = capsys.readouterr()
            (line,) = (line for line in said.err.splitlines() if "blip3o-jax: " in line)
            assert line.startswith(f"blip3o-jax: {path}")
            assert problem in line
            assert FIX[name] in line
    # And that helps.
    if name == "job/job.json":
        return
    path.unlink()
    if before:
        assert b"p" in before
        return
    assert generate(channels) == 0


def test_a_row_that_belongs_to_another_shard_is_no_row_of_this_one(channels, capsys):
    assert generate(channels) == 0
    first, second = (pathlib.Path(f"made/job/done/00000{i}.jsonl") for i in (0, 1))
    first.write_bytes(second.read_bytes())
    assert generate(channels) == 2
    assert f"{first} line 1 is damaged: it is no row of this shard;" in capsys.readouterr().err
    first.unlink()
    assert generate(channels) == 0
    assert [row["id"] for row in manifest()] == [f"p{i}" for i in range(8)]


def test_what_a_writer_that_was_killed_left_is_no_other_files_job(channels):
    left = [pathlib.Path(f"made/job/{paths.NEW}{i}") for i in "ab"]
    left[0].parent.mkdir(parents=True)
    for path in left:
        path.write_bytes(b"half")
    assert generate(channels) == 0
    assert main(["generate", "--status", "--out", "made"]) == 0
    assert len(manifest()) == 8
    pathlib.Path("other/job").mkdir(parents=True)
    for path in (pathlib.Path("other/job/list"), pathlib.Path("other/list")):
        path.write_bytes(b"mine")
        assert generate(channels, out="other") == 2
        path.unlink()
    assert generate(channels, out="other") == 0


def test_what_a_job_did_not_write_is_not_overwritten(channels, capsys, never):
    assert generate(channels) == 0
    (first, *_), before = manifest(), files()
    never()
    retouched = first["file"].replace(".png", "-small.png")
    for name in ("edited/manifest.jsonl", retouched, f"edited/{first['file']}", "result.json"):
        path = pathlib.Path("made", name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
        assert generate(channels, "--seed", "1", "--overwrite") == 2
        sentence = f"made also holds {name}, which its job did not write; move it away, or name"
        assert sentence in capsys.readouterr().err
        assert path.read_bytes() == b"mine"
        path.unlink()
        assert files() == before


@pytest.mark.parametrize("kind", ["png", "tar"])
def test_what_a_killed_job_left_without_rows_is_overwritten_by_other_prompts(kind, channels):
    """Also where it was killed as it deleted: rows may go first, the job's facts go last."""
    assert generate(channels, "--format", kind) == 0
    pathlib.Path("made/manifest.jsonl").unlink()
    pathlib.Path("made/job/done/000000.jsonl").write_bytes(b"half")
    pathlib.Path("made/job/done/000001.jsonl").unlink()
    pathlib.Path(f"made/{paths.NEW}1").write_bytes(b"half")
    pathlib.Path("prompts.jsonl").write_text('{"prompt": "a dog"}')
    assert generate(channels, "--format", kind, "--overwrite") == 0
    assert len(manifest()) == 1
    assert len(list(pathlib.Path("made").glob("*.png"))) == (kind == "png")


@pytest.mark.parametrize("is_listed_first", [False, True])
def test_a_share_that_begins_while_another_looks_is_no_other_files(is_listed_first, monkeypatch):
    facts, is_empty = {"command": "generate", "requests": 1}, ledger._is_empty
    folder = pathlib.Path("made")

    def look(place):
        monkeypatch.setattr(ledger, "_is_empty", is_empty)
        was_empty = is_empty(place) if is_listed_first else None
        ledger.begin(place, facts)
        return was_empty or is_empty(place)

    monkeypatch.setattr(ledger, "_is_empty", look)
    ledger.begin(folder, facts)
    assert ledger.is_begun(folder, facts)
    monkeypatch.setattr(ledger, "_is_empty", look)
    with pytest.raises(InputError, match="a job with requests 1; this one has requests 2"):
        ledger.begin(pathlib.Path("other"), facts | {"requests": 2})


@pytest.mark.parametrize("overwrite", [False, True])
def test_devices_that_do_not_fit_leave_no_folder_and_empty_none(
    overwrite, channels, capsys, monkeypatch
):
    if overwrite:
        assert generate(channels, out="new/made") == 0
    before = sorted(pathlib.Path().rglob("*"))
    monkeypatch.setattr(work, "load_for", load_for)
    options = ["--overwrite"] * overwrite
    for mesh, sentence in {
        "data=3": "data=3 does not fit the 8 of 8 devices",
        "data=-1,fsdp=-1": "both data and fsdp are -1",
        "data=8": "batch_size 4 does not divide by the mesh's 8 batch shards.",
    }.items():
        size = ["--batch-size", "4"]
        assert generate(channels, "--mesh", mesh, *size, *options, out="new/made") == 2
        assert sentence in capsys.readouterr().err
        assert sorted(pathlib.Path().rglob("*")) == before


def test_a_place_that_cannot_be_is_known_before_the_model_is_loaded(channels, capsys, never):
    pathlib.Path("file").touch()
    never()
    for out, sentence in {
        "file": "file exists and is not a folder.",
        "file/below": "blip3o-jax: file is not a folder.",
        "x" * 300: "cannot be read: File name too long.",
    }.items():
        assert generate(channels, out=out) == 2
        assert sentence in capsys.readouterr().err
    pathlib.Path("link").symlink_to("nowhere/below")
    assert generate(channels, out="link") == 2
    assert "blip3o-jax: link is not a folder." in capsys.readouterr().err


def test_a_folder_behind_a_link_is_emptied_and_stays_behind_it(channels):
    pathlib.Path("disk").mkdir()
    pathlib.Path("made").symlink_to("disk")
    assert generate(channels, "--num-images", "2") == 0
    assert len(files()) == 17
    assert generate(channels, "--overwrite") == 0
    assert pathlib.Path("made").is_symlink()
    assert len(files()) == 9


def test_a_source_that_is_another_file_than_before_is_refused_and_one_that_is_gone_is_not(
    channels, capsys
):
    rows = [{"image": name, "instruction": "make it blue"} for name in ("a.png", "b.png")]
    pathlib.Path("edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["edit", "--edits", "edits.jsonl", "--checkpoint", channels, *FLAGS, "--out", "made"]
    assert main(argv) == 0
    before, source = files(), pathlib.Path("b.png").read_bytes()
    Image.open("a.png").save("b.png")
    assert main(argv) == 2
    error = capsys.readouterr().err
    old, new = (hashlib.sha256(x).hexdigest() for x in (source, pathlib.Path("b.png").read_bytes()))
    told = [f'[{{"file": "b.png", "sha256": "{x}"}}]' for x in (old, new)]
    assert f"was made of {told[0]}, and these are now {told[1]}: put them back, name" in error
    assert files() == before
    pathlib.Path("b.png").unlink()
    assert main(argv) == 0
