"""Sampling against numpy; decoding against transformers and against a second full forward."""

import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TRANSFORMER
from tiny import TRANSFORMER_VOCAB as VOCAB

from blip3o_jax.config import replace
from blip3o_jax.convert.qwen3 import qwen3_rules
from blip3o_jax.convert.rules import to_jax
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.models.qwen3 import Qwen3, positions_of
from blip3o_jax.parallel.mesh import BATCH, make_mesh
from blip3o_jax.parallel.parameters import shardings
from blip3o_jax.plan.collectives import collectives
from blip3o_jax.presets import preset
from blip3o_jax.sample.decode import generate_tokens, sample, token_logprobs

CFG = TRANSFORMER
MODEL = Qwen3(CFG)
N = 6

traced = []


def counted(*args):
    traced.append(args)
    return generate_tokens(*args)


generate = jax.jit(counted, static_argnums=(0, 2, 3, 7))
jit_sample = jax.jit(sample, static_argnums=2)


@pytest.fixture(scope="module")
def arrays():
    with np.load(Path(__file__).parents[1] / "fixtures" / "qwen3.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def params(arrays):
    tensors = {
        name.removeprefix("weights/"): x
        for name, x in arrays.items()
        if name.startswith("weights/")
    }
    x = jnp.zeros((1, 1), jnp.int32)
    return to_jax(
        qwen3_rules(CFG),
        tensors,
        jax.eval_shape(MODEL.init, jax.random.key(0), x, x, x == 0)["params"],
    )


def run(params, prompt, valid, keys, top_k=20, top_p=0.9, temperature=1.0):
    return generate(
        MODEL,
        params,
        VOCAB,
        N,
        jnp.asarray(prompt),
        jnp.asarray(valid),
        keys,
        top_k,
        top_p,
        temperature,
    )


def close(actual, expected):
    return np.abs(np.asarray(actual) - expected).max() < 1e-5 * np.abs(expected).max()


# Sampling
# ------------------------------------------------------------

# in order of size: 1, 4, 2, 3, 0
LOGITS = np.log(np.array([0.05, 0.4, 0.15, 0.1, 0.3], np.float32)) + 3
DRAWS = 4000


def draw(top_k, top_p, temperature=1.0, logits=LOGITS):
    keys = jax.random.split(jax.random.key(0), DRAWS)
    return jit_sample(jnp.tile(logits, (DRAWS, 1)), keys, top_k, top_p, temperature)


def kept(top_k, top_p, temperature):
    """The truncated distribution: the smallest probabilities are struck out."""
    probs = np.exp(LOGITS.astype(np.float64) / temperature)
    order = np.argsort(-probs)
    probs[order[top_k or 5 :]] = 0
    probs /= probs.sum()
    rising = order[::-1]
    struck = np.cumsum(probs[rising]) <= 1 - top_p
    struck[-1] = False
    probs[rising[struck]] = 0
    return probs / probs.sum()


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature", "support"),
    [
        (0, 1.0, 1.0, {0, 1, 2, 3, 4}),
        (99, 1.0, 2.0, {0, 1, 2, 3, 4}),
        (3, 1.0, 1.0, {1, 4, 2}),
        (0, 0.72, 1.0, {1, 4, 2}),  # 0.4 and 0.3 are below 0.72: the next still enters
        (0, 0.69, 1.0, {1, 4}),
        (0, 0.01, 1.0, {1}),
        (0, 0.0, 1.0, {1}),
        # of the three, 0.47 and 0.35; of all five 0.81 would let the third in
        (3, 0.81, 1.0, {1, 4}),
        (0, 0.72, 0.5, {1, 4}),  # colder: 0.55 and 0.31
    ],
)
def test_truncation_and_frequencies(top_k, top_p, temperature, support):
    ids, logprobs = draw(top_k, top_p, temperature)
    expected = kept(top_k, top_p, temperature)
    assert set(np.flatnonzero(expected)) == support
    assert set(np.unique(ids)) == support
    np.testing.assert_allclose(
        np.bincount(ids, minlength=5) / DRAWS, expected, atol=4 * 0.5 * DRAWS**-0.5
    )
    whole = jax.nn.log_softmax(LOGITS / temperature)
    np.testing.assert_allclose(logprobs, whole[ids], atol=1e-6)


def test_temperature_zero_is_greedy():
    ids, logprobs = draw(0, 1.0, 0.0)
    assert set(np.unique(ids)) == {1}
    np.testing.assert_allclose(logprobs, np.log(0.4), atol=1e-6)


