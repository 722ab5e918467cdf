"""`evaluate scenes`: held-out prompts of the embedded world, verdicts on pictures, their tables."""

import numpy as np

from blip3o_jax.pipeline import Sample
from blip3o_jax.pixels import labelled_sheet, with_legend
from blip3o_jax.scenes import prompts, scene
from blip3o_jax.scenes.config import FURTHER_TAGS, TAGS, WorldConfig

SHEET = 48  # pictures shown
LEGEND = "+ correct, and nothing else in the picture; o correct by GenEval's rules; - wrong"
DATA_SEED = 1  # of the held-out prompts; training draws from seed 0


def heldout(count: int, words: int = 0) -> list[tuple[dict, scene.Scene]]:
    """`count` held-out prompts with a scene each, spread evenly over the six tags of GenEval, then
    a sixth as many of each of FURTHER_TAGS, then `words` that ask for a written word."""
    tags = [TAGS[i % len(TAGS)] for i in range(count)]
    tags += [tag for tag in FURTHER_TAGS for _ in range(count // len(TAGS))]
    worlds = [WorldConfig(seed=DATA_SEED, weights={tag: 1.0}) for tag in tags]
    worlds += [WorldConfig(seed=DATA_SEED, text=1.0)] * words
    return [prompts.sample(world, i, "heldout") for i, world in enumerate(worlds)]


def table(metadata: list[dict], verdicts: list[dict]) -> dict[str, dict[str, float]]:
    """Shares of `correct` and `strict` by tag and overall, the mean of GenEval's tags as there;
    "text" is a written word's."""
    tags, result = [row["tag"] for row in metadata], {}
    for rule in ("correct", "strict"):
        rates = {}
        for tag in (tag for tag in (*TAGS, *FURTHER_TAGS, "text") if tag in tags):
            own = [v[rule] for v, its in zip(verdicts, tags, strict=True) if its == tag]
            rates[tag] = round(float(np.mean(own)), 4)
        overall = np.mean([rate for tag, rate in rates.items() if tag in TAGS])
        result[rule] = {"overall": round(float(overall), 4), **rates}
    return result


def records(metadata: list[dict], samples: list[Sample], verdicts: list[dict]) -> list[dict]:
    """Of each image what was asked, its index and seed, and the verdict on it."""
    rows = []
    for asked, sample, verdict in zip(metadata, samples, verdicts, strict=True):
        judged = {key: verdict[key] for key in ("correct", "strict", "score", "reason")}
        rows.append({**asked, "index": sample.index, "seed": sample.seed, **judged})
    return rows


def verdict_sheet(images: np.ndarray, metadata: list[dict], verdicts: list[dict]) -> np.ndarray:
    """`SHEET` pictures spread over all, twice as large, each above a sign of LEGEND and its
    prompt."""
    # an odd step, so that all tags and seeds are shown
    step = max(1, len(images) // SHEET) | 1
    shown = [i * step % len(images) for i in range(min(SHEET, len(images)))]
    signs = ["+" if v["strict"] else "o" if v["correct"] else "-" for v in verdicts]
    labels = [f"{signs[i]} {metadata[i]['prompt']}" for i in shown]
    return with_legend(labelled_sheet(images[shown], labels), LEGEND)
