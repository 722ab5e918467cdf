"""`blip3o-jax evaluate scenes`, `edits` and `drift`: a checkpoint's score, the judge's own and the
ceilings; official benchmarks are in jobs/benchmarks.py."""

import argparse
import json
from dataclasses import asdict

from blip3o_jax.errors import require
from blip3o_jax.jobs import benchmarks as official
from blip3o_jax.jobs.edit import keep_option, levels_to_keep
from blip3o_jax.jobs.options import load_for, model_options, option, settings_of
from blip3o_jax.jobs.output import new_folder
from blip3o_jax.sample.settings import EditSettings, Settings
from blip3o_jax.scenes.config import TAGS

HELP = "score a checkpoint; or write images for an official scorer and read its results"


def options(parser: argparse.ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    scenes = benchmarks.add_parser("scenes", help="held-out prompts, GenEval's rules")
    option(scenes, "--num-prompts", 402, "held-out prompts, of GenEval's tags; more of others")
    edits = benchmarks.add_parser("edits", help="held-out edits: done, and nothing else changed")
    option(edits, "--num-edits", 300, "held-out edits, spread over the kinds")
    drift = benchmarks.add_parser("drift", help="what edit after edit leaves of a picture")
    option(drift, "--num-pictures", 48, "pictures that are edited again and again")
    option(drift, "--turns", 5, "edits of each")
    keep_option(edits)
    for job in (scenes, edits):
        option(job, "--seeds", 2, "images of each")
    runs = (scenes, Settings, run_scenes), (edits, EditSettings, run_edits)
    for job, settings, run in (*runs, (drift, EditSettings, run_drift)):
        model_options(job, settings)
        job.set_defaults(run=run)
    official.options(benchmarks)


def run_scenes(args: argparse.Namespace) -> None:
    """Writes OUT/{result.json,images.jsonl,images.npz,sheet.png}; prints the result as a table
    and as JSON."""
    import numpy as np
    from PIL import Image
    from tqdm import tqdm

    from blip3o_jax.evaluate import scenes
    from blip3o_jax.evaluate.ceilings import ceilings
    from blip3o_jax.evaluate.tables import table
    from blip3o_jax.parallel.processes import require_alone
    from blip3o_jax.request import Request, repeated
    from blip3o_jax.scenes import judge, scene

    require_alone("evaluate")
    enough = args.num_prompts >= len(TAGS) and args.seeds >= 1
    require(enough, f"--num-prompts is at least {len(TAGS)} and --seeds at least 1.")
    settings = settings_of(args)
    with new_folder(args.out, marker="result.json", overwrite=args.overwrite) as folder:
        # Images of the held-out prompts, and the true renders of their scenes.
        pipeline = load_for(args)
        metadata, worlds = zip(*scenes.heldout(args.num_prompts), strict=True)
        truth = np.stack([scene.compose(world) for world in worlds])
        sentences = [row["prompt"] for row in metadata]
        total = len(sentences) * args.seeds
        requests = [Request(text, seed=args.seed, settings=settings) for text in sentences]
        samples = pipeline.run(repeated(requests, args.seeds))
        samples = list(tqdm(samples, total=total, unit="image"))
        images = np.stack([sample.image for sample in samples])
        # Scores of the images, of the judge itself, and of the ceilings.
        asked = [row for row in metadata for _ in range(args.seeds)]
        verdicts = judge.judge_batch(images, asked)
        pictures = {"judge_on_true_renders": truth}
        pictures |= ceilings(pipeline, sentences, truth, settings)
        result = {"checkpoint": pipeline.identity, "prompts": len(sentences), "seeds": args.seeds}
        result |= {"settings": asdict(settings), "scores": scenes.table(asked, verdicts)}
        for name, shown in pictures.items():
            result[name] = scenes.table(metadata, judge.judge_batch(shown, metadata))
        # What was judged, for people to look at.
        scenes.write_records(folder / "images.jsonl", asked, samples, verdicts)
        np.savez_compressed(folder / "images.npz", images=images)
        sheet = scenes.verdict_sheet(images, asked, verdicts)
        Image.fromarray(sheet).save(folder / "sheet.png")
        (folder / "result.json").write_text(json.dumps(result, indent=1))
    judged = {name: result[name] for name in ("scores", *pictures)}
    rows = {f"{x}, {rule}": row for x, rules in judged.items() for rule, row in rules.items()}
    print(table(rows))
    print(json.dumps(result))


def run_edits(args: argparse.Namespace) -> None:
    """Writes OUT/{result.json,images.jsonl,images.npz,sheet.png}; prints the result as a table
    and as JSON."""
    import numpy as np
    from PIL import Image
    from tqdm import tqdm

    from blip3o_jax import checkpoints
    from blip3o_jax.evaluate import edits as measures
    from blip3o_jax.evaluate.ceilings import autoencoded
    from blip3o_jax.evaluate.tables import table
    from blip3o_jax.parallel.processes import require_alone
    from blip3o_jax.request import Request, repeated
    from blip3o_jax.scenes.judge import judge_edit

    require_alone("evaluate")
    enough = args.num_edits >= len(measures.KINDS) and args.seeds >= 1
    require(enough, f"--num-edits is at least {len(measures.KINDS)} and --seeds at least 1.")
    checkpoints.config_of(args.checkpoint).check_sources(1)
    settings, levels = settings_of(args, EditSettings), levels_to_keep(args)
    with new_folder(args.out, marker="result.json", overwrite=args.overwrite) as folder:
        # Edits of the held-out scenes, and what the autoencoder makes of the true results.
        pipeline = load_for(args)
        edits = measures.heldout(args.num_edits)
        before, after = measures.pictures(edits)
        how = {"seed": args.seed, "settings": settings, "keep_unchanged": levels}
        requests = [
            Request(edit.instruction, (source,), **how)
            for edit, source in zip(edits, before, strict=True)
        ]
        samples = pipeline.run(repeated(requests, args.seeds))
        samples = list(tqdm(samples, total=len(edits) * args.seeds, unit="image"))
        images = np.stack([sample.image for sample in samples])
        truth = autoencoded(pipeline, after)
        # Verdicts and measures of the results, and of the round trip alone.
        asked = [edit for edit in edits for _ in range(args.seeds)]
        rows = [(image, edit) for image, edit in zip(images, asked, strict=True)]
        verdicts = [judge_edit(*row) for row in rows]
        measured = [measures.measure(*row) for row in rows]
        pairs = list(zip(truth, edits, strict=True))
        ceiling = [measures.measure(*pair)["psnr"] for pair in pairs]
        psnrs, shifts = ([row[name] for row in measured] for name in ("psnr", "shift"))
        roundtrips = np.repeat(ceiling, args.seeds)
        result = {"checkpoint": pipeline.identity, "edits": len(edits), "seeds": args.seeds}
        result |= {"settings": asdict(settings), "keep_unchanged": levels}
        result["scores"] = measures.table(asked, verdicts, psnrs, roundtrips, shifts)
        judged = {"judge_on_true_renders": zip(after, edits, strict=True), "autoencoder": pairs}
        for name, shown in judged.items():
            right = [judge_edit(*pair)["success"] for pair in shown]
            result[name] = round(float(np.mean(right)), 4)
        # What was judged, for people to look at.
        seeds = [sample.seed for sample in samples]
        measures.write_records(folder / "images.jsonl", asked, seeds, verdicts, measured)
        np.savez_compressed(folder / "images.npz", images=images)
        Image.fromarray(measures.sheet(images, asked, verdicts)).save(folder / "sheet.png")
        (folder / "result.json").write_text(json.dumps(result, indent=1))
    columns = result["scores"]
    rows = {x: {kind: row[x] for kind, row in columns.items()} for x in columns["overall"]}
    print(table(rows | {f"success, {name}": {"overall": result[name]} for name in judged}))
    print(json.dumps(result))


def run_drift(args: argparse.Namespace) -> None:
    """Writes OUT/{result.json,sheet.png}; prints the result as a table and as JSON."""
    import numpy as np
    from PIL import Image
    from tqdm import tqdm

    from blip3o_jax import checkpoints
    from blip3o_jax.evaluate import edits as measures
    from blip3o_jax.evaluate.tables import table
    from blip3o_jax.parallel.processes import require_alone
    from blip3o_jax.request import Request
    from blip3o_jax.scenes.scene import compose

    require_alone("evaluate")
    enough = min(args.num_pictures, args.turns) >= 1
    require(enough, "--num-pictures and --turns are at least 1.")
    checkpoints.config_of(args.checkpoint).check_sources(1)
    settings = settings_of(args, EditSettings)
    with new_folder(args.out, marker="result.json", overwrite=args.overwrite) as folder:
        # Each picture edited turn by turn.
        pipeline = load_for(args)
        chains = measures.heldout_chains(args.num_pictures, args.turns)
        first = [compose(chain[0].before) for chain in chains]
        how = {"seed": args.seed, "settings": settings}
        turns = [[edit.instruction for edit in chain] for chain in chains]
        requests = [
            Request(texts[0], (source,), tuple(texts[1:]), **how)
            for source, texts in zip(first, turns, strict=True)
        ]
        samples = pipeline.run(requests)
        total = args.num_pictures * args.turns
        images = np.stack([sample.image for sample in tqdm(samples, total=total, unit="image")])
        images = images.reshape(len(chains), args.turns, *images.shape[1:])
        result = {"checkpoint": pipeline.identity, "pictures": len(chains)}
        result |= {"settings": asdict(settings), "turns": measures.drift(images, chains)}
        # What was measured, for people to look at: a row a picture.
        Image.fromarray(measures.drift_sheet(images, chains)).save(folder / "sheet.png")
        (folder / "result.json").write_text(json.dumps(result, indent=1))
    columns = {f"turn_{row['turn']}": row for row in result["turns"]}
    print(table({x: {turn: row[x] for turn, row in columns.items()} for x in ("success", "psnr")}))
    print(json.dumps(result))
