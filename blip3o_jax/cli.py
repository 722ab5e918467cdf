"""`blip3o-jax JOB ...`: parses the command line and calls one job. An error of the user's is one sentence and exit code 2."""

import argparse
import logging
import sys

from blip3o_jax import __version__
from blip3o_jax.config import ConfigError


def _generate(args) -> None:
    from blip3o_jax.jobs import generate

    generate.run(args)


def _train(args) -> None:
    from blip3o_jax.jobs import train

    train.run(args.config, args.workdir, args.overrides)


def _evaluate(args) -> None:
    from blip3o_jax.jobs import evaluate

    evaluate.run(args)


def _export(args) -> None:
    from blip3o_jax.jobs import export

    export.run(args.source, args.destination, args.dtype, args.overwrite)


def _model_options(parser) -> None:
    parser.add_argument("--checkpoint", default="emoji_64", help="embedded name, published PyTorch folder, or training workdir")
    parser.add_argument("--out", default="out", help="folder for the results, or NAME.png for one image (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace results that are there already")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-inference-steps", type=int, default=30, help="Euler steps (default: %(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--top-k", type=int, default=1200)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--shift", type=float, default=1.0, help="of the flow schedule; BLIP3o-NEXT's is 1")
    parser.add_argument("--batch-size", type=int, default=None, help="images made at once (default: by device)")
    parser.add_argument("--mesh", default="", help="e.g. data=4,fsdp=2")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(prog="blip3o-jax", description="BLIP3o-NEXT in JAX: text to image, training and evaluation.")
    parser.add_argument("--version", action="version", version=__version__)
    jobs = parser.add_subparsers(dest="job", metavar="JOB", required=True)

    job = jobs.add_parser("generate", help="images from prompts")
    job.add_argument("prompt", nargs="*", metavar="PROMPT")
    job.add_argument("--prompts", metavar="FILE", help=".txt (a prompt a line), .jsonl or .csv (field `prompt`)")
    job.add_argument("--num-images", type=int, default=1, help="images of each prompt")
    _model_options(job)
    job.set_defaults(run=_generate)

    job = jobs.add_parser("train", help="train from a config; resumes if the workdir holds a checkpoint")
    job.add_argument("--config", required=True, help="a config file or the name of a shipped one")
    job.add_argument("--workdir", required=True)
    job.set_defaults(run=_train)

    job = jobs.add_parser("evaluate", help="score a checkpoint; prints one JSON line last")
    job.add_argument("benchmark", choices=["scenes"])
    job.add_argument("--num-prompts", type=int, default=402, help="held-out prompts, spread over the tags (default: %(default)s)")
    job.add_argument("--seeds", type=int, default=2, help="images of each prompt")
    _model_options(job)
    job.set_defaults(run=_evaluate)

    job = jobs.add_parser("export", help="a training run as a checkpoint in the published PyTorch layout")
    job.add_argument("source", metavar="WORKDIR")
    job.add_argument("destination", metavar="DIR")
    job.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    job.add_argument("--overwrite", action="store_true")
    job.set_defaults(run=_export)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one job; returns the exit code."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    args.overrides = [item for item in rest if item.startswith("--config.")]
    if unknown := [item for item in rest if item not in args.overrides or args.job != "train"]:
        parser.error(f"unknown argument {unknown[0]}")
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(lambda record: record.name.startswith("blip3o_jax") or record.levelno >= logging.ERROR)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=[handler])
    try:
        args.run(args)
    except ConfigError as error:
        print(f"blip3o-jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
