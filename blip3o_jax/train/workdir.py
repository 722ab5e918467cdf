"""The folder of a run, and the config that it belongs to."""

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict

from blip3o_jax import paths, resources
from blip3o_jax.checkpoints import keep_tokenizer
from blip3o_jax.errors import InputError, os_errors, require
from blip3o_jax.files import parse_json
from blip3o_jax.parallel.processes import barrier, is_process_zero, process_zero_first
from blip3o_jax.paths import AnyPath
from blip3o_jax.train import owner, resume
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.train.read_config import saved_config
from blip3o_jax.training_checkpoint import complete, is_workdir

log = logging.getLogger(__name__)


def open_workdir(
    cfg: TrainConfig, workdir: str | AnyPath, allowed: tuple[str, ...] = ()
) -> AnyPath:
    """Creates the workdir and keeps the config in it; InputError when it holds another run's or
    cannot be written. Changes that `train.resume` takes, and those of the `allowed` keys, are
    logged and kept."""
    folder = paths.path(workdir)
    file, trial = folder / "config.json", folder / ".config.json"
    text = json.dumps(asdict(cfg), indent=1, sort_keys=True)
    # Process 0 writes what all then compare with.
    with process_zero_first("the workdir") as first:
        if first:
            with os_errors(f"The workdir {workdir} cannot be written"):
                folder.mkdir(parents=True, exist_ok=True)
                # Also where there is a config, to see whether the workdir can be written.
                paths.write_text(trial, text)
                trial.unlink()
                if not file.exists():
                    paths.write_text(file, text)

    try:
        saved = saved_config(parse_json("it", file.read_bytes()))
    except InputError as error:
        reason = str(error).rstrip(".")
        raise InputError(f"{file} is no config of a run ({reason}); take a new workdir.") from error
    changes = resume.changes(saved, cfg)
    resume.check(changes, allowed, cfg, folder)
    if changes:
        _log_changes(saved, cfg, folder, changes)
        # All processes have compared by now.
        barrier("the new config")
        if is_process_zero():
            paths.write_text(file, text)
    return folder


def _log_changes(
    saved: TrainConfig, cfg: TrainConfig, folder: AnyPath, changes: resume.Changes
) -> None:
    """Logs what changes in the run; InputError when it would be over."""
    steps = [int(checkpoint.name) for checkpoint in complete(folder / "checkpoints")]
    step = max(steps, default=0)
    reached = f"num_steps {cfg.num_steps} is below step {step}, which the run in {folder}"
    require(step <= cfg.num_steps, f"{reached} has reached; generate with it as it is.")
    for key, (before, now) in changes.items():
        same = ", taken to be the same files" if resume.matches(key, resume.PATHS) else ""
        log.info("Resumed with %s %s, not %s%s.", key, now, before, same)
    if any(key == "num_steps" or key.startswith("optimizer.") for key in changes):
        log.info("%s", resume.course(saved, cfg, step))


@contextlib.contextmanager
def own_workdir(
    cfg: TrainConfig, workdir: str | AnyPath, allowed: tuple[str, ...] = ()
) -> Iterator[AnyPath]:
    """`open_workdir` around a run that owns the workdir, with a copy of its tokenizer.

    Where invalid input ends the run before there are metrics or a checkpoint, both are removed, so
    that the corrected command can take the same folder; a resumed run gets its config back.
    """
    # One process writes for all.
    with owner.own(paths.path(workdir)) if is_process_zero() else contextlib.nullcontext():
        file = paths.path(workdir) / "config.json"
        before = file.read_bytes() if file.is_file() else None
        folder = open_workdir(cfg, workdir, allowed)
        steps = complete(folder / "checkpoints")
        try:
            if "tokenizer" in cfg.record.data:
                with process_zero_first("the tokenizer"):
                    keep_tokenizer(folder, find_tokenizer(cfg))
            yield folder
        except InputError:
            if not (folder / "metrics.jsonl").exists() and not is_workdir(folder):
                # Another process of the run may be quicker.
                for name in ("config.json", "tokenizer.json", "init.json"):
                    (folder / name).unlink(missing_ok=True)
            elif before and is_process_zero() and complete(folder / "checkpoints") == steps:
                paths.write_bytes(file, before)
            raise


def find_tokenizer(cfg: TrainConfig) -> AnyPath:
    """The tokenizer.json of a run: `data.tokenizer`, or that of the preset."""
    return resources.find_tokenizer(cfg.blip3o().name, cfg.data.tokenizer)
