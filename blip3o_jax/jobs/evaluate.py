"""`blip3o-jax evaluate scenes`: a checkpoint's score, beside the judge's own and the ceilings."""

import argparse
import json
from dataclasses import asdict

from blip3o_jax.errors import require
from blip3o_jax.jobs.generate import load_for
from blip3o_jax.jobs.options import model_options, option, settings_of
from blip3o_jax.jobs.output import new_folder
from blip3o_jax.scenes.config import TAGS

HELP = "score a checkpoint; prints one JSON line last"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", choices=["scenes"])
    option(parser, "--num-prompts", 402, "held-out prompts, spread over the tags")
    option(parser, "--seeds", 2, "images of each prompt")
    model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Writes OUT/{result.json,images.jsonl,images.npz,sheet.png}; prints the result as JSON."""
    import numpy as np
    from PIL import Image
    from tqdm import tqdm

    from blip3o_jax.evaluate import scenes
    from blip3o_jax.evaluate.ceilings import ceilings
    from blip3o_jax.scenes import judge, scene

    enough = args.num_prompts >= len(TAGS) and args.seeds >= 1
    require(enough, f"--num-prompts is at least {len(TAGS)} and --seeds at least 1.")
    settings = settings_of(args)
    with new_folder(args.out, marker="result.json", overwrite=args.overwrite) as folder:
        # Images of the held-out prompts, and the true renders of their scenes.
        pipeline = load_for(args)
        metadata, worlds = zip(*scenes.heldout(args.num_prompts), strict=True)
        truth = np.stack([scene.compose(world) for world in worlds])
        sentences = [row["prompt"] for row in metadata]
        total = args.num_prompts * args.seeds
        samples = pipeline.samples(sentences, args.seed, args.seeds, settings)
        samples = list(tqdm(samples, total=total, unit="image"))
        images = np.stack([sample.image for sample in samples])
        # Scores of the images, of the judge itself, and of the ceilings.
        asked = [row for row in metadata for _ in range(args.seeds)]
        verdicts = judge.judge_batch(images, asked)
        pictures = {"judge_on_true_renders": truth}
        pictures |= ceilings(pipeline, sentences, truth, settings)
        result = {"checkpoint": pipeline.identity, "prompts": args.num_prompts, "seeds": args.seeds}
        result |= {"settings": asdict(settings), "scores": scenes.table(asked, verdicts)}
        for name, shown in pictures.items():
            result[name] = scenes.table(metadata, judge.judge_batch(shown, metadata))
        # What was judged, for people to look at.
        scenes.write_records(folder / "images.jsonl", asked, samples, verdicts)
        np.savez_compressed(folder / "images.npz", images=images)
        sheet = scenes.verdict_sheet(images, asked, verdicts)
        Image.fromarray(sheet).save(folder / "sheet.png")
        (folder / "result.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result))
