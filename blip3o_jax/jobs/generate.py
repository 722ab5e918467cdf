"""`blip3o-jax generate`: prompts -> PNG files with their origin inside, and a manifest."""

from __future__ import annotations

import argparse
import csv
import json
import pathlib
import re
from dataclasses import asdict
from typing import TYPE_CHECKING

from blip3o_jax.errors import InputError, require
from blip3o_jax.jobs.options import model_options, option, settings_of
from blip3o_jax.jobs.output import new_file, new_folder
from blip3o_jax.sample.settings import Settings

if TYPE_CHECKING:
    from blip3o_jax.pipeline import Pipeline, Sample

HELP = "images from prompts"
MAX_PROMPT_FILE = 256 << 20  # bytes


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="*", metavar="PROMPT")
    formats = ".txt (a prompt a line), .jsonl or .csv (field `prompt`)"
    parser.add_argument("--prompts", metavar="FILE", help=formats)
    option(parser, "--num-images", 1, "images of each prompt")
    model_options(parser)
    parser.set_defaults(run=run)


def read_prompts(path: str) -> list[str]:
    """Prompts of a .txt (non-blank lines), .jsonl or .csv file (field or column `prompt`)."""
    file = pathlib.Path(path)
    try:
        limit = f"{path} is larger than {MAX_PROMPT_FILE >> 20} MB."
        require(file.stat().st_size <= MAX_PROMPT_FILE, limit)
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"The prompts file {path} cannot be read: {reason}.") from error
    # The format by the file's name.
    if file.suffix == ".txt":
        prompts = [line.strip() for line in lines if line.strip()]
    elif file.suffix == ".jsonl":
        prompts = [_json_prompt(path, n, line) for n, line in enumerate(lines, 1) if line.strip()]
    elif file.suffix == ".csv":
        rows = csv.DictReader(lines)
        require("prompt" in (rows.fieldnames or ()), f"{path} has no column `prompt`.")
        prompts = [row["prompt"] or "" for row in rows]
    else:
        raise InputError(f"{path}: a prompts file ends in .txt, .jsonl or .csv.")
    require(bool(prompts), f"{path} contains no prompts.")
    return prompts


def _json_prompt(path: str, number: int, line: str) -> str:
    where = f"{path} line {number}"
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where} is not a JSON object with a field `prompt`.") from error
    require(isinstance(prompt, str), f"{where}: `prompt` is not text.")
    return prompt


def save_png(path: pathlib.Path, sample: Sample, origin: dict, settings: Settings) -> None:
    """Writes the image with its origin and settings as PNG text."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in (origin | {"settings": json.dumps(asdict(settings))}).items():
        info.add_itxt(key, str(value))
    Image.fromarray(sample.image).save(path, "png", pnginfo=info)


def origin_of(sample: Sample, pipeline: Pipeline) -> dict:
    """What an image was made from."""
    names = ("prompt", "seed", "index")
    return {n: getattr(sample, n) for n in names} | {"checkpoint": pipeline.identity}


def load_for(args: argparse.Namespace) -> Pipeline:
    """The checkpoint of the command line on its mesh."""
    from blip3o_jax import checkpoints, pipeline
    from blip3o_jax.kernels.platform import is_narrow
    from blip3o_jax.parallel import mesh

    size = args.batch_size
    require(size is None or size >= 1, f"--batch-size is at least 1, not {size}.")
    # A narrow model is faster with each core of a CPU as a device; --mesh decides otherwise.
    if not args.mesh and is_narrow(checkpoints.config_of(args.checkpoint)):
        mesh.split_cpu_into_devices(size or pipeline.CPU_BATCH)
    return pipeline.load(args.checkpoint, mesh=mesh.parse_mesh(args.mesh), batch_size=size)


def file_name(sample: Sample, number: int) -> str:
    """NUMBER-INDEX-words.png: sorts by prompt, and says what the image shows."""
    words = re.sub(r"[^a-z0-9]+", "-", sample.prompt.lower()).strip("-")[:60]
    return f"{number:05d}-{sample.index}-{words}.png"


def run(args: argparse.Namespace) -> None:
    """Writes OUT/NUMBER-INDEX-words.png and OUT/manifest.jsonl, or one image as OUT.png."""
    # All of the command line is checked before anything is loaded.
    one_way = bool(args.prompt) != bool(args.prompts)
    require(one_way, "Give prompts as arguments or --prompts FILE, one of the two.")
    prompts = args.prompt or read_prompts(args.prompts)
    for number, prompt in enumerate(prompts, 1):
        empty = f"Prompt {number} is empty; write what the image should show."
        require(bool(prompt.strip()), empty)
    require(args.num_images >= 1, f"--num-images is at least 1, not {args.num_images}.")
    settings, total = settings_of(args), len(prompts) * args.num_images
    # One image as a file.
    if args.out.endswith(".png"):
        several = f"{args.out} is one file, but you asked for {total} images; name a folder."
        require(total == 1, several)
        with new_file(args.out, args.overwrite) as path:
            pipeline = load_for(args)
            (sample,) = pipeline.samples(prompts, args.seed, 1, settings)
            save_png(path, sample, origin_of(sample, pipeline), settings)
        print(args.out)
        return
    # All images in a folder, with a manifest.
    from tqdm import tqdm

    with new_folder(args.out, marker="manifest.jsonl", overwrite=args.overwrite) as folder:
        pipeline = load_for(args)
        samples = pipeline.samples(prompts, args.seed, args.num_images, settings)
        with (folder / "manifest.jsonl").open("w", encoding="utf-8") as manifest:
            for number, sample in enumerate(tqdm(samples, total=total, unit="image")):
                name = file_name(sample, number // args.num_images)
                origin = origin_of(sample, pipeline)
                save_png(folder / name, sample, origin, settings)
                tokens = {"tokens": sample.tokens.tolist()}
                row = {"file": name} | origin | tokens | asdict(settings)
                manifest.write(json.dumps(row) + "\n")
    print(f"{total} images in {args.out}")
