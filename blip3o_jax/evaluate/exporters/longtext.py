"""LongText-Bench (X-Omni-Team/X-Omni), English and Chinese: four images of 160 prompts."""

from pathlib import Path

from blip3o_jax.errors import require
from blip3o_jax.evaluate.exporters import record
from blip3o_jax.evaluate.exporters.record import Benchmark, Export, Item, Scores

FIELDS = ("category", "length", "prompt", "text", "text_length", "prompt_id")
IDS = (*range(80), *range(100, 140), *range(160, 200))
COUNTS = ("match_word_count", "gt_word_count")


def read(path: Path, _: str) -> list[Item]:
    rows = [row for _, row in record.json_lines(path, FIELDS)]
    record.check_count(path, len(rows), len(IDS))
    record.check_same(path, [str(row["prompt_id"]) for row in rows], map(str, IDS))
    items = []
    for row in rows:
        require(isinstance(row["text"], list), f"{path}: a `text` is not a list.")
        key = f"{int(row['prompt_id']):04d}"
        files = tuple(f"{key}_{k}.png" for k in range(1, 5))
        items.append(Item(key, row["prompt"], files, {"category": row["category"]}))
    return items


def scores(export: Export, results: list[Path]) -> Scores:
    """The share of words (in Chinese characters) that were read, of all images together."""
    path = record.only(results)
    # The scorer's summary adds both counts to the file.
    rows = [row for _, row in record.json_lines(path, ("image", *COUNTS))]
    files = [record.tail(row["image"], 1) for row in rows]
    record.check_same(path, files, (file for item in export.items for file in item.files))
    words = [record.number(path, row["gt_word_count"], 1, 1e6) for row in rows]
    right = [
        record.number(path, row["match_word_count"], 0, count)
        for row, count in zip(rows, words, strict=True)
    ]
    return {"text_score": sum(right) / sum(words)}


def _benchmark(mode: str, name: str) -> Benchmark:
    out = "{out}/scores"
    return Benchmark(
        title=f"LongText-Bench {mode}",
        prompts=f"textbench/{name}",
        results="results.jsonl, after summary_scores.py",
        repository="https://github.com/X-Omni-Team/X-Omni, folder textbench",
        read=read,
        # eval.sh joins results.jsonl but summarises results.json.
        command=f"""torchrun --nnodes=1 --nproc_per_node=8 evaluate_text_reward.py \\
    --sample_dir {{images}} --output_dir {out} --mode {mode}
cat {out}/results_chunk*.jsonl > {out}/results.jsonl
python summary_scores.py {out}/results.jsonl --mode {mode}""",
        scores=scores,
        num_images=4,
        judge="Qwen2.5-VL-7B-Instruct",
    )


LONGTEXT = _benchmark("en", "text_prompts.jsonl")
LONGTEXT_ZH = _benchmark("zh", "text_prompts_zh.jsonl")
