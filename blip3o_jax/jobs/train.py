"""`blip3o-jax train`: config file -> checked config -> data -> loop."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import inspect
import json
import pathlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from blip3o_jax import resources
from blip3o_jax.errors import InputError
from blip3o_jax.jobs.options import config_option
from blip3o_jax.train.config import TrainConfig, from_dict

if TYPE_CHECKING:
    from blip3o_jax.data.feed import Feed
    from blip3o_jax.text import Text

HELP = "train from a config; resumes if the workdir holds a checkpoint"

# What a run must do to follow the original's curves (docs/model.md §6.6 no. 1 and 2).
REFERENCE_QUIRKS = ["--config.loss.last_slice=true", "--config.loss.stochastic_codes=true"]


def options(parser: argparse.ArgumentParser) -> None:
    config_option(parser)
    parser.add_argument("--workdir", required=True)
    parser.add_argument(
        "--reference-quirks",
        action="store_true",
        help="train as the PyTorch code does: last positions, sampled codes",
    )
    parser.set_defaults(run=run)


def read_config(name: str, overrides: list[str]) -> TrainConfig:
    """Runs `get_config()` of a config file, applies `--config.a.b=value` overrides and checks the
    result.

    "NAME:TOPOLOGY" runs `get_config(TOPOLOGY)`. Values are read as JSON where they are JSON, else
    as text.
    """
    name, _, topology = name.partition(":")
    path = resources.find_config(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if topology and not inspect.signature(module.get_config).parameters:
            raise InputError(
                f"The config {name} is the same on all topologies; leave ':{topology}' out."
            )
        values = module.get_config(*filter(None, [topology])).to_dict()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path} gives no config: {type(error).__name__}: {error}.") from error
    for item in overrides:
        key, equals, text = item.removeprefix("--config.").partition("=")
        if not equals:
            raise InputError(f"{item}: write --config.{key}=VALUE.")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        *parents, last = (
            key.split(".")
            if not key.startswith("model.")
            else ("model", key.removeprefix("model."))
        )
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise InputError(f"{item}: {parent!r} is a value, not a group of keys.")
        node[last] = value
    return from_dict(TrainConfig, values)


def find_tokenizer(cfg: TrainConfig) -> pathlib.Path:
    """The tokenizer.json of a run: `data.tokenizer`, or that of the preset."""
    return resources.find_tokenizer(cfg.blip3o().name, cfg.data.tokenizer)


def open_tokenizer(cfg: TrainConfig) -> Text:
    """The Text that a run's captions and prompts are written with."""
    from blip3o_jax.text import Text, load_tokenizer

    model = cfg.blip3o()
    return Text(load_tokenizer(find_tokenizer(cfg)), model.vocab, model.max_prompt_tokens)


# The rows of data.feed that each stage trains on.
ROWS = {
    "autoencoder": "patches",
    "tokenizer": "patches",
    "practice": "exercises",
    "joint": "captions",
}


def open_feed(
    cfg: TrainConfig,
    tokenizer: Text | None,
    data_dir: str = "",
    hosts: tuple[int, int] = (0, 1),
    workdir: pathlib.Path | None = None,
) -> Feed:
    """The run's data.feed.Feed; bad records are named in a file of the workdir, if there is one."""
    import jax

    from blip3o_jax.data.feed import Feed

    bad = workdir and workdir / f"bad_records.{jax.process_index()}.jsonl"
    what = cfg.data, cfg.blip3o(), ROWS[cfg.stage], tokenizer
    return Feed(*what, cfg.batch_size, cfg.seed, hosts, data_dir, bad)


