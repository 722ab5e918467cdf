"""Compiled programs on disk: who finds them compiles nothing, and no other program is ever run."""

import configparser
import json
import logging
import os
import shutil
import subprocess
import sys
import unittest.mock
from pathlib import Path

import jax
import numpy as np
import pytest
from editing import CHANNELS, checkpoint, picture
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

import blip3o_jax
from blip3o_jax import executables, paths
from blip3o_jax.cli import main
from blip3o_jax.serve.worker import Worker

COMPILED = "/jax/core/compile/backend_compile_duration"
TRACED = "/jax/core/compile/jaxpr_trace_duration"
NAMES = {"write_tokens", "draw_latents", "pictures"}  # the programs of a picture


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("model") / "channels", CHANNELS)


@pytest.fixture
def cache(tmp_path):
    """A cache of compiled programs of this test's own; the run's comes back after it."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache

    def use(folder, is_enabled):
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_enable_compilation_cache", is_enabled)
        compilation_cache.reset_cache()
        jax.clear_caches()

    use(str(tmp_path / "cache"), True)
    yield tmp_path / "cache" / executables.FOLDER
    use(*before)


def load(model, count=1):
    return blip3o_jax.load(model, devices=jax.devices()[:count], batch_size=2)


def picture_of(pipeline, prompt="a b", steps=2):
    (image,) = pipeline.generate(prompt, seed=3, num_inference_steps=steps)
    return np.asarray(image)


def events(run):
    """(result of `run`, names of the functions that JAX traced or compiled meanwhile)."""
    seen = []

    def hear(event, seconds, **about):
        if event in (COMPILED, TRACED):
            seen.append(about.get("fun_name", ""))

    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        return run(), seen
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)


def kinds(folder):
    """The programs there, by name without the hash."""
    return {file.name.rpartition("-")[0] for file in folder.iterdir()}


def test_a_second_process_neither_traces_nor_compiles(model, cache):
    first, compiled = events(lambda: picture_of(load(model)))
    assert kinds(cache) == NAMES
    assert any("write_tokens" in name for name in compiled)
    jax.clear_caches()
    again = load(model)
    second, compiled = events(lambda: picture_of(again))
    np.testing.assert_array_equal(second, first)
    assert not [name for name in compiled if any(kind in name for kind in NAMES)]
    assert len(list(cache.iterdir())) == 3


def test_what_is_another_program_has_a_file_of_its_own(model, cache):
    """Other steps, other devices and another batch: nothing is taken for what it is not."""
    pipeline = load(model)
    two = picture_of(pipeline)
    assert not np.array_equal(picture_of(pipeline, steps=3), two)
    count = len(list(cache.iterdir()))
    assert count == 4  # draw_latents twice
    for devices in (jax.devices()[1:2], jax.devices()[:2]):
        other = blip3o_jax.load(model, devices=devices, batch_size=2)
        np.testing.assert_array_equal(picture_of(other), two)
        assert len(list(cache.iterdir())) == (count := count + 3)


@pytest.mark.parametrize("name", ["jax", "platform", "blip3o_jax", "options", "program"])
def test_a_stale_or_foreign_program_is_made_again_and_never_run(
    model, cache, name, caplog, monkeypatch
):
    expected = picture_of(load(model))
    for file in cache.iterdir():
        head, _, data = file.read_bytes().partition(b"\n")
        other = json.dumps(json.loads(head) | {name: "another"}).encode()
        file.write_bytes(other + b"\n" + data)
    read = []
    deserialize = serialize_executable.deserialize_and_load
    monkeypatch.setattr(
        serialize_executable,
        "deserialize_and_load",
        lambda *args, **kwargs: read.append(args) or deserialize(*args, **kwargs),
    )
    jax.clear_caches()
    with caplog.at_level(logging.INFO):
        np.testing.assert_array_equal(picture_of(load(model)), expected)
    assert not read
    assert caplog.text.count(f"has another {name} than ") == 3
    jax.clear_caches()
    np.testing.assert_array_equal(picture_of(load(model)), expected)
    assert len(read) == 3  # what was made again


def test_a_program_of_other_code_or_options_is_not_known(tmp_path, monkeypatch):
    device = jax.devices()[0]
    before = executables._facts(device)
    monkeypatch.setenv("XLA_FLAGS", "--xla_other=1")
    options = executables._facts(device)
    assert {name for name in before if options[name] != before[name]} == {"options"}
    monkeypatch.undo()
    # Code that programs are traced from, and other code.
    copy = tmp_path / "blip3o_jax"
    shutil.copytree(Path(executables.__file__).parent, copy, ignore=lambda *_: ["assets"])
    monkeypatch.setattr(executables, "__file__", str(copy / "executables.py"))
    assert executables._facts(device) == before
    (copy / "jobs" / "compile.py").write_text("")
    assert executables._facts(device) == before
    for name in ("sample/flow.py", "models/layers.py", "pixels.py"):
        file = copy / name
        file.write_text((text := file.read_text()) + "# other\n")
        code = executables._facts(device)
        assert {name for name in before if code[name] != before[name]} == {"blip3o_jax"}
        file.write_text(text)


def test_code_that_programs_are_traced_from_is_all_that_sampling_imports():
    contracts = configparser.ConfigParser()
    contracts.read(Path(__file__).parents[1] / "setup.cfg")
    kind, *rooms = contracts["import_contracts"]["sample"].split()
    assert kind == "only"
    assert set(executables.ROOMS) == {*rooms, "sample", "pipeline"}


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_a_damaged_program_is_made_again(model, cache, damage, caplog):
    expected = picture_of(load(model))
    for file in cache.iterdir():
        data = file.read_bytes()
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        damaged = {"cut": data[:middle], "flipped": flipped, "empty": b"", "text": b"{}\nx"}
        file.write_bytes(damaged[damage])
    jax.clear_caches()
    with caplog.at_level(logging.INFO):
        np.testing.assert_array_equal(picture_of(load(model)), expected)
    assert caplog.text.count("it is compiled again") == 3


def test_a_program_that_jax_had_in_its_cache_runs_from_disk_too(model, cache):
    """jaxlib 0.10.2 writes what it took from there without its functions."""
    with unittest.mock.patch.object(executables, "folder", return_value=None):
        expected = picture_of(load(model))
    assert len(list(cache.parent.glob("*-cache"))) > 2
    assert not cache.exists()
    for _ in range(2):  # makes it, and takes it from disk
        jax.clear_caches()
        np.testing.assert_array_equal(picture_of(load(model)), expected)
        assert kinds(cache) == NAMES
    assert jax.config.jax_enable_compilation_cache


def test_a_folder_in_which_others_may_write_is_not_used(model, cache, caplog):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    assert picture_of(load(model)).any()
    assert "is not used: others may write there" in caplog.text
    assert not list(cache.iterdir())


def test_a_picture_needs_no_disk(model, cache, caplog):
    cache.parent.mkdir()
    cache.write_text("no folder")
    assert picture_of(load(model)).any()
    assert caplog.text.count("is not kept: ") == 3


def compile_for(model, capsys, *more):
    """The report of `compile`, which runs in a process of its own."""
    assert main(["compile", "--checkpoint", str(model), "--mesh", "data=1", *more]) == 0
    jax.clear_caches()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr("jax.local_devices", lambda: jax.devices()[:1])


def test_compile_makes_what_generate_and_edit_need(model, cache, capsys, one_device):
    options = "--batch-size", "2", "--num-inference-steps", "2"
    report = compile_for(model, capsys, *options)
    programs = list(cache.iterdir())
    assert report["programs_compiled"] == len(programs) > 4
    assert report["bytes"] == sum(file.stat().st_size for file in programs)
    assert kinds(cache) == NAMES | {"encode_sources"}
    # Again: all is there.
    assert compile_for(model, capsys, *options)["programs_compiled"] == 0
    pipeline = load(model)

    def make():
        edited = pipeline.edit(picture(16, 16), "c d", num_inference_steps=2)
        return picture_of(pipeline), edited

    _, compiled = events(make)
    made = NAMES | {"encode_sources"}
    assert not [name for name in compiled if any(kind in name for kind in made)]
    assert set(cache.iterdir()) == set(programs)


def test_processes_that_compile_into_one_folder_do_not_stop_each_other(
    model, cache, capsys, one_device, monkeypatch
):
    """Their trial is another's too, and what they write at the moment is gone when it is asked."""
    monkeypatch.setattr("blip3o_jax.request.of_each_shape", lambda *_, **__: ())
    write, below, left = paths.write_bytes, paths.files_below, iter("ab")

    def write_and_lose(file, data):
        write(file, data)
        file.unlink()

    def list_and_lose(folder):
        write(folder / f"{paths.NEW}{next(left)}", b"half")
        write(folder / "other", b"whole")
        files = below(folder)
        (folder / "other").unlink()
        return files

    monkeypatch.setattr(paths, "write_bytes", write_and_lose)
    monkeypatch.setattr(paths, "files_below", list_and_lose)
    report = compile_for(model, capsys)
    assert (report["programs_compiled"], report["bytes"], list(left)) == (0, 0, [])


