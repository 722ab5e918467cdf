"""Damaged files for every reader of what people bring.

    python tests/fuzz.py [--inputs 20000] [--seed 0] [--workers 1] [KIND ...]

An input is a small valid file (tests/fuzz_readers.py), damaged a few times: bits flipped, bytes
deleted, inserted, overwritten by extreme numbers, repeated or cut off; or, of JSON, values
replaced, removed or put elsewhere and numbers made extreme. Its reader may read it, refuse it by an
InputError of one line, or call its records unusable. Anything else, more than 10 s or 1 GB of
growth is a failure, printed with kind, seed and damage; exit code 1. A seed gives the same inputs.
"""

import argparse
import copy
import faulthandler
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import hypothesis
from fuzz_readers import KINDS, Seed
from hypothesis import strategies as st

from blip3o_jax.errors import InputError

# Of one input: seconds of the processor, seconds on a busy machine, growth of the process in bytes.
LONGEST, HANGS, MOST = 10.0, 120.0, 1 << 30
SHARES = {"config.json": 0.2}  # of the inputs, beside 1 of other kinds: each traces a model anew
COLUMNS = ("inputs", "refused", "unusable", "read", "slowest_s", "growth_mb")

# Places count from the start or the end, where headers and footers are, or are anywhere.
PLACES = st.integers(0, 300) | st.integers(-300, -1) | st.integers(0, 1 << 20)
SIZES = st.sampled_from((1, 4, 60, 600))
NUMBERS = [
    value.to_bytes(width, order)
    for width in (1, 2, 4, 8)
    for value in (0, 1, (1 << 8 * width - 1) - 1, 1 << 8 * width - 1, (1 << 8 * width) - 1)
    for order in ("little", "big")
]
JUNK = [b"\0", b"\n", b'"', b"{", b"}", b"[", b"]", b",", b":", b"-1", b"1e999", b"9", b"null"]
JUNK += [b"<image>", b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"\xff"]
TIMES = st.sampled_from((1, 1, 400, 10**5))
BYTES = st.one_of(
    st.tuples(st.just("flip"), PLACES, st.integers(0, 7)),
    st.tuples(st.just("delete"), PLACES, SIZES),
    st.tuples(st.just("insert"), PLACES, st.sampled_from(JUNK), TIMES),
    st.tuples(st.just("overwrite"), PLACES, st.sampled_from(NUMBERS)),
    st.tuples(st.just("repeat"), PLACES, PLACES, SIZES),
    st.tuples(st.just("cut"), PLACES),
)
INTEGERS = [0, 1, 2, 7, 1000, 2**20, 2**31 - 1, 2**31, 2**63, 2**64, 10**30, -1]
SCALARS = [None, True, 0, -1, 3, 2**63, 10**400, -1.5, 1e308, float("nan")]
SCALARS += ["", "a cat", "0.png", "<image>", "a\0b", "\ud800", "/", "..", "*", "x" * 1000]
KEYS = st.sampled_from(("from", "value", "role", "content", "bytes", "path", "x"))
VALUES = st.recursive(
    st.sampled_from(SCALARS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner),
    max_leaves=4,
)
CHANGES = st.one_of(
    st.tuples(st.just("replace"), PLACES, VALUES),
    st.tuples(st.just("remove"), PLACES),
    st.tuples(st.just("copy"), PLACES, PLACES),
    st.tuples(st.just("number"), PLACES, st.sampled_from(INTEGERS)),
)


@st.composite
def damages(draw, seeds: list[Seed]) -> tuple[int, list[tuple]]:
    """(number of a seed, steps of damage)."""
    number = draw(st.integers(0, len(seeds) - 1))
    has_values = seeds[number].document is not None
    step = CHANGES if has_values and draw(st.booleans()) else BYTES
    most = draw(st.sampled_from((1, 1, 2, 4)))
    return number, draw(st.lists(step, min_size=1, max_size=most))


def broken(data: bytes, what: str, place: int, *more: Any) -> bytes:
    """Bytes after one step of `BYTES`."""
    at = place % (len(data) or 1)
    before, after = data[:at], data[at:]
    if what == "flip":
        return before + bytes(byte ^ 1 << more[0] for byte in after[:1]) + after[1:]
    if what == "delete":
        return before + after[more[0] :]
    if what == "insert":
        return before + more[0] * more[1] + after
    if what == "overwrite":
        return before + more[0] + after[len(more[0]) :]
    start = more[0] % (len(data) or 1) if more else 0
    return before + data[start : start + more[1]] + after if what == "repeat" else before


def paths(document: Any, path: tuple = ()) -> dict[tuple, Any]:
    """{path: value} of a document, which is the first of them itself."""
    items = document.items() if isinstance(document, dict) else ()
    items = enumerate(document) if isinstance(document, list) else items
    below = [paths(value, (*path, key)) for key, value in items]
    return {path: document} | {p: value for part in below for p, value in part.items()}


def changed(document: Any, what: str, place: int, *more: Any) -> Any:
    """A document after one step of `CHANGES`."""
    values = paths(document)
    numbers = [path for path, value in values.items() if type(value) in (int, float)]
    places = numbers if what == "number" else list(values)
    path = places[place % len(places)] if places else ()
    value = more[0] if more else None
    if what == "copy":
        value = copy.deepcopy(values[places[value % len(places)]])
    if not path:
        return value
    if what == "remove":
        del values[path[:-1]][path[-1]]
    else:
        values[path[:-1]][path[-1]] = value
    return document


