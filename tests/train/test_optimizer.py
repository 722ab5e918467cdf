"""Norms and steps: the textbook's values, however they are computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from blip3o_jax.train import optimizer, steps
from blip3o_jax.train.config import JointConfig, OptimizerConfig, TrainConfig
from blip3o_jax.train.optimizer import norm


@pytest.fixture
def tree():
    rng = np.random.default_rng(0)
    return {
        "stack": rng.standard_normal((3, 40, 5), np.float32),
        "rows": {"kernel": rng.standard_normal((70, 2), np.float32)},
        "vector": rng.standard_normal(33, np.float32),
        "number": np.float32(7),
    }


def test_norm_is_over_all_numbers(tree):
    expected = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(tree)))
    np.testing.assert_allclose(jax.jit(norm)(tree), expected, rtol=1e-6)
    # a square alone is beyond float16
    assert norm({"half": jnp.full((2, 9), 300, jnp.float16)}) == pytest.approx(300 * 18**0.5)


def advance(cfg, grads, moments, params):
    after = optimizer.moments(cfg, grads, norm(grads), moments)
    return after, optax.apply_updates(params, optimizer.updates(cfg, 10, after, params))


@pytest.mark.parametrize("clip_norm", [0.0, 1.0, 1000.0])
def test_steps_are_those_of_optax(tree, clip_norm):
    """Three steps of clipping and AdamW with a warm-up, decay of matrices only and a factor for one
    part."""
    cfg = OptimizerConfig(
        3e-3,
        1e-3,
        warmup_steps=2,
        b2=0.95,
        weight_decay=0.1,
        clip_norm=clip_norm,
        part_learning_rates={"rows": 0.5},
    )
    mask = {"stack": False, "rows": {"kernel": True}, "vector": False, "number": False}
    adamw = optax.adamw(
        optimizer.schedule(cfg, 10),
        cfg.b1,
        cfg.b2,
        cfg.eps,
        weight_decay=cfg.weight_decay,
        mask=mask,
    )
    factors = optax.stateless(
        lambda updates, _: updates | {"rows": optax.tree.scale(0.5, updates["rows"])}
    )
    chain = optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(), adamw, factors
    )
    ours, theirs, moments, state = tree, tree, optimizer.init(tree), chain.init(tree)
    step = jax.jit(functools.partial(advance, cfg))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        grads = jax.tree.map(lambda x, rng=rng: rng.standard_normal(x.shape, np.float32), tree)
        moments, ours = step(grads, moments, ours)
        changes, state = chain.update(grads, state, theirs)
        theirs = optax.apply_updates(theirs, changes)
    moved = [jax.tree.map(lambda a, b: a - b, side, tree) for side in (ours, theirs)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), *moved)
    assert norm(moved[0]["rows"]) > 0
    adam, close = state[1][0], functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8)
    jax.tree.map(close, (moments.mu, moments.nu), (adam.mu, adam.nu))


def test_a_step_writes_the_state_where_it_lies():
    """Parameters, moments and average are donated; a copy of any of them would be as large as the
    kernel."""
    cfg = TrainConfig(
        stage="joint",
        joint=JointConfig(trainable_sana="all"),
        optimizer=OptimizerConfig(ema_decay=0.9),
    )
    params = {"sana": {"kernel": jnp.ones((4, 64, 128))}}
    state, _ = steps.init_state(cfg, params)
    step = (
        jax.jit(functools.partial(steps.advance, cfg), donate_argnums=0)
        .lower(state, params, {"loss": jnp.float32(1)})
        .compile()
    )
    memory, kernel = step.memory_analysis(), params["sana"]["kernel"].nbytes
    assert memory.alias_size_in_bytes >= 4 * kernel
    assert memory.temp_size_in_bytes < kernel
