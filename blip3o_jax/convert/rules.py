"""How a PyTorch tensor becomes a leaf of our parameter tree, and back.

Every conversion here only regroups and reorders axes, so one einops pattern serves both directions:
a torch Linear [out, in] is stored as [in, out] ("o i -> i o"), a projection onto heads [N*H, D] as
[D, N, H] ("(n h) d -> d n h"). Layers that the JAX model scans are stacked along a new first axis:
their rules carry `{}` where the torch name has the layer's index.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import rearrange

from blip3o_jax.errors import InputError, require
from blip3o_jax.tree import flatten, unflatten

LINEAR = "o i -> i o"
HEADS_OUT = "(n h) d -> d n h"  # projection onto heads; its bias is "(n h) -> n h"
HEADS_IN = "d (n h) -> n h d"  # projection from heads
CONV = "o i y x -> y x i o"

Shape = tuple[int, ...]
Pattern = str | None  # einops, torch axes -> our axes; None where they are the same


@dataclass(frozen=True)
class Rule:
    """How the tensors of one parameter are named and laid out."""

    source: str  # torch name, `{}` for a stacked layer's index
    path: str  # ours, `/` between keys
    pattern: Pattern = None

    @property
    def stacked(self) -> bool:
        return "{}" in self.source

    @property
    def part(self) -> str:
        """The model's part, the first key of the path."""
        return self.path.partition("/")[0]

    def names(self, shape: Shape) -> list[str]:
        """The torch names behind a leaf of `shape`, one for each layer."""
        return [self.source.format(i) for i in range(shape[0] if self.stacked else 1)]

    def axes(self, shape: Shape) -> dict[str, int]:
        """Sizes of the pattern's axes in `shape`; InputError when there are more or fewer."""
        shape = shape[1:] if self.stacked else shape
        ours = self.pattern.partition("->")[2]
        fits = len(ours.split()) == len(shape)
        require(fits, f"The table gives {self.path} the axes{ours}, but its shape is {shape}.")
        return dict(zip(ours.split(), shape, strict=True))

    def tensor_shape(self, shape: Shape) -> Shape:
        """The shape of the torch tensor, of each where layers are stacked, behind `shape`."""
        if self.pattern is None:
            return shape[1:] if self.stacked else shape
        # Each of their axes is one of ours, or a group of them multiplied.
        sizes = {"1": 1, **self.axes(shape)}
        groups = re.findall(r"\([^)]*\)|\S+", self.pattern.partition("->")[0])
        return tuple(math.prod(sizes[axis] for axis in x.strip("()").split()) for x in groups)


def linear(
    names: str, path: str = "", pattern: Pattern = LINEAR, bias: Pattern = "o -> o", to="kernel"
) -> list[Rule]:
    """The rules of torch Linears or Conv2ds, names between blanks: weight -> kernel and, unless
    `bias` is None, bias -> bias. Without a `path` each has its own name's."""
    rules = []
    for name in names.split():
        ours = path or name.replace(".", "/")
        rules.append(Rule(f"{name}.weight", f"{ours}/{to}", pattern))
        rules += [Rule(f"{name}.bias", f"{ours}/bias", bias)] if bias else []
    return rules


def norm(names: str, path: str = "", bias: bool = False) -> list[Rule]:
    """The rules of torch norms, as `linear`: weight -> scale, bias -> bias."""
    return linear(names, path, None, "o -> o" if bias else None, "scale")


def under(source: str, path: str, rules: list[Rule]) -> list[Rule]:
    """The same rules with prefixes before both names, e.g. "model.sana." and "sana/"."""
    return [Rule(source + rule.source, path + rule.path, rule.pattern) for rule in rules]


def leaf_shapes(rules: list[Rule], tree: Mapping[str, Any]) -> dict[str, Shape]:
    """Shapes by path, of leaves with `.shape`; InputError unless the rules name each leaf once."""
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(tree).items()}
    # Nothing left out, nothing invented, nothing twice.
    named = Counter(rule.path for rule in rules)
    for problem, paths in (
        ("names parameters that this model does not have", named.keys() - shapes.keys()),
        ("leaves parameters unfilled", shapes.keys() - named.keys()),
        ("names parameters twice", {path for path, count in named.items() if count > 1}),
    ):
        if paths:
            raise InputError(f"The conversion table {problem}: {len(paths)}, first {min(paths)!r}.")
    return shapes


