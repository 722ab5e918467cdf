"""What of a run's config may change when it resumes (the table of docs/data.md)."""

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blip3o_jax.errors import nearest, require
from blip3o_jax.paths import AnyPath
from blip3o_jax.train import optimizer
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.train.sections import DIFFUSION_METHODS_OF

# Keys, and groups of them, that change no number beyond rounding: how a step is computed, when
# something is written, when the run gives up, and where files are. A tokenizer is compared with the
# workdir's copy.
FREE = (
    *("mesh", "topology", "accumulate", "remat", "joint.ce_chunk", "pretrain_ar.ce_chunk"),
    *("log_every", "eval_every", "checkpoint_every", "keep_checkpoints", "profile"),
    *("guard.max_skipped", "data.max_bad_fraction", "data.reader_threads", "data.row_group_mb"),
    *("grpo.reward_timeout", "grpo.watched", "grpo.pieces"),
    *("data.data_dir", "data.tokenizer", "data.sources.*.root"),
)
# Paths of which the last part (of patterns, the last two) tells that they were only moved.
PATHS = ("init", "data.cache", "data.prompts", "data.sources.*.path")
# What decides which arrays a checkpoint holds.
ARRAYS = ("stage", "preset", "model", "frozen_parts", "joint.trainable_sana", "tokenizer.teacher")

Changes = dict[str, tuple[Any, Any]]  # key -> (there, here)


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} of nested dicts and lists of dicts, whose places are numbers."""
    if isinstance(values, list) and values and all(isinstance(item, dict) for item in values):
        values = dict(enumerate(values))
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    below = (flat(value, f"{prefix}.{key}".strip(".")) for key, value in values.items())
    return {key: value for part in below for key, value in part.items()}


def changes(before: TrainConfig, now: TrainConfig) -> Changes:
    """What differs between two configs, compared as JSON, which has no tuples."""
    there, here = (flat(json.loads(json.dumps(asdict(config)))) for config in (before, now))
    differing = {key: (there.get(key), here.get(key)) for key in sorted(there | here)}
    # An empty group, and one with keys, are told apart by the keys.
    empty = ({}, [], None)
    return {
        key: (a, b)
        for key, (a, b) in differing.items()
        if a != b and not (a in empty and b in empty)
    }


def matches(key: str, groups: tuple[str, ...]) -> bool:
    """Whether `key` is one of `groups` or below it; a number is matched by `*`."""
    parts = ["*" if part.isdigit() else part for part in key.split(".")]
    return any(parts[: group.count(".") + 1] == group.split(".") for group in groups)


def is_moved(before: Any, now: Any) -> bool:
    """Whether two paths may be of the same files at two places."""
    if not (isinstance(before, str) and isinstance(now, str) and before and now):
        return False
    # From the last part that is no pattern on.
    parts = Path(before).parts
    patterns = itertools.takewhile(lambda part: set(part) & set("*?["), reversed(parts))
    count = 1 + len([*patterns])
    return parts[-count:] == Path(now).parts[-count:]


def is_free(key: str, before: Any, now: Any) -> bool:
    """Whether a run may resume with the change unasked."""
    return matches(key, FREE) or (matches(key, PATHS) and is_moved(before, now))


def check(differing: Changes, allowed: tuple[str, ...], cfg: TrainConfig, workdir: AnyPath) -> None:
    """InputError naming the changes that need a permission which `allowed` does not give."""
    keys = flat(json.loads(json.dumps(asdict(cfg)))) | differing
    for name in allowed:
        is_key = name in keys or any(key.startswith(f"{name}.") for key in keys)
        require(is_key, f"--allow {name}: there is no such config key; {nearest(name, keys)}")
    refused = {
        key: pair
        for key, pair in differing.items()
        if not is_free(key, *pair) and not matches(key, allowed)
    }
    arrays = {key: pair for key, pair in differing.items() if holds_other_arrays(key, *pair)}
    shown = arrays or refused
    listed = "; ".join(f"{key}: {a} there, {b} here" for key, (a, b) in list(shown.items())[:6])
    more = f"; and {len(shown) - 6} more" if len(shown) > 6 else ""
    sentence = f"The workdir {workdir} is of another config ({listed}{more})"
    require(not arrays, f"{sentence}, whose checkpoints hold other arrays; take a new workdir.")
    permission = f"resume with --allow {','.join(refused)}"
    require(not refused, f"{sentence}; take a new workdir, or {permission}.")


def holds_other_arrays(key: str, before: Any, now: Any) -> bool:
    """Whether the change adds arrays to the state, takes some from it or reshapes them."""
    if key == "optimizer.ema_decay":
        return bool(before) != bool(now)
    if key == "grpo.train":  # these have both halves
        return {before, now} != {"alternating", "joint"}
    if key == "grpo.diffusion.method":
        lagged = DIFFUSION_METHODS_OF["old_decay"]
        return (before in lagged) != (now in lagged)
    return matches(key, ARRAYS)


def course(before: TrainConfig, now: TrainConfig, step: int) -> str:
    """The learning rate from `step` to the end in a few steps, beside what it would have been."""
    old, new = (optimizer.schedule(cfg.optimizer, cfg.num_steps) for cfg in (before, now))
    left = now.num_steps - step
    points = sorted({step + max(left - 1, 0) * quarter // 4 for quarter in range(5)})
    # The rate of step n is the schedule's at n - 1.
    rates = ", ".join(f"{float(new(point)):.3g} at step {point + 1}" for point in points)
    return f"Learning rate: {rates}; step {step + 1} would have had {float(old(step)):.3g}."
