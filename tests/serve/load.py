"""A server under load on loopback, beside what `generate` makes at the same batch size.

    python tests/serve/load.py --clients 32 --seconds 300

Clients ask for one image after another, each over its own connection; a 429 is waited for. Prints
one line of JSON.
"""

import argparse
import asyncio
import collections
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time

import httpx2
import numpy as np

PROMPTS = ("two red hearts", "a blue cat left of a tree", "a moon", "three green apples on pink")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def resident(pid: int) -> int:
    """MB of a process."""
    with open(f"/proc/{pid}/status") as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read())[1]) >> 10


def await_ready(url: str, process: subprocess.Popen) -> None:
    while True:
        assert process.poll() is None, "the server ended"
        try:
            if httpx2.get(f"{url}/ready").status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.2)


async def ask(url: str, number: int, steps: int, end: float, statuses: dict, waits: list) -> None:
    """One client until the end."""
    draw = random.Random(number)
    async with httpx2.AsyncClient(base_url=url, timeout=600) as client:
        while time.monotonic() < end:
            body = {"prompt": draw.choice(PROMPTS), "seed": draw.randrange(1 << 32)}
            body["num_inference_steps"] = steps
            begun = time.monotonic()
            answer = await client.post("/v1/images/generations", json=body)
            statuses[answer.status_code] += 1
            if answer.status_code == 200:
                waits.append(time.monotonic() - begun)
            elif answer.status_code == 429:
                await asyncio.sleep(float(answer.headers["retry-after"]))


async def load(url: str, args: argparse.Namespace, pid: int) -> dict:
    """What all clients see together, and the server's memory at each tenth of the time."""
    statuses: dict[int, int] = collections.Counter()
    waits: list[float] = []
    begun, own = time.monotonic(), time.process_time()
    end = begun + args.seconds
    clients = [
        asyncio.ensure_future(ask(url, number, args.steps, end, statuses, waits))
        for number in range(args.clients)
    ]
    memory = [resident(pid)]
    for _ in range(10):
        await asyncio.sleep(args.seconds / 10)
        memory.append(resident(pid))
    await asyncio.gather(*clients)
    return {
        "statuses": dict(statuses),
        "images_per_s": round(len(waits) / (time.monotonic() - begun), 3),
        "clients_cpu_s": round(time.process_time() - own, 1),  # of the same cores
        "median_s": round(float(np.median(waits)), 2),
        "p95_s": round(float(np.percentile(waits, 95)), 2),
        "memory_mb": memory,
    }


def alone(args: argparse.Namespace, count: int) -> dict:
    """Images per second of `generate --prompts`, files and all, and of its pipeline alone, with the
    same batch size and a model that is loaded and compiled."""
    code = f"""
import contextlib, io, json, pathlib, tempfile, time
from blip3o_jax.cli import main, parse
from blip3o_jax.jobs import work
from blip3o_jax.request import Request
from blip3o_jax.sample.settings import Settings
words = ["--checkpoint", {args.checkpoint!r}, "--batch-size", "{args.batch_size}"]
words += ["--num-inference-steps", "{args.steps}"]
pipeline = work.load_for(parse(["generate", "x", *words]))
settings = Settings(num_inference_steps={args.steps})
texts = ({PROMPTS!r} * {count})[:{count}]
asked = [Request(text, seed=i, settings=settings) for i, text in enumerate(texts)]
list(pipeline.run(asked[:{args.batch_size}]))
rates = {{}}
begun = time.monotonic()
list(pipeline.run(asked))
rates["pipeline_images_per_s"] = {count} / (time.monotonic() - begun)
work.load_for = lambda _: pipeline
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
    file = pathlib.Path(folder, "prompts.txt")
    file.write_text("\\n".join(texts))
    begun = time.monotonic()
    assert main(["generate", "--prompts", str(file), "--out", folder + "/out", *words]) == 0
    rates["generate_images_per_s"] = {count} / (time.monotonic() - begun)
print(json.dumps(rates))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name: round(rate, 3) for name, rate in json.loads(done.stdout).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="emoji_64")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    argv = ["serve", "--checkpoint", args.checkpoint, "--port", str(port)]
    argv += ["--batch-size", str(args.batch_size)]
    process = subprocess.Popen([sys.executable, "-m", "blip3o_jax", *argv])
    try:
        await_ready(url, process)
        result = asyncio.run(load(url, args, process.pid))
        process.send_signal(signal.SIGTERM)
        result["exit_code"] = process.wait(120)
    finally:
        process.kill()
        process.wait()
    # Half a minute's, in whole batches.
    count = max(2, int(30 * result["images_per_s"] / args.batch_size)) * args.batch_size
    result |= alone(args, count)
    print(json.dumps(vars(args) | result))


if __name__ == "__main__":
    main()
