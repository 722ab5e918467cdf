"""What each way of reinforcement makes of the same checkpoint: runs of several seeds, judged on
held-out prompts.

    python tests/rl/compare.py --init CHECKPOINT --out DIR --steps 120 --seeds 3
    python tests/rl/compare.py --init CHECKPOINT --out DIR --ways transformer,joint
    python tests/rl/compare.py --init runs/words --out DIR --ways words --steps 60

Ways that are judged alike go together: `words` by written words, `edits` by edits, all others by
GenEval's prompts. Runs and evaluations are those of the commands. What is in DIR already is not
made again, so that an interrupted comparison goes on; prints a table.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

import numpy as np
from PIL import Image

from blip3o_jax.pixels import contact_sheet, labelled_sheet
from blip3o_jax.rl.rewards.ocr import ocr

DIFFUSION = {"num_train_timesteps": 2, "norm_penalty": 0.1, "max_kl": 1.0}
METHODS = {
    "ram": {"method": "ram", "strength": 0.3},
    "nft": {"method": "nft"},
    "flow_grpo": {"method": "flow_grpo"},
}
# What `grpo` is given, beside the seed and the number of steps.
WAYS = {"transformer": ["--config", "emoji_grpo"]} | {
    name: [
        *("--config", "emoji_diffusion_rl", f"--config.grpo.train={train}"),
        f"--config.grpo.diffusion={json.dumps(DIFFUSION | METHODS[method])}",
    ]
    for name, train, method in (
        *((method, "diffusion", method) for method in METHODS),
        ("alternating", "alternating", "ram"),
        ("joint", "joint", "ram"),
    )
}
BY_PROMPTS = tuple(WAYS)
WAYS |= {
    "words": ["--config", "emoji_words:grpo"],
    "edits": ["--config", "emoji_edit_grpo", "--config.data.edits=1.0"],
}
SHOWN = 24  # prompts on the sheet
# As the rollouts are rendered.
SAMPLING = ["--num-inference-steps", "8", "--guidance-scale", "1", "--batch-size", "16"]


def blip3o(log: pathlib.Path, *command: str) -> float:
    """Runs a command into a log; its seconds."""
    begin = time.monotonic()
    with log.open("a") as file:
        done = subprocess.run(
            [sys.executable, "-m", "blip3o_jax", *command], stdout=file, stderr=subprocess.STDOUT
        )
    assert done.returncode == 0, f"{' '.join(command)}: exit {done.returncode}, see {log}"
    return time.monotonic() - begin


def judged(checkpoint: str, out: pathlib.Path, args: argparse.Namespace) -> dict[str, float]:
    """What `evaluate` says of a checkpoint, by name."""
    way = args.ways.split(",")[0]
    benchmark = {
        "words": ["scenes", "--num-prompts", "6", "--num-words", str(args.prompts), "--seeds", "2"],
        "edits": ["edits", "--num-edits", str(args.prompts), "--seeds", "1"],
    }.get(way, ["scenes", "--num-prompts", str(args.prompts), "--seeds", "1"])
    if not (out / "result.json").exists():
        where = ["--checkpoint", checkpoint, "--out", str(out)]
        blip3o(out.with_suffix(".log"), "evaluate", *benchmark, *SAMPLING, *where)
    scores = json.loads((out / "result.json").read_text())["scores"]
    if way == "edits":
        overall = {name: scores["overall"][name] for name in ("success", "done", "kept", "psnr")}
        return overall | {x: row["success"] for x, row in scores.items() if x != "overall"}
    if way == "words":
        return {rule: own["text"] for rule, own in scores.items()} | read_by_ocr(out)
    overall = {"overall": scores["correct"]["overall"], "strict": scores["strict"]["overall"]}
    return overall | {name: x for name, x in scores["correct"].items() if name not in overall}


def read_by_ocr(folder: pathlib.Path) -> dict[str, float]:
    """Of the pictures of words in an evaluation: the mean reward, and the share that is read
    without fault."""
    rows = [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]
    files = sorted((folder / "images").glob("*.png"))
    own = [(np.asarray(Image.open(f)), x) for f, x in zip(files, rows, strict=True) if "word" in x]
    rewards = np.array(ocr([image for image, _ in own], [row["prompt"] for _, row in own]))
    return {"ocr": float(rewards.mean()), "read": float(np.mean(rewards == 1))}


def trained(way: str, seed: int, args: argparse.Namespace) -> tuple[dict[str, float], float]:
    """The scores of a run, and its minutes."""
    folder = args.out / f"{way}-{seed}"
    minutes = folder / "minutes.txt"
    if not minutes.exists():
        more = ["--config.grpo.phase_steps=10"] if way == "alternating" else []
        more += ["--config.grpo.beta=0.01"] if way in ("alternating", "joint") else []
        changes = [f"--config.{name}" for name in (f"init={args.init}", f"seed={seed}")]
        changes += [f"--config.num_steps={args.steps}", f"--config.eval_every={args.steps}"]
        own = [
            *WAYS[way],
            *changes,
            *more,
            *(f"--config.{x}" for x in args.change),
            "--workdir",
            str(folder),
        ]
        spent = blip3o(folder.with_suffix(".log"), "grpo", *own)
        minutes.write_text(f"{spent / 60:.1f}")
    scores = judged(str(folder), args.out / f"{way}-{seed}.scores", args)
    return scores, float(minutes.read_text())


def sheet(folders: list[pathlib.Path]) -> np.ndarray:
    """`SHOWN` prompts, spread over all, that are drawn once by each of the evaluations, in their
    order, above a sign for each: + right and with nothing else, o right, - wrong."""
    verdicts = [
        [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]
        for folder in folders
    ]
    files = [sorted((folder / "images").glob("*.png")) for folder in folders]
    # An odd step, so that all tags are shown.
    step = max(1, len(verdicts[0]) // SHOWN) | 1
    images, labels = [], []
    for i in (k * step % len(verdicts[0]) for k in range(SHOWN)):
        drawn = [np.asarray(Image.open(own[i])) for own in files]
        images.append(contact_sheet(np.stack(drawn), len(drawn), 2))
        signs = [sign(own[i]) for own in verdicts]
        asked = verdicts[0][i]
        labels.append(f"{' '.join(signs)}  {asked.get('prompt') or asked['instruction']}")
    return labelled_sheet(np.stack(images), labels, columns=4, scale=1)


def sign(verdict: dict) -> str:
    """Of a verdict on a prompt or an edit."""
    whole, part = ("strict", "correct") if "strict" in verdict else ("success", "done")
    return "+" if verdict[whole] else "o" if verdict[part] else "-"


def row(name: str, scores: list[dict[str, float]], minutes: float) -> str:
    """Means over the seeds, and what a seed differs from the first of them at most."""
    values = np.array([[*own.values()] for own in scores])
    first, *others = values.mean(axis=0)
    spread = np.abs(values[:, 0] - first).max()
    cells = [f"{minutes:.1f}", f"{first:.3f} ± {spread:.3f}", *(f"{x:.3f}" for x in others)]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--init", required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=402)
    parser.add_argument("--ways", default=",".join(BY_PROMPTS))
    change = "of the config of all, e.g. checkpoint_every=80; may be repeated"
    parser.add_argument("--change", action="append", default=[], metavar="KEY=VALUE", help=change)
    args = parser.parse_args()
    ways = args.ways.split(",")
    if len(ways) > 1 and not set(ways) <= set(BY_PROMPTS):
        parser.error(f"--ways: only {', '.join(BY_PROMPTS)} are judged alike")
    args.out.mkdir(parents=True, exist_ok=True)
    before = judged(args.init, args.out / "before", args)
    print("| way | minutes |", " | ".join(before), "|")
    print("|", "---|" * (2 + len(before)), sep="")
    print(row("before", [before], 0.0), flush=True)
    for way in ways:
        results = [trained(way, seed, args) for seed in range(args.seeds)]
        minutes = float(np.mean([spent for _, spent in results]))
        print(row(way, [scores for scores, _ in results], minutes), flush=True)
    folders = ["before", *(f"{way}-0.scores" for way in ways)]
    drawn = sheet([args.out / name for name in folders])
    Image.fromarray(drawn).quantize(256).save(args.out / "sheet.png", optimize=True)


if __name__ == "__main__":
    main()
