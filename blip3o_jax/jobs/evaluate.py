"""`blip3o-jax evaluate scenes`: held-out prompts of the embedded world, judged; beside them the
judge's own accuracy and the ceilings."""

import functools
import json
from dataclasses import asdict

import jax
import numpy as np

from blip3o_jax.errors import InputError
from blip3o_jax.jobs.generate import load_for, settings_of
from blip3o_jax.jobs.output import new_folder
from blip3o_jax.kernels.platform import jit
from blip3o_jax.parallel.batches import put_batch
from blip3o_jax.pipeline import Pipeline
from blip3o_jax.pixels import labelled_sheet, to_uint8, to_unit
from blip3o_jax.sample import generate, programs
from blip3o_jax.scenes import judge, prompts, scene
from blip3o_jax.scenes.config import TAGS, WorldConfig
from blip3o_jax.text import row_length

SHEET = 48  # pictures shown
DATA_SEED = 1  # of the held-out prompts; training draws from seed 0


def heldout(count: int) -> list[tuple[dict, scene.Scene]]:
    """`count` held-out prompts with a scene each, spread evenly over the six tags of GenEval."""
    worlds = [WorldConfig(seed=DATA_SEED, weights={tag: 1.0}) for tag in TAGS]
    return [prompts.sample(worlds[i % len(TAGS)], i, "heldout") for i in range(count)]


def table(metadata: list[dict], images: np.ndarray) -> dict[str, dict[str, float]]:
    """Shares of `correct` and `strict` by tag and over all, overall being the mean of the tags as
    in GenEval."""
    verdicts = judge.judge_batch(images, metadata)
    result = {}
    for rule in ("correct", "strict"):
        tags = {
            tag: [v[rule] for v, m in zip(verdicts, metadata, strict=True) if m["tag"] == tag]
            for tag in TAGS
        }
        rates = {tag: round(float(np.mean(values)), 4) for tag, values in tags.items() if values}
        result[rule] = {"overall": round(float(np.mean(list(rates.values()))), 4), **rates}
    return result


def ceilings(
    pipeline: Pipeline, metadata: list[dict], images: np.ndarray, settings
) -> dict[str, np.ndarray]:
    """Pictures of two shorter ways: the autoencoder alone, and the diffusion part fed the tokens of
    the true picture."""
    model, params, text = pipeline.model, pipeline.params, pipeline.text

    @jit
    def reconstruct(params, pixels):
        latents = model.dc_ae.apply({"params": params["dc_ae"]}, to_unit(pixels), method="encode")
        return to_uint8(model.dc_ae.apply({"params": params["dc_ae"]}, latents, method="decode"))

    read = jit(functools.partial(generate.read_tokens, model), model.config)
    _, draw = programs.programs(model)
    chosen = {
        name: getattr(settings, name) for name in ("num_inference_steps", "guidance_scale", "shift")
    }
    made = {"autoencoder": [], "true_tokens": []}
    size = pipeline.batch_size
    codes = np.zeros((len(metadata), model.config.ta_tok.num_tokens), np.int32)
    encoded = [text.encode_prompt(m["prompt"]) for m in metadata]
    rows, start = text.training_rows(encoded, codes, row_length(model.config))
    for first in range(0, len(images), size):
        index = np.minimum(np.arange(first, first + size), len(images) - 1)
        keep = min(size, len(images) - first)
        numbers = np.array(
            [generate.sample_key(0, metadata[i]["prompt"], 0) for i in index], np.uint32
        )
        *inputs, numbers = put_batch(
            (images[index], rows[index], start[index], numbers), pipeline.mesh
        )
        with jax.set_mesh(pipeline.mesh):
            made["autoencoder"].append(np.asarray(reconstruct(params, inputs[0]))[:keep])
            out = draw(params, read(params, *inputs), numbers, **chosen)
            made["true_tokens"].append(np.asarray(out)[:keep])
    return {name: np.concatenate(parts) for name, parts in made.items()}


def run(args) -> None:
    """Writes OUT/{result.json,images.jsonl,images.npz,sheet.png} and prints the result as one JSON
    line."""
    if args.num_prompts < len(TAGS) or args.seeds < 1:
        raise InputError(f"--num-prompts is at least {len(TAGS)} and --seeds at least 1.")
    from PIL import Image
    from tqdm import tqdm

    settings = settings_of(args)
    with new_folder(args.out, marker="result.json", overwrite=args.overwrite) as folder:
        pipeline = load_for(args)
        metadata, scenes = zip(*heldout(args.num_prompts), strict=True)
        truth = np.stack([scene.compose(s) for s in scenes])
        samples = pipeline.samples([m["prompt"] for m in metadata], args.seed, args.seeds, settings)
        samples = list(tqdm(samples, total=args.num_prompts * args.seeds, unit="image"))
        asked = [m for m in metadata for _ in range(args.seeds)]
        images = np.stack([s.image for s in samples])
        result = {
            "checkpoint": pipeline.identity,
            "prompts": args.num_prompts,
            "seeds": args.seeds,
            "settings": asdict(settings),
            "scores": table(asked, images),
            "judge_on_true_renders": table(metadata, truth),
        }
        for name, pictures in ceilings(pipeline, metadata, truth, settings).items():
            result[name] = table(metadata, pictures)
        verdicts = judge.judge_batch(images, asked)
        with (folder / "images.jsonl").open("w", encoding="utf-8") as file:
            for m, s, v in zip(asked, samples, verdicts, strict=True):
                kept = {k: v[k] for k in ("correct", "strict", "score", "reason")}
                file.write(json.dumps({**m, "index": s.index, "seed": s.seed, **kept}) + "\n")
        np.savez_compressed(folder / "images.npz", images=images)
        Image.fromarray(verdict_sheet(images, asked, verdicts)).save(folder / "sheet.png")
        (folder / "result.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result))


def verdict_sheet(images: np.ndarray, metadata: list[dict], verdicts: list[dict]) -> np.ndarray:
    """`SHEET` pictures spread over all, twice as large, each above its prompt and a sign:

    - `+` right, and nothing else in the picture;
    - `o` right by GenEval's rules;
    - `-` wrong.
    """
    step = max(1, len(images) // SHEET) | 1  # odd, so that all tags and seeds are shown
    shown = [i * step % len(images) for i in range(min(SHEET, len(images)))]
    signs = ["+" if v["strict"] else "o" if v["correct"] else "-" for v in verdicts]
    labels = [f"{signs[i]} {metadata[i]['prompt']}" for i in shown]
    return labelled_sheet(images[shown], labels)
