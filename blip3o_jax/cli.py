"""`blip3o-jax JOB ...`: parses the command line and runs one job.

A job is a file of `jobs/` that declares its options and runs. Invalid input prints one sentence
and exits with code 2.
"""

import argparse
import contextlib
import difflib
import importlib
import logging
import os
import signal
import sys

from blip3o_jax import __version__
from blip3o_jax.errors import InputError
from blip3o_jax.paths import is_bucket
from blip3o_jax.train import stop

# Each job, with one line that is enough to begin with.
EXAMPLES = {
    "generate": 'blip3o-jax generate "two red hearts" --out hearts.png --seed 7',
    "edit": 'blip3o-jax edit hearts.png "make the top heart blue" --out blue.png',
    "serve": "blip3o-jax serve --checkpoint emoji_64 --port 8000",
    "compile": "blip3o-jax compile --checkpoint emoji_64 --num-inference-steps 30",
    "train": "blip3o-jax train --config emoji_finetune --workdir runs/mine --config.num_steps=500",
    "grpo": "blip3o-jax grpo --config emoji_grpo --workdir runs/grpo",
    "evaluate": "blip3o-jax evaluate scenes --checkpoint runs/mine --out out/scores",
    "convert": "blip3o-jax convert to-jax BLIP3o-NEXT-SFT-3B jax-sft",
    "data": "blip3o-jax data check --config mine.py --out out/check",
    "plan": "blip3o-jax plan --config pretrain_3b --topology v5e:16x16 --price 1.20",
    "bench": "blip3o-jax bench --repeats 15",
}
JOBS = tuple(EXAMPLES)
RESUMED = ("train", "grpo", "generate", "edit", "evaluate")  # jobs that a launcher starts again


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; imports nothing but the standard library and light files of ours."""
    what = "BLIP3o-NEXT in JAX: text to image, editing, training and evaluation."
    parser = argparse.ArgumentParser(prog="blip3o-jax", description=what)
    parser.add_argument("--version", action="version", version=__version__)
    shell = "print what completes the command line at Tab in a shell (extra [completion])"
    names = {"choices": ("bash", "zsh"), "help": shell}
    parser.add_argument("--print-completion", action=_PrintCompletion, **names)
    jobs = parser.add_subparsers(dest="job", metavar="JOB", required=True)
    for name in JOBS:
        job = importlib.import_module(f"blip3o_jax.jobs.{name}")
        example = f"example: {EXAMPLES[name]}"
        job.options(jobs.add_parser(name, help=job.HELP, description=job.HELP, epilog=example))
    return parser


class _PrintCompletion(argparse.Action):
    """Prints the completion of the parser's command line for a shell, and ends the process."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values, flag=None
    ) -> None:
        try:
            import shtab
        except ImportError:
            parser.error(f"{flag} needs shtab: pip install 'blip3o-jax[completion]'")
        _complete_files(parser)
        print(shtab.complete(parser, values), flush=True)
        parser.exit()


def _complete_files(parser: argparse.ArgumentParser) -> None:
    """Lets what takes any text, in all of the parser's commands, be completed to a file's name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_files(command)
        elif action.nargs != 0 and action.choices is None and action.type in (None, str):
            action.complete = "file"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The checked command line of a job; a wrong one ends the process with 2, as argparse does."""
    # --config.key=value is free in form, so argparse leaves it over.
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    args.overrides = [item for item in rest if item.startswith("--config.")]
    overridable = getattr(args, "overridable", False)
    if unknown := [item for item in rest if not (overridable and item in args.overrides)]:
        parser.error(f"unknown argument {unknown[0]}{_suggestion(unknown[0], parser, args)}")
    return args


def _suggestion(word: str, parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """`'; did you mean --X?'` for an option of the job that is like `word`; how a run's settings
    are changed, where that is meant; else nothing."""
    # The parser of the job, or of the subcommand behind it.
    while groups := [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]:
        parser = groups[0].choices[getattr(args, groups[0].dest)]
    # First an option with all of its words and more, such as --num-inference-steps for --steps.
    name = word.partition("=")[0]
    flags = [flag for flag in parser._option_string_actions if flag not in ("-h", "--help")]
    longer = [flag for flag in flags if set(name.split("-")) <= set(flag.split("-"))]
    close = longer or difflib.get_close_matches(name, flags, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    is_run = getattr(args, "overridable", False) and name.startswith("--")
    return "; settings of a run are changed with --config.KEY=VALUE" if is_run else ""


def main(argv: list[str] | None = None) -> int:
    """Runs one job, that of the process without `argv`; returns the exit code."""
    job = (sys.argv[1:] if argv is None else argv)[:1]
    is_resumed = bool(job) and job[0] in RESUMED
    # Before all else, since a launcher may end a run that has hardly begun.
    with stop.handled(process=argv is None) if is_resumed else contextlib.nullcontext():
        return _run(argv)


def _run(argv: list[str] | None) -> int:
    try:
        code = _run_job(parse(argv))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # who reads the output has seen enough; nothing more is written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _run_job(args: argparse.Namespace) -> int:
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
    except OSError as error:
        # A bucket may end to answer anywhere; what a disk says is expected where it is asked.
        if not is_bucket(str(error.filename)):
            raise
        print(f"blip3o-jax: {error.filename}: {error.strerror}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
