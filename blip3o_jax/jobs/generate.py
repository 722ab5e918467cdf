"""`blip3o-jax generate`: prompts -> PNG files with their origin inside, and a manifest."""

import csv
import json
import pathlib
import re
from dataclasses import asdict

from blip3o_jax.errors import InputError
from blip3o_jax.jobs.output import new_file, new_folder
from blip3o_jax.kernels.platform import is_narrow
from blip3o_jax.parallel.mesh import parse_mesh, split_cpu_into_devices
from blip3o_jax.pipeline import CPU_BATCH, Pipeline, Sample, config_of, find_checkpoint, load
from blip3o_jax.sample.settings import Settings

MAX_PROMPT_FILE = 256 << 20  # bytes


def read_prompts(path: str) -> list[str]:
    """Prompts of a .txt (one a line; blank lines are not prompts), .jsonl or .csv file (field or
    column `prompt`), in order."""
    file = pathlib.Path(path)
    try:
        if file.stat().st_size > MAX_PROMPT_FILE:
            raise InputError(f"{path} is larger than {MAX_PROMPT_FILE >> 20} MB.")
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"The prompts file {path} cannot be read: "
            f"{getattr(error, 'strerror', None) or 'it is not UTF-8 text'}."
        ) from error
    if file.suffix == ".txt":
        prompts = [line.strip() for line in lines if line.strip()]
    elif file.suffix == ".jsonl":
        prompts = [
            _json_prompt(path, number, line) for number, line in enumerate(lines, 1) if line.strip()
        ]
    elif file.suffix == ".csv":
        rows = csv.DictReader(lines)
        if "prompt" not in (rows.fieldnames or ()):
            raise InputError(f"{path} has no column `prompt`.")
        prompts = [row["prompt"] or "" for row in rows]
    else:
        raise InputError(f"{path}: a prompts file ends in .txt, .jsonl or .csv.")
    if not prompts:
        raise InputError(f"{path} holds no prompts.")
    return prompts


def _json_prompt(path: str, number: int, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} line {number} is not a JSON object with a field `prompt`."
        ) from error
    if not isinstance(prompt, str):
        raise InputError(f"{path} line {number}: `prompt` is not text.")
    return prompt


def save_png(path: pathlib.Path, sample: Sample, pipeline: Pipeline, settings: Settings) -> None:
    """The image with prompt, seed, index, checkpoint and settings as PNG text."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    origin = {
        "prompt": sample.prompt,
        "seed": sample.seed,
        "index": sample.index,
        "checkpoint": pipeline.identity,
    }
    for key, value in (origin | {"settings": json.dumps(asdict(settings))}).items():
        info.add_itxt(key, str(value))
    Image.fromarray(sample.image).save(path, "png", pnginfo=info)


def settings_of(args) -> Settings:
    """The sampling options of the command line."""
    names = ("num_inference_steps", "guidance_scale", "top_k", "top_p", "temperature", "shift")
    return Settings(**{name: getattr(args, name) for name in names})


def load_for(args) -> Pipeline:
    """The checkpoint of the command line on its mesh; a narrow model on a CPU has a device on each
    core, unless told otherwise."""
    if args.batch_size is not None and args.batch_size < 1:
        raise InputError(f"--batch-size is at least 1, not {args.batch_size}.")
    if not args.mesh and is_narrow(config_of(find_checkpoint(args.checkpoint))):
        split_cpu_into_devices(args.batch_size or CPU_BATCH)
    return load(args.checkpoint, mesh=parse_mesh(args.mesh), batch_size=args.batch_size)


def file_name(sample: Sample, number: int) -> str:
    """NUMBER-INDEX-words.png: sorts by prompt, and says what it shows."""
    words = re.sub(r"[^a-z0-9]+", "-", sample.prompt.lower()).strip("-")[:60]
    return f"{number:05d}-{sample.index}-{words}.png"


def run(args) -> None:
    """Writes OUT/NUMBER-INDEX-words.png and OUT/manifest.jsonl, a line an image; or one image as
    OUT.png."""
    from tqdm import tqdm

    if bool(args.prompt) == bool(args.prompts):
        raise InputError("Give prompts as arguments or --prompts FILE, one of the two.")
    prompts = args.prompt or read_prompts(args.prompts)
    if blank := [number for number, prompt in enumerate(prompts, 1) if not prompt.strip()]:
        raise InputError(f"Prompt {blank[0]} is empty; write what the image should show.")
    if args.num_images < 1:
        raise InputError(f"--num-images is at least 1, not {args.num_images}.")
    settings = settings_of(args)
    total = len(prompts) * args.num_images
    if args.out.endswith(".png"):
        if total != 1:
            raise InputError(
                f"{args.out} is one file, and {total} images are asked for; name a folder."
            )
        with new_file(args.out, args.overwrite) as path:
            pipeline = load_for(args)
            (sample,) = pipeline.samples(prompts, args.seed, 1, settings)
            save_png(path, sample, pipeline, settings)
        print(args.out)
        return
    with new_folder(args.out, marker="manifest.jsonl", overwrite=args.overwrite) as folder:
        pipeline = load_for(args)
        samples = pipeline.samples(prompts, args.seed, args.num_images, settings)
        with (folder / "manifest.jsonl").open("w", encoding="utf-8") as manifest:
            for number, sample in enumerate(tqdm(samples, total=total, unit="image")):
                name = file_name(sample, number // args.num_images)
                save_png(folder / name, sample, pipeline, settings)
                origin = {
                    "file": name,
                    "prompt": sample.prompt,
                    "seed": sample.seed,
                    "index": sample.index,
                }
                line = origin | {
                    "checkpoint": pipeline.identity,
                    "tokens": sample.tokens.tolist(),
                    **asdict(settings),
                }
                manifest.write(json.dumps(line) + "\n")
    print(f"{total} images in {args.out}")
