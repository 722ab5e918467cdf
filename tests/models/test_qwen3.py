"""Qwen3 against transformers' values, its cache against itself, and its size."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TRANSFORMER

from blip3o_jax.convert.qwen3 import qwen3_rules
from blip3o_jax.convert.rules import to_jax, to_torch
from blip3o_jax.kernels import cpu
from blip3o_jax.models.layers import RMSNorm
from blip3o_jax.models.qwen3 import Qwen3, head_logits, init_cache, positions_of
from blip3o_jax.parallel.activations import STEP
from blip3o_jax.presets import preset

TIED = TRANSFORMER
UNTIED = dataclasses.replace(TIED, tie_word_embeddings=False)


def abstract_params(cfg):
    x = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(Qwen3(cfg).init, jax.random.key(0), x, x, x == 0)["params"]


def load():
    """(tensors of the tied model by torch name, the other arrays by name)."""
    with np.load(Path(__file__).parents[1] / "fixtures" / "qwen3.npz") as file:
        arrays = dict(file)
    tensors = {
        name.removeprefix("weights/"): arrays.pop(name)
        for name in list(arrays)
        if name.startswith("weights/")
    }
    return tensors, arrays


TENSORS, ARRAYS = load()
ALL_TENSORS = {TIED: TENSORS, UNTIED: {**TENSORS, "lm_head.weight": ARRAYS["lm_head.weight"]}}


@pytest.fixture(scope="module")
def params():
    return {
        cfg: to_jax(qwen3_rules(cfg), tensors, abstract_params(cfg))
        for cfg, tensors in ALL_TENSORS.items()
    }


def hidden_states(params, tokens, valid, model=Qwen3(TIED)):  # noqa: B008, a frozen dataclass
    return jax.jit(model.apply)({"params": params}, tokens, positions_of(valid), valid)[0]


def relative_error(actual, expected):
    return np.abs(np.asarray(actual, np.float32) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("cfg", [TIED, UNTIED], ids=["tied", "untied"])
def test_weights_survive_the_round_trip(params, cfg):
    back = to_torch(qwen3_rules(cfg), params[cfg])
    assert set(back) == set(ALL_TENSORS[cfg])
    assert all(
        back[name].tobytes() == x.tobytes() and back[name].shape == x.shape
        for name, x in ALL_TENSORS[cfg].items()
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_values_are_those_of_transformers(params, side):
    tokens, valid, expected, logits, untied_logits = (
        ARRAYS[f"{side}/{name}"]
        for name in ("tokens", "valid", "hidden", "logits", "untied_logits")
    )
    hidden = hidden_states(params[TIED], tokens, jnp.asarray(valid))
    assert np.isfinite(hidden).all()
    assert relative_error(hidden[valid], expected[valid]) < 1e-5
    assert (
        relative_error(
            Qwen3(TIED).apply({"params": params[TIED]}, hidden, method="logits")[valid],
            logits[valid],
        )
        < 1e-5
    )
    untied = Qwen3(UNTIED).apply({"params": params[UNTIED]}, hidden, method="logits")
    assert relative_error(untied[valid], untied_logits[valid]) < 1e-5


@pytest.mark.parametrize("cfg", [TIED, UNTIED], ids=["tied", "untied"])
def test_logits_of_a_range(params, cfg):
    hidden = jax.random.normal(jax.random.key(0), (2, 24))
    logits = partial(Qwen3(cfg).apply, {"params": params[cfg]}, method="logits")
    np.testing.assert_allclose(logits(hidden, 35, 32), logits(hidden)[:, 35:67], atol=1e-6)
    np.testing.assert_allclose(logits(hidden, 70), logits(hidden)[:, 70:], atol=1e-6)
    head = Qwen3(cfg).apply({"params": params[cfg]}, 35, 32, method="head")
    np.testing.assert_allclose(
        head_logits("bd,dv->bv", hidden, head), logits(hidden, 35, 32), atol=1e-6
    )
    with pytest.raises(ValueError, match="ids 60 to 80 are not in a vocabulary of 72"):
        logits(hidden, 60, 20)


def test_cached_calls_equal_the_whole(params):
    """Two pieces of three tokens, then one token at a time; at last two tokens of each row, another
    number of them back, once more."""
    tokens, valid = ARRAYS["left/tokens"], jnp.asarray(ARRAYS["left/valid"])
    apply = jax.jit(Qwen3(TIED).apply)
    # three places stay empty
    cache, pieces = init_cache(TIED, batch=3, length=13, dtype=jnp.float32), []
    for part in (slice(0, 3), slice(3, 6), *(slice(i, i + 1) for i in range(6, 10))):
        piece, cache = apply(
            {"params": params[TIED]},
            tokens[:, part],
            positions_of(valid)[:, part],
            valid[:, part],
            cache,
        )
        pieces.append(piece)
    assert cache["index"].tolist() == [10] * 3
    np.testing.assert_array_equal(cache["valid"], np.pad(valid, ((0, 0), (0, 3))))
    expected = hidden_states(params[TIED], tokens, valid)
    assert relative_error(np.concatenate(pieces, 1)[valid], expected[valid]) < 1e-5
    back = np.array([[4], [2], [3]])
    places = 10 - back + np.arange(2)
    again, moved = apply(
        {"params": params[TIED]},
        np.take_along_axis(tokens, places, 1),
        np.take_along_axis(np.asarray(positions_of(valid)), places, 1),
        np.ones_like(places, bool),
        cache | {"index": jnp.asarray(10 - back[:, 0])},
    )
    assert moved["index"].tolist() == [8, 10, 9]
    rows = np.arange(3)[:, None]
    assert relative_error(np.asarray(again), np.asarray(expected)[rows, places]) < 1e-5
    np.testing.assert_allclose(moved["k"], cache["k"], atol=1e-5)
    np.testing.assert_allclose(moved["v"], cache["v"], atol=1e-5)


def test_hidden_states_of_every_layer(params):
    """Embeddings first, `__call__`'s result last; between them what a shallower model norms."""
    tokens, valid = ARRAYS["left/tokens"], jnp.asarray(ARRAYS["left/valid"])
    inputs = (tokens, positions_of(valid), valid)
    states = jax.jit(partial(Qwen3(TIED).apply, method="hidden_states"))(
        {"params": params[TIED]}, *inputs
    )
    assert states.shape == (TIED.num_hidden_layers + 1, *tokens.shape, TIED.hidden_size)
    np.testing.assert_array_equal(states[0], params[TIED]["embed_tokens"]["embedding"][tokens])
    np.testing.assert_allclose(states[-1], hidden_states(params[TIED], tokens, valid), atol=1e-6)
    norm = RMSNorm(TIED.rms_norm_eps)
    for depth in (1, 2):
        shallow = params[TIED] | {
            "layers": jax.tree.map(lambda x: x[:depth], params[TIED]["layers"])  # noqa: B023
        }
        model = Qwen3(dataclasses.replace(TIED, num_hidden_layers=depth))
        expected, _ = model.apply({"params": shallow}, *inputs)
        found = norm.apply({"params": params[TIED]["norm"]}, states[depth])
        assert relative_error(found[valid], np.asarray(expected[valid])) < 1e-5


