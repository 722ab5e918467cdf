"""`blip3o-jax grpo`: config -> prompts and judge of the embedded world -> loop."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from blip3o_jax.errors import about, require
from blip3o_jax.jobs.options import run_options
from blip3o_jax.jobs.train import open_run, open_tokenizer

if TYPE_CHECKING:
    from blip3o_jax.paths import AnyPath
    from blip3o_jax.text import Text
    from blip3o_jax.train.config import TrainConfig

HELP = "reinforce a model by rewards; resumes if the workdir holds a checkpoint"

HELDOUT_SEED = 2  # of the prompts shown while training; the benchmark draws from seed 1
HELDOUT = 64  # of them at most, of a batch

# Rewards of some prompts alone, and the share that draws those.
NEEDS = {"ocr": "text_fraction", "edit_done": "edits", "edit_kept": "edits"}


def options(parser: argparse.ArgumentParser) -> None:
    run_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Trains; prints the last held-out numbers as one JSON line."""
    import numpy as np

    from blip3o_jax import checkpoints
    from blip3o_jax.data.feed import row_tokens
    from blip3o_jax.kernels.platform import enable_compilation_cache
    from blip3o_jax.parallel.processes import is_process_zero, process_zero_first
    from blip3o_jax.rl.rewards.protocol import named
    from blip3o_jax.rl.rewards.scoring import scorer
    from blip3o_jax.rl.run import reinforced
    from blip3o_jax.train import loop
    from blip3o_jax.train.workdir import own_workdir

    cfg = open_run(args.config, args.overrides, "grpo")
    row_tokens(cfg.data, cfg.blip3o())  # refuses edits of a model that takes none
    text = open_tokenizer(cfg)
    names = names_of(cfg)
    prompts_at, heldout = of_file(cfg, text, names) if cfg.data.prompts else of_world(cfg)

    # Each reward is asked once, so that one that cannot work is known before anything is written.
    section = cfg.grpo
    rewards = {name: named(name, section.reward_timeout) for name in names}
    blank = np.zeros((1, *[cfg.blip3o().image_size] * 2, 3), np.uint8)
    with scorer(rewards, section.reward_timeout, section.watched) as score:
        score(blank, heldout[:1], pauses=False)()
        with own_workdir(cfg, args.workdir, args.allow) as folder:
            with process_zero_first("the first weights"):
                keep_identities(folder, cfg)
            enable_compilation_cache()
            run = reinforced(cfg, prompts_at, heldout, text, score, checkpoints.load_part)
            result = loop.run(cfg, folder, run)
    if is_process_zero():
        print(json.dumps(result))


def keep_identities(folder: AnyPath, cfg: TrainConfig) -> None:
    """Keeps in a workdir which weights its run began with: they are read again when it resumes, for
    its divergence from them. InputError where they are others by then."""
    from blip3o_jax import checkpoints, paths
    from blip3o_jax.files import json_object

    parts = [part for part in cfg.trained_parts if part != "qwen3" or cfg.grpo.beta]
    here = {x: checkpoints.open(cfg.init[x]).identity for x in parts if x in cfg.init}
    file = folder / "init.json"
    if not file.is_file():
        paths.write_text(file, json.dumps(here))
    there = json_object(str(file), file.read_bytes())
    for part, identity in here.items():
        began = there.get(part, identity)
        sentence = f"init.{part}: the run in {folder} began with {began}, and {cfg.init[part]} is"
        fix = "name the first, as WORKDIR@STEP, or take a new workdir"
        require(began == identity, f"{sentence} {identity}; {fix}.")