def test_jobs_of_their_own_processes_run_what_compile_made(model, tmp_path):
    """As a picture, which joins no other processes, and as a job, which looks for them."""
    folder = tmp_path / "cache" / executables.FOLDER

    def states():
        return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}

    def run(*words):
        words = [*words, "--checkpoint", model, "--num-inference-steps", "2", "--batch-size", "1"]
        command = [sys.executable, "-m", "blip3o_jax", *map(str, words)]
        own = {"JAX_COMPILATION_CACHE_DIR": str(folder.parent), "XLA_FLAGS": ""}
        done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "compiled again" not in done.stderr

    run("compile")
    before = states()
    for out in ("a.png", "job"):
        run("generate", "a b", "--out", tmp_path / out)
        assert states() == before


def test_compile_for_a_server_makes_what_it_warms_up_with(model, cache, capsys, one_device):
    assert compile_for(model, capsys, "--batch-size", "2", "--server")["programs_compiled"]
    before = set(cache.iterdir())
    assert {"first_noise", "denoise_between"} <= kinds(cache)
    from blip3o_jax.serve.metrics import Metrics
    from blip3o_jax.serve.queue import Queue

    worker = Worker(load(model), Queue(1), Metrics())
    _, compiled = events(worker._warm_up)
    assert not [name for name in compiled if "denoise_between" in name or "write_tok" in name]
    assert set(cache.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--top-k", "0"], "top_k is a number from 1"),
        (["--num-inference-steps", "0"], "num_inference_steps is a number from 1"),
        (["--server", "--num-inference-steps", "4"], "--server compiles for any number of steps"),
        (["--batch-size", "0"], "--batch-size is at least 1, not 0."),
        (["--checkpoint", "nothing"], "No checkpoint 'nothing'"),
    ],
)
def test_compile_refuses(options, sentence, capsys):
    assert main(["compile", *options]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_compile_says_that_nothing_is_kept(model, cache, capsys, one_device):
    jax.config.update("jax_enable_compilation_cache", False)
    assert main(["compile", "--checkpoint", str(model), "--mesh", "data=1"]) == 2
    assert "Programs are kept nowhere" in capsys.readouterr().err
    jax.config.update("jax_enable_compilation_cache", True)
    cache.parent.write_text("no folder")
    assert main(["compile", "--checkpoint", str(model), "--mesh", "data=1"]) == 2
    assert f"{cache} cannot be written: Not a directory" in capsys.readouterr().err
