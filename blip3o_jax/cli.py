"""`blip3o-jax JOB ...`: parses the command line and calls one job.

An error of the user's is one sentence and exit code 2.
"""

import argparse
import importlib
import logging
import sys

from blip3o_jax import __version__
from blip3o_jax.errors import InputError


def _job(module: str, function: str = "run"):
    """`function` of blip3o_jax.jobs.`module`, imported when it is called: help needs no jax."""

    def run(args) -> int | None:
        return getattr(importlib.import_module(f"blip3o_jax.jobs.{module}"), function)(args)

    return run


def _model_options(parser) -> None:
    parser.add_argument(
        "--checkpoint",
        default="emoji_64",
        help="embedded name, published PyTorch folder, or training workdir",
    )
    parser.add_argument(
        "--out",
        default="out",
        help="folder for the results, or NAME.png for one image (default: %(default)s)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace results that are there already"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--num-inference-steps", type=int, default=30, help="Euler steps (default: %(default)s)"
    )
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--top-k", type=int, default=1200)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument(
        "--shift", type=float, default=1.0, help="of the flow schedule; BLIP3o-NEXT's is 1"
    )
    parser.add_argument(
        "--batch-size", type=int, default=None, help="images made at once (default: by device)"
    )
    parser.add_argument("--mesh", default="", help="e.g. data=4,fsdp=2")


def _convert_options(directions) -> None:
    dtypes = ["keep", "float32", "bfloat16", "float16"]
    job = directions.add_parser(
        "to-jax", help="a published checkpoint, or the parts of one, for JAX on any mesh"
    )
    job.add_argument(
        "source",
        metavar="SRC",
        nargs="?",
        help="folder in the published layout, or an embedded name; left out when the four parts "
        "are named",
    )
    job.add_argument("destination", metavar="DST")
    job.add_argument("--ar", metavar="DIR", help="Qwen3 of transformers")
    job.add_argument(
        "--dit", metavar="DIR", help="SANA of diffusers: the repository, or its transformer/"
    )
    job.add_argument("--vae", metavar="DIR", help="its autoencoder, if not in vae/ of --dit")
    job.add_argument("--tokenizer", metavar="FILE.pth|DIR", help="TA-Tok's ta_tok.pth")
    job.add_argument(
        "--dtype", default="keep", choices=dtypes, help="of the result (default: each tensor's own)"
    )
    job.add_argument(
        "--mesh",
        default="",
        help="e.g. fsdp=8: cut the files as that mesh reads them; any other may read them too",
    )
    job.add_argument(
        "--new-vocabulary",
        choices=["mean", "projected-codebook"],
        help="how a plain Qwen3 gets its image tokens",
    )
    job.add_argument("--overwrite", action="store_true", help="replace an earlier conversion")
    job.set_defaults(run=_job("convert", "run_to_jax"))

    job = directions.add_parser(
        "to-torch", help="a converted checkpoint or a training run in the published PyTorch layout"
    )
    job.add_argument("source", metavar="SRC", help="folder of to-jax, or training workdir")
    job.add_argument("destination", metavar="DST")
    job.add_argument(
        "--dtype",
        default="keep",
        choices=dtypes,
        help="of the result (default: each parameter's own)",
    )
    job.add_argument(
        "--max-shard-bytes", type=float, default=5e9, help="size of a file (default: %(default).0f)"
    )
    job.add_argument("--overwrite", action="store_true", help="replace an earlier conversion")
    job.set_defaults(run=_job("convert", "run_to_torch"))

    job = directions.add_parser(
        "verify",
        help="whether two copies of a model agree, tensor by tensor and stage by stage; exit 1 "
        "if not",
    )
    job.add_argument(
        "a",
        metavar="A",
        help="a checkpoint of any kind: embedded name, published or converted folder, training "
        "workdir",
    )
    job.add_argument("b", metavar="B", help="another")
    job.add_argument("--torch", action="store_true", help="run A in PyTorch (extra [parity])")
    job.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="of a stage, relative to its largest value (default: %(default)s)",
    )
    job.add_argument(
        "--stages",
        action="store_true",
        help="run the stages of a model of more than a billion parameters too",
    )
    job.add_argument(
        "--report", metavar="FILE", help="write the report with every tensor to a file"
    )
    job.set_defaults(run=_job("verify"))


