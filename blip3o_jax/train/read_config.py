"""From a config file, or a workdir's JSON, to a checked TrainConfig."""

import contextlib
import copy
import dataclasses
import importlib.util
import inspect
import json
import logging
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blip3o_jax import resources
from blip3o_jax.errors import MAX_FLOAT, InputError, check_number, nearest, require
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.train.stages import MIXTURE, STAGES, WORLD

log = logging.getLogger(__name__)

# Names of version 0.1, which still work in config files, overrides and workdirs. "STAGE" is the
# run's own.
RENAMED_STAGES = {"practice": "pretrain_ar"}
RENAMED_KEYS = {
    "trainable_sana": "joint.trainable_sana",
    "named_tokens": "pretrain_ar.named_tokens",
    "loss.condition_dropout": "joint.condition_dropout",
    "loss.flow_weight": "joint.flow_weight",
    "loss.last_slice": "joint.last_slice",
    "loss.stochastic_codes": "joint.stochastic_codes",
    "loss.ce_chunk": "STAGE.ce_chunk",
    "loss.latent_noise": "autoencoder.latent_noise",
}


def read_config(name: str, overrides: list[str]) -> TrainConfig:
    """The run of `get_config()` in a config file, with overrides `--config.a.b=value`.

    "NAME:TOPOLOGY" calls `get_config(TOPOLOGY)`. Values are read as JSON where they are JSON, else
    as text. Raises InputError for what is not there or not valid, naming it.
    """
    name, _, topology = name.partition(":")
    values = _run_file(name, topology)
    changes = [_override(item) for item in overrides]
    stage = str(dict(changes).get("stage", values.get("stage", "")))
    stage = RENAMED_STAGES.get(stage, stage)
    is_known = stage in ("", *STAGES)  # none is found missing below
    require(is_known, f"Unknown stage {stage!r}; {nearest(stage, STAGES)}")

    # Renamed before and after, so that an override wins whichever of the names it has.
    renamed = rename(values, stage)
    if (
        stage
        and isinstance(values.get("init"), str)
        and any(key.startswith("init.") for key, _ in changes)
    ):
        values["init"] = dict.fromkeys(STAGES[stage].parts, values["init"])
    for key, value in changes:
        _set(values, key, value)
    for old, new in renamed + rename(values, stage):
        log.warning("Config: %s is now called %s.", old, new)
    return from_dict(TrainConfig, values)


def saved_config(values: dict) -> TrainConfig:
    """The run whose config a workdir or checkpoint holds, also one of version 0.1.

    That version kept the keys of all stages; those without an effect are left out.
    """
    # Only what has groups where a config has them can be renamed.
    data, loss = map(values.get, ("data", "loss")) if isinstance(values, dict) else (None, None)
    are_groups = bool(data) and isinstance(data, dict) and isinstance(loss or {}, dict)
    require(are_groups, "it has no groups of keys")
    values = copy.deepcopy(values)
    stage = str(values.get("stage"))
    stage = RENAMED_STAGES.get(stage, stage)
    require(stage in STAGES, f"its stage is {stage!r}")
    rename(values, stage)
    record = STAGES[stage]
    values = {key: value for key, value in values.items() if key == stage or key not in STAGES}
    # Keys that had no effect in this stage.
    values.pop("loss", None)
    section = values.get(stage)
    if isinstance(section, dict) and "ce_chunk" not in record.section.__dataclass_fields__:
        section.pop("ce_chunk", None)
    unread = WORLD if values["data"].get("sources") else MIXTURE
    read = set(record.data).difference(unread)
    values["data"] = {key: value for key, value in values["data"].items() if key in read}
    return from_dict(TrainConfig, values)


def rename(values: dict, stage: str | None) -> list[tuple[str, str]]:
    """Gives the keys of nested `values`, of a run of `stage`, today's names; returns (old, new) of
    those that had others."""
    renamed = []
    if (old := values.get("stage")) in RENAMED_STAGES:
        values["stage"] = RENAMED_STAGES[old]
        renamed.append((f"stage {old!r}", repr(values["stage"])))
    for old, new in RENAMED_KEYS.items():
        group, _, name = old.rpartition(".")
        node = values.get(group) if group else values
        if isinstance(node, dict) and name in node:
            new = new.replace("STAGE", str(stage))
            _set(values, new, node.pop(name))
            renamed.append((old, new))
    # The strict verdict's share, beside the dense score.
    section = values.get("grpo")
    if isinstance(section, dict) and "strict" in section:
        share = section.pop("strict")
        check_number(share, "grpo.strict", 0, 1)
        shares = {"scenes": 1 - share, "strict": share}
        section["rewards"] = {name: own for name, own in shares.items() if own}
        renamed.append(("grpo.strict", f"grpo.rewards, {json.dumps(section['rewards'])}"))
    if values.get("loss") == {}:
        del values["loss"]
    return renamed


