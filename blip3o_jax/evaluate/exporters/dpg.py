"""DPG-Bench (TencentQQGYLab/ELLA): four images of a prompt as one grid."""

import re
import statistics
from pathlib import Path

from blip3o_jax.errors import require
from blip3o_jax.evaluate.exporters import record
from blip3o_jax.evaluate.exporters.record import Benchmark, Export, Item, Scores


def read(path: Path, _: str) -> list[Item]:
    require(path.is_dir(), f"{path} is not a folder; name that of the prompts, one .txt each.")
    files = sorted(path.glob("*.txt"))
    record.check_count(path, len(files), 1065)
    # The scorer takes what is before the first dot.
    keys = [file.name.split(".")[0] for file in files]
    record.check_unique(path, keys)
    items = []
    for file, key in zip(files, keys, strict=True):
        prompt = record.read_text(file).strip()
        require(prompt != "", f"{file} is empty.")
        items.append(Item(key, prompt, (f"{key}.png",), {}))
    return items


def scores(export: Export, results: list[Path]) -> Scores:
    """The mean over prompts in percent and the first level of categories, as reported."""
    path, text = record.only(results), record.read_text(record.only(results))
    # A line a prompt: its file, the scores of its four images, and their mean.
    lines = [line.rsplit(", ", 5) for line in text.split("\n") if ".png, " in line]
    require(all(len(line) == 6 for line in lines), f"{path} was not made with four images each.")
    keys = [Path(line[0]).name.split(".")[0] for line in lines]
    record.check_same(path, keys, [item.key for item in export.items])
    means = [statistics.fmean(record.number(path, x, 0, 1) for x in line[1:5]) for line in lines]
    overall = 100 * statistics.fmean(means)
    # The scorer's own summary must be of the same run.
    reported = re.findall(r"DPG-Bench score: (\S+)", text)
    require(len(reported) == 1, f"{path} has {len(reported)} summaries; give one finished run.")
    is_same = abs(record.number(path, reported[0], 0, 100) - overall) < 0.01
    require(is_same, f"{path}: the summary says {reported[0]}, its lines {overall:.4f}.")
    level = text.partition("L1 category scores:\n")[2].partition("L2 category")[0]
    named = dict(re.findall(r"^\t(.+): (\S+)$", level, re.MULTILINE))
    return {"overall": overall, **{k: record.number(path, v, 0, 100) for k, v in named.items()}}


DPG = Benchmark(
    title="DPG-Bench",
    prompts="dpg_bench/prompts, a folder",
    results="dpg-bench_TIME_results.txt, which the scorer writes among the images",
    repository="https://github.com/TencentQQGYLab/ELLA",
    read=read,
    command="PIC_NUM=4 bash dpg_bench/dist_eval.sh {images} {size}",
    scores=scores,
    num_images=4,
    grid=True,
    judge="mPLUG-large",
)
