"""What ledger and files cost a job: its seconds in which the devices wait for them.

    python tests/jobs/overhead.py [--prompts 200] [--checkpoint emoji_64] [--format png]
    python tests/jobs/overhead.py --bucket s3 --latency 0.02

The job runs as `blip3o-jax generate` does, in this process, with its programs compiled before. From
the moment at which the model is loaded, all time counts in which nobody waits for the next sample:
checking, encoding, hashing, writing and recording, as far as they do not overlap with the devices'
work. With --bucket the folder is in a bucket of a server on loopback, and every request waits
`latency` seconds more. One JSON line last.
"""

import argparse
import asyncio
import contextlib
import json
import pathlib
import sys
import tempfile
import threading
import time
from collections import Counter

from blip3o_jax import paths, pipeline
from blip3o_jax.cli import main as command
from blip3o_jax.jobs import ledger, work

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # for clouds.py
from clouds import new_bucket, servers

seconds: Counter[str] = Counter()  # of parts of the job, threads of their own included


def timed(owner: object, name: str) -> None:
    """Adds the seconds of a function, where it runs, to those of its name."""
    function = getattr(owner, name)

    def run(*args, **options):
        thread = "main" if threading.current_thread() is threading.main_thread() else "threads"
        begin = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            seconds[f"{name} in {thread}"] += time.perf_counter() - begin

    setattr(owner, name, run)


def slow(latency: float) -> None:
    """Lets every request of the clients, which are all aiohttp's, wait before it is sent."""
    import aiohttp

    request = aiohttp.ClientSession._request

    async def later(self, *args, **options):
        await asyncio.sleep(latency)
        seconds["requests"] += 1
        return await request(self, *args, **options)

    aiohttp.ClientSession._request = later


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--checkpoint", default="emoji_64")
    parser.add_argument("--format", default="png")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--bucket", choices=["gs", "s3"])
    parser.add_argument("--latency", type=float, default=0.0)
    args = parser.parse_args()
    run = pipeline.Pipeline.run

    def watched(self, *asked):
        """The samples; all time but that in which the next one is waited for counts."""
        samples = run(self, *asked)
        while True:
            begin = time.perf_counter()
            sample = next(samples, None)
            seconds["devices"] += time.perf_counter() - begin
            if sample is None:
                return
            yield sample

    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root = folder
        if args.bucket:
            root = new_bucket(stack.enter_context(servers()), args.bucket)
        words = [f"{n} {color} hearts" for n in ("two", "three") for color in ("red", "blue")]
        lines = [words[place % len(words)] for place in range(args.prompts)]
        paths.write_text(root / "prompts.txt", "\n".join(lines))
        argv = ["generate", "--prompts", str(root / "prompts.txt"), "--format", args.format]
        argv += ["--checkpoint", args.checkpoint, "--num-inference-steps", str(args.steps)]
        paths.write_text(folder / "one.txt", words[0])
        first = [argv[0], "--prompts", str(folder / "one.txt"), *argv[3:]]
        assert command([*first, "--out", str(folder / "one")]) == 0
        # From here on everything is counted but the model's loading.
        slow(args.latency)
        pipeline.Pipeline.run = watched
        for owner, name in ((work, "write"), (work, "encode_image"), (ledger, "write_whole")):
            timed(owner, name)
        for owner, name in ((work, "load_for"), (ledger, "finish"), (ledger, "begin")):
            timed(owner, name)
        begin = time.perf_counter()
        assert command([*argv, "--out", str(root / "out")]) == 0
        whole = time.perf_counter() - begin
        made = dict(seconds)
        seconds.clear()
        begin = time.perf_counter()
        assert command([*argv, "--out", str(root / "out")]) == 0  # all is there, and is checked
        again = time.perf_counter() - begin
    counted = whole - made["load_for in main"]
    result = {"prompts": args.prompts, "bucket": args.bucket, "latency": args.latency}
    result |= {"format": args.format, "seconds": counted, "devices": made["devices"]}
    result |= {"overhead": 1 - made["devices"] / counted, "start_when_done": again}
    result |= {"parts": made}
    print(json.dumps(result, default=float), file=sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
