"""A lock of each process of a job, kept alive by a beat: a second job stays out, and the restart of
one that was killed gets in."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from blip3o_jax import paths
from blip3o_jax.errors import InputError, require
from blip3o_jax.files import json_object
from blip3o_jax.jobs.ledger import mended_by, write_whole

log = logging.getLogger(__name__)

BEAT = 10.0  # seconds between two signs of life
DEAD = 35.0  # seconds without one
# What a lock says of its process.
KINDS = {"host": (str,), "pid": (int,), "token": (str,), "made": (int,), "seconds": (int, float)}


@contextlib.contextmanager
def locked(folder: paths.AnyPath, index: int, count: int) -> Iterator[dict]:
    """Holds the share `index` of `count` in its body, which counts what it has `made` in the dict
    it is given; InputError if another process is at work on this share, or on one of another count.

    The process of an earlier lock is known to be dead if it ran on this host and is gone, or if its
    beat does not change: clocks of two hosts are never compared.
    """
    name = f"job/lock-{index}-of-{count}.json"
    path = folder / name
    outwait(folder, lambda other: other == path or not other.stem.endswith(f"-of-{count}"))
    life = {"share": f"{index}/{count}", "token": uuid.uuid4().hex, "host": socket.gethostname()}
    life |= {"pid": os.getpid(), "made": 0, "seconds": 0.0}
    write_whole(folder, name, [json.dumps(life).encode()])
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(folder, name, life, ended), daemon=True)
    thread.start()
    try:
        yield life
    finally:
        ended.set()
        thread.join()
        if _token(path) == life["token"]:
            path.unlink(missing_ok=True)


def read(path: paths.AnyPath) -> dict:
    """A lock, {} where there is none or a server does not answer; InputError for a damaged one."""
    text = None
    with contextlib.suppress(InputError), paths.remote_errors(path.name):
        text = path.read_bytes()
    if text is None:
        return {}
    with mended_by("delete it, if no process is at work on this job"):
        life = json_object(path, text)
        are_there = all(type(life.get(name)) in kinds for name, kinds in KINDS.items())
        is_lock = are_there and 0 < life["pid"] < 2**31 and life["seconds"] >= 0
        require(is_lock, f"{path} is damaged: it is no lock.")
    return life


def _token(path: paths.AnyPath) -> str | None:
    """By which a process knows its own lock; None where there is none that can be read."""
    with contextlib.suppress(InputError):
        return read(path).get("token")
    return None


def outwait(
    folder: paths.AnyPath, is_rival: Callable[[paths.AnyPath], bool] = lambda _: True
) -> None:
    """Deletes the rivals' locks, once their processes are known to be dead; InputError if one is
    alive."""
    for path in filter(is_rival, sorted((folder / "job").glob("lock-*.json"))):
        first, until = read(path), time.monotonic()
        if is_alive(first):
            log.info("%s is held; waiting up to %d s for a sign of life.", path.name, DEAD)
            until += DEAD
        while time.monotonic() < until:
            time.sleep(min(1.0, DEAD / 10))
            now = read(path)
            who = f"process {now.get('pid')} on {now.get('host')}"
            sentence = f"Another job is at work on {folder}: {who}; wait for it or stop it."
            require(now in ({}, first), sentence)
        path.unlink(missing_ok=True)


def is_alive(life: dict) -> bool:
    """Whether the process of a lock may be at work; False for one of this host that is gone."""
    with contextlib.suppress(PermissionError):  # of another user
        try:
            if life.get("host") == socket.gethostname():
                os.kill(life["pid"], 0)
        except ProcessLookupError:
            return False
    return True


def _beat(folder: paths.AnyPath, name: str, life: dict, ended: threading.Event) -> None:
    begin = time.monotonic()
    while not ended.wait(BEAT):
        if _token(folder / name) not in (None, life["token"]):
            log.error("%s was taken by another process; this one stops.", name)
            os._exit(1)
        life["seconds"] = round(time.monotonic() - begin, 1)  # so each beat differs
        with contextlib.suppress(InputError):  # a disk that is full for a while
            write_whole(folder, name, [json.dumps(life).encode()])
