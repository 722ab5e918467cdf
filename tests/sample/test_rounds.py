"""Tokens in windows are those of one by one, in fewer rounds, on one device and on eight."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sample.one_by_one import one_by_one, windows_of
from tiny import TRANSFORMER
from tiny import TRANSFORMER_VOCAB as VOCAB

from blip3o_jax.models.qwen3 import Qwen3
from blip3o_jax.parallel.mesh import BATCH, make_mesh
from blip3o_jax.parallel.parameters import shardings
from blip3o_jax.plan import collectives
from blip3o_jax.sample.decode import generate_tokens

MODEL, N, ROWS = Qwen3(TRANSFORMER), 25, 8
SETTINGS = {"default": (1200, 0.95, 1.0), "cold": (0, 1.0, 0.3), "greedy": (1200, 0.95, 0.0)}


@pytest.fixture(scope="module")
def params():
    x = jnp.zeros((1, 1), jnp.int32)
    params = MODEL.init(jax.random.key(0), x, x, x == 0)["params"]
    # Larger weights: what came before decides more, but not all.
    params["embed_tokens"] = jax.tree.map(lambda x: 20 * x, params["embed_tokens"])
    grow = partial(jax.tree.map, lambda x: 5 * x)
    layers = params["layers"]
    return params | {"layers": layers | {name: grow(layers[name]) for name in ("mlp", "self_attn")}}


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    prompt = rng.integers(2, 30, (ROWS, 7)).astype(np.int32)
    valid = np.arange(7) >= np.array([[0], [3], [5], [1], [0], [6], [2], [4]])
    prompt[:, -1] = VOCAB.scale_start_token_id
    return np.where(valid, prompt, 0), valid, jax.random.split(jax.random.key(5), ROWS)


def written(params, inputs, settings, window, drafts=None, **options):
    write = jax.jit(
        lambda params, drafts, *inputs: generate_tokens(
            MODEL, params, VOCAB, N, *inputs, *settings, drafts=drafts
        ),
        **options,
    )
    with windows_of(window):
        return jax.device_get(write(params, drafts, *inputs))


@pytest.fixture(scope="module")
def expected(params, inputs):
    write = jax.jit(partial(one_by_one, MODEL), static_argnums=(1, 2, 6))
    return {
        name: jax.device_get(write(params, VOCAB, N, *inputs, *values))
        for name, values in SETTINGS.items()
    }


def same(found, one):
    np.testing.assert_array_equal(found["tokens"], one["tokens"])
    np.testing.assert_allclose(found["hidden"], one["hidden"], atol=2e-4)
    np.testing.assert_allclose(found["logprobs"], one["logprobs"], atol=2e-4)


@pytest.mark.parametrize("name", SETTINGS)
def test_windows_give_the_tokens_of_one_by_one(params, inputs, expected, name):
    found = written(params, inputs, SETTINGS[name], 8)
    same(found, expected[name])
    assert len(set(np.ravel(found["tokens"]).tolist())) > 3
    assert found["rounds"].mean() < 0.8 * N


def test_rows_stop_each_for_itself(params, inputs, expected):
    """A row that is drafted as it will be drawn takes the fewest rounds; of the others every
    guess is wrong."""
    one = expected["default"]
    drafts = (one["tokens"] + 1) % 32
    drafts[2] = one["tokens"][2]
    found = written(params, inputs, SETTINGS["default"], 5, drafts)
    same(found, one)
    assert found["rounds"][2] == N / 5
    assert (np.delete(found["rounds"], 2) > N / 5).all()


@pytest.mark.parametrize("window", [1, 3, 40])
def test_any_window_even_one_beyond_the_image(params, inputs, expected, window):
    found = written(params, inputs, SETTINGS["default"], window)
    same(found, expected["default"])
    assert (found["rounds"] == N).all() == (window == 1)


def on_mesh(params, inputs, mesh):
    """Weights and inputs, placed, and where the results go."""
    placed = jax.device_put(params, shardings({"qwen3": params}, mesh)["qwen3"])
    rows = jax.NamedSharding(mesh, BATCH)
    return placed, jax.device_put(inputs, rows), rows


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_eight_devices_write_the_same(params, inputs, expected, sizes):
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        placed, arrays, rows = on_mesh(params, inputs, mesh)
        drafts = jax.device_put(expected["cold"]["tokens"], rows)
        for guesses in (None, drafts):
            found = written(placed, arrays, SETTINGS["cold"], 8, guesses, out_shardings=rows)
            same(found, expected["cold"])
            assert found["rounds"].mean() < 0.8 * N


def test_devices_with_all_weights_wait_for_no_other(params, inputs):
    mesh = make_mesh({"data": 8})
    write = jax.jit(
        lambda params, *inputs: generate_tokens(MODEL, params, VOCAB, N, *inputs, 0, 1.0, 1.0)
    )
    with jax.set_mesh(mesh), windows_of(4):
        placed, arrays, _ = on_mesh(params, inputs, mesh)
        program = write.lower(placed, *arrays).compile().as_text()
    assert "while(" in program
    assert not collectives.collectives(program)
