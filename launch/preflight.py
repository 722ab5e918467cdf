"""Whether a job can start on this host, before it costs anything: one line a check, exit code 0 or
1. Run it on all hosts at once.

    python launch/preflight.py --workdir /mnt/runs/pretrain_3b --config pretrain_3b:v5e:16x16

The config is read as the run reads it, with --config.key=value; its own topology must be there.

A check that hangs, as a pod does that lacks a host, fails after --timeout seconds. Processes find
each other as those of a run do (parallel.processes.start_processes). Exit code 75 is given after a
SIGTERM or SIGUSR1 alone: what fails here fails again.
"""

import argparse
import contextlib
import glob
import importlib.metadata
import os
import platform
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator

PACKAGES = ("blip3o-jax", "jax", "jaxlib", "flax", "orbax-checkpoint", "libtpu")


class CheckError(Exception):
    """What is wrong and what to do, in a sentence."""


def need(holds: bool, sentence: str) -> None:
    if not holds:
        raise CheckError(sentence)


def say(name: str, verdict: str, what: str) -> None:
    print(f"{socket.gethostname()} {name}: {verdict}, {what}", flush=True)


@contextlib.contextmanager
def deadline(name: str, seconds: float) -> Iterator[None]:
    """Ends the process when the body takes longer: a collective without its partners listens to
    nothing else."""

    def end():
        cause = "a host is missing, or a disk or the network does not answer"
        say(name, "FAILED", f"no answer within {seconds:g} s; {cause}")
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def config_of(args):
    """The run's config, as `blip3o-jax train` reads it."""
    from blip3o_jax.train.read_config import read_config

    return read_config(args.config, args.overrides)


def versions(args) -> str:
    installed = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = f"{name} {importlib.metadata.version(name)}"
    missing = "blip3o-jax is not installed for this Python; pip install it on every host"
    need(PACKAGES[0] in installed, missing)
    return f"Python {platform.python_version()}, {', '.join(installed.values())}"


def workdir(args) -> str:
    """A file of this host's is written, read and removed."""
    from blip3o_jax import paths

    workdir = paths.path(args.workdir)
    if paths.is_bucket(workdir):
        folder = workdir
    else:
        folder = next(parent for parent in (workdir, *workdir.parents) if parent.exists())
    mark = folder / f".preflight-{socket.gethostname()}-{uuid.uuid4().hex}"
    began = time.perf_counter()
    try:
        mark.write_bytes(bytes(1 << 20))
        size = len(mark.read_bytes())
        mark.unlink()
    except OSError as error:
        raise CheckError(f"{folder} cannot be written: {error.strerror}") from error
    need(size == 1 << 20, f"{folder} gave back {size} of {1 << 20} bytes")
    return f"{folder} is written and read, 1 MiB in {time.perf_counter() - began:.2f} s"


def data(args) -> str:
    """The first bytes of the first file of everything that the config reads: its cache, or its
    sources, and the checkpoints, also embedded ones, that parts come from."""
    if not args.config:
        return "no --config, nothing to look for"
    from blip3o_jax import checkpoints, paths
    from blip3o_jax.data import records

    cfg = config_of(args)
    names = [cfg.data.cache] if cfg.data.cache else [source.path for source in cfg.data.sources]
    names += [cfg.data.prompts] if cfg.data.prompts else []
    names = [name for name in [*names, cfg.data.tokenizer] if name]
    inits = sorted(set(cfg.init.values()))
    folders = [glob.escape(str(checkpoints.find(name)[0])) for name in inits]
    for pattern in [*names, *folders]:
        # Lazily: a folder may hold millions of files.
        in_bucket = paths.is_bucket(pattern)
        there = records.expand(pattern) if in_bucket else sorted(glob.glob(pattern))
        found = map(paths.path, there)
        files = (file for path in found for file in ([path] if path.is_file() else path.rglob("*")))
        first = next((file for file in files if file.is_file()), None)
        absent = f"{pattern} names no file on this host; mount it or change the config"
        need(first is not None, absent)
        try:
            paths.read_range(first, 0, min(4096, first.stat().st_size))
        except OSError as error:
            raise CheckError(f"{first} cannot be read: {error.strerror}") from error
    return f"{', '.join([*names, *inits]) or 'the config reads no files'}"


