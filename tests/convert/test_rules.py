"""Tables between torch names and our tree: what each pattern means, and what is refused."""

from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import pytest

from blip3o_jax.convert.rules import (
    CONV,
    HEADS_IN,
    HEADS_OUT,
    Rule,
    flatten,
    linear,
    norm,
    to_jax,
    to_torch,
    torch_shapes,
    torch_tensors,
    under,
    unflatten,
)
from blip3o_jax.errors import InputError

RULES = [
    *linear("q_proj", "q", HEADS_OUT, bias="(n h) -> n h"),
    *linear("o_proj", "o", HEADS_IN, bias=None),
    *linear("conv", "conv", CONV),
    *linear("point", "point", "o i 1 1 -> i o", bias=None),
    *norm("norm", "norm", bias=True),
    *under("layers.{}.", "layers/", [*linear("mlp.fc", "fc"), Rule("table", "table")]),
]
# D 6, N 2 heads of H 3, L 2 layers
OURS = {
    "q/kernel": (6, 2, 3),
    "q/bias": (2, 3),
    "o/kernel": (2, 3, 6),
    "conv/kernel": (5, 7, 2, 4),
    "conv/bias": (4,),
    "point/kernel": (2, 4),
    "norm/scale": (6,),
    "norm/bias": (6,),
    "layers/fc/kernel": (2, 3, 8),
    "layers/fc/bias": (2, 8),
    "layers/table": (2, 9, 3),
}
THEIRS = {
    "q_proj.weight": (6, 6),
    "q_proj.bias": (6,),
    "o_proj.weight": (6, 6),
    "conv.weight": (4, 2, 5, 7),
    "conv.bias": (4,),
    "point.weight": (4, 2, 1, 1),
    "norm.weight": (6,),
    "norm.bias": (6,),
    **{f"layers.{i}.mlp.fc.weight": (8, 3) for i in range(2)},
    **{f"layers.{i}.mlp.fc.bias": (8,) for i in range(2)},
    **{f"layers.{i}.table": (9, 3) for i in range(2)},
}


def abstract(shapes):
    return unflatten({path: SimpleNamespace(shape=shape) for path, shape in shapes.items()})


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in THEIRS.items()}


def test_every_axis_goes_where_its_name_says(tensors):
    flat = flatten(to_jax(RULES, tensors, abstract(OURS)))
    assert {path: leaf.shape for path, leaf in flat.items()} == OURS
    n, h, d = 1, 2, 4
    row = n * 3 + h  # of a torch matrix: heads outermost
    assert flat["q/kernel"][d, n, h] == tensors["q_proj.weight"][row, d]
    assert flat["q/bias"][n, h] == tensors["q_proj.bias"][row]
    assert flat["o/kernel"][n, h, d] == tensors["o_proj.weight"][d, row]
    assert flat["conv/kernel"][4, 6, 1, 3] == tensors["conv.weight"][3, 1, 4, 6]
    assert flat["point/kernel"][1, 3] == tensors["point.weight"][3, 1, 0, 0]
    assert flat["layers/fc/kernel"][1, 2, 7] == tensors["layers.1.mlp.fc.weight"][7, 2]
    np.testing.assert_array_equal(flat["layers/table"][1], tensors["layers.1.table"])


def test_round_trip_gives_back_the_bytes(tensors):
    tensors["q_proj.weight"][0, 0] = -0.0  # equal to 0.0, so only bytes tell
    back = to_torch(RULES, to_jax(RULES, tensors, abstract(OURS)))
    assert set(back) == set(tensors)
    assert all(
        back[name].tobytes() == tensors[name].tobytes() and back[name].flags["C_CONTIGUOUS"]
        for name in tensors
    )


def test_torch_shapes_need_no_arrays():
    assert torch_shapes(RULES, abstract(OURS)) == THEIRS


def test_torch_shapes_are_those_of_the_tensors(tensors):
    params = to_jax(RULES, tensors, abstract(OURS))
    rebuilt = torch_tensors(RULES, flatten(params))
    shapes = [(name, tensor.shape) for name, tensor in rebuilt]
    assert shapes == list(torch_shapes(RULES, params).items())


def test_tree_and_paths_are_inverse():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten(tree) == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert unflatten(flatten(tree)) == tree


class Lazy(Mapping):
    """Writes down what is read."""

    def __init__(self, tensors, events):
        self.tensors, self.events = tensors, events

    def __getitem__(self, name):
        self.events.append(name)
        return self.tensors[name]

    def __contains__(self, name):
        return name in self.tensors

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


def test_a_leaf_is_placed_before_the_next_is_read(tensors):
    events = []
    rules = [*norm("norm", "norm"), Rule("layers.{}.table", "layers/table")]
    tensors = {name: tensors[name] for name in ("norm.weight", "layers.0.table", "layers.1.table")}
    tree = abstract({path: OURS[path] for path in ("norm/scale", "layers/table")})
    params = to_jax(
        rules, Lazy(tensors, events), tree, lambda path, leaf: events.append(path) or leaf.sum()
    )
    assert events == [
        "norm.weight",
        "norm/scale",
        "layers.0.table",
        "layers.1.table",
        "layers/table",
    ]
    assert (
        params["layers"]["table"]
        == np.stack([tensors["layers.0.table"], tensors["layers.1.table"]]).sum()
    )


def test_names_are_compared_before_anything_is_read(tensors):
    events = []
    del tensors["layers.1.table"]
    with pytest.raises(InputError, match=r"'layers\.1\.table' is missing"):
        to_jax(RULES, Lazy(tensors, events), abstract(OURS))
    assert events == []


def test_a_tensor_of_no_rule_is_refused(tensors):
    with pytest.raises(
        InputError, match=r"2 tensors are not part of this model, first 'layers\.2\.table'"
    ):
        to_jax(
            RULES, {**tensors, "stray": np.zeros(1), "layers.2.table": np.zeros(1)}, abstract(OURS)
        )


@pytest.mark.parametrize("shape", [(3, 8), (8, 3, 1), (24,)])
def test_a_wrong_shape_is_refused(tensors, shape):
    tensors["layers.1.mlp.fc.weight"] = np.zeros(shape, np.float32)
    with pytest.raises(
        InputError,
        match=r"'layers\.1\.mlp\.fc\.weight' has shape .* but layers/fc/kernel needs \(8, 3\)",
    ):
        to_jax(RULES, tensors, abstract(OURS))


def test_layers_of_different_dtype_are_refused(tensors):
    tensors["layers.1.table"] = tensors["layers.1.table"].astype(np.float16)
    with pytest.raises(
        InputError, match=r"'layers\.1\.table' is float16, and the layers before it are float32"
    ):
        to_jax(RULES, tensors, abstract(OURS))


@pytest.mark.parametrize(
    ("rules", "shapes", "message"),
    [
        (
            RULES,
            {k: v for k, v in OURS.items() if k != "norm/bias"},
            "this model does not have: 1, first 'norm/bias'",
        ),
        (RULES, {**OURS, "extra/kernel": (1,)}, "unfilled: 1, first 'extra/kernel'"),
        ([*RULES, Rule("again", "norm/bias")], OURS, "twice: 1, first 'norm/bias'"),
        (RULES, {**OURS, "q/kernel": (6, 6)}, "q/kernel the axes d n h, but its shape is"),
    ],
)
def test_a_table_that_does_not_fit_the_model_is_refused(tensors, rules, shapes, message):
    with pytest.raises(InputError, match=message):
        to_jax(rules, tensors, abstract(shapes))
    with pytest.raises(InputError, match=message):
        torch_shapes(rules, abstract(shapes))
