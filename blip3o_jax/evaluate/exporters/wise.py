"""WISE (PKU-YuanGroup/WISE): WISE_Verified, and the first release, whose scores are others."""

import functools
from pathlib import Path

from blip3o_jax.errors import require
from blip3o_jax.evaluate.exporters import record
from blip3o_jax.evaluate.exporters.record import Benchmark, Export, Item, Scores

NAMES = ("cultural_common_sense", "spatio-temporal_reasoning", "natural_science")
FIELDS = ("Prompt", "Explanation", "Category", "Subcategory", "prompt_id")
GROUPS = ("culture", "time", "space", "biology", "physics", "chemistry")
# The last prompt of each group, and its weight.
LEGACY = {"ends": (400, 567, 700, 800, 900, 1000), "weights": (0.4, 0.167, 0.133, 0.1, 0.1, 0.1)}
VERIFIED = {"ends": (400, 520, 640, 760, 880, 1000), "weights": (0.4, *[0.12] * 5)}


def read(path: Path, _: str, suffix: str) -> list[Item]:
    require(path.is_dir(), f"{path} is not a folder; name that of the three JSON files.")
    items = []
    for name in NAMES:
        file = path / f"{name}{suffix}.json"
        rows = record.parse_json(file, record.read_text(file))
        require(isinstance(rows, list), f"{file} is not a list of prompts.")
        for n, row in enumerate(rows):
            prompt, *_, key = (
                record.check_fields(f"{file}, row {n}", row, FIELDS)[f] for f in FIELDS
            )
            items.append(Item(str(key), prompt, (f"{key}.png",), {}))
    record.check_count(path, len(items), 1000)
    record.check_same(path, [item.key for item in items], map(str, range(1, 1001)))
    return items


def scores(export: Export, results: list[Path], rules: dict, fields: dict[str, float]) -> Scores:
    """The mean of each group, and their weighted sum."""
    rows = [
        (path, row)
        for path in results
        for _, row in record.json_lines(path, ("prompt_id", *fields))
    ]
    keys = [str(row["prompt_id"]) for _, row in rows]
    record.check_same(results[0], keys, [item.key for item in export.items])
    # Scores in [0, 1]; what the first release's judge gives is from 0 to 2.
    high = 1 if len(fields) == 1 else 2
    values: dict[str, list[float]] = {group: [] for group in GROUPS}
    for path, row in rows:
        group = next(g for g, end in zip(GROUPS, rules["ends"], strict=True) if _id(row) <= end)
        parts = (w * record.number(path, row[name], 0, high) / high for name, w in fields.items())
        values[group].append(sum(parts))
    result = {group: sum(points) / len(points) for group, points in values.items()}
    weighted = zip(rules["weights"], result.values(), strict=True)
    return {"overall": sum(weight * mean for weight, mean in weighted), **result}


def _id(row: dict) -> int:
    return int(row["prompt_id"])


WISE = Benchmark(
    title="WISE_Verified",
    prompts="data_verified, a folder",
    results="the three files NAME_scores_results.jsonl",
    repository="https://github.com/PKU-YuanGroup/WISE",
    read=functools.partial(read, suffix="_verified"),
    command="IMAGE_DIR={images} JUDGE_MODEL=Qwen3.5-35B-A3B bash eval_qwen.sh",
    scores=functools.partial(scores, rules=VERIFIED, fields={"score": 1.0}),
)

_JUDGE = """python gpt_eval.py --json_path {prompts}/NAME.json --image_dir {images} \\
    --output_dir {out}/results/NAME --api_key "$OPENAI_API_KEY" --model gpt-4o-2024-05-13 \\
    --result_full {out}/results/NAME_full_results.json \\
    --result_scores {out}/results/NAME_scores_results.jsonl --max_workers 96
"""
WISE_LEGACY = Benchmark(
    title="WISE, first release",
    prompts="WISE_legacy/data, a folder",
    results="the three files NAME_scores_results.jsonl",
    repository="https://github.com/PKU-YuanGroup/WISE, folder WISE_legacy",
    read=functools.partial(read, suffix=""),
    command="".join(_JUDGE.replace("NAME", name) for name in NAMES)
    + "python Calculate.py {out}/results/*_scores_results.jsonl --category all",
    scores=functools.partial(
        scores, rules=LEGACY, fields={"consistency": 0.7, "realism": 0.2, "aesthetic_quality": 0.1}
    ),
)