def processes(args) -> str:
    from blip3o_jax.parallel.processes import start_processes

    # `deadline` comes first: JAX's own ends the process without a word for people
    start_processes(int(args.timeout) + 60)
    import jax

    count = jax.process_count()
    is_whole = not args.processes or count == args.processes
    problem = f"{count} processes found each other, not {args.processes}"
    need(is_whole, f"{problem}; start one on every host")
    return f"this is {jax.process_index()} of {count}"


def devices(args) -> str:
    """All are there, of one kind, and those that the config is for; its batch divides over them."""
    import jax

    kinds = sorted({device.device_kind for device in jax.devices()})
    local, count = jax.local_device_count(), jax.device_count()
    present = f"{local} of {count} devices are local, {' and '.join(kinds)}"
    is_even = len(kinds) == 1 and local * jax.process_count() == count
    need(is_even, f"{present}; all hosts must have as many of the same")
    cfg = config_of(args) if args.config else None
    topology = args.topology or (cfg and cfg.topology)
    if topology:
        from blip3o_jax.chips import chip_of, parse_topology

        chip, planned = parse_topology(topology)
        is_planned = count == planned and chip_of(kinds[0]) == chip
        fix = (
            "" if args.topology else "; name the config's own NAME:TOPOLOGY, or --config.topology="
        )
        need(is_planned, f"{present}; {topology} has {planned} of {chip.kind}{fix}")
    if cfg:
        from blip3o_jax.parallel.mesh import make_mesh
        from blip3o_jax.train.start import check_batches

        check_batches(cfg, make_mesh(cfg.mesh))
    return f"{present}{f', as {topology}' if topology else ''}"


def all_reduce(args) -> str:
    """The sum over all devices of the number of each."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    count = jax.device_count()
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("all",))
    cut, whole = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (["all"], []))
    numbers = np.arange(count, dtype=np.float32)
    mine = jax.make_array_from_callback((count,), cut, lambda index: numbers[index])
    began = time.perf_counter()
    total = float(jax.jit(jnp.sum, out_shardings=whole)(mine))
    wrong = f"the sum of 0 to {count - 1} over all devices came out as {total:g}"
    need(total == count * (count - 1) / 2, f"{wrong}; a link is broken")
    return f"{count} devices add up, {time.perf_counter() - began:.2f} s"


CHECKS = (versions, workdir, data, processes, devices, all_reduce)


def interrupted(number: int, frame: object) -> None:
    os._exit(75)  # JAX's runtime may be anywhere, and there is nothing to save


def main(argv: list[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, interrupted)
    signal.signal(signal.SIGUSR1, interrupted)
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--workdir", required=True)
    config = "whose data and devices must be there; with --config.key=value as for the run"
    parser.add_argument("--config", help=config)
    topology = "devices that must be there, e.g. v5e:16x16 (default: the config's)"
    parser.add_argument("--topology", help=topology)
    parser.add_argument("--processes", type=int, help="number expected")
    timeout = "seconds of each check (default: %(default)s)"
    parser.add_argument("--timeout", type=float, default=300, help=timeout)
    args, rest = parser.parse_known_args(argv)
    args.overrides = [word for word in rest if args.config and word.startswith("--config.")]
    if unknown := [word for word in rest if word not in args.overrides]:
        parser.error(f"unknown argument {unknown[0]}")
    for check in CHECKS:
        name = check.__name__
        try:
            with deadline(name, args.timeout):
                say(name, "ok", check(args))
        except Exception as error:  # whatever it is, it is this check that failed
            reason = str(error).splitlines()[0] if str(error) else "no reason given"
            # Sentences for people are said as they are, other errors with their kind.
            kind = type(error).__name__
            is_sentence = kind in ("CheckError", "InputError")
            say(name, "FAILED", reason if is_sentence else f"{kind}: {reason}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
