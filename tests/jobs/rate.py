"""A job beside what an older build makes of the same file: seconds and memory of both commands.

    python tests/jobs/rate.py --old aac4f9f --prompts 1000 --turns 2

The older build is a commit of this repository, put beside it for the time; both run by this
interpreter, each with its defaults and with programs that a first short run has compiled, and take
turns. More options are for the newer build. One JSON line last.
"""

import argparse
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parents[2]
COLORS = ("red", "blue", "green", "yellow", "purple", "orange")
THINGS = ("heart", "cat", "tree", "moon", "apple", "fish", "star", "dog")
PLACES = ("left of", "right of", "above", "below")


def prompt(chance: random.Random) -> str:
    color, thing, other = chance.choice(COLORS), *chance.sample(THINGS, 2)
    return chance.choice(
        (
            f"{chance.choice(('two', 'three', 'four'))} {color} {thing}s",
            f"a {color} {thing} and a {chance.choice(COLORS)} {other}",
            f"a {thing} {chance.choice(PLACES)} a {color} {other}",
        )
    )


def generated(tree: pathlib.Path, file: pathlib.Path, out: pathlib.Path, *more: str) -> dict:
    """Seconds of `generate --prompts` by the code of a tree, and its most memory in MB."""
    command = [sys.executable, "-m", "blip3o_jax", "generate", "--prompts", str(file), *more]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    begin = time.monotonic()
    log = out.with_suffix(".log")
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, "--out", str(out)], cwd=tree, env=environment, stdout=stream, stderr=stream
        )
        _, status, used = os.wait4(process.pid, 0)
    assert status == 0, log.read_text()
    images = len(list(out.glob("*.png")))
    assert images == len(file.read_text().splitlines())
    return {"seconds": time.monotonic() - begin, "mb": used.ru_maxrss >> 10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--old", required=True, help="commit of the older build")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("more", nargs="*", help="options of the newer build, after --")
    args = parser.parse_args()
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        many, few = folder / "prompts.txt", folder / "few.txt"
        lines = [prompt(chance) for _ in range(args.prompts)]
        many.write_text("\n".join(lines))
        few.write_text("\n".join(lines[:12]))
        git = ["git", "-C", str(HERE), "worktree"]
        subprocess.run([*git, "add", "--detach", folder / "old", args.old], check=True)
        try:
            sides = {"new": (HERE, *args.more), "old": (folder / "old",)}
            for name, (tree, *more) in sides.items():
                generated(tree, few, folder / f"{name}-few", *more)
            runs: dict[str, list] = {name: [] for name in sides}
            for turn in range(args.turns):
                for name, (tree, *more) in sides.items():
                    runs[name].append(generated(tree, many, folder / f"{name}-{turn}", *more))
        finally:
            subprocess.run([*git, "remove", "--force", folder / "old"], check=True)
    seconds = {name: statistics.median(run["seconds"] for run in own) for name, own in runs.items()}
    print(json.dumps({"times": seconds["old"] / seconds["new"], **runs}))


if __name__ == "__main__":
    main()
