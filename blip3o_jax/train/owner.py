"""One owner of a workdir: WORKDIR/owner.json names the host and the process that trains in it, and
a thread touches it as long as the process lives (its heartbeat)."""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from blip3o_jax import paths
from blip3o_jax.errors import os_errors, require
from blip3o_jax.paths import AnyPath

log = logging.getLogger(__name__)

NAME = "owner.json"
HEARTBEAT = 10.0  # seconds between two touches
# seconds without one after which an owner on another host, whose process cannot be asked, is gone
SILENCE = 60.0


@contextlib.contextmanager
def own(workdir: AnyPath) -> Iterator[None]:
    """Owns the workdir in its body; InputError when a live process does. Waits up to `SILENCE` for
    one of another host that may be gone."""
    file, me = workdir / NAME, _me()
    with os_errors(f"The workdir {workdir} cannot be written"):
        workdir.mkdir(parents=True, exist_ok=True)
        while not paths.create(file, json.dumps(me).encode()):
            _wait_for_its_end(file)
    ended = threading.Event()
    thread = threading.Thread(target=_touch, args=[file, me, ended], daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()  # in a bucket, a touch that is under way writes the file again
        if _read(file) == me:
            file.unlink(missing_ok=True)
        if not paths.is_bucket(workdir):
            with contextlib.suppress(OSError):  # it holds something, as it should
                workdir.rmdir()


def _me() -> dict[str, str | int]:
    process = os.getpid()
    names = {"host": socket.gethostname(), "boot": _boot(), "run": uuid.uuid4().hex}
    return {**names, "process": process, "started": _started(process)}


def _boot() -> str:
    """Which kernel and which processes it shows: a container sees others than its neighbour."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _started(process: int) -> str:
    """When a process of this kernel began, "" if there is none or it cannot be told; its number may
    have been another's before."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _read(file: AnyPath) -> dict | None:
    """The owner, {} for a file that names none, None without a file."""
    try:
        owner = json.loads(file.read_text())
        return owner if isinstance(owner, dict) else {}
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def _touched(file: AnyPath) -> str | None:
    """What every touch changes, by the disk's clock; None without a file."""
    with contextlib.suppress(FileNotFoundError):
        return paths.state(file)[1]
    return None


def _wait_for_its_end(file: AnyPath) -> None:
    """Returns when the present owner is gone and its file removed; InputError when it lives."""
    owner, here = _read(file), _me()
    if owner is None:
        return
    who = f"process {owner.get('process')} on {owner.get('host')}"
    sentence = f"The workdir {file.parent} is in use by {who}; end that run, or use another folder."
    if here["boot"] and owner.get("boot") == here["boot"]:
        lives = owner.get("started") == _started(owner["process"]) != ""
        require(not lives, sentence)
    else:
        # Its clock is the disk's, which may not be ours: only a change says that it lives.
        log.info("The workdir was in use by %s; waiting for a sign of life.", who)
        touched, until = _touched(file), time.monotonic() + SILENCE
        while time.monotonic() < until:
            time.sleep(min(1.0, SILENCE / 10))
            if (now := _touched(file)) is None:
                return
            require(now == touched, sentence)
    log.warning("The workdir's owner, %s, is gone; this process owns it now.", who)
    # Two that wait remove one owner's file, not each other's.
    if _read(file) == owner:
        file.unlink(missing_ok=True)


def _touch(file: AnyPath, me: dict, ended: threading.Event) -> None:
    """The heartbeat; a disk that does not answer for a while is no end."""
    while not ended.wait(HEARTBEAT):
        with contextlib.suppress(OSError):
            if _read(file) == me:
                paths.touch(file)
