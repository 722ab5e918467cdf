"""GRPO on the transformer: what decoding and the update see, and a reward that is learned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SMALL

from blip3o_jax.config import replace
from blip3o_jax.convert.random_weights import random_params
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.presets import preset
from blip3o_jax.rl import grpo
from blip3o_jax.rl.logprobs import image_logprobs
from blip3o_jax.rl.update import compile_update
from blip3o_jax.sample import decode
from blip3o_jax.train import steps
from blip3o_jax.train.config import GrpoConfig, OptimizerConfig, TrainConfig

MODEL = Blip3o(replace(preset("emoji_64"), **SMALL))
VOCAB, N = MODEL.config.vocab, 4


@pytest.fixture(scope="module")
def params():
    """Of all parts, drawn by numpy: compiling `init` takes longer than the tests."""
    return jax.tree.map(jnp.asarray, random_params(MODEL.config))


def draw(params, prompts, key):
    """Rows of ids -> tokens [B,n], logprobs [B,n], training rows [B,T], start [B]."""
    length = max(map(len, prompts))
    prompt, valid = (
        np.zeros((len(prompts), length), np.int32),
        np.zeros((len(prompts), length), bool),
    )
    rows = np.full((len(prompts), length + N + 2), VOCAB.pad_token_id, np.int32)
    for i, ids in enumerate(prompts):
        prompt[i, length - len(ids) :], valid[i, length - len(ids) :], rows[i, : len(ids)] = (
            ids,
            True,
            ids,
        )
    keys = jax.random.split(key, len(prompts))
    made = decode.generate_tokens(
        MODEL.qwen3,
        params["qwen3"],
        VOCAB,
        N,
        prompt,
        valid,
        keys,
        0,
        jnp.float32(1),
        jnp.float32(1),
    )
    start = np.array([len(ids) - 1 for ids in prompts], np.int32)
    for i, at in enumerate(start):
        rows[i, at + 1 : at + 1 + N] = np.asarray(made["tokens"])[i] + VOCAB.image_start_token_id
    return made["tokens"], made["logprobs"], rows, start


def test_the_update_sees_the_probabilities_that_decoding_drew_with(params):
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    _, logprobs, rows, start = draw(params, prompts, jax.random.key(1))
    found, _ = image_logprobs(MODEL, params["qwen3"], rows, start, 1.0)
    np.testing.assert_allclose(found, logprobs, atol=2e-5)


def test_a_rewarded_token_becomes_likely_and_only_the_transformer_moves(params):
    """Reward: share of even codes, half at first. The frozen connector stays as it is."""
    cfg = TrainConfig(
        stage="grpo",
        batch_size=32,
        num_steps=40,
        grpo=GrpoConfig(num_generations=8, beta=0.01),
        optimizer=OptimizerConfig(learning_rate=3e-3, final_learning_rate=3e-3, warmup_steps=1),
    )
    parts = {part: params[part] for part in ("qwen3", "diffusion_connector")}
    state, frozen = steps.init_state(cfg, jax.tree.map(jnp.copy, parts))
    assert set(state["params"]) == {"qwen3"}
    assert set(frozen) == {"diffusion_connector"}
    sample, update = (
        jax.jit(lambda params, key: draw_static(params, key)),
        compile_update(MODEL, cfg, None),
    )
    rewards = []
    for step in range(40):
        tokens, logprobs, rows, start = jax.device_get(
            sample(state["params"], jax.random.key(100 + step))
        )
        rewards.append(np.mean(tokens % 2 == 0, axis=1))
        batch = {
            "tokens": rows,
            "start": start,
            "logprobs": logprobs,
            "advantages": grpo.advantages(rewards[-1][:, None], [1.0], cfg.grpo)[0],
            "mask": np.ones(32, np.float32),
        }
        state, metrics = update(state, {}, {"qwen3": params["qwen3"]}, {"transformer": batch})
        assert metrics["logprob_gap"] < 1e-4
    assert 0.3 < np.mean(rewards[:3]) < 0.7
    assert np.mean(rewards[-3:]) > 0.75
    assert 0 < metrics["kl"] < 5


def draw_static(params, key):
    """`draw` for 32 copies of one prompt, traceable."""
    prompt = jnp.tile(jnp.array([5, 6, 7], jnp.int32), (32, 1))
    keys = jax.random.split(key, 32)
    args = prompt, jnp.ones_like(prompt, bool), keys, 0, jnp.float32(1), jnp.float32(1)
    made = decode.generate_tokens(MODEL.qwen3, params["qwen3"], VOCAB, N, *args)
    rows = jnp.concatenate([prompt, made["tokens"] + VOCAB.image_start_token_id], axis=1)
    return made["tokens"], made["logprobs"], rows, jnp.full(32, 2)
