"""GEdit-Bench (stepfun-ai/Step1X-Edit): each edit with its source beside it."""

import functools
import io
import math
import statistics
from collections.abc import Iterator
from pathlib import Path

from blip3o_jax.errors import InputError, about, require
from blip3o_jax.evaluate.exporters import record
from blip3o_jax.evaluate.exporters.record import Benchmark, Content, Export, Item, Scores
from blip3o_jax.paths import AnyPath

FIELDS = ("task_type", "key", "instruction", "instruction_language", "Intersection_exist")
EACH = 606  # edits in each language
MEASURES = ("semantics", "quality", "overall")


def read(path: Path, model_name: str) -> list[Item]:
    items = []
    for where, row in _rows(path, FIELDS):
        record.check_fields(where, row, FIELDS)
        task, language = row["task_type"], row["instruction_language"]
        require(language in ("en", "cn"), f"{where}: the language {language!r} is not GEdit's.")
        key = f"{task}/{language}/{row['key']}"
        files = f"{model_name}/fullset/{key}.png", f"{model_name}/fullset/{key}_SRCIMG.png"
        about_item = {"task": task, "language": language, "shared": row["Intersection_exist"]}
        items.append(Item(key, row["instruction"], files[:1], about_item, files[1]))
    for language in ("en", "cn"):
        own = [item for item in items if item.row["language"] == language]
        record.check_count(path, len(own), EACH, f"edits in `{language}`")
    record.check_count(path, len({item.row["task"] for item in items}), 11, "types of edits")
    record.check_unique(path, [item.key for item in items])
    return items


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
    """Each row of the set's Parquet files with these columns, and where it stands."""
    import pyarrow.parquet as pq

    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    require(bool(files), f"{path} has no .parquet file.")
    for file in files:
        try:
            with file.open("rb") as stream, pq.ParquetFile(stream) as table:
                missing = sorted(set(columns) - set(table.schema_arrow.names))
                require(not missing, f"{file} has no column {missing[:1]}.")
                start = 0
                for batch in table.iter_batches(batch_size=64, columns=list(columns)):
                    for n, row in enumerate(batch.to_pylist(), start):
                        yield f"{file} row {n}", row
                    start += len(batch)
        except InputError:
            raise
        except (OSError, ValueError) as error:  # pyarrow's errors are of these
            raise InputError(f"{file} is not Parquet, or is truncated.") from error


def beside(_: AnyPath, items: list[Item], path: Path) -> Iterator[Content]:
    """KEY_SRCIMG.png is the image `input_image`, which is also what is edited."""
    for item, (where, row) in zip(items, _rows(path, ("key", "input_image")), strict=True):
        yield item.source, functools.partial(_source, where, row)


def _source(where: str, row: dict) -> bytes:
    from blip3o_jax.pictures import PictureError, decode

    try:
        image, data = decode((row["input_image"] or {}).get("bytes") or b""), io.BytesIO()
    except PictureError as error:
        raise InputError(f"{where}: the image cannot be used, {error}.") from error
    image.save(data, "png")
    return data.getvalue()


def scores(export: Export, results: list[Path]) -> Scores:
    """LANGUAGE_SET_MEASURE: the mean over types of edits, of all edits (full) and of those that
    every compared model answers (intersection)."""
    rows: dict[str, dict] = {}
    for path in record.files_of(results):
        fields = ("edited_image", "sementics_score", "quality_score")
        for row in record.csv_rows(path, fields):
            name = record.tail(row["edited_image"], 3).removesuffix(".png")
            require(name not in rows, f"{path}: {name} comes twice.")
            with about(path):
                pair = [record.number(name, row[field], 0, 10) for field in fields[1:]]
            rows[name] = dict(zip(MEASURES, (*pair, math.sqrt(pair[0] * pair[1])), strict=True))
    record.check_same(results[0], rows, (item.key for item in export.items))
    # Both sets apart, as papers report the one or the other.
    result = {}
    for language in ("en", "cn"):
        for name in ("full", "intersection"):
            own = [
                item
                for item in export.items
                if item.row["language"] == language and (name == "full" or item.row["shared"])
            ]
            tasks = sorted({item.row["task"] for item in own})
            for measure in MEASURES if own else ():
                result[f"{language}_{name}_{measure}"] = statistics.fmean(
                    statistics.fmean(rows[x.key][measure] for x in own if x.row["task"] == task)
                    for task in tasks
                )
    return result


GEDIT = Benchmark(
    title="GEdit-Bench",
    prompts="the folder of the Parquet files of stepfun-ai/GEdit-Bench",
    results="the files MODEL_TASK_gpt_score.csv, or their folder",
    repository="https://github.com/stepfun-ai/Step1X-Edit, folder GEdit-Bench",
    read=read,
    beside=beside,
    # Its tables go to IMAGES/MODEL/gpt4o/eval_results_new.
    command="python test_gedit_score.py --model_name {model} --save_path {images} --backbone gpt4o",
    scores=scores,
    edits=True,
)
