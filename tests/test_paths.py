"""`paths.path` names local files and objects in buckets; what is local is written whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from clouds import serve_folder

from blip3o_jax import buckets, paths
from blip3o_jax.data import tables
from blip3o_jax.errors import InputError
from blip3o_jax.jobs import openai


def test_a_local_name_is_a_pathlib_path(tmp_path):
    assert paths.path("runs/a b") == Path("runs/a b")
    assert paths.path(tmp_path) == tmp_path
    assert paths.path("file:///data/a%20b") == Path("/data/a b")
    assert not paths.is_bucket("runs/gs:/x")
    assert paths.is_bucket("gs://team/run")
    assert paths.is_bucket("s3://team/run")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("http://host/run", "http://host/run: paths are local, or begin with gs:// or s3://"),
        ("file://host/run", "file://host/run names another host"),
        ("gs://", "gs:// names no bucket."),
        ("s3:///run", "s3:///run names no bucket."),
        ("gs:/team/run", "gs:/team/run is no path; write gs://team/run."),
        ("s3:run", "s3:run is no path; write s3://run."),
    ],
)
def test_a_name_that_cannot_work_is_refused(name, sentence):
    with pytest.raises(InputError) as caught:
        paths.path(name)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(("scheme", "extra"), [("gs", "gcs"), ("s3", "s3")])
def test_a_missing_extra_is_named(scheme, extra, monkeypatch):
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(InputError) as caught:
        paths.path(f"{scheme}://team/run")
    install = f"install it with: pip install 'blip3o-jax[{extra}]'"
    assert str(caught.value) == f"{scheme}://team/run needs the extra [{extra}]; {install}"


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "config.json"
    paths.write_text(file, "old")

    def full():
        yield b"n"
        raise OSError(28, os.strerror(28))

    sentence = "config.json cannot be written: No space left on device."
    with (
        pytest.raises(InputError, match=sentence),
        paths.remote_errors(f"{file} cannot be written"),
    ):
        paths.write_chunks(file, full())
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert file.read_text() == "old"


def test_a_file_is_written_beside_its_place_under_a_name_of_its_own(tmp_path):
    """Of two writers neither sees the other's, wherever they run; a killed one's is known."""
    file, begun = tmp_path / "a" / "list", []

    def chunks(last: bytes):
        yield b"x"
        begun.append(set((tmp_path / "job").iterdir()))
        assert not file.exists()
        yield last

    def outer():
        yield b"o"
        paths.write_chunks(tmp_path / "b", chunks(b"y"), tmp_path / "job")
        yield b"o"

    paths.write_chunks(file, outer(), tmp_path / "job")
    assert (tmp_path / "b").read_bytes() == b"xy"
    assert file.read_bytes() == b"oo"
    (names,) = begun
    assert len(names) == 2
    assert all(paths.is_left_over(name) for name in names)
    assert not paths.is_left_over(file)
    assert list((tmp_path / "job").iterdir()) == []


def test_a_mistake_of_the_program_is_not_put_down_to_the_server():
    with pytest.raises(KeyError), paths.remote_errors("x cannot be read"):
        raise KeyError("x")


def test_files_of_all_folders_are_listed_and_removed_behind_a_link_too(tmp_path, monkeypatch):
    for name in ("b/c/d", "a"):
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_text(name)
    files = paths.files_below(tmp_path / "f")
    assert [str(file.relative_to(tmp_path)) for file in files] == ["f/a", "f/b/c/d"]
    assert [file.stat().st_size for file in files] == [1, 5]
    before = paths.state(files[0])
    files[0].write_text("x")
    os.utime(files[0], ns=(1, 1))
    assert paths.state(files[0]) == (1, "1") != before
    (tmp_path / "link").symlink_to("f")
    (tmp_path / "f" / "elsewhere").symlink_to(tmp_path)
    # Who is ended halfway, here by a file that cannot be removed, goes on by the marker.
    unlink = Path.unlink

    def refuse(file, missing_ok=False):
        if file.name == "d":
            raise PermissionError
        unlink(file, missing_ok)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "unlink", refuse)
        with pytest.raises(PermissionError):
            paths.clear_folder(tmp_path / "link", "a")
    assert (tmp_path / "f/a").exists()
    paths.clear_folder(tmp_path / "link", "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "link"]
    assert list((tmp_path / "f").iterdir()) == []


def test_local_paths_import_no_client():
    code = "import sys; from blip3o_jax import paths; paths.path('a'); print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"etils", "fsspec", "gcsfs", "s3fs"} & set(result.stdout.split())


def test_an_object_is_read_in_few_requests(tmp_path, monkeypatch):
    """Of as much as is read ahead: line by line, at once, and where a line tells what it is."""
    monkeypatch.setattr(buckets, "READ_AHEAD", 1 << 20)
    own, asked = serve_folder(monkeypatch, tmp_path)
    rows = [json.dumps({"id": str(n), "error": "x" * 60}) for n in range(40_000)]
    (tmp_path / "manifest.jsonl").write_text("\n".join(rows))
    (tmp_path / "rows.json").write_text("[" + ",\n".join(rows) + "]")
    pieces = -(-len("\n".join(rows)) // (1 << 20))
    assert pieces == 4

    def requests(read):
        asked.clear()
        count = len(read())
        return count, asked.count("cat_file")

    with (own / "rows.json").open("rb") as stream:
        assert requests(stream.read) == ((tmp_path / "rows.json").stat().st_size, 1)
    lines = requests(lambda: list(openai._result_lines(own, 1, wants_errors=True)))
    assert lines == (len(rows), pieces)
    assert requests(lambda: tables._spans("gs://own/rows.json")) == (len(rows), 2)
