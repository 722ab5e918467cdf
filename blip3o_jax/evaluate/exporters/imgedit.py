"""ImgEdit-Bench, the basic suite (PKU-YuanGroup/ImgEdit)."""

from pathlib import Path

from blip3o_jax.evaluate.exporters import record
from blip3o_jax.evaluate.exporters.record import Benchmark, Export, Item, Scores
from blip3o_jax.files import json_object

COUNTS = {
    **{"extract": 117, "style": 100, "add": 95, "adjust": 94, "background": 94},
    **{"replace": 92, "remove": 86, "action": 36, "compose": 23},
}


def read(path: Path, _: str) -> list[Item]:
    edits = json_object(path, record.read_text(path))
    record.check_count(path, len(edits), sum(COUNTS.values()), "edits")
    items = []
    for key, row in edits.items():
        row = record.check_fields(f"{path}, {key}", row, ("id", "prompt", "edit_type"))
        kind = {"edit_type": row["edit_type"]}
        items.append(Item(key, row["prompt"], (f"{key}.png",), kind, row["id"]))
    for kind, count in COUNTS.items():
        own = [item for item in items if item.row["edit_type"] == kind]
        record.check_count(path, len(own), count, f"edits `{kind}`")
    return items


def scores(export: Export, results: list[Path]) -> Scores:
    """The mean score from 1 to 5 by type of edit, and the mean of the types."""
    path = record.only(results)
    given = json_object(path, record.read_text(path))
    record.check_same(path, given, (item.key for item in export.items))
    values: dict[str, list[float]] = {kind: [] for kind in COUNTS}
    for item in export.items:
        values[item.row["edit_type"]].append(record.number(path, given[item.key], 1, 5))
    return record.means(values)


IMGEDIT = Benchmark(
    title="ImgEdit-Bench basic",
    prompts="Benchmark/Basic/basic_edit.json",
    results="average_score.json of step1_get_avgscore.py",
    repository="https://github.com/PKU-YuanGroup/ImgEdit, folder Benchmark/Basic",
    read=read,
    command="""python basic_bench.py --result_img_folder {images} --edit_json {prompts} \\
    --origin_img_root {sources} --prompts_json prompts.json
python step1_get_avgscore.py --result_json {images}/result.json \\
    --average_score_json {out}/average_score.json
python step2_typescore.py --average_score_json {out}/average_score.json \\
    --basic_edit {prompts} --typescore_json {out}/typescore.json""",
    scores=scores,
    edits=True,
    sources="the folder of source images, unpacked from Benchmark.tar",
)
