"""The folder of a run, and the config that it belongs to."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from flax.traverse_util import flatten_dict

from blip3o_jax import resources
from blip3o_jax.checkpoints import keep_tokenizer
from blip3o_jax.errors import InputError, require
from blip3o_jax.parallel.processes import process_zero_first
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.train.read_config import saved_config
from blip3o_jax.training_checkpoint import is_workdir


def open_workdir(cfg: TrainConfig, workdir: str | Path) -> Path:
    """Creates the workdir and keeps the config in it; InputError when it holds another run's or
    cannot be written."""
    folder = Path(workdir)
    file, new_file = folder / "config.json", folder / ".config.json"
    text = json.dumps(asdict(cfg), indent=1, sort_keys=True)
    # Process 0 writes what all then compare with.
    with process_zero_first("the workdir") as first:
        try:
            if first:
                folder.mkdir(parents=True, exist_ok=True)
                # Also where there is one, to see whether the workdir can be written.
                new_file.write_text(text)
                new_file.unlink() if file.exists() else new_file.replace(file)
        except OSError as error:
            with contextlib.suppress(OSError):
                new_file.unlink()
            reason = f"The workdir {workdir} cannot be written: {error.strerror}."
            raise InputError(reason) from error

    # Compared as JSON, which has no tuples.
    try:
        saved = saved_config(json.loads(file.read_text()))
    except (InputError, ValueError, KeyError) as error:
        raise InputError(f"{file} is no config of a run ({error}); take a new workdir.") from error
    before, now = (
        flatten_dict(json.loads(json.dumps(asdict(config))), keep_empty_nodes=True, sep=".")
        for config in (saved, cfg)
    )
    values = {key: (before.get(key), now.get(key)) for key in sorted(before | now)}
    differences = [f"{key}: {a} there, {b} here" for key, (a, b) in values.items() if a != b]
    sentence = f"The workdir {workdir} is of another config ({'; '.join(differences[:3])})"
    require(not differences, f"{sentence}; take a new workdir.")
    return folder


@contextlib.contextmanager
def own_workdir(cfg: TrainConfig, workdir: str | Path) -> Iterator[Path]:
    """`open_workdir` around a run, with a copy of its tokenizer.

    Where invalid input ends the run before there are metrics or a checkpoint, both are removed, so
    that the corrected command can take the same folder.
    """
    folder = open_workdir(cfg, workdir)
    try:
        if "tokenizer" in cfg.record.data:
            with process_zero_first("the tokenizer"):
                keep_tokenizer(folder, find_tokenizer(cfg))
        yield folder
    except InputError:
        if not (folder / "metrics.jsonl").exists() and not is_workdir(folder):
            # Another process of the run may be quicker.
            for name in ("config.json", "tokenizer.json"):
                (folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds something else
                folder.rmdir()
        raise


def find_tokenizer(cfg: TrainConfig) -> Path:
    """The tokenizer.json of a run: `data.tokenizer`, or that of the preset."""
    return resources.find_tokenizer(cfg.blip3o().name, cfg.data.tokenizer)