def _data_options(tasks) -> None:
    job = tasks.add_parser(
        "check",
        help="read a mixture: what cannot be used, sizes, shapes, duplicates, lengths of captions",
    )
    job.add_argument(
        "--limit",
        type=int,
        default=0,
        metavar="N",
        help="records of each source, evenly spread (default: all)",
    )
    job.add_argument(
        "--out", required=True, help="folder for report.json, the list of problems and the plots"
    )
    job.add_argument("--overwrite", action="store_true", help="replace an earlier report")
    job.set_defaults(run=_job("data", "run_check"))

    job = tasks.add_parser("stats", help="how fast a mixture is read, by number of reader threads")
    job.add_argument(
        "--threads", default="1,2,4", help="numbers of threads to try (default: %(default)s)"
    )
    job.add_argument(
        "--batches",
        type=int,
        default=20,
        metavar="N",
        help="batches to read with each (default: %(default)s)",
    )
    job.set_defaults(run=_job("data", "run_stats"))

    job = tasks.add_parser(
        "cache",
        help="codes and latents of a mixture, for training without image encoders; goes on "
        "where it stopped",
    )
    job.add_argument("--out", required=True, help="folder of the cache, for data.cache")
    job.add_argument(
        "--latents",
        default="float32",
        choices=["float32", "bfloat16"],
        help="how latents are kept (default: %(default)s)",
    )
    job.add_argument(
        "--shard-records", type=int, default=4096, help="records of a file (default: %(default)s)"
    )
    job.add_argument(
        "--batch-size",
        type=int,
        default=32,
        help="images encoded at once on a host (default: %(default)s)",
    )
    job.set_defaults(run=_job("data_cache"))
    for name in ("check", "stats", "cache"):
        tasks.choices[name].add_argument(
            "--config", required=True, help="a config file or the name of a shipped one"
        )


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="blip3o-jax", description="BLIP3o-NEXT in JAX: text to image, training and evaluation."
    )
    parser.add_argument("--version", action="version", version=__version__)
    jobs = parser.add_subparsers(dest="job", metavar="JOB", required=True)

    job = jobs.add_parser("generate", help="images from prompts")
    job.add_argument("prompt", nargs="*", metavar="PROMPT")
    job.add_argument(
        "--prompts", metavar="FILE", help=".txt (a prompt a line), .jsonl or .csv (field `prompt`)"
    )
    job.add_argument("--num-images", type=int, default=1, help="images of each prompt")
    _model_options(job)
    job.set_defaults(run=_job("generate"))

    for name, run, what in (
        ("train", _job("train"), "train from a config"),
        ("grpo", _job("grpo"), "reinforce the transformer by rewards"),
    ):
        job = jobs.add_parser(name, help=f"{what}; resumes if the workdir holds a checkpoint")
        job.add_argument(
            "--config", required=True, help="a config file or the name of a shipped one"
        )
        job.add_argument("--workdir", required=True)
        job.set_defaults(run=run, reference_quirks=False)
        if name == "train":
            job.add_argument(
                "--reference-quirks",
                action="store_true",
                help="train as the PyTorch code does: last positions, sampled codes",
            )

    job = jobs.add_parser("evaluate", help="score a checkpoint; prints one JSON line last")
    job.add_argument("benchmark", choices=["scenes"])
    job.add_argument(
        "--num-prompts",
        type=int,
        default=402,
        help="held-out prompts, spread over the tags (default: %(default)s)",
    )
    job.add_argument("--seeds", type=int, default=2, help="images of each prompt")
    _model_options(job)
    job.set_defaults(run=_job("evaluate"))

    job = jobs.add_parser(
        "convert", help="PyTorch checkpoints in and out; prints one JSON report last"
    )
    _convert_options(job.add_subparsers(dest="direction", metavar="DIRECTION", required=True))

    job = jobs.add_parser(
        "data",
        help="look at a mixture of training data, time it, cache it; prints one JSON line last",
    )
    _data_options(job.add_subparsers(dest="task", metavar="TASK", required=True))

    job = jobs.add_parser(
        "plan",
        help="compile a config's step for a TPU topology that is not here: memory, time, cost; "
        "one JSON line last",
    )
    job.add_argument(
        "--config",
        required=True,
        help="a config file or the name of a shipped one; NAME:TOPOLOGY where it knows several",
    )
    job.add_argument(
        "--topology", help="e.g. v5e:16x16, v5p:4x4x8, v6e:4x4, tpu7x:2x2x1 (default: the config's)"
    )
    job.add_argument(
        "--generate",
        type=int,
        metavar="N",
        help="plan generation of a million images instead, N a device at once",
    )
    job.add_argument(
        "--num-inference-steps", type=int, default=30, help="of generation (default: %(default)s)"
    )
    job.add_argument(
        "--mesh",
        default="",
        help="of generation, as `generate --mesh` (default: whole weights on every device)",
    )
    job.add_argument(
        "--search", action="store_true", help="over rows a device and remat; the best that fits"
    )
    job.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        help="share of the peak that the time is for (default: %(default)s)",
    )
    job.add_argument("--price", type=float, metavar="DOLLARS", help="of a chip-hour")
    job.add_argument(
        "--depth",
        type=int,
        metavar="N",
        help="layers of each transformer and autoencoder stage, for a quick look",
    )
    job.set_defaults(run=_job("plan"))

    job = jobs.add_parser(
        "bench",
        help="how fast each stage is here, against PyTorch if asked; prints one JSON line last",
    )
    job.add_argument(
        "--preset",
        default="emoji_64",
        help="emoji_64 with its weights, or e.g. mid_128 with random ones (default: %(default)s)",
    )
    job.add_argument(
        "--against", choices=["torch"], help="measure PyTorch beside it (extra [parity])"
    )
    job.add_argument("--batch-size", type=int, default=4)
    job.add_argument("--num-inference-steps", type=int, default=10)
    job.add_argument(
        "--repeats",
        type=int,
        default=5,
        help="turns, of which the median counts (default: %(default)s)",
    )
    job.add_argument(
        "--stages",
        help="some of decode,denoise,autoencoder,text_to_image,train_step,cached_train_step "
        "(default: all)",
    )
    job.add_argument("--out", metavar="FILE.json", help="write the report to a file too")
    job.add_argument("--overwrite", action="store_true", help="replace an earlier report")
    job.set_defaults(run=_job("bench"))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one job; returns the exit code."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    args.overrides = [item for item in rest if item.startswith("--config.")]
    if unknown := [
        item
        for item in rest
        if item not in args.overrides or args.job not in ("train", "grpo", "data", "plan")
    ]:
        parser.error(f"unknown argument {unknown[0]}")
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(
        lambda record: record.name.startswith("blip3o_jax") or record.levelno >= logging.ERROR
    )
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=[handler]
    )
    try:
        code = args.run(args)
    except InputError as error:
        print(f"blip3o-jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
