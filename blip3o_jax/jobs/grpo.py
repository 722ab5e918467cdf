"""`blip3o-jax grpo`: config -> prompts and judge of the embedded world -> loop."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from blip3o_jax.errors import require
from blip3o_jax.jobs.options import run_options
from blip3o_jax.jobs.train import open_run, open_tokenizer

if TYPE_CHECKING:
    from blip3o_jax.train.config import TrainConfig

HELP = "reinforce the transformer by rewards; resumes if the workdir holds a checkpoint"

HELDOUT_SEED = 2  # of the prompts shown while training; the benchmark draws from seed 1

# Rewards of some prompts alone, and the share that draws those.
NEEDS = {"ocr": "text_fraction", "edit_done": "edits", "edit_kept": "edits"}


def options(parser: argparse.ArgumentParser) -> None:
    run_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Trains; prints the last held-out numbers as one JSON line."""
    import jax
    import numpy as np

    from blip3o_jax import checkpoints
    from blip3o_jax.data.feed import row_tokens
    from blip3o_jax.kernels.platform import enable_compilation_cache
    from blip3o_jax.rl.rewards.protocol import named
    from blip3o_jax.rl.rewards.scoring import scorer
    from blip3o_jax.rl.run import reinforced
    from blip3o_jax.scenes import edits, prompts
    from blip3o_jax.scenes.config import TAGS, WorldConfig
    from blip3o_jax.scenes.scene import compose
    from blip3o_jax.train import loop
    from blip3o_jax.train.workdir import own_workdir

    cfg = open_run(args.config, args.overrides, "grpo")
    one_process = jax.process_count() == 1
    require(one_process, "GRPO runs in one process; rewards are not yet gathered from several.")
    row_tokens(cfg.data, cfg.blip3o())  # refuses edits of a model that takes none
    text = open_tokenizer(cfg)
    # Prompts and edits of the embedded world: step after step, and those of the evaluation.
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

    heldout = [asked(unseen, i, "heldout") for i in range(min(64, cfg.batch_size))]

    # Each reward is asked once, so that one that cannot work is known before anything is written.
    section = cfg.grpo
    rewards = {name: named(name, section.reward_timeout) for name in names_of(cfg)}
    blank = np.zeros((1, *[cfg.blip3o().image_size] * 2, 3), np.uint8)
    with scorer(rewards, section.reward_timeout, section.watched) as score:
        score(blank, heldout[:1], pauses=False)()
        with own_workdir(cfg, args.workdir, args.allow) as folder:
            enable_compilation_cache()
            run = reinforced(cfg, prompts_at, heldout, text, score, checkpoints.load_part)
            result = loop.run(cfg, folder, run)
    print(json.dumps(result))


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
    for name in filter(NEEDS.get, names):
        is_drawn = getattr(cfg.data, NEEDS[name]) > 0
        sentence = f"The reward {name!r} has nothing to say of these prompts"
        require(is_drawn, f"{sentence}; set data.{NEEDS[name]} above 0.")
    return names