def open_workdir(cfg: TrainConfig, workdir: str) -> pathlib.Path:
    """Makes the workdir and keeps the config in it; InputError when it holds another run's or
    cannot be written."""
    from blip3o_jax.parallel.processes import process_zero_first

    folder = pathlib.Path(workdir)
    text = json.dumps(asdict(cfg), indent=1, sort_keys=True)
    kept, new = folder / "config.json", folder / ".config.json"
    with process_zero_first("the workdir") as first:
        try:
            if first:
                folder.mkdir(parents=True, exist_ok=True)
                # even when there is one: so that it shows now whether the workdir can be written
                new.write_text(text)
                new.unlink() if kept.exists() else new.replace(kept)
        except OSError as error:
            with contextlib.suppress(OSError):
                new.unlink()
            raise InputError(
                f"The workdir {workdir} cannot be written: {error.strerror}."
            ) from error
    before, now = (_flat(json.loads(t)) for t in (kept.read_text(), text))
    changed = [
        f"{k}: {before.get(k)} there, {now.get(k)} here"
        for k in sorted(before | now)
        if before.get(k) != now.get(k)
    ]
    if changed:
        raise InputError(
            f"The workdir {workdir} is of another config ({'; '.join(changed[:3])}); take "
            "a new workdir."
        )
    return folder


@contextlib.contextmanager
def own_workdir(cfg: TrainConfig, workdir: str) -> Iterator[pathlib.Path]:
    """`open_workdir` around a run.

    One that a wrong input ends before it has metrics or a checkpoint leaves no config there, so
    that the mended command may take the same folder.
    """
    from blip3o_jax.checkpoints import keep_tokenizer
    from blip3o_jax.parallel.processes import process_zero_first
    from blip3o_jax.training_checkpoint import is_workdir

    folder = open_workdir(cfg, workdir)
    try:
        if cfg.stage not in ("autoencoder", "tokenizer"):  # which have no text
            with process_zero_first("the tokenizer"):
                keep_tokenizer(folder, find_tokenizer(cfg))
        yield folder
    except InputError:
        if not (folder / "metrics.jsonl").exists() and not is_workdir(folder):
            # another process of the run may be quicker
            for name in ("config.json", "tokenizer.json"):
                (folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds something else
                folder.rmdir()
        raise


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat.update(
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def run(args) -> None:
    """Trains; prints the last evaluation as one JSON line, from process 0 if there are several."""
    from blip3o_jax import checkpoints
    from blip3o_jax.data import cache
    from blip3o_jax.kernels.platform import enable_compilation_cache
    from blip3o_jax.parallel.batches import batch_hosts, check_batch
    from blip3o_jax.parallel.mesh import make_mesh
    from blip3o_jax.parallel.processes import is_process_zero, process_zero_first, start_processes
    from blip3o_jax.scenes.exercises import name_ids
    from blip3o_jax.train import loop, start

    quirks = REFERENCE_QUIRKS if args.reference_quirks else []
    cfg = read_config(args.config, [*args.overrides, *quirks])
    if cfg.stage == "grpo":
        raise InputError(f"{args.config} is of stage 'grpo'; `blip3o-jax grpo` runs that.")
    for directory in cfg.init.values():
        checkpoints.find(directory)  # before anything is made
    start_processes()
    mesh = make_mesh(cfg.mesh)
    check_batch(cfg.batch_size, mesh, cfg.accumulate)
    hosts = batch_hosts(mesh)
    tokenizer = open_tokenizer(cfg) if cfg.stage in ("practice", "joint") else None
    workdir = pathlib.Path(args.workdir)
    data_dir = cfg.data.data_dir or str(workdir.parent / "scenes")
    feed = open_feed(cfg, tokenizer, data_dir, hosts, workdir)
    if cfg.data.cache:
        encoders = start.encoder_params(cfg, checkpoints.load_part)
        cache.check_cache(cfg.data.cache, cache.describe(cfg.blip3o(), cfg.data.crop, encoders))
    words = name_ids(tokenizer) if cfg.named_tokens else None
    with own_workdir(cfg, args.workdir) as folder:
        enable_compilation_cache()
        with process_zero_first("the data"):
            heldout = feed.heldout(64)
        result = loop.run(cfg, folder, feed.train, heldout, checkpoints.load_part, words)
    if is_process_zero():
        print(json.dumps(result))