def names_of(cfg: TrainConfig) -> tuple[str, ...]:
    """The rewards of a run and those that it watches; InputError for one that its prompts cannot
    have, or that is of no other kind."""
    from blip3o_jax.rl.rewards.scoring import asked_as

    rewarded = {asked_as(name): name for name in cfg.grpo.rewards}
    for name in cfg.grpo.watched:
        same = rewarded.get(asked_as(name))
        sentence = f"grpo.watched: {name!r} is not independent of the reward {same!r}"
        require(same is None, f"{sentence}; name a judge of another kind.")
    names = *cfg.grpo.rewards, *cfg.grpo.watched
    for name in () if cfg.data.prompts else filter(NEEDS.get, names):
        is_drawn = getattr(cfg.data, NEEDS[name]) > 0
        sentence = f"The reward {name!r} has nothing to say of these prompts"
        require(is_drawn, f"{sentence}; set data.{NEEDS[name]} above 0.")
    return names


EDITS_OWN = {"source", "edit"}  # metadata of the embedded world's edits
Prompts = tuple[Callable[[int], list[dict]], list[dict]]  # of the update after a step; held out


def of_world(cfg: TrainConfig) -> Prompts:
    """Prompts and edits of the embedded world; those held out of combinations never trained on."""
    from blip3o_jax.scenes import edits, prompts
    from blip3o_jax.scenes.config import TAGS, WorldConfig
    from blip3o_jax.scenes.scene import compose

    count, share = cfg.batch_size // cfg.grpo.num_generations, cfg.data.edits
    world, equal = cfg.data.world, dict.fromkeys(TAGS, 1.0)
    unseen = WorldConfig(seed=HELDOUT_SEED, weights=equal, text=world.text)

    def asked(world: WorldConfig, index: int, split: str = "train") -> dict:
        # Edits at even distances.
        if int((index + 1) * share) == int(index * share):
            return prompts.sample(world, index, split)[0]
        edit = edits.sample(world, index, split)
        return {"prompt": edit.instruction, "source": compose(edit.before), "edit": edit}

    def prompts_at(step: int) -> list[dict]:
        return [asked(world, step * count + i) for i in range(count)]

    return prompts_at, [asked(unseen, i, "heldout") for i in range(min(HELDOUT, cfg.batch_size))]


def of_file(cfg: TrainConfig, text: Text, rewards: Sequence[str]) -> Prompts:
    """The prompts of a file, each with its other fields: all once, in an order of each epoch's own;
    a tenth, `HELDOUT` at most, is held out. InputError for one that is too long, or that a reward
    cannot judge."""
    import numpy as np

    from blip3o_jax.data.feed import row_tokens
    from blip3o_jax.jobs.prompts import read_prompts
    from blip3o_jax.rl.rewards.protocol import check_asked

    # What a line is asked for is known before the run.
    path, rows, model = cfg.data.prompts, read_prompts(cfg.data.prompts), cfg.blip3o()
    codes, length = np.zeros((1, model.ta_tok.num_tokens), int), row_tokens(cfg.data, model)
    for row in rows:
        with about(row.where):
            text.training_rows([text.encode_prompt(row.text)], codes, length)
            own = sorted(EDITS_OWN & row.fields.keys())
            require(not own, f"`{''.join(own[:1])}` is what edits have here; give it another name.")
            for name in rewards:
                check_asked(name, row.text, row.fields)
    few = (
        f"{path} has {len(rows)} prompts; one is held out, and at least one to train on is needed."
    )
    require(len(rows) > 1, few)
    asked = [row.fields | {"prompt": row.text} for row in rows]
    count, seed = cfg.batch_size // cfg.grpo.num_generations, cfg.data.seed

    @functools.lru_cache(maxsize=2)
    def shuffled(size: int, epoch: int) -> np.ndarray:
        key = np.random.Philox(key=seed, counter=[0, 0, 0, epoch])
        return np.random.Generator(key).permutation(size)

    # Epochs are counted from 1; order 0 says which are held out.
    order = shuffled(len(asked), 0)
    held = min(HELDOUT, cfg.batch_size, max(1, len(asked) // 10))
    heldout, trained = order[:held], order[held:]

    def prompts_at(step: int) -> list[dict]:
        places = range(step * count, (step + 1) * count)
        turns = (divmod(place, len(trained)) for place in places)
        return [asked[trained[shuffled(len(trained), 1 + epoch)[i]]] for epoch, i in turns]

    return prompts_at, [asked[i] for i in heldout]
