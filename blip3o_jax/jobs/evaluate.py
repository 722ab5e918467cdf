"""`blip3o-jax evaluate scenes`, `edits` and `drift`: a checkpoint's score, the judge's own and the
ceilings; official benchmarks are in jobs/benchmarks.py."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from blip3o_jax import paths
from blip3o_jax.errors import require
from blip3o_jax.jobs import benchmarks as official
from blip3o_jax.jobs import ledger, whole
from blip3o_jax.jobs.edit import keep_option, levels_to_keep
from blip3o_jax.jobs.options import model_options, option, settings_of, share_option
from blip3o_jax.origin import encode_image
from blip3o_jax.sample.settings import EditSettings, Settings
from blip3o_jax.scenes.config import TAGS

if TYPE_CHECKING:
    import numpy as np

HELP = "score a checkpoint; or write images for an official scorer and read its results"


def options(parser: argparse.ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    scenes = benchmarks.add_parser("scenes", help="held-out prompts, GenEval's rules")
    option(scenes, "--num-prompts", 402, "held-out prompts of GenEval's tags; others are added")
    option(scenes, "--num-words", 0, "further prompts, each for a written word")
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
        share_option(job)
        job.set_defaults(run=run)
    official.options(benchmarks)


def run_scenes(args: argparse.Namespace) -> None:
    """Makes OUT/images as a job, then writes OUT/{sheet.png,images.jsonl,result.json}; prints the
    result as a table and as JSON."""
    import numpy as np

    from blip3o_jax import checkpoints
    from blip3o_jax.evaluate import scenes
    from blip3o_jax.evaluate.ceilings import ceilings
    from blip3o_jax.evaluate.tables import table
    from blip3o_jax.request import Request, repeated
    from blip3o_jax.scenes import judge, scene

    enough = args.num_prompts >= len(TAGS) and args.num_words >= 0 and args.seeds >= 1
    least = f"--num-prompts is at least {len(TAGS)}, --num-words 0 and --seeds 1."
    require(enough, least)
    size = checkpoints.config_of(args.checkpoint).image_size
    other = f"{args.checkpoint} makes images of {size} px, and the judge looks at {scene.SIZE} px."
    require(size == scene.SIZE, other)
    settings = settings_of(args)
    # Images of the held-out prompts, and the true renders of their scenes.
    metadata, worlds = zip(*scenes.heldout(args.num_prompts, args.num_words), strict=True)
    sentences = [row["prompt"] for row in metadata]
    requests = [Request(text, seed=args.seed, settings=settings) for text in sentences]
    facts = {"command": "evaluate scenes", "seeds": args.seeds, "seed": args.seed}
    facts |= asdict(settings)
    made = whole.score(args, repeated(requests, args.seeds), facts, args.seeds)
    if made is None:
        return
    pipeline, samples = made
    images = np.stack([sample.image for sample in samples])
    truth = np.stack([scene.compose(world) for world in worlds])
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
    sheet = scenes.verdict_sheet(images, asked, verdicts)
    records = scenes.records(asked, samples, verdicts)
    write_results(args, result, sheet, records)
    judged = {name: result[name] for name in ("scores", *pictures)}
    rows = {f"{x}, {rule}": row for x, rules in judged.items() for rule, row in rules.items()}
    print(table(rows))
    print(json.dumps(result))


def write_results(
    args: argparse.Namespace, result: dict, sheet: np.ndarray, records: list[dict] | None = None
) -> None:
    """Writes what is known of the images in OUT, the result last."""
    folder = paths.path(args.out)
    ledger.write_whole(folder, "sheet.png", [encode_image(sheet, {})])
    if records:
        lines = ((json.dumps(row) + "\n").encode() for row in records)
        ledger.write_whole(folder, "images.jsonl", lines)
    # Last: what is there has all of the rest beside it.
    ledger.write_whole(folder, "result.json", [json.dumps(result, indent=1).encode()])


def run_edits(args: argparse.Namespace) -> None:
    """As `run_scenes`, of edits."""
    import numpy as np

    from blip3o_jax import checkpoints
    from blip3o_jax.evaluate import edits as measures
    from blip3o_jax.evaluate.ceilings import autoencoded
    from blip3o_jax.evaluate.tables import table
    from blip3o_jax.request import Request, repeated
    from blip3o_jax.scenes.judge import judge_edit

    enough = args.num_edits >= len(measures.KINDS) and args.seeds >= 1
    require(enough, f"--num-edits is at least {len(measures.KINDS)} and --seeds at least 1.")
    checkpoints.config_of(args.checkpoint).check_sources(1)
    settings, levels = settings_of(args, EditSettings), levels_to_keep(args)
    # Edits of the held-out scenes, and what the autoencoder makes of the true results.
    edits = measures.heldout(args.num_edits)
    before, after = measures.pictures(edits)
    how = {"seed": args.seed, "settings": settings, "keep_unchanged": levels}
    requests = [
        Request(edit.instruction, (source,), **how)
        for edit, source in zip(edits, before, strict=True)
    ]
    facts = {"command": "evaluate edits", "seeds": args.seeds, "seed": args.seed}
    facts |= {"keep_unchanged": levels, **asdict(settings)}
    made = whole.score(args, repeated(requests, args.seeds), facts, args.seeds)
    if made is None:
        return
    pipeline, samples = made
    truth = autoencoded(pipeline, after)
    # Verdicts and measures of the results, and of the round trip alone.
    images = np.stack([sample.image for sample in samples])
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
    records = measures.records(asked, [sample.seed for sample in samples], verdicts, measured)
    write_results(args, result, measures.sheet(images, asked, verdicts), records)
    columns = result["scores"]
    rows = {x: {kind: row[x] for kind, row in columns.items()} for x in columns["overall"]}
    print(table(rows | {f"success, {name}": {"overall": result[name]} for name in judged}))
    print(json.dumps(result))


def run_drift(args: argparse.Namespace) -> None:
    """As `run_scenes`, of edits one after the other."""
    import numpy as np

    from blip3o_jax import checkpoints
    from blip3o_jax.evaluate import edits as measures
    from blip3o_jax.evaluate.tables import table
    from blip3o_jax.request import Request
    from blip3o_jax.scenes.scene import compose

    enough = min(args.num_pictures, args.turns) >= 1
    require(enough, "--num-pictures and --turns are at least 1.")
    checkpoints.config_of(args.checkpoint).check_sources(1)
    settings = settings_of(args, EditSettings)
    # Each picture edited turn by turn.
    chains = measures.heldout_chains(args.num_pictures, args.turns)
    first = [compose(chain[0].before) for chain in chains]
    how = {"seed": args.seed, "settings": settings}
    turns = [[edit.instruction for edit in chain] for chain in chains]
    requests = [
        Request(texts[0], (source,), tuple(texts[1:]), **how)
        for source, texts in zip(first, turns, strict=True)
    ]
    facts = {"command": "evaluate drift", "turns": args.turns, "seed": args.seed}
    made = whole.score(args, requests, facts | asdict(settings), 1)
    if made is None:
        return
    pipeline, samples = made
    images = np.stack([sample.image for sample in samples])
    images = images.reshape(len(chains), args.turns, *images.shape[1:])
    result = {"checkpoint": pipeline.identity, "pictures": len(chains)}
    result |= {"settings": asdict(settings), "turns": measures.drift(images, chains)}
    # What was measured, for people to look at: a row a picture.
    write_results(args, result, measures.drift_sheet(images, chains))
    columns = {f"turn_{row['turn']}": row for row in result["turns"]}
    print(table({x: {turn: row[x] for turn, row in columns.items()} for x in ("success", "psnr")}))
    print(json.dumps(result))
