"""How a PyTorch tensor becomes a leaf of our parameter tree, and back.

Every conversion here only regroups and reorders axes, so one einops pattern serves both directions: a torch Linear [out, in] is stored
as [in, out] ("o i -> i o"), a projection onto heads [N*H, D] as [D, N, H] ("(n h) d -> d n h").
Layers that the JAX model scans are stacked along a new first axis: their rules carry `{}` where the torch name has the layer's index.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import rearrange

from blip3o_jax.config import ConfigError

LINEAR = "o i -> i o"
HEADS_OUT = "(n h) d -> d n h"  # projection onto heads; its bias is "(n h) -> n h"
HEADS_IN = "d (n h) -> n h d"  # projection from heads
CONV = "o i y x -> y x i o"


@dataclass(frozen=True)
class Rule:
    """`source`: torch name, `{}` for a stacked layer's index. `path`: ours, `/` between keys. `pattern`: einops, torch axes -> our axes."""

    source: str
    path: str
    pattern: str | None = None


def linear(source: str, path: str, pattern: str = LINEAR, bias: str | None = "o -> o") -> list[Rule]:
    """The rules of a torch Linear or Conv2d: weight -> kernel and, unless `bias` is None, bias -> bias."""
    rules = [Rule(f"{source}.weight", f"{path}/kernel", pattern)]
    return [*rules, Rule(f"{source}.bias", f"{path}/bias", bias)] if bias else rules


def norm(source: str, path: str, bias: bool = False) -> list[Rule]:
    """The rules of a torch norm: weight -> scale, bias -> bias."""
    rules = [Rule(f"{source}.weight", f"{path}/scale")]
    return [*rules, Rule(f"{source}.bias", f"{path}/bias")] if bias else rules


def under(source: str, path: str, rules: list[Rule]) -> list[Rule]:
    """The same rules with a prefix before both names (given with their separators, e.g. "model.sana.", "sana/")."""
    return [Rule(source + rule.source, path + rule.path, rule.pattern) for rule in rules]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> {"a/b/c": leaf}."""
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat.update(flatten(value, f"{path}/") if isinstance(value, Mapping) else {path: value})
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def tensor_to_leaf(tensor: np.ndarray, shape: tuple[int, ...], rule: Rule, name: str) -> np.ndarray:
    """One torch tensor as an array of `shape` (one layer's shape, where layers are stacked); ConfigError when it does not fit."""
    try:
        if rule.pattern is not None:
            axes = rule.pattern.split("->")[1].split()
            tensor = rearrange(tensor, rule.pattern, **dict(zip(axes, shape, strict=True)))
        if tensor.shape != shape:
            raise ValueError
    except ValueError as error:  # einops' own error is one
        raise ConfigError(f"Tensor {name!r} has shape {tuple(tensor.shape)}, which does not fit {rule.path} {shape}.") from error
    return tensor


def leaf_to_tensor(leaf: np.ndarray, rule: Rule) -> np.ndarray:
    """Inverse of `tensor_to_leaf`."""
    if rule.pattern is None:
        return leaf
    theirs, ours = rule.pattern.split("->")
    return np.ascontiguousarray(rearrange(leaf, f"{ours} -> {theirs}"))


def to_jax(rules: list[Rule], tensors: Mapping[str, np.ndarray], abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Fills a tree shaped like `abstract` (leaves have `.shape`) from torch tensors by name.

    Raises ConfigError for a missing tensor, a wrong shape, a tensor that no rule names, or a parameter that no rule fills.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(abstract).items()}
    flat, used = {}, set()
    for rule in rules:
        if rule.path not in shapes:
            raise ConfigError(f"The table names {rule.path!r}, which this model does not have.")
        shape, stacked = shapes[rule.path], "{}" in rule.source
        names = [rule.source.format(i) for i in range(shape[0])] if stacked else [rule.source]
        for name in names:
            if name not in tensors:
                raise ConfigError(f"Tensor {name!r} is missing.")
        used.update(names)
        leaves = [tensor_to_leaf(tensors[name], shape[1:] if stacked else shape, rule, name) for name in names]
        flat[rule.path] = np.stack(leaves) if stacked else np.ascontiguousarray(leaves[0])
    if unused := sorted(set(tensors) - used):
        raise ConfigError(f"{len(unused)} tensors are not part of this model, first {unused[0]!r}.")
    if unfilled := sorted(set(shapes) - set(flat)):
        raise ConfigError(f"The table leaves {len(unfilled)} parameters unfilled, first {unfilled[0]!r}.")
    return unflatten(flat)


def to_torch(rules: list[Rule], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Torch tensors by name from our tree; inverse of `to_jax`."""
    flat = flatten(params)
    tensors = {}
    for rule in rules:
        leaf = np.asarray(flat[rule.path])
        if "{}" in rule.source:
            tensors.update({rule.source.format(i): leaf_to_tensor(layer, rule) for i, layer in enumerate(leaf)})
        else:
            tensors[rule.source] = leaf_to_tensor(leaf, rule)
    return tensors