def test_bf16_keeps_logits_in_f32(params):
    tokens, valid = ARRAYS["left/tokens"], jnp.asarray(ARRAYS["left/valid"])
    model = Qwen3(TIED, dtype=jnp.bfloat16)
    hidden = hidden_states(params[TIED], tokens, valid, model)
    logits = model.apply({"params": params[TIED]}, hidden, method="logits")
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    assert relative_error(logits[valid], ARRAYS["left/logits"][valid]) < 0.05


def test_remat_changes_memory_not_gradients(params):
    tokens, valid = ARRAYS["right/tokens"], jnp.asarray(ARRAYS["right/valid"])

    def loss(params, model):
        hidden, _ = model.apply({"params": params}, tokens, positions_of(valid), valid)
        logits = model.apply({"params": params}, hidden, method="logits")
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1), where=valid)

    models = {remat: Qwen3(TIED, remat=remat) for remat in ("none", "dots", "full")}
    products = {
        remat: str(jax.make_jaxpr(jax.grad(partial(loss, model=m)))(params[TIED])).count(
            "dot_general"
        )
        for remat, m in models.items()
    }
    assert products["none"] < products["dots"] < products["full"]
    none, full = (
        jax.jit(jax.grad(partial(loss, model=models[remat])))(params[TIED])
        for remat in ("none", "full")
    )
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), full, none)


def test_unknown_remat_is_named():
    with pytest.raises(ValueError, match=r"'half'.*none, full, dots"):
        jax.eval_shape(
            Qwen3(TIED, remat="half").init, jax.random.key(0), *[jnp.zeros((1, 1), jnp.int32)] * 3
        )


def test_initial_logits_are_small_and_distinct():
    tokens = jnp.arange(8)[None]
    model = Qwen3(dataclasses.replace(TIED, rms_norm_eps=1e-6))
    key = jax.random.key(0, impl="rbg")  # compiles three times faster than threefry
    (hidden, _), variables = jax.jit(model.init_with_output)(key, tokens, tokens, tokens >= 0)
    logits = model.apply(variables, hidden, method="logits")
    # normed states times columns of 0.02
    assert 0.8 < float(jnp.std(logits)) / (0.02 * 24**0.5) < 1.3
    # a token's own vector outweighs what the layers add
    assert jnp.array_equal(jnp.argmax(logits, axis=-1), tokens)
    kernel = variables["params"]["layers"]["self_attn"]["o_proj"]["kernel"]
    assert 0.018 < float(jnp.std(kernel)) < 0.022
    assert not jnp.array_equal(kernel[0], kernel[1])


@pytest.mark.parametrize(
    ("name", "vocab_size", "count"),
    [
        ("blip3o_next_0_6b", 217210, 662_890_496),
        ("blip3o_next_3b", 217210, 1_854_256_128),
        ("blip3o_next_0_6b", 151936, 596_049_920),
        ("blip3o_next_3b", 151936, 1_720_574_976),
    ],
)
def test_published_size(name, vocab_size, count):
    cfg = dataclasses.replace(preset(name).qwen3, vocab_size=vocab_size)
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract_params(cfg))) == count
    abstract = abstract_params(cfg)
    assert abstract["embed_tokens"]["embedding"].shape == (vocab_size, cfg.hidden_size)
    assert abstract["layers"]["self_attn"]["o_proj"]["kernel"].shape == (
        28,
        16,
        128,
        cfg.hidden_size,
    )


@pytest.mark.parametrize(("layers", "products"), [(16, 15), (17, 8)])
def test_weights_of_a_loop_over_layers_are_not_laid_out_for_tokens(monkeypatch, layers, products):
    """A large kernel's product as sums needs two products with ones; attention has one for its
    query."""
    monkeypatch.setattr(cpu, "SMALL", 0)
    cfg = dataclasses.replace(TIED, num_hidden_layers=layers)
    one = jax.ShapeDtypeStruct((5, 1), jnp.int32)
    cache = jax.eval_shape(partial(init_cache, cfg, 5, 9, jnp.float32))
    step = jax.make_jaxpr(partial(Qwen3(cfg).apply, layout=STEP))(
        {"params": abstract_params(cfg)}, one, one, jax.ShapeDtypeStruct((5, 1), bool), cache
    )
    assert str(step).count("dot_general[") == products
