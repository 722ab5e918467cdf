"""`blip3o-jax grpo`: config -> prompts and judge of the embedded world -> loop."""

import argparse
import dataclasses
import json

from blip3o_jax.errors import require
from blip3o_jax.jobs.options import run_options
from blip3o_jax.jobs.train import open_run, open_tokenizer

HELP = "reinforce the transformer by rewards; resumes if the workdir holds a checkpoint"

HELDOUT_SEED = 2  # of the prompts shown while training; the benchmark draws from seed 1


def options(parser: argparse.ArgumentParser) -> None:
    run_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Trains; prints the last held-out numbers as one JSON line."""
    import jax

    from blip3o_jax import checkpoints
    from blip3o_jax.data.feed import row_tokens
    from blip3o_jax.kernels.platform import enable_compilation_cache
    from blip3o_jax.rl.rewards import scene_rewards
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
    world = dataclasses.replace(cfg.data.world, text=0.0)
    unseen = WorldConfig(seed=HELDOUT_SEED, weights=dict.fromkeys(TAGS, 1.0))

    def asked(world: WorldConfig, index: int, split: str = "train") -> dict:
        # Edits at even distances.
        if int((index + 1) * share) == int(index * share):
            return prompts.sample(world, index, split)[0]
        edit = edits.sample(world, index, split)
        return {"prompt": edit.instruction, "source": compose(edit.before), "edit": edit}

    def prompts_at(step: int) -> list[dict]:
        return [asked(world, step * count + i) for i in range(count)]

    heldout = [asked(unseen, i, "heldout") for i in range(min(64, cfg.batch_size))]

    with own_workdir(cfg, args.workdir, args.allow) as folder:
        enable_compilation_cache()
        run = reinforced(cfg, prompts_at, heldout, text, scene_rewards, checkpoints.load_part)
        result = loop.run(cfg, folder, run)
    print(json.dumps(result))