def test_each_row_draws_with_its_own_key():
    keys = jax.random.split(jax.random.key(3), 50)
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((50, 9)), jnp.float32)
    together, _ = jit_sample(logits, keys, 5, 0.9, 1.0)
    alone = [
        int(jit_sample(logits[i : i + 1], keys[i : i + 1], 5, 0.9, 1.0)[0][0]) for i in range(50)
    ]
    assert together.tolist() == alone
    assert jit_sample(logits, keys[::-1], 5, 0.9, 1.0)[0].tolist() != alone


def test_token_logprobs():
    logits = np.random.default_rng(0).standard_normal((2, 3, 7), np.float32)
    ids = np.array([[0, 6, 2], [5, 5, 1]])
    expected = np.take_along_axis(
        logits - np.log(np.exp(logits).sum(-1, keepdims=True)), ids[..., None], -1
    )[..., 0]
    np.testing.assert_allclose(token_logprobs(logits, ids), expected, atol=1e-6)


# Decoding
# ------------------------------------------------------------


def test_greedy_tokens_are_those_of_transformers(arrays, params):
    out = run(
        params,
        arrays["left/tokens"],
        arrays["left/valid"],
        jax.random.split(jax.random.key(0), 3),
        temperature=0.0,
    )
    np.testing.assert_array_equal(out["tokens"], arrays["greedy/tokens"])
    assert close(out["hidden"], arrays["greedy/hidden"])


@pytest.fixture(scope="module")
def drawn(arrays, params):
    keys = jax.random.split(jax.random.key(7), 3)
    return keys, run(params, arrays["left/tokens"], arrays["left/valid"], keys, temperature=1.5)


def test_hidden_states_are_those_of_a_second_forward(arrays, params, drawn):
    """The original generates, then runs the transformer again over all ids (docs/model.md §6.6 no.
    3)."""
    _, out = drawn
    assert out["tokens"].shape == (3, N)
    assert out["tokens"].dtype == jnp.int32
    assert ((out["tokens"] >= 0) & (out["tokens"] < VOCAB.num_image_tokens)).all()
    assert len(set(np.asarray(out["tokens"]).ravel().tolist())) > N
    tokens = np.concatenate(
        [arrays["left/tokens"], out["tokens"] + VOCAB.image_start_token_id], axis=1
    )
    valid = jnp.asarray(np.pad(arrays["left/valid"], ((0, 0), (0, N)), constant_values=True))
    hidden, _ = jax.jit(MODEL.apply)({"params": params}, tokens, positions_of(valid), valid)
    assert close(out["hidden"], hidden[:, -N - 1 :])
    logits = MODEL.apply({"params": params}, hidden[:, -N - 1 : -1], 35, 32, method="logits") / 1.5
    np.testing.assert_allclose(out["logprobs"], token_logprobs(logits, out["tokens"]), atol=1e-5)


def test_ragged_batch_equals_single_runs(arrays, params, drawn):
    keys, out = drawn
    assert arrays["left/valid"].sum(1).tolist() == [10, 7, 4]
    # the second padded as in the batch, the third not at all
    for row, width in enumerate((10, 10, 4)):
        prompt, valid = (
            arrays[f"left/{name}"][row : row + 1, -width:] for name in ("tokens", "valid")
        )
        alone = run(params, prompt, valid, keys[row : row + 1], temperature=1.5)
        np.testing.assert_array_equal(alone["tokens"][0], out["tokens"][row])
        assert close(alone["hidden"][0], out["hidden"][row])
        np.testing.assert_allclose(alone["logprobs"][0], out["logprobs"][row], atol=1e-5)


def test_keys_decide(arrays, params, drawn):
    keys, out = drawn
    again = partial(run, params, arrays["left/tokens"], arrays["left/valid"], temperature=1.5)
    np.testing.assert_array_equal(again(keys)["tokens"], out["tokens"])
    assert not np.array_equal(
        again(jax.random.split(jax.random.key(8), 3))["tokens"], out["tokens"]
    )
    # The key decides, not the row.
    swapped = run(
        params, arrays["left/tokens"][::-1], arrays["left/valid"][::-1], keys[::-1], temperature=1.5
    )
    np.testing.assert_array_equal(swapped["tokens"][::-1], out["tokens"])


def test_step_i_draws_with_the_key_folded_with_i(arrays, params, drawn):
    keys, _ = drawn
    flat = {**params, "embed_tokens": {"embedding": jnp.zeros((CFG.vocab_size, CFG.hidden_size))}}
    out = run(flat, arrays["left/tokens"], arrays["left/valid"], keys, temperature=1.5)
    for i in range(N):
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        np.testing.assert_array_equal(
            out["tokens"][:, i], jit_sample(jnp.zeros((3, 32)), step_keys, 20, 0.9, 1.5)[0]
        )


