"""TIIF-Bench (A113N-W3I/TIIF-Bench): a short and a long description of each prompt."""

import functools
import re
from pathlib import Path

from blip3o_jax.errors import require
from blip3o_jax.evaluate.exporters import record
from blip3o_jax.evaluate.exporters.record import Benchmark, Export, Item, Scores

LENGTHS = ("short_description", "long_description")
OVERALL = "Overall average score of 9 sub-attributes"


def read(path: Path, model_name: str, count: int) -> list[Item]:
    require(path.is_dir(), f"{path} is not a folder; name that of the .jsonl files.")
    items = []
    for file in sorted(path.glob("*.jsonl")):
        for index, (_, row) in enumerate(record.json_lines(file, ("type", *LENGTHS))):
            for length in LENGTHS:
                key = f"{row['type']}/{model_name}/{length}/{index}.png"
                items.append(Item(key, row[length], (key,), {}))
    record.check_count(path, len(items) // 2, count)
    record.check_unique(path, [item.key for item in items])
    return items


def scores(export: Export, results: list[Path]) -> Scores:
    """The short and the long score of every section of the scorer's summary."""
    path, section, result = record.only(results), "", {}
    for line in record.read_text(path).split("\n"):
        if title := re.fullmatch(r"=+\s*(.+?)\s*=+", line.strip()):
            section = title[1]
        elif (cells := line.split())[:1] == [export.model_name]:
            require(len(cells) == 3, f"{path}: {section} has no short and long score.")
            for length, value in zip(("short", "long"), cells[1:], strict=True):
                name = f"{section} {length}"
                require(name not in result, f"{path}: {section} comes twice.")
                result[name] = record.number(f"{path}, {section}", value, 0, 100)
    is_whole = f"{OVERALL} long" in result
    require(is_whole, f"{path} has no `{OVERALL}` for the model {export.model_name}.")
    return result


def _benchmark(title: str, name: str, count: int) -> Benchmark:
    return Benchmark(
        title=title,
        prompts=f"data/{name}_prompts, a folder",
        results="result_summary_dimension.txt",
        repository="https://github.com/A113N-W3I/TIIF-Bench",
        read=functools.partial(read, count=count),
        command=f"""python eval/eval_with_vlm.py --jsonl_dir data/{name}_eval_prompts \\
    --image_dir {{images}} --eval_model {{model}} --output_dir {{out}}/scores \\
    --api_key "$OPENAI_API_KEY" --base_url "$BASE_URL" --model gpt-4o
python eval/summary_results.py --input_dir {{out}}/scores
python eval/summary_dimension_results.py --input_excel {{out}}/scores/result_summary.xlsx \\
    --output_txt {{out}}/scores/result_summary_dimension.txt""",
        scores=scores,
    )


TIIF = _benchmark("TIIF-Bench", "test", 2538)
TIIF_MINI = _benchmark("TIIF-Bench testmini", "testmini", 277)
