"""`blip3o-jax generate`: prompts -> PNG files with their origin inside, and a manifest."""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from blip3o_jax.errors import InputError, about, require
from blip3o_jax.jobs.options import model_options, option, settings_of
from blip3o_jax.jobs.output import new_file, new_folder

if TYPE_CHECKING:
    import numpy as np

    from blip3o_jax.pipeline import EditSample, Pipeline, Sample

    Result = tuple[str, dict, Sample | EditSample]  # file name, origin, image

HELP = "images from prompts"
MAX_PROMPT_FILE = 256 << 20  # bytes


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="*", metavar="PROMPT")
    formats = ".txt (a prompt a line), .jsonl or .csv (field `prompt`)"
    parser.add_argument("--prompts", metavar="FILE", help=formats)
    option(parser, "--num-images", 1, "images of each prompt")
    model_options(parser)
    parser.set_defaults(run=run)


def read_lines(path: str, what: str) -> list[str]:
    """Lines of a UTF-8 file of bounded size; InputError names it as `what`."""
    file = pathlib.Path(path)
    try:
        limit = f"{path} is larger than {MAX_PROMPT_FILE >> 20} MB."
        require(file.stat().st_size <= MAX_PROMPT_FILE, limit)
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"The {what} file {path} cannot be read: {reason}.") from error


def read_prompts(path: str) -> dict[str, str]:
    """Prompts, by where each stands, of a .txt (non-blank lines), .jsonl or .csv file (field or
    column `prompt`)."""
    lines, kind = read_lines(path, "prompts"), pathlib.Path(path).suffix
    numbered = {f"{path} line {n}": line for n, line in enumerate(lines, 1) if line.strip()}
    # The format by the file's name.
    if kind == ".txt":
        prompts = {where: line.strip() for where, line in numbered.items()}
    elif kind == ".jsonl":
        prompts = {where: _json_prompt(where, line) for where, line in numbered.items()}
    elif kind == ".csv":
        rows = csv.DictReader(lines)
        require("prompt" in (rows.fieldnames or ()), f"{path} has no column `prompt`.")
        prompts = {f"{path} line {rows.line_num}": row["prompt"] or "" for row in rows}
    else:
        raise InputError(f"{path}: a prompts file ends in .txt, .jsonl or .csv.")
    require(bool(prompts), f"{path} contains no prompts.")
    return prompts


def _json_prompt(where: str, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where} is not a JSON object with a field `prompt`.") from error
    require(isinstance(prompt, str), f"{where}: `prompt` is not text.")
    return prompt


def save_png(path: pathlib.Path, image: np.ndarray, origin: dict) -> None:
    """Writes an image with its origin as PNG text; what is not text as JSON."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in origin.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    Image.fromarray(image).save(path, "png", pnginfo=info)


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


def file_name(text: str, number: int, *more: int) -> str:
    """NUMBER-INDEX-words.png: sorts by prompt, and says what the image shows."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60]
    return "-".join([f"{number:05d}", *map(str, more), f"{words}.png"])


def run(args: argparse.Namespace) -> None:
    """Writes OUT/NUMBER-INDEX-words.png and OUT/manifest.jsonl, or one image as OUT.png."""
    from blip3o_jax import checkpoints

    # All of the command line, and every prompt, is checked before any weights are loaded.
    one_way = bool(args.prompt) != bool(args.prompts)
    require(one_way, "Give prompts as arguments or --prompts FILE, one of the two.")
    named = {f"Prompt {number}": prompt for number, prompt in enumerate(args.prompt, 1)}
    named = named or read_prompts(args.prompts)
    require(args.num_images >= 1, f"--num-images is at least 1, not {args.num_images}.")
    settings, text = settings_of(args), checkpoints.text_of(args.checkpoint)
    for where, prompt in named.items():
        with about(where):
            text.encode_prompt(prompt)
    prompts = list(named.values())

    def result(number: int, sample: Sample) -> Result:
        name = file_name(sample.prompt, number // args.num_images, sample.index)
        return name, {n: getattr(sample, n) for n in ("prompt", "seed", "index")}, sample

    def results(pipeline: Pipeline) -> Iterator[Result]:
        samples = pipeline.samples(prompts, args.seed, args.num_images, settings)
        return itertools.starmap(result, enumerate(samples))

    write(args, len(prompts) * args.num_images, asdict(settings), results)


def write(
    args: argparse.Namespace,
    total: int,
    settings: dict,
    results: Callable[[Pipeline], Iterator[Result]],
) -> None:
    """Loads the checkpoint and writes `total` results as OUT/NAME with OUT/manifest.jsonl, or one
    as OUT.png; masks beside them if --mask is given."""

    def save(
        path: pathlib.Path, mask: pathlib.Path, origin: dict, sample: Sample | EditSample
    ) -> None:
        save_png(path, sample.image, origin | {"settings": settings})
        if with_mask:
            save_png(mask, sample.mask, {})

    with_mask = getattr(args, "mask", False)
    # One image as a file.
    if args.out.endswith(".png"):
        several = f"{args.out} is one file, but you asked for {total} images; name a folder."
        require(total == 1, several)
        with contextlib.ExitStack() as stack:
            files = [args.out, mask_name(args.out)][: 1 + with_mask]
            paths = [stack.enter_context(new_file(file, args.overwrite)) for file in files]
            pipeline = load_for(args)
            ((_, origin, sample),) = results(pipeline)
            save(paths[0], paths[-1], origin | {"checkpoint": pipeline.identity}, sample)
        print(args.out)
        return
    # All images in a folder, with a manifest.
    from tqdm import tqdm

    with new_folder(args.out, marker="manifest.jsonl", overwrite=args.overwrite) as folder:
        pipeline = load_for(args)
        with (folder / "manifest.jsonl").open("w", encoding="utf-8") as manifest:
            for name, origin, sample in tqdm(results(pipeline), total=total, unit="image"):
                origin |= {"checkpoint": pipeline.identity}
                save(folder / name, folder / mask_name(name), origin, sample)
                tokens = {"tokens": sample.tokens.tolist()}
                row = {"file": name} | origin | tokens | settings
                manifest.write(json.dumps(row) + "\n")
    print(f"{total} images in {args.out}")


def mask_name(name: str) -> str:
    """The mask's file beside that of an image."""
    return f"{name.removesuffix('.png')}.mask.png"