def test_other_prompts_and_settings_need_no_other_program(arrays, params, drawn):
    before = len(traced)
    prompt = np.roll(arrays["left/tokens"], 1, axis=0)
    valid = np.roll(arrays["left/valid"], 1, axis=0)
    for top_p, temperature in ((0.5, 0.7), (1.0, 0.0), (0.1, 1.0)):
        run(
            params,
            prompt,
            valid,
            jax.random.split(jax.random.key(9), 3),
            top_p=top_p,
            temperature=temperature,
        )
    assert len(traced) == before


@pytest.mark.parametrize("sizes", [None, {"data": 2}, {"data": 2, "fsdp": 2}, {"data": 4}])
def test_images_of_one_prompt_are_those_of_its_copies(arrays, params, sizes):
    """Of two prompts, which four devices do not divide."""
    prompt, valid = arrays["left/tokens"][:2], arrays["left/valid"][:2]
    keys = jax.random.split(jax.random.key(3), 8)
    devices = jax.devices()[: math.prod((sizes or {}).values())]
    with jax.set_mesh(make_mesh(sizes, devices)) if sizes else nullcontext():
        shared = run(params, prompt, valid, keys)
        copies = run(params, prompt.repeat(4, axis=0), valid.repeat(4, axis=0), keys)
    assert len(np.unique(shared["tokens"], axis=0)) == 8
    np.testing.assert_array_equal(shared["tokens"], copies["tokens"])
    np.testing.assert_allclose(shared["hidden"], copies["hidden"], atol=1e-5)
    np.testing.assert_allclose(shared["logprobs"], copies["logprobs"], atol=1e-5)


def test_a_prompt_is_read_once_for_its_images(arrays, params):
    """Else its arithmetic would be that of the copies."""
    prompt, valid = arrays["left/tokens"][:1], arrays["left/valid"][:1]
    keys = jax.random.split(jax.random.key(3), 8)

    def flops(rows):
        inputs = prompt.repeat(rows, axis=0), valid.repeat(rows, axis=0), keys
        lowered = generate.lower(MODEL, params, VOCAB, N, *inputs, 0, 1.0, 1.0)
        return lowered.cost_analysis()["flops"]

    def reading(rows):
        ids = prompt.repeat(rows, axis=0)
        there = valid.repeat(rows, axis=0)
        read = jax.jit(
            lambda params: MODEL.apply({"params": params}, ids, positions_of(there), there)
        )
        return read.lower(params).cost_analysis()["flops"]

    assert flops(8) - flops(1) > 0.8 * (reading(8) - reading(1)) > 0


def test_shapes_that_do_not_fit(params):
    prompt = jnp.ones((2, 4), jnp.int32)
    with pytest.raises(ValueError, match=r"keys \(3,\)"):
        generate_tokens(
            MODEL,
            params,
            VOCAB,
            N,
            prompt,
            prompt > 0,
            jax.random.split(jax.random.key(0), 3),
            5,
            1.0,
            1.0,
        )


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 4}, {"fsdp": 4, "tensor": 2}])
def test_weights_that_are_cut_stay_where_they_are(sizes):
    """Layers are a loop, as elsewhere than on a CPU.

    A projection of keys gathered for each of 32 tokens sends 1.8 times all layers, the head 3.3
    times.
    """
    widths = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
    }
    cfg = replace(
        preset("mid_128"),
        **{f"qwen3.{name}": size for name, size in (widths | {"num_hidden_layers": 17}).items()},
    )
    mesh, model, count = make_mesh(sizes), Qwen3(cfg.qwen3), 32
    rows = jax.NamedSharding(mesh, BATCH)
    weights = Blip3o(cfg).abstract()["qwen3"]
    size = sum(x.size * 4 for x in jax.tree.leaves(weights["layers"]))
    places = shardings({"qwen3": weights}, mesh)["qwen3"]
    placed = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), weights, places
    )
    prompt, valid = (
        jax.ShapeDtypeStruct((8, 4), dtype, sharding=rows) for dtype in (jnp.int32, bool)
    )

    @partial(jax.jit, out_shardings=rows)
    def write(params, prompt, valid):
        return generate_tokens(
            model,
            params,
            cfg.vocab,
            count,
            prompt,
            valid,
            jax.random.split(jax.random.key(0), 8),
            10,
            0.9,
            1.0,
        )

    with jax.set_mesh(mesh):
        sent = collectives(write.lower(placed, prompt, valid).compile().as_text())
    # Once is the prompts' pass, which gathers the layers.
    assert size < mesh.shape["tensor"] * sum(kind["bytes"] for kind in sent.values()) < 2.2 * size
