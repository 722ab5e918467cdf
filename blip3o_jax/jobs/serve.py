"""`blip3o-jax serve`: a checkpoint behind the images API of OpenAI (docs/serve.md)."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import logging
import math
import pathlib
import tempfile

from blip3o_jax import files
from blip3o_jax.errors import InputError, os_errors, require
from blip3o_jax.jobs.options import (
    check_devices,
    checkpoint_option,
    device_options,
    load_for,
    option,
)

log = logging.getLogger(__name__)

HELP = "serve a checkpoint to clients of OpenAI's images API"


def options(parser: argparse.ArgumentParser) -> None:
    checkpoint_option(parser)
    device_options(parser)
    option(parser, "--host", "127.0.0.1", "address to listen on; others need --api-key-file")
    option(parser, "--port", 8000, "port to listen on; 0 takes a free one")
    keys = "keys that calls must have, one a line (default: calls from this machine need none)"
    parser.add_argument("--api-key-file", default="", metavar="FILE", help=keys)
    option(parser, "--queue", 64, "images that may wait; more are answered with 429")
    option(parser, "--timeout", 600.0, "seconds after which a call is given up")
    option(parser, "--drain", 30.0, "seconds that SIGTERM leaves to what was asked before")
    kept = "folder that keeps uploaded files and batches (default: until the server stops)"
    parser.add_argument("--files", default="", metavar="FOLDER", help=kept)
    parser.set_defaults(run=run)


def read_keys(path: str) -> tuple[str, ...]:
    """The keys of a file; InputError if it has none, or one that no header can hold."""
    if not path:
        return ()
    keys = tuple(filter(None, map(str.strip, files.read_lines(path, "key"))))
    require(bool(keys), f"{path} has no keys: write one a line.")
    for number, key in enumerate(keys, 1):
        is_plain = key.isascii() and key.isprintable() and " " not in key
        require(is_plain, f"{path}: key {number} is not of ASCII letters, digits and signs.")
    return keys


def check_host(host: str, has_keys: bool) -> None:
    """InputError for an address that others than this machine reach, without keys."""
    try:
        is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError as error:
        raise InputError(f"--host is an IP address or localhost, not {host!r}.") from error
    open_to = f"--host {host} is open to others than this machine"
    require(is_loopback or has_keys, f"{open_to}; add --api-key-file with a key for them.")


def run(args: argparse.Namespace) -> int:
    """Serves until SIGTERM or SIGINT; 0 if all that was asked before is answered, else 1."""
    # All of the command line is checked before any weights are loaded.
    keys = read_keys(args.api_key_file)
    check_host(args.host, bool(keys))
    require(0 <= args.port < 1 << 16, f"--port is from 0 to 65535, not {args.port}.")
    require(args.queue >= 1, f"--queue is at least 1, not {args.queue}.")
    for name in ("timeout", "drain"):
        value = getattr(args, name)
        is_time = math.isfinite(value) and value >= (name == "timeout")
        require(is_time, f"--{name} is a number of seconds, not {value}.")
    check_devices(args)
    try:
        from blip3o_jax.serve import app, http
        from blip3o_jax.serve.metrics import Metrics
        from blip3o_jax.serve.queue import Queue
        from blip3o_jax.serve.store import Store
        from blip3o_jax.serve.worker import Worker
    except ImportError as error:
        problem = "serve needs starlette, uvicorn, python-multipart and prometheus-client"
        fix = "pip install 'blip3o-jax[serve]'"
        raise InputError(f"{problem} ({error.name} is missing): {fix}.") from error
    # A port that cannot be had is known before weights are loaded.
    listener = http.listen(args.host, args.port)
    worker = Worker(load_for(args), Queue(args.queue), Metrics())
    with contextlib.ExitStack() as stack:
        folder = args.files or stack.enter_context(tempfile.TemporaryDirectory())
        with os_errors(f"--files {folder} cannot be written"):
            store = Store(pathlib.Path(folder))
        server = app.Server(worker, app.offer_of(worker.pipeline, store), store, keys, args.timeout)
        return http.serve(server, listener, args.drain)
