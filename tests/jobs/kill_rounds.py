"""Proof that a job survives kill -9: ended again and again at random moments.

    python tests/jobs/kill_rounds.py [--rounds 50] [--processes 1] [--format png] [--seed 0]
    python tests/jobs/kill_rounds.py --command edit --bucket gs
    python tests/jobs/kill_rounds.py --command export --processes 2
    python tests/jobs/kill_rounds.py --rounds 0 --prompts 10000

Makes pictures with a tiny model of random weights by the command that users give; with --bucket,
checkpoint, prompts, source images and results are in a bucket of a server on loopback. Whatever
died on the way, the result must have the bytes of a job that was never killed, nothing twice and
nothing missing. One JSON line last, also with the memory of the job that was not killed, when a
fifth of it was done and at most; exit code 1 if not.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import pathlib
import random
import re
import signal
import sys
import tempfile
import time

from PIL import Image

from blip3o_jax import paths
from blip3o_jax.jobs import work

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # for those that follow
from clouds import new_bucket, servers
from forks import fork

QUICK = ["--num-inference-steps", "2", "--temperature", "0", "--batch-size", "4"]
# The words of each command, the file that follows them, and its options.
COMMANDS = {
    "generate": (["generate", "--prompts"], "prompts.txt", []),
    "edit": (["edit", "--edits"], "edits.jsonl", ["--keep-unchanged", "--mask"]),
    "export": (["evaluate", "longtext", "export", "--prompts"], "text_prompts.jsonl", []),
}
EXPORTED = 640  # pictures of that benchmark, however many are asked for
PICTURES = 24  # that are edited
SHARD = 8  # requests that are recorded together; fewer than in other jobs, which are longer
LONGEST = 900.0  # seconds after which a process hangs
# Imported once, by the process from which all others are forked.
HEAVY = ("blip3o_jax.pipeline", "blip3o_jax.jobs.best", "blip3o_jax.rl.rewards", "tqdm")


def write_inputs(root: paths.AnyPath, command: str, number: int, seed: int) -> None:
    """The checkpoint, the command's file of so many rows, and the pictures that it names."""
    import official
    from editing import CHANNELS, checkpoint, picture

    with tempfile.TemporaryDirectory() as temporary:
        local = pathlib.Path(temporary) / "tiny"
        checkpoint(local, CHANNELS)
        paths.copy_folder(local, root / "tiny", "config.json")
    if command == "export":
        with tempfile.TemporaryDirectory() as temporary:
            file, _ = official.longtext(pathlib.Path(temporary))
            paths.write_text(root / file.name, file.read_text())
        return
    words = [f"{n} {color} hearts" for n in ("two", "three") for color in ("red", "blue")]
    if command == "generate":  # an edit has no room for so many
        words += ["a photo of a blue fish left of a green tree on pink and nothing else at all"]
    chance = random.Random(seed)
    texts = [f"{chance.choice(words)} {place}" for place in range(number)]
    if command == "generate":
        paths.write_text(root / "prompts.txt", "\n".join(texts))
        return
    for place in range(PICTURES):
        data = io.BytesIO()
        Image.fromarray(picture(24 + place, 40, place)).save(data, "png")
        paths.write_bytes(root / f"pictures/{place}.png", data.getvalue())
    names = [f"pictures/{chance.randrange(PICTURES)}.png" for _ in texts]
    rows = [{"image": x, "instruction": text} for x, text in zip(names, texts, strict=True)]
    paths.write_text(root / "edits.jsonl", "\n".join(map(json.dumps, rows)))


def start(root: paths.AnyPath, log: pathlib.Path, command: str, out: str, *more: str) -> int:
    """The command, in a process of its own; its id."""
    from blip3o_jax.cli import main

    words, name, options = COMMANDS[command]
    argv = [*words, str(root / name), *options]
    argv += ["--checkpoint", str(root / "tiny"), "--out", str(root / out), *QUICK, *more]
    work.SHARD = SHARD
    return fork(log, main, argv)


def formats(args: argparse.Namespace) -> list[str]:
    """A benchmark has its own."""
    return [] if args.command == "export" else ["--format", args.format]


def wait(lives: list[int], seconds: float) -> dict[int, int]:
    """Exit codes by process, once all have ended or `seconds` are over."""
    codes, until = {}, time.monotonic() + seconds
    while len(codes) < len(lives) and time.monotonic() < until:
        for life in set(lives) - codes.keys():
            process, status = os.waitpid(life, os.WNOHANG)
            if process:
                codes[life] = os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    return codes