def _run_file(name: str, topology: str) -> dict:
    """What `get_config` of a config file gives, as nested dicts."""
    path = resources.find_config(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        with _neighbours(path.parent):
            spec.loader.exec_module(module)
            require(
                not topology or bool(inspect.signature(module.get_config).parameters),
                f"The config {name} is the same on all topologies; leave ':{topology}' out.",
            )
            return module.get_config(*filter(None, [topology])).to_dict()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path} gives no config: {type(error).__name__}: {error}.") from error


@contextlib.contextmanager
def _neighbours(folder: Path) -> Iterator[None]:
    """Lets a config file import the files beside it, whatever else has their names."""
    names = {file.stem for file in folder.glob("*.py")}
    hidden = {name: sys.modules.pop(name) for name in names & sys.modules.keys()}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in names & sys.modules.keys():
            del sys.modules[name]
        sys.modules.update(hidden)


def _override(item: str) -> tuple[str, Any]:
    """("a.b", value) of "--config.a.b=value"."""
    key, equals, text = item.removeprefix("--config.").partition("=")
    require(bool(equals), f"{item}: write --config.{key}=VALUE.")
    try:
        return key, json.loads(text)
    except json.JSONDecodeError:
        return key, text


def _set(tree: dict, key: str, value: Any) -> None:
    """Enters a value into nested dicts at "a.b"; paths within the model's config stay whole."""
    *parents, last = key.split(".", 1 if key.startswith("model.") else -1)
    for parent in parents:
        tree = tree.setdefault(parent, {})
        require(isinstance(tree, dict), f"{key}: {parent!r} is a value, not a group of keys.")
    tree[last] = value


def from_dict(cls: type, values: dict, prefix: str = "") -> Any:
    """Builds a frozen dataclass from nested dicts; an unknown key or a value of a wrong type is an
    InputError that names it."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    kinds = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        require(key in fields, f"Unknown config key {prefix + key!r}; {nearest(key, fields)}")
        arguments[key] = _value(kinds[key], value, prefix + key)
    for name, f in fields.items():
        required = f.default is f.default_factory is dataclasses.MISSING
        require(name in values or not required, f"Config key {prefix + name!r} is missing.")
    return cls(**arguments)


def _value(kind: Any, value: Any, key: str) -> Any:
    """`value` as a field of this type holds it."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and types.NoneType in kinds:
        return None
    # The first type that the value fits: true is no number, an integer is a float.
    is_bool = isinstance(value, bool)
    for one in kinds:
        (item, *_) = typing.get_args(one) or (None,)
        if dataclasses.is_dataclass(one) and isinstance(value, dict):
            return from_dict(one, value, f"{key}.")
        if item and isinstance(value, list | tuple):
            if item is str and all(isinstance(v, str) for v in value):
                return tuple(value)
            if dataclasses.is_dataclass(item) and all(isinstance(v, dict) for v in value):
                return tuple(from_dict(item, v, f"{key}[{i}].") for i, v in enumerate(value))
        elif one is float and isinstance(value, int | float) and not is_bool:
            if abs(value) <= MAX_FLOAT:  # neither infinite nor NaN
                return float(value)
        elif not item and isinstance(value, one) and (one is bool or not is_bool):
            return value
    expected = " or ".join(_described(one) for one in kinds if one is not types.NoneType)
    raise InputError(f"Config key {key!r} wants {expected}, not {value!r}.")


def _described(kind: Any) -> str:
    (item, *_) = typing.get_args(kind) or (None,)
    if item:
        return f"a list of {'names' if item is str else 'groups of keys'}"
    is_group = kind is dict or dataclasses.is_dataclass(kind)
    return "a group of keys" if is_group else kind.__name__
