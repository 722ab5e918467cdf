"""Where things are when a program runs on eight devices: what XLA does with activations and with
the token table, seen in its program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.data.config import DataConfig, SourceConfig
from blip3o_jax.parallel.activations import ROWS, WHOLE, lookup, pin, pin_rows
from blip3o_jax.parallel.mesh import BATCH, make_mesh
from blip3o_jax.plan.collectives import sizes
from blip3o_jax.plan.programs import lower_step
from blip3o_jax.presets import preset
from blip3o_jax.train.config import TrainConfig

MESHES = [{"fsdp": 8}, {"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}]


def test_the_pin_is_nothing_without_a_mesh_or_with_another():
    x = jnp.ones((8, 4))
    assert pin_rows(x) is x
    with jax.set_mesh(jax.make_mesh((8,), ("all",), axis_types=(jax.sharding.AxisType.Auto,))):
        assert jax.jit(pin_rows)(x).shape == x.shape


def test_an_axis_that_does_not_divide_is_left_to_the_compiler():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        place = jax.jit(lambda x: pin(x, (ROWS, None, "tensor")))(jnp.ones((8, 3, 6))).sharding
        assert place.is_equivalent_to(
            jax.NamedSharding(mesh, jax.P(("data", "fsdp"), None, "tensor")), 3
        )
        odd = jax.jit(lambda x: pin(x, (ROWS, None, "tensor")))(jnp.ones((3, 3, 5)))
        np.testing.assert_array_equal(odd, 1)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_lookup_and_its_gradient_on_any_mesh(sizes):
    rng = np.random.default_rng(0)
    table, probe = (
        rng.standard_normal((26, 16), np.float32),
        rng.standard_normal((8, 6, 16), np.float32),
    )
    ids = rng.integers(0, 26, (8, 6))

    def loss(table, ids):
        rows = lookup(table, ids, jnp.float32, WHOLE.stream)
        return jnp.sum(rows * probe), rows

    expected = np.zeros_like(table)
    np.add.at(expected, ids, probe)
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        placed = jax.device_put(table, jax.NamedSharding(mesh, jax.P("tensor", "fsdp")))
        gradient, rows = jax.jit(jax.grad(loss, has_aux=True))(
            placed, jax.device_put(ids, jax.NamedSharding(mesh, BATCH))
        )
    np.testing.assert_array_equal(rows, table[ids])
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def step_of(mesh: dict[str, int]) -> str:
    """The step of a small model, all of whose sizes differ, for 8 devices: what XLA made of it."""
    wide = {"qwen3.hidden_size": 320, "qwen3.intermediate_size": 704, "sana.caption_channels": 448}
    layers = {
        "qwen3.num_hidden_layers": 2,
        "sana.num_layers": 2,
        "ta_tok.encoder.num_hidden_layers": 2,
    }
    # Codes and latents from a cache, which here is only a name: the encoders are not what this
    # looks at.
    data = DataConfig(row_length=160, sources=(SourceConfig("webdataset", "*.tar"),), cache="cache")
    cfg = TrainConfig(
        "joint", model=wide | layers, batch_size=16, remat="full", dtype="float32", data=data
    )
    return lower_step(cfg, make_mesh(mesh)).lowered.compile().as_text()


def test_no_device_computes_the_whole_batch():
    """Rows of all devices (16) of hidden states, of a layer's inside, of logits: none may exist.

    Before activations were pinned all did.
    """
    program, vocabulary = step_of({"fsdp": 8}), preset("emoji_64").qwen3.vocab_size
    for wide in (320, 704, vocabulary, 448, 480):
        assert not re.search(rf"f32\[16,(160|159|65|64|8,8),{wide}\]", program), wide
    assert re.search(r"f32\[2,160,320\]", program)  # two rows a device


def test_the_token_table_is_gathered_for_the_logits_only():
    """With heads and vocabulary cut too, where XLA by itself gathers it for the lookup."""
    program, rows = (
        step_of({"data": 2, "fsdp": 2, "tensor": 2}),
        preset("emoji_64").qwen3.vocab_rows,
    )
    gathered = re.findall(
        rf"= f32\[({rows}|{rows // 2}),(?:320|160)\]\S* all-gather\(.*op_name=\"([^\"]*)", program
    )
    assert {size for size, _ in gathered} == {str(rows // 2)}
    assert all("logits" in name for _, name in gathered)
    # The lookup's results change places: 8 rows of 160 tokens, half of the width.
    moved = [sum(sizes(shape)) for shape in re.findall(r"= (\(.*?\)) all-to-all\(", program)]
    assert moved
    assert max(moved) == 8 * 160 * 320 // 2 * 4
