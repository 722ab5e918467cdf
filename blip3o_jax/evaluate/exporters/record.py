"""A benchmark: its prompts as the user has them, where its scorer looks for the images, and what
its result files say. Imports nothing heavy, so that the command line can list them."""

import csv
import io
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from blip3o_jax.errors import InputError, require
from blip3o_jax.files import parse_json, read_lines, read_text
from blip3o_jax.paths import AnyPath

Scores = dict[str, float]
Content = tuple[str, Callable[[], bytes]]  # a file below the scorer's folder, and what is in it


@dataclass(frozen=True)
class Item:
    """A prompt or an edit, and where its images go below the scorer's folder.

    `files` names a file an image, or the one file of a grid. `source` is the image to edit: below
    the folder of sources, or below the scorer's if `Benchmark.beside` has it. `row` holds the
    official fields that the scores need.
    """

    key: str
    prompt: str
    files: tuple[str, ...]
    row: dict
    source: str = ""


@dataclass(frozen=True)
class Export:
    """What an export wrote, as `import` reads it: names and items of the benchmark."""

    items: list[Item]
    model_name: str


@dataclass(frozen=True)
class Benchmark:
    """What an official benchmark asks for and gives back.

    `read` takes what --prompts names and the model's name. `beside` gives what the scorer reads
    beside the images, from (the scorer's folder, items, --prompts). `command` is
    the scorer's, with {images}, {out}, {prompts}, {sources}, {model} and {size}, the side of one
    image. `scores` takes the paths that --results names and raises InputError for what is
    incomplete. An empty `judge` is for the user to name.
    """

    title: str
    prompts: str
    results: str
    repository: str
    read: Callable[[Path, str], list[Item]]
    command: str
    scores: Callable[[Export, list[Path]], Scores]
    num_images: int = 1
    grid: bool = False
    seed: int = 0
    judge: str = ""
    edits: bool = False
    sources: str = ""
    beside: Callable[[AnyPath, list[Item], Path], Iterator[Content]] | None = None


def check_fields(where: str, row: object, fields: Iterable[str]) -> dict:
    """The row itself, an object that has these fields, text ones not blank."""
    require(isinstance(row, dict), f"{where} is not a JSON object.")
    for name in fields:
        value = row.get(name)
        require(value is not None, f"{where} has no field `{name}`.")
        is_empty = value == [] or str(value).strip() == ""
        require(not is_empty, f"{where}: `{name}` is empty.")
    return row


def json_lines(path: Path, fields: Iterable[str]) -> list[tuple[str, dict]]:
    """The non-blank lines of a .jsonl file, each as it stands and as an object with these
    fields."""
    numbered = enumerate(read_lines(path), 1)
    lines = [(f"{path} line {n}", line.strip()) for n, line in numbered if line.strip()]
    return [(line, check_fields(where, parse_json(where, line), fields)) for where, line in lines]


def csv_rows(path: Path, fields: Iterable[str]) -> list[dict]:
    """The rows of a .csv file with these columns, as text, so that `000` stays as it is."""
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        return [check_fields(f"{path} line {rows.line_num}", row, fields) for row in rows]
    except csv.Error as error:
        raise InputError(f"{path} line {rows.line_num + 1} is not CSV: {error}.") from error


def check_count(where: object, number: int, count: int, what: str = "prompts") -> None:
    """InputError unless a file holds as many as the official one."""
    fix = "give the whole official file, and nothing else"
    require(number == count, f"{where} has {number} {what}, the benchmark has {count}; {fix}.")


def check_unique(where: object, keys: Sequence[object]) -> None:
    """InputError that names the first key that comes twice."""
    seen: set[object] = set()
    for key in keys:
        require(key not in seen, f"{where}: {key!r} comes twice.")
        seen.add(key)


def check_same(where: object, given: Iterable[str], asked: Iterable[str]) -> None:
    """InputError unless the keys given are exactly those asked for, once each."""
    given, asked = list(given), set(asked)
    check_unique(where, given)
    missing, other = sorted(asked - set(given)), sorted(set(given) - asked)
    what = f"{len(missing)} of {len(asked)} are missing"
    require(not missing, f"{where}: {what}, such as {missing[:1]}.")
    require(not other, f"{where}: {other[:1]} does not belong there.")


def tail(path: str, parts: int) -> str:
    """The last parts of a path, by which results of a moved folder are known."""
    return "/".join(path.replace("\\", "/").split("/")[-parts:])


def number(where: object, value: object, low: float, high: float) -> float:
    """A value as a finite number in a range; InputError for any other."""
    try:
        result = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        result = math.nan
    inside = math.isfinite(result) and low <= result <= high
    require(inside, f"{where}: {value!r} is not a score from {low:g} to {high:g}.")
    return result


def only(results: list[Path]) -> Path:
    """The one path that --results must name."""
    require(len(results) == 1, f"--results takes one path here, not {len(results)}.")
    return results[0]


def files_of(results: list[Path]) -> list[Path]:
    """Result files, tables in place of a folder of them, but for those that repeat others."""
    tables = {path: sorted(path.glob("*.csv")) for path in results if path.is_dir()}
    files = [file for path in results for file in tables.get(path, [path])]
    return [file for file in files if file in results or "_combined_" not in file.name]


def means(values: Mapping[str, Sequence[float]], overall: str = "overall") -> Scores:
    """The mean of each group, after the mean of these means."""
    rates = {name: statistics.fmean(group) for name, group in values.items()}
    return {overall: statistics.fmean(rates.values()), **rates}