def results(folder: paths.AnyPath) -> dict[str, bytes]:
    """All files but the job's own."""
    files = {file.relative_to(folder).as_posix(): file for file in paths.files_below(folder)}
    return {name: path.read_bytes() for name, path in files.items() if name[:4] != "job/"}


def resident(pid: int) -> float:
    """MB of a process; 0 of one that has ended."""
    with contextlib.suppress(OSError):
        match = re.search(r"VmRSS:\s+(\d+) kB", pathlib.Path(f"/proc/{pid}/status").read_text())
        return round(int(match[1]) / 1000, 1) if match else 0.0
    return 0.0


def recorded(folder: paths.AnyPath) -> int:
    return len(list((folder / "job").glob("done/*.jsonl")))


def until_whole(args: argparse.Namespace, root: paths.AnyPath, log: pathlib.Path, out: str) -> dict:
    """A job that nothing ends: its seconds, and its memory over time."""
    begin, memory = time.monotonic(), []
    life = start(root, log, args.command, out, *formats(args))
    while not (codes := wait([life], 0.3)):
        if recorded(root / out) * SHARD >= args.prompts / 5:
            memory.append(resident(life))
    assert codes == {life: 0}, log.read_text()
    return {"seconds": time.monotonic() - begin, "memory": memory}


def rounds(args: argparse.Namespace, root: paths.AnyPath, folder: pathlib.Path) -> dict | None:
    """Kills jobs until there were enough kills and the last job is done: what is printed, None if
    a result was another one."""
    chance, kills, halfway, finished = random.Random(args.seed), 0, 0, 0
    logs = [folder / f"log.{index}" for index in range(args.processes)]
    # No process that others are forked from may use a device.
    inputs = fork(logs[0], write_inputs, root, args.command, args.prompts, args.seed)
    assert wait([inputs], LONGEST) == {inputs: 0}, logs[0].read_text()
    shares = [f"{index}/{args.processes}" for index in range(args.processes)]
    until_whole(args, root, logs[0], "first")  # compiles, so only the second tells how long it is
    whole = until_whole(args, root, logs[0], "whole")
    usual, memory, expected = whole["seconds"], whole["memory"], results(root / "whole")
    print(f"A job of {args.prompts} takes {usual:.1f} s.", file=sys.stderr)
    while kills < args.rounds:
        out = f"job-{finished}"
        while True:
            lives = [
                start(root, log, args.command, out, *formats(args), "--share", share)
                for log, share in zip(logs, shares, strict=True)
            ]
            # A victim each time, and the others with it, or not, as it comes.
            is_last = kills >= args.rounds
            codes = wait(lives, LONGEST if is_last else chance.uniform(0.4, 1.0) * usual)
            alive = [life for life in lives if life not in codes and not is_last]
            for life in alive[: chance.randint(1, args.processes)]:
                os.kill(life, signal.SIGKILL)
                kills += 1
                halfway += recorded(root / out) > 0
            codes |= wait(alive, LONGEST) if alive else {}
            said = "".join(log.read_text()[-3000:] for log in logs)
            assert len(codes) == len(lives), f"A process hangs: {said}"
            assert set(codes.values()) <= {0, -signal.SIGKILL}, said
            if not any(codes.values()):
                break
        found = results(root / out)
        differ = [name for name in expected.keys() | found if found.get(name) != expected.get(name)]
        if differ:
            print(json.dumps({"failed": out, "differ": sorted(differ)[:9]}))
            return None
        finished += 1
    result = {"command": args.command, "bucket": args.bucket, "processes": args.processes}
    result |= {"prompts": args.prompts, "format": args.format, "kills": kills}
    result |= {"mb_at_a_fifth": memory[0], "mb_at_most": max(memory)}
    return result | {"after_some_was_recorded": halfway, "jobs_finished": finished}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--command", choices=COMMANDS, default="generate")
    parser.add_argument("--bucket", choices=["gs", "s3"], help="the only disk of the job")
    parser.add_argument("--prompts", type=int, default=240)
    parser.add_argument("--format", default="png")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.command == "export":
        args.prompts = EXPORTED
    for name in HEAVY:
        importlib.import_module(name)
    with contextlib.ExitStack() as stack:
        root = folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if args.bucket:
            root = new_bucket(stack.enter_context(servers()), args.bucket)
        result = rounds(args, root, folder)
    if result:
        print(json.dumps(result))
    return 0 if result else 1


if __name__ == "__main__":
    sys.exit(main())
