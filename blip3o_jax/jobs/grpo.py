"""`blip3o-jax grpo`: config file -> checked config -> prompts and judge of the embedded world ->
loop."""

import argparse
import dataclasses
import json

from blip3o_jax.errors import InputError
from blip3o_jax.jobs.options import config_option
from blip3o_jax.jobs.train import open_tokenizer, own_workdir, read_config

HELP = "reinforce the transformer by rewards; resumes if the workdir holds a checkpoint"

HELDOUT_SEED = 2  # of the prompts shown while training; the benchmark draws from seed 1


def options(parser: argparse.ArgumentParser) -> None:
    config_option(parser)
    parser.add_argument("--workdir", required=True)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Trains; prints the last held-out numbers as one JSON line."""
    import jax

    from blip3o_jax import checkpoints
    from blip3o_jax.kernels.platform import enable_compilation_cache
    from blip3o_jax.parallel.batches import check_batch
    from blip3o_jax.parallel.mesh import make_mesh
    from blip3o_jax.parallel.processes import start_processes
    from blip3o_jax.rl import loop
    from blip3o_jax.rl.rewards import scene_rewards
    from blip3o_jax.scenes import prompts
    from blip3o_jax.scenes.config import TAGS, WorldConfig

    cfg = read_config(args.config, args.overrides)
    if cfg.stage != "grpo":
        raise InputError(f"{args.config} is of stage {cfg.stage!r}; `blip3o-jax train` runs that.")
    for directory in cfg.init.values():
        checkpoints.find(directory)  # before anything is made
    start_processes()
    if jax.process_count() > 1:
        raise InputError("GRPO runs in one process; rewards are not yet gathered from several.")
    check_batch(cfg.batch_size, make_mesh(cfg.mesh))
    text = open_tokenizer(cfg)
    count = cfg.batch_size // cfg.grpo.num_generations
    world = dataclasses.replace(cfg.data.world, text=0.0)
    unseen = WorldConfig(seed=HELDOUT_SEED, weights=dict.fromkeys(TAGS, 1.0))

    def asked(step: int) -> list[dict]:
        return [prompts.sample(world, step * count + i)[0] for i in range(count)]

    heldout = [prompts.sample(unseen, i, "heldout")[0] for i in range(min(64, cfg.batch_size))]

    def reward(images, metadata):
        return scene_rewards(images, metadata, cfg.grpo.strict)

    with own_workdir(cfg, args.workdir) as folder:
        enable_compilation_cache()
        result = loop.run(cfg, folder, asked, heldout, text, reward, checkpoints.load_part)
    print(json.dumps(result))
