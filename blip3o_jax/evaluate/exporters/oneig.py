"""OneIG-Bench (OneIG-Bench/OneIG-Benchmark), English and Chinese: grids of four images."""

import csv
import functools
import io
from pathlib import Path

from blip3o_jax.errors import require
from blip3o_jax.evaluate.exporters import record
from blip3o_jax.evaluate.exporters.record import Benchmark, Export, Item, Scores

# Folders of the categories, and how many prompts each has.
FOLDERS = {
    "Anime_Stylization": ("anime", 245),
    "Portrait": ("human", 244),
    "General_Object": ("object", 206),
    "Text_Rendering": ("text", 200),
    "Knowledge_Reasoning": ("reasoning", 225),
}
MULTILINGUALISM = {"Multilingualism": ("multilingualism", 200)}
METRICS = ("alignment", "text", "diversity", "style", "reasoning")


def read(path: Path, model_name: str, column: str, folders: dict) -> list[Item]:
    rows = record.csv_rows(path, ("category", "id", column))
    record.check_count(path, len(rows), sum(count for _, count in folders.values()))
    items = []
    for row in rows:
        category = row["category"]
        require(category in folders, f"{path}: the category {category!r} is not OneIG's.")
        folder, key = folders[category][0], row["id"]
        file = f"{folder}/{model_name}/{key}.webp"
        items.append(Item(f"{folder}_{key}", row[column], (file,), {"folder": folder}))
    for folder, count in folders.values():
        own = [item for item in items if item.row["folder"] == folder]
        record.check_count(path, len(own), count, f"prompts for {folder}")
    record.check_unique(path, [item.key for item in items])
    return items


def scores(export: Export, results: list[Path], mode: str) -> Scores:
    """METRIC_COLUMN of the five tables METRIC_score_MODE_TIME.csv in the scorer's folder."""
    folder, model_name, result = record.only(results), export.model_name, {}
    for metric in METRICS:
        file, rows = _table(folder, f"{metric}_score_{mode}_*.csv")
        require(model_name in rows, f"{file} has no row for the model {model_name}.")
        for column, value in rows[model_name].items():
            name = f"{metric}_{column}".replace(" ", "_")
            result[name] = record.number(file, value, -1, 1e4)  # an edit distance is the largest
    # The scorer leaves out what is missing: its tables of single prompts tell.
    keys = {item.key for item in export.items}
    asked = {
        "diversity": keys,
        "alignment": {key for key in keys if not key.startswith(("text_", "reasoning_"))},
        "text": {key.removeprefix("text_") for key in keys if key.startswith("text_")},
    }
    for metric, names in asked.items():
        file, rows = _table(folder, f"{metric}_prompt_score_{mode}_*.csv")
        record.check_same(file, (key for key, row in rows.items() if row.get(model_name)), names)
    return result


def _table(folder: Path, pattern: str) -> tuple[Path, dict[str, dict]]:
    """The one file of that name, and its rows by what is in the first column."""
    files = sorted(folder.glob(pattern))
    require(len(files) == 1, f"{folder} has {len(files)} files {pattern}; keep those of one run.")
    (_, *columns), *rows = csv.reader(io.StringIO(record.read_text(files[0]), newline=""))
    record.check_unique(files[0], [row[0] for row in rows])
    return files[0], {row[0]: dict(zip(columns, row[1:], strict=False)) for row in rows}


def _command(mode: str, more: str) -> str:
    """The five metrics one by one: run_overall.sh defines IMAGE_GRIDS and reads IMAGE_GRID."""
    ends = {
        "alignment": f"{{images}} --class_items anime human object{more}",
        "text": "{images}/text",
        "diversity": f"{{images}} --class_items anime human object text reasoning{more}",
        "style": "{images}/anime",
        "reasoning": "{images}/reasoning",
    }
    begin = f"--mode {mode} --model_names {{model}} --image_grid 2,2 --image_dirname"
    return "\n".join(f"python -m scripts.{m}.{m}_score {begin} {e}" for m, e in ends.items())


def _benchmark(mode: str, name: str, column: str, folders: dict, more: str = "") -> Benchmark:
    return Benchmark(
        title=f"OneIG-Bench {mode}",
        prompts=name,
        results="results, the folder that the scorer writes",
        repository="https://github.com/OneIG-Bench/OneIG-Benchmark",
        read=functools.partial(read, column=column, folders=folders),
        command=_command(mode, more),
        scores=functools.partial(scores, mode=mode),
        num_images=4,
        grid=True,
        judge="Qwen2.5-VL-7B-Instruct and OneIG's encoders",
    )


ONEIG = _benchmark("EN", "OneIG-Bench.csv", "prompt_en", FOLDERS)
ONEIG_ZH = _benchmark(
    "ZH", "OneIG-Bench-ZH.csv", "prompt_cn", FOLDERS | MULTILINGUALISM, " multilingualism"
)
