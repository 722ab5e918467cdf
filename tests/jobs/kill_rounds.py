"""Proof that a job survives kill -9: ended again and again at random moments.

    python tests/jobs/kill_rounds.py [--rounds 50] [--processes 1] [--format png] [--seed 0]
    python tests/jobs/kill_rounds.py --rounds 0 --prompts 10000

Makes pictures with a tiny model of random weights by the command that users give. Whatever died on
the way, the result must have the bytes of a job that was never killed, nothing twice and nothing
missing. One JSON line last, also with the memory of the job that was not killed, when a fifth of it
was done and at most; exit code 1 if not.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # for editing.py

QUICK = ["--num-inference-steps", "2", "--temperature", "0", "--batch-size", "8"]
SHARD = 32  # blip3o_jax.jobs.work's
LONGEST = 600.0  # seconds after which a process hangs


def start(folder: pathlib.Path, out: str, *more: str) -> subprocess.Popen:
    """The command, in a process of its own that signals reach alone."""
    argv = ["generate", "--prompts", "prompts.txt", "--checkpoint", "tiny", "--out", out]
    command = [sys.executable, "-m", "blip3o_jax", *argv, *QUICK, *more]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)


def results(folder: pathlib.Path) -> dict[str, bytes]:
    """All files but the job's own."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name[:4] != "job/"}


def resident(pid: int) -> float:
    """MB of a process; 0 of one that has ended."""
    with contextlib.suppress(OSError):
        match = re.search(r"VmRSS:\s+(\d+) kB", pathlib.Path(f"/proc/{pid}/status").read_text())
        return round(int(match[1]) / 1000, 1) if match else 0.0
    return 0.0


def recorded(folder: pathlib.Path) -> int:
    done = folder / "job/done"
    return sum(1 for _ in done.iterdir()) if done.is_dir() else 0


def main() -> int:
    from editing import CHANNELS, checkpoint

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--format", default="png")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance, kills, halfway, finished = random.Random(args.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        checkpoint(folder / "tiny", CHANNELS)
        words = [f"{n} {color} hearts" for n in ("two", "three") for color in ("red", "blue")]
        words += ["a photo of a blue fish left of a green tree on pink and nothing else at all"]
        lines = [f"{chance.choice(words)} {number}" for number in range(args.prompts)]
        (folder / "prompts.txt").write_text("\n".join(lines))
        shape = ["--format", args.format]
        begin = time.monotonic()
        whole, memory = start(folder, "whole", *shape), []
        while whole.poll() is None:
            if recorded(folder / "whole") * SHARD >= args.prompts / 5:
                memory.append(resident(whole.pid))
            time.sleep(0.2)
        assert whole.returncode == 0, (folder / "log.txt").read_text()
        usual, expected = time.monotonic() - begin, results(folder / "whole")
        print(f"A job of {args.prompts} takes {usual:.1f} s.", file=sys.stderr)
        while kills < args.rounds:
            out = f"job-{finished}"
            while True:
                shares = [["--share", f"{i}/{args.processes}"] for i in range(args.processes)]
                lives = [start(folder, out, *shape, *share) for share in shares]
                # A victim each time, and the others with it, or not, as it comes.
                if kills < args.rounds:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        lives[0].wait(chance.uniform(0.3, 1.1) * usual)
                victims = [life for life in lives if life.poll() is None and kills < args.rounds]
                victims = victims[: chance.randint(1, args.processes)]
                for life in victims:
                    os.kill(life.pid, signal.SIGKILL)
                    kills += 1
                    halfway += recorded(folder / out) > 0
                codes = {life.wait(LONGEST) for life in lives}
                assert codes <= {0, -signal.SIGKILL}, (folder / "log.txt").read_text()[-3000:]
                if codes == {0}:
                    break
            found = results(folder / out)
            differ = [
                name for name in expected.keys() | found if found.get(name) != expected.get(name)
            ]
            if differ:
                print(json.dumps({"failed": out, "differ": sorted(differ)[:9]}))
                return 1
            finished += 1
    result = {"prompts": args.prompts, "mb_at_a_fifth": memory[0], "mb_at_most": max(memory)}
    result |= {"processes": args.processes, "format": args.format, "kills": kills}
    print(json.dumps(result | {"after_some_was_recorded": halfway, "jobs_finished": finished}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
