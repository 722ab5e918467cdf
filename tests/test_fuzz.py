"""A short run of tests/fuzz.py over every kind of file, and that it sees what it looks for."""

import ast
import itertools
import json
import re
import time

import fuzz
import fuzz_readers
import pytest

INPUTS = {"config.json": 8}  # of which many trace a model of other sizes


@pytest.fixture(autouse=True)
def index_files_are_the_tests(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", sorted(fuzz.KINDS))
def test_damaged_files_are_read_or_refused_in_one_sentence(kind, tmp_path):
    inputs = INPUTS.get(kind, 25)
    row = fuzz.run(kind, inputs, 0, tmp_path)
    assert row["failure"] == ""
    assert row["inputs"] == row["read"] + row["refused"] + row["unusable"] == inputs
    assert row["refused"] + row["unusable"] > 0


def careless(folder):
    """A reader that forgets what JSON may hold."""
    seed = fuzz.Seed(fuzz_readers.as_json, {"sizes": [1, 2]})
    return [seed], lambda data: sum(json.loads(data)["sizes"])


def test_a_traceback_is_a_failure_with_the_damage_that_gives_it_again(tmp_path, monkeypatch):
    monkeypatch.setitem(fuzz.KINDS, "careless", careless)
    failure = fuzz.run("careless", 25, 0, tmp_path)["failure"]
    assert failure == fuzz.run("careless", 25, 0, tmp_path)["failure"]
    first, _, trace = failure.partition("\n")
    seeds, read = careless(tmp_path)
    with pytest.raises((KeyError, TypeError, ValueError)) as error:
        read(fuzz.damaged(seeds, *ast.literal_eval(first.removeprefix("damage "))))
    assert type(error.value).__name__ in trace.splitlines()[-1]


def test_a_slow_reader_is_a_failure_with_its_damage(tmp_path, monkeypatch):
    def spin(data):
        end = time.process_time() + 0.1 * (b"x" in data)
        while time.process_time() < end:
            pass
        return True

    seed = fuzz.Seed(fuzz_readers.as_json, ["a"])
    monkeypatch.setitem(fuzz.KINDS, "slow", lambda folder: ([seed], spin))
    monkeypatch.setattr(fuzz, "LONGEST", 0.05)
    failure = fuzz.run("slow", 200, 0, tmp_path)["failure"]
    damage = ast.literal_eval(failure.partition("\n")[0].removeprefix("damage "))
    assert b"x" in fuzz.damaged([seed], *damage)
    assert re.search(r"it took 0\.\d+ s", failure)


def test_a_reader_that_grows_is_a_failure(tmp_path, monkeypatch):
    reader = [fuzz_readers.constant(b"abc")], len
    monkeypatch.setitem(fuzz.KINDS, "large", lambda folder: reader)
    peaks = itertools.count(0, 300 << 20)
    monkeypatch.setattr(fuzz, "peak", lambda: next(peaks))
    failure = fuzz.run("large", 30, 0, tmp_path)["failure"]
    assert re.search(r"it grew by (1[1-9]|[2-9]\d|\d{3})00 MB", failure)


def test_a_process_that_ends_is_a_failure():
    failure = fuzz.run_apart("no kind", 1, 0)["failure"]
    assert failure.startswith("exit code 1, damage none\n")
    assert "KeyError: 'no kind'" in failure


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (("flip", 7, 1), b"a`cdef"),
        (("delete", -5, 4), b"af"),
        (("insert", 3, b"xy", 2), b"abcxyxydef"),
        (("overwrite", 4, b"xyz"), b"abcdxyz"),
        (("repeat", 1, 3, 2), b"adebcdef"),
        (("cut", 2), b"ab"),
    ],
)
def test_bytes_are_damaged_at_a_place(step, expected):
    assert fuzz.broken(b"abcdef", *step) == expected
    fuzz.broken(b"", *step)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (("replace", 1, None), {"a": None, "b": 5}),
        (("remove", 2), {"a": ["x"], "b": 5}),
        (("copy", 2, 4), {"a": [5, "x"], "b": 5}),
        (("copy", 4, 1), {"a": [1, "x"], "b": [1, "x"]}),
        (("number", 1, -1), {"a": [1, "x"], "b": -1}),
        (("replace", 5, "y"), "y"),
        (("remove", 0), None),
    ],
)
def test_values_are_damaged_at_a_place(step, expected):
    assert fuzz.changed({"a": [1, "x"], "b": 5}, *step) == expected