def damaged(seeds: list[Seed], number: int, steps: list[tuple]) -> bytes:
    """A seed's bytes after all steps; another is drawn where no file can hold the values."""
    document = copy.deepcopy(seeds[number].document)
    in_values = steps[0][0] in ("replace", "remove", "copy", "number")
    for step in steps if in_values else ():
        document = changed(document, *step)
    try:
        data = seeds[number].pack(document)
    except Exception:
        hypothesis.reject()
    for step in () if in_values else steps:
        data = broken(data, *step)
    return data


def peak() -> int:
    """Most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def run(kind: str, inputs: int, seed: int, folder: Path, watched: bool = False) -> dict:
    """{column: number} of a kind, and `failure`, "" or the first one's damage and traceback. An
    input that hangs ends the process if it is `watched`; FOLDER/last names the one being read."""
    hypothesis.configuration.set_hypothesis_home_dir(folder)
    seeds, read = KINDS[kind](folder)
    row = dict.fromkeys(COLUMNS, 0) | {"kind": kind, "failure": ""}
    for number, one in enumerate(seeds):  # each reader does its work
        assert read(one.pack(one.document)), f"{kind}: seed file {number} is not read"
    at_first, last = peak(), folder / "last"

    def once(damage: tuple[int, list[tuple]]) -> None:
        data = damaged(seeds, *damage)
        last.write_text(repr(damage), errors="replace")
        row["inputs"] += 1
        start, before = time.process_time(), peak()
        if watched:
            faulthandler.dump_traceback_later(HANGS, exit=True)
        sentence = ""
        try:
            outcome = "read" if read(data) else "unusable"
        except InputError as error:
            outcome, sentence = "refused", str(error)
        faulthandler.cancel_dump_traceback_later()
        row[outcome] += 1
        assert len(sentence.splitlines()) <= 1, f"several lines: {sentence}"
        seconds, highest = round(time.process_time() - start, 2), peak()
        row["slowest_s"] = max(row["slowest_s"], seconds)
        row["growth_mb"] = (highest - at_first) >> 20
        assert seconds <= LONGEST, f"it took {seconds} s"
        assert highest == before or highest - at_first <= MOST, f"it grew by {row['growth_mb']} MB"

    settings = hypothesis.settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        derandomize=False,  # under CI, Hypothesis changes its defaults: ours hold everywhere
        print_blob=False,
        phases=(hypothesis.Phase.generate,),  # a few steps are short, and may be slow
        verbosity=hypothesis.Verbosity.quiet,
        suppress_health_check=list(hypothesis.HealthCheck),
        report_multiple_bugs=False,
    )
    try:
        hypothesis.seed(seed)(settings(hypothesis.given(damages(seeds))(once)))()
    except KeyboardInterrupt:
        raise
    except BaseException:  # panics of libraries are no Exception
        row["failure"] = f"damage {last.read_text()}\n{traceback.format_exc()}"
    return row


def run_apart(kind: str, inputs: int, seed: int) -> dict:
    """As `run`, in a process of its own, which may crash."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        command = [sys.executable, __file__, kind, f"--inputs={inputs}", f"--seed={seed}"]
        environment = os.environ | {"XDG_CACHE_HOME": folder, "JAX_PLATFORMS": "cpu"}
        command.append(f"--folder={folder}")
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        if result.returncode == 0:
            return json.loads(result.stdout.splitlines()[-1])
        damage = last.read_text() if (last := Path(folder, "last")).exists() else "none"
        failure = f"exit code {result.returncode}, damage {damage}\n{result.stderr[-4000:]}"
        return dict.fromkeys(COLUMNS, 0) | {"kind": kind, "failure": failure}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--inputs", type=int, default=20000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="kinds at once")
    parser.add_argument("--folder", type=Path, help="run one kind in this process and folder")
    args = parser.parse_args()
    kinds = args.kinds or list(KINDS)
    if args.folder:
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")
        print(json.dumps(run(*kinds, args.inputs, args.seed, args.folder, watched=True)))
        return 0
    if unknown := sorted(set(kinds) - set(KINDS)):
        parser.error(f"unknown kind {unknown[0]!r}, one of {', '.join(KINDS)}")
    ends = list(accumulate(SHARES.get(kind, 1) for kind in kinds))
    counts = [round(args.inputs * end / ends[-1]) for end in ends]
    counts = [count - before for before, count in pairwise([0, *counts])]
    print(f"| kind | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}", sep="\n")
    total, failures = dict.fromkeys(COLUMNS, 0), 0
    with ThreadPoolExecutor(args.workers) as pool:
        for row in pool.map(partial(run_apart, seed=args.seed), kinds, counts):
            print(
                f"| {row['kind']} | {' | '.join(str(row[name]) for name in COLUMNS)} |", flush=True
            )
            if row["failure"]:
                print(f"FAILED: {row['kind']}, seed {args.seed}, {row['failure']}", flush=True)
                failures += 1
            for name in COLUMNS:
                join = max if name in COLUMNS[-2:] else int.__add__
                total[name] = join(total[name], row[name])
    print(f"| all | {' | '.join(str(total[name]) for name in COLUMNS)} |")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
