"""`blip3o-jax train`: config file -> checked config -> data -> loop."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from blip3o_jax.errors import InputError, require
from blip3o_jax.jobs.options import run_options

if TYPE_CHECKING:
    from blip3o_jax.data.feed import Feed
    from blip3o_jax.paths import AnyPath
    from blip3o_jax.text import Text
    from blip3o_jax.train.config import TrainConfig

HELP = "train from a config; resumes if the workdir holds a checkpoint"

# What a run must do to follow the original's curves (docs/model.md §6.6 no. 1 and 2).
REFERENCE_QUIRKS = ("--config.joint.last_slice=true", "--config.joint.stochastic_codes=true")


def options(parser: argparse.ArgumentParser) -> None:
    run_options(parser)
    quirks = "train as the PyTorch code does: last positions, sampled codes"
    parser.add_argument("--reference-quirks", action="store_true", help=quirks)
    parser.set_defaults(run=run)


def open_run(name: str, overrides: list[str], job: str) -> TrainConfig:
    """The checked config of a run that `blip3o-jax JOB` trains, its processes started.

    Raises InputError for what is wrong with it, before anything is written.
    """
    from blip3o_jax import checkpoints
    from blip3o_jax.parallel.mesh import make_mesh
    from blip3o_jax.parallel.processes import start_processes
    from blip3o_jax.train import start
    from blip3o_jax.train.read_config import read_config

    cfg = read_config(name, overrides)
    command = f"blip3o-jax {cfg.record.job}"
    require(cfg.record.job == job, f"{name} is of stage {cfg.stage!r}; `{command}` runs that.")
    for part, directory in cfg.init.items():
        try:
            checkpoints.find(directory)
        except InputError as error:
            raise InputError(f"init of {part}: {error}") from error
    cfg = with_editing_parts(cfg)
    start_processes()
    start.check_batches(cfg, make_mesh(cfg.mesh))
    return cfg


def with_editing_parts(cfg: TrainConfig) -> TrainConfig:
    """The config whose `init` also names the connectors of an editing model, where the checkpoint
    of its diffusion part has them."""
    from blip3o_jax import checkpoints
    from blip3o_jax.models.blip3o import parts_of

    missing = set(cfg.parts) - set(cfg.init)
    if "sana" not in cfg.init or not missing:
        return cfg
    held = missing & set(parts_of(checkpoints.config_of(cfg.init["sana"])))
    return dataclasses.replace(cfg, init={**cfg.init, **dict.fromkeys(held, cfg.init["sana"])})


def open_tokenizer(cfg: TrainConfig) -> Text:
    """The Text that a run's captions and prompts are written with."""
    from blip3o_jax.text import Text, load_tokenizer
    from blip3o_jax.train.workdir import find_tokenizer

    model = cfg.blip3o()
    return Text(load_tokenizer(find_tokenizer(cfg)), model.vocab, model.max_prompt_tokens)


def open_feed(
    cfg: TrainConfig,
    tokenizer: Text | None,
    data_dir: str = "",
    own: Sequence[int] | None = None,
    workdir: AnyPath | None = None,
) -> Feed:
    """The run's data.feed.Feed; bad records are named in a file of the workdir, if there is one."""
    import jax

    from blip3o_jax.data.feed import Feed

    bad = workdir and workdir / f"bad_records.{jax.process_index()}.jsonl"
    what = cfg.data, cfg.blip3o(), cfg.record.rows, tokenizer
    return Feed(*what, cfg.batch_size, cfg.seed, own, data_dir, bad)


def run(args: argparse.Namespace) -> None:
    """Trains; prints the last evaluation as one JSON line, from process 0 if there are several."""
    from blip3o_jax import checkpoints, paths, resources
    from blip3o_jax.data import cache
    from blip3o_jax.kernels.platform import enable_compilation_cache
    from blip3o_jax.parallel.batches import rows_of_host
    from blip3o_jax.parallel.mesh import make_mesh
    from blip3o_jax.parallel.processes import is_process_zero, process_zero_first
    from blip3o_jax.scenes.exercises import name_ids
    from blip3o_jax.train import loop, start
    from blip3o_jax.train.workdir import own_workdir

    quirks = REFERENCE_QUIRKS if args.reference_quirks else ()
    cfg = open_run(args.config, [*args.overrides, *quirks], "train")
    # The data; a cache must have been made by the run's own encoders.
    tokenizer = open_tokenizer(cfg) if "tokenizer" in cfg.record.data else None
    workdir = paths.path(args.workdir)
    # The embedded world is drawn on a disk.
    beside = resources.cache_folder() if paths.is_bucket(workdir) else workdir.parent
    data_dir = cfg.data.data_dir or str(beside / "scenes")
    own = rows_of_host(cfg.batch_size, make_mesh(cfg.mesh))
    feed = open_feed(cfg, tokenizer, data_dir, own, workdir)
    if cfg.data.cache:
        encoders = start.encoder_params(cfg, checkpoints.load_part)
        cache.check_cache(cfg.data.cache, cache.describe(cfg.blip3o(), cfg.data, encoders))
    words = name_ids(tokenizer) if cfg.pretrain_ar and cfg.pretrain_ar.named_tokens else None

    with own_workdir(cfg, workdir, args.allow) as folder:
        enable_compilation_cache()
        with process_zero_first("the data"):
            heldout = feed.heldout(64)
        run = loop.supervised(cfg, feed.train, heldout, checkpoints.load_part, words)
        result = loop.run(cfg, folder, run)
    if is_process_zero():
        print(json.dumps(result))
