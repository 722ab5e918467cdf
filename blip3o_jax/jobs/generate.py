"""`blip3o-jax generate`: prompts -> image files with their origin inside, and a manifest."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from blip3o_jax.errors import require
from blip3o_jax.jobs import ledger, work
from blip3o_jax.jobs.images import SHARDED, image_format
from blip3o_jax.jobs.options import job_options, model_options, option, settings_of
from blip3o_jax.jobs.prompts import Row, read_prompts
from blip3o_jax.sample.settings import EditSettings, Settings

HELP = "images from prompts"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="*", metavar="PROMPT")
    formats = ".txt (a prompt a line), .jsonl, .csv or .parquet (field `prompt`, maybe `id`)"
    parser.add_argument("--prompts", metavar="FILE", help=formats)
    option(parser, "--num-images", 1, "images of each prompt")
    model_options(parser, to_file=True)
    job_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes OUT/NUMBER-INDEX-words.png and OUT/manifest.jsonl, or one image as OUT itself."""
    from blip3o_jax.jobs import openai
    from blip3o_jax.request import Request, repeated

    if args.status:
        return work.status(args.out)
    # All of the command line is checked before any weights are loaded.
    one_way = bool(args.prompt) != bool(args.prompts)
    require(one_way, "Give prompts as arguments or --prompts FILE, one of the two.")
    require(args.num_images >= 1, f"--num-images is at least 1, not {args.num_images}.")
    image_format(args.out)
    settings = settings_of(args)
    facts = {"command": "generate", "num_images": args.num_images, "seed": args.seed}
    facts |= asdict(settings)
    if args.prompts and openai.is_batch(args.prompts):
        return _run_batch(args, settings, facts)
    typed = [Row(f"Prompt {number}", prompt) for number, prompt in enumerate(args.prompt, 1)]
    rows = typed or read_prompts(args.prompts)
    how = {"seed": args.seed, "settings": settings}
    requests = [
        Request(row.text, id=row.id, where=row.where, metadata=row.fields, **how) for row in rows
    ]
    requests = repeated(requests, args.num_images)
    return work.run(args, requests, facts, is_file=bool(args.prompts))


def _run_batch(args: argparse.Namespace, settings: Settings, facts: dict) -> int:
    """Serves the lines of OpenAI's batch file, images and edits, and writes their output and error
    files beside the manifest."""
    from blip3o_jax import checkpoints, paths
    from blip3o_jax.jobs import openai
    from blip3o_jax.serve.bodies import Offer

    alone = "of a batch file stands in its lines (`n`), and its results are files of a folder."
    is_folder = not image_format(args.out) and args.format not in SHARDED
    require(is_folder and args.num_images == 1, f"The number of images {alone}")
    config = checkpoints.config_of(args.checkpoint)
    models = args.checkpoint, checkpoints.open(args.checkpoint).identity
    # An edit has its own defaults where the command line keeps an image's.
    edits = EditSettings(**dict(asdict(settings).items() - asdict(Settings()).items()))
    offer = Offer(models, config, (args.format,), args.seed, settings, edits)
    requests, refused = openai.read_batch(args.prompts, offer)
    facts["batch"] = ledger.digest_of(paths.path(args.prompts))
    facts[ledger.FURTHER] = ["output.jsonl", "errors.jsonl"]
    code = work.run(args, requests, facts, is_file=True, refused=refused)
    folder = paths.path(args.out)
    if (folder / ledger.MANIFEST).is_file():
        openai.write_results(folder, ledger.read_facts(folder)[ledger.BEGUN])
    return code
