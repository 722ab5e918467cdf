"""GenEval (djghosh13/geneval) and GenEval2 (facebookresearch/GenEval2)."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

from blip3o_jax.errors import require
from blip3o_jax.evaluate.exporters import record
from blip3o_jax.evaluate.exporters.record import Benchmark, Content, Export, Item, Scores
from blip3o_jax.paths import AnyPath

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def read(path: Path, _: str) -> list[Item]:
    items = []
    for index, (line, row) in enumerate(record.json_lines(path, ("tag", "include", "prompt"))):
        is_known = row["tag"] in TAGS
        require(is_known, f"{path} line {index + 1}: the tag {row['tag']!r} is not GenEval's.")
        files = tuple(f"{index:05d}/samples/{k:04d}.png" for k in range(4))
        items.append(Item(f"{index:05d}", row["prompt"], files, {"tag": row["tag"], "line": line}))
    record.check_count(path, len(items), 553)
    return items


def beside(_: AnyPath, items: list[Item], __: Path) -> Iterator[Content]:
    """NUMBER/metadata.jsonl is the prompt's own line."""
    for item in items:
        yield f"{item.key}/metadata.jsonl", f"{item.row['line']}\n".encode


def scores(export: Export, results: list[Path]) -> Scores:
    """Shares of correct images by tag, and the mean of the six tags."""
    path = record.only(results)
    rows = [row for _, row in record.json_lines(path, ("filename", "tag", "correct"))]
    tags = {file: item.row["tag"] for item in export.items for file in item.files}
    judged = {record.tail(row["filename"], 3): row for row in rows}
    record.check_same(path, [record.tail(row["filename"], 3) for row in rows], tags)
    for file, row in judged.items():
        is_bool = isinstance(row["correct"], bool)
        require(is_bool and row["tag"] == tags[file], f"{path}: the result of {file} is damaged.")
    return record.means({t: [r["correct"] for r in judged.values() if r["tag"] == t] for t in TAGS})


GENEVAL = Benchmark(
    title="GenEval",
    prompts="prompts/evaluation_metadata.jsonl",
    results="results.jsonl of evaluate_images.py",
    repository="https://github.com/djghosh13/geneval",
    read=read,
    beside=beside,
    command="""python evaluation/evaluate_images.py {images} --outfile {out}/results.jsonl \\
    --model-path OBJECT_DETECTOR_FOLDER""",
    scores=scores,
    num_images=4,
    seed=42,  # set anew for every prompt
    judge="Mask2Former Swin-S and CLIP ViT-L/14",
)


def read2(path: Path, _: str) -> list[Item]:
    rows = [
        row for _, row in record.json_lines(path, ("prompt", "atom_count", "vqa_list", "skills"))
    ]
    record.check_count(path, len(rows), 800)
    record.check_unique(path, [row["prompt"] for row in rows])
    return [
        Item(f"{i:04d}", row["prompt"], (f"{i:04d}.png",), {"questions": len(row["vqa_list"])})
        for i, row in enumerate(rows)
    ]


def beside2(folder: AnyPath, items: list[Item], _: Path) -> Iterator[Content]:
    """image_paths.json: {prompt: file}."""
    paths = {item.prompt: str(folder / item.files[0]) for item in items}
    yield "image_paths.json", json.dumps(paths, indent=1, ensure_ascii=False).encode


def scores2(export: Export, results: list[Path]) -> Scores:
    """Soft-TIFA in percent, from a list of probabilities a prompt: the mean of the arithmetic (am)
    and of the geometric (gm) means."""
    path = record.only(results)
    lists = record.parse_json(path, record.read_text(path))
    require(isinstance(lists, list), f"{path} is not a list of lists of scores.")
    record.check_count(path, len(lists), len(export.items), "lists of scores")
    arithmetic, geometric = [], []
    for item, values in zip(export.items, lists, strict=True):
        where = f"{path}, prompt {item.key}"
        require(isinstance(values, list), f"{where} is not a list of scores.")
        record.check_count(where, len(values), item.row["questions"], "scores")
        # The scorer's sums of probabilities may round to slightly more than 1.
        shares = [record.number(where, value, 0, 1.001) for value in values]
        arithmetic.append(statistics.fmean(shares))
        geometric.append(statistics.geometric_mean(shares) if min(shares) > 0 else 0.0)
    both = {"soft_tifa_am": arithmetic, "soft_tifa_gm": geometric}
    return {name: 100 * statistics.fmean(values) for name, values in both.items()}


GENEVAL2 = Benchmark(
    title="GenEval2",
    prompts="geneval2_data.jsonl",
    results="score_lists.json of evaluation.py",
    repository="https://github.com/facebookresearch/GenEval2",
    read=read2,
    beside=beside2,
    command="""python evaluation.py --benchmark_data {prompts} \\
    --image_filepath_data {images}/image_paths.json \\
    --method soft_tifa_gm --output_file {out}/score_lists.json""",
    scores=scores2,
    judge="Qwen3-VL-8B-Instruct",
)