def torch_shapes(rules: list[Rule], tree: Mapping[str, Any]) -> dict[str, Shape]:
    """The torch shapes by name that the rules imply for a tree whose leaves have `.shape`."""
    leaves = leaf_shapes(rules, tree)
    shapes: dict[str, Shape] = {}
    for rule in rules:
        leaf = leaves[rule.path]
        shapes |= dict.fromkeys(rule.names(leaf), rule.tensor_shape(leaf))
    return shapes


def tensor_to_leaf(tensor: np.ndarray, shape: Shape, rule: Rule, name: str) -> np.ndarray:
    """A torch tensor as (a layer of) a leaf, if possible a view; InputError unless it fits."""
    expected, actual = rule.tensor_shape(shape), tensor.shape
    fits = actual == expected
    require(fits, f"Tensor {name!r} has shape {actual}, but {rule.path} needs {expected}.")
    return rearrange(tensor, rule.pattern, **rule.axes(shape)) if rule.pattern else tensor


def leaf_to_tensor(leaf: np.ndarray, rule: Rule) -> np.ndarray:
    """Inverse of `tensor_to_leaf`, for one layer of a stack; a view where possible."""
    if rule.pattern is None:
        return leaf
    theirs, ours = rule.pattern.split("->")
    return rearrange(leaf, f"{ours} -> {theirs}")


def gather(rule: Rule, shape: Shape, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """The leaf of `rule`, from tensors that are read by name and held one at a time."""
    leaf = None
    for i, name in enumerate(rule.names(shape)):
        layer = tensor_to_leaf(read(name), shape, rule, name)
        if not rule.stacked:
            return np.ascontiguousarray(layer)
        leaf = np.empty(shape, layer.dtype) if leaf is None else leaf
        dtypes = f"{layer.dtype}, and the layers before it are {leaf.dtype}"
        require(layer.dtype == leaf.dtype, f"Tensor {name!r} is {dtypes}.")
        leaf[i] = layer
    return leaf


def to_jax(
    rules: list[Rule],
    tensors: Mapping,
    abstract: Mapping,
    place: Callable = lambda path, leaf: leaf,
) -> dict[str, Any]:
    """Fills a tree shaped like `abstract` from torch tensors by name, leaf by leaf.

    `tensors` may read lazily: names are compared first, and each is asked for once. Each leaf goes
    through `place(path, leaf)`, for instance onto devices, before the next is begun. InputError for
    a missing tensor, a wrong shape, a tensor that no rule names, or a parameter that none fills.
    """
    shapes = leaf_shapes(rules, abstract)
    # Names first, before anything is read ...
    needed = [name for rule in rules for name in rule.names(shapes[rule.path])]
    for name in needed:
        require(name in tensors, f"Tensor {name!r} is missing.")
    if unused := sorted(set(tensors).difference(needed)):
        raise InputError(f"{len(unused)} tensors are not part of this model, first {unused[0]!r}.")
    # ... then one leaf after the other.
    leaves = {x.path: place(x.path, gather(x, shapes[x.path], tensors.__getitem__)) for x in rules}
    return unflatten(leaves)


def torch_tensors(rules: list[Rule], leaves: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(torch name, tensor) of leaves by path: arrays, or unread ones with `.shape` and
    `.layers(stacked)`, of which one layer is in memory at a time."""
    for rule in rules:
        leaf = leaves[rule.path]
        if hasattr(leaf, "layers"):
            layers = leaf.layers(rule.stacked)
        else:
            layers = np.asarray(leaf) if rule.stacked else [np.asarray(leaf)]
        for name, layer in zip(rule.names(leaf.shape), layers, strict=True):
            yield name, leaf_to_tensor(layer, rule)


def to_torch(rules: list[Rule], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Torch tensors by name from our tree (those that the rules name); inverse of `to_jax`."""
    tensors = torch_tensors(rules, flatten(params))
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors}
