"""`blip3o-jax JOB ...`: parses the command line and runs one job.

A job is a file of `jobs/` that declares its options and runs. Invalid input prints one sentence
and exits with code 2.
"""

import argparse
import importlib
import logging
import sys

from blip3o_jax import __version__
from blip3o_jax.errors import InputError

JOBS = ("generate", "edit", "train", "grpo", "evaluate", "convert", "data", "plan", "bench")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; imports nothing but the standard library and light files of ours."""
    what = "BLIP3o-NEXT in JAX: text to image, editing, training and evaluation."
    parser = argparse.ArgumentParser(prog="blip3o-jax", description=what)
    parser.add_argument("--version", action="version", version=__version__)
    jobs = parser.add_subparsers(dest="job", metavar="JOB", required=True)
    for name in JOBS:
        job = importlib.import_module(f"blip3o_jax.jobs.{name}")
        job.options(jobs.add_parser(name, help=job.HELP))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one job; returns the exit code."""
    # --config.key=value is free in form, so argparse leaves it over.
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    args.overrides = [item for item in rest if item.startswith("--config.")]
    overridable = getattr(args, "overridable", False)
    if unknown := [item for item in rest if not (overridable and item in args.overrides)]:
        parser.error(f"unknown argument {unknown[0]}")
    # Our own messages from INFO on, those of libraries from ERROR on.
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(lambda r: r.name.startswith("blip3o_jax") or r.levelno >= logging.ERROR)
    style = {"format": "%(asctime)s %(message)s", "datefmt": "%H:%M:%S"}
    logging.basicConfig(level=logging.INFO, handlers=[handler], **style)
    try:
        return args.run(args) or 0
    except InputError as error:
        print(f"blip3o-jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
