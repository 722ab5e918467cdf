"""The formulas of GRPO, each against TRL's as written down here in numpy and float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from blip3o_jax.config import replace
from blip3o_jax.convert.random_weights import random_params
from blip3o_jax.errors import InputError
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.presets import preset
from blip3o_jax.rl import grpo, logprobs
from blip3o_jax.rl.update import compile_update
from blip3o_jax.train import steps
from blip3o_jax.train.config import GrpoConfig, OptimizerConfig, TrainConfig
from blip3o_jax.train.read_config import read_config

B, N, G = 12, 7, 4


def expected_advantages(rewards, weights, scale, order):
    """For rewards without NaN."""
    groups = rewards.reshape(-1, G, rewards.shape[1])
    if order == "normalize_then_sum":
        normal = (groups - groups.mean(1, keepdims=True)) / (
            groups.std(1, ddof=1, keepdims=True) + 1e-4
        )
        total = normal.reshape(rewards.shape) @ weights
        return (total - total.mean()) / (total.std(ddof=1) + 1e-4)
    total = rewards @ weights
    groups = total.reshape(-1, G)
    spread = {
        "group": groups.std(1, ddof=1, keepdims=True) + 1e-4,
        "batch": total.std(ddof=1) + 1e-4,
        "none": 1.0,
    }[scale]
    return ((groups - groups.mean(1, keepdims=True)) / spread).ravel()


@pytest.mark.parametrize(
    ("scale", "order"),
    [(scale, "sum_then_normalize") for scale in ("group", "batch", "none")]
    + [("group", "normalize_then_sum")],
)
def test_advantages_are_those_of_trl(scale, order):
    rewards, weights = np.random.default_rng(0).random((B, 2)), np.array([0.7, 0.3])
    cfg = GrpoConfig(num_generations=G, scale_rewards=scale, multi_objective_aggregation=order)
    found, dropped = grpo.advantages(rewards, weights, cfg)
    expected = expected_advantages(rewards, weights, scale, order)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not any(rows.any() for rows in dropped.values())


def test_advantages_have_the_published_values():
    """docs/proofs.md C9; and a group that agrees teaches nothing."""
    rewards = np.array([0, 0, 0.5, 1, 7, 7, 7, 7])[:, None]
    found, dropped = grpo.advantages(rewards, [1.0], GrpoConfig(num_generations=4))
    np.testing.assert_allclose(found, [-0.78319, -0.78319, 0.26106, 1.30531, 0, 0, 0, 0], atol=1e-5)
    np.testing.assert_array_equal(dropped["zero_spread"], [False] * 4 + [True] * 4)


@pytest.mark.parametrize("order", ["sum_then_normalize", "normalize_then_sum"])
def test_a_reward_that_does_not_apply_counts_as_nothing(order):
    """A row without any has no advantage, and its group's moments are those of the others; a row
    without the second one has that of the first."""
    cfg = GrpoConfig(num_generations=4, multi_objective_aggregation=order)
    rewards = np.array([[1.0, np.nan], [0.0, np.nan], [0.5, np.nan], [np.nan, np.nan]])
    found, _ = grpo.advantages(rewards, [1.0, 2.0], cfg)
    assert found[3] == 0
    spread = 0.5 + 1e-4
    if order == "normalize_then_sum":
        spread *= 0.5 / spread + 1e-4
    np.testing.assert_allclose(found[:3], np.array([0.5, -0.5, 0]) / spread, atol=1e-6)


def test_groups_without_spread_or_almost_done_are_dropped_and_told_apart():
    rewards = np.array([[1, 1, 1, 1], [0.97, 1, 1, 1], [0.85, 1, 1, 1], [0.97, 0.94, 0.9, 0.9]])
    cfg = GrpoConfig(num_generations=4, saturated_mean=0.95)
    _, dropped = grpo.advantages(rewards.reshape(-1, 1), [1.0], cfg)
    groups = {name: rows.reshape(-1, 4)[:, 0].tolist() for name, rows in dropped.items()}
    assert groups == {
        "zero_spread": [True, False, False, False],
        "saturated": [False, True, False, False],
    }


def expected_loss(cfg, new, old, reference, gains, mask, entropies):
    """Token by token."""
    high = cfg.epsilon if cfg.epsilon_high is None else cfg.epsilon_high
    least = np.quantile(entropies[mask > 0], 1 - cfg.top_entropy_quantile)
    losses, low_clips, high_clips, divergences = np.zeros((4, *new.shape))
    for b in range(len(new)):
        mean = np.sum((new[b] - old[b]) * mask[b]) / max(mask[b].sum(), 1)
        for t in range(new.shape[1]):
            is_token = cfg.importance_sampling_level == "token"
            ratio = np.exp(new[b, t] - old[b, t] if is_token else mean)
            clipped = min(max(ratio, 1 - cfg.epsilon), 1 + high)
            losses[b, t] = -min(ratio * gains[b], clipped * gains[b])
            if cfg.top_entropy_quantile < 1 and entropies[b, t] < least:
                losses[b, t] = 0
            d = reference[b, t] - new[b, t]
            divergences[b, t] = np.exp(d) - d - 1
            losses[b, t] += cfg.beta * divergences[b, t]
            low_clips[b, t] = ratio < 1 - cfg.epsilon and gains[b] < 0
            high_clips[b, t] = ratio > 1 + high and gains[b] > 0
    lengths = mask.sum(axis=1)
    loss = {
        "bnpo": np.sum(losses * mask) / mask.sum(),
        "dapo": np.sum(losses * mask) / mask.sum(),
        "dr_grpo": np.sum(losses * mask) / mask.size,
        "grpo": np.mean(np.sum(losses * mask, axis=1) / np.maximum(lengths, 1)),
    }[cfg.loss_type]
    means = (np.sum(x * mask) / mask.sum() for x in (low_clips, high_clips, divergences, entropies))
    return loss, *means


def random_inputs(seed=0):
    """new, old, reference [B,N], advantages [B], mask and entropies [B,N]."""
    rng = np.random.default_rng(seed)
    new, old, reference = rng.normal(-2, 0.4, (3, B, N))
    mask = np.arange(N) < rng.integers(1, N + 1, (B, 1))
    mask[2] = False
    return new, old, reference, rng.normal(size=B), mask.astype(float), rng.random((B, N))


@pytest.mark.parametrize("loss_type", ["bnpo", "grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"epsilon_high": 0.5, "beta": 0.3},
        {"importance_sampling_level": "sequence", "epsilon": 0.1, "beta": 0.3},
        {"top_entropy_quantile": 0.3, "beta": 0.3},
    ],
)
def test_the_loss_is_that_of_trl(loss_type, changes):
    cfg = GrpoConfig(loss_type=loss_type, **{"beta": 0.0, **changes})
    new, old, reference, gains, mask, entropies = inputs = random_inputs()
    given = reference if cfg.beta else None
    arrays = (new, old, given, gains, mask, entropies)
    arrays = [None if x is None else jnp.asarray(x, jnp.float32) for x in arrays]
    loss, metrics = grpo.policy_loss(cfg, *arrays, arrays[4])
    value, low, high, divergence, entropy = expected_loss(cfg, *inputs)
    np.testing.assert_allclose(loss, value, atol=1e-6)
    assert ("kl" in metrics) == bool(cfg.beta)
    if cfg.beta:
        np.testing.assert_allclose(metrics["kl"], divergence, atol=1e-6)
    names = ("clipped_low", "clipped_high", "entropy")
    np.testing.assert_allclose([metrics[n] for n in names], [low, high, entropy], atol=1e-6)
    assert low + high > 0


@pytest.mark.parametrize("loss_type", ["bnpo", "grpo", "dr_grpo", "dapo"])
def test_losses_and_metrics_of_micro_batches_add_up_to_those_of_the_batch(loss_type):
    cfg = GrpoConfig(loss_type=loss_type, beta=0.3)
    inputs = [jnp.asarray(x, jnp.float32) for x in random_inputs()]
    mask = inputs[4]
    value, metrics = grpo.policy_loss(cfg, *inputs, mask)
    halves = [[x[i::2] for x in inputs] for i in range(2)]
    (one, own), (two, others) = (grpo.policy_loss(cfg, *half, mask) for half in halves)
    np.testing.assert_allclose(one + two, value, rtol=1e-5)
    jax.tree.map(lambda a, *b: np.testing.assert_allclose(a, sum(b), 1e-5), metrics, own, others)


@pytest.mark.parametrize("loss_type", ["bnpo", "grpo", "dr_grpo", "dapo"])
def test_a_batch_of_dropped_groups_gives_a_loss_of_zero(loss_type):
    new, old, reference, gains, mask, entropies = map(jnp.asarray, random_inputs())
    cfg = GrpoConfig(loss_type=loss_type, top_entropy_quantile=0.5)
    inputs = old, reference, gains, 0 * mask, entropies, 0 * mask
    loss = functools.partial(grpo.policy_loss, cfg)
    value, gradient = jax.value_and_grad(lambda new: loss(new, *inputs)[0])(new)
    assert value == 0
    assert not np.any(gradient)


MODEL = Blip3o(replace(preset("emoji_64"), **tiny.SMALL))


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, random_params(MODEL.config))


@pytest.fixture(scope="module")
def rows():
    """Four rows: tokens [4,T], start [4]."""
    rng = np.random.default_rng(1)
    n, vocab = MODEL.config.ta_tok.num_tokens, MODEL.config.vocab
    tokens = rng.integers(0, 200, (4, 6 + n)).astype(np.int32)
    tokens[:, 6:] = vocab.image_start_token_id + rng.integers(0, vocab.num_image_tokens, (4, n))
    return tokens, np.full(4, 5, np.int32)


@pytest.mark.parametrize("full_vocabulary", [False, True])
def test_logprobs_are_those_of_all_logits_at_once(params, rows, full_vocabulary, monkeypatch):
    tokens, start = rows
    n, vocab = MODEL.config.ta_tok.num_tokens, MODEL.config.vocab

    @jax.jit
    def every(params):
        hidden = MODEL.read_rows(params, tokens)[:, 5 : 5 + n]
        return MODEL.apply(params, "qwen3", hidden, method="logits")

    logits = np.asarray(every(params), np.float64) / 0.7
    ids = tokens[:, 6:]
    if not full_vocabulary:
        first = vocab.image_start_token_id
        logits, ids = logits[..., first : first + vocab.num_image_tokens], ids - first
    logs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    expected = np.take_along_axis(logs, ids[..., None], axis=-1)[..., 0]
    entropies = -np.sum(np.exp(logs) * logs, axis=-1)

    def run(params):
        return logprobs.image_logprobs(MODEL, params["qwen3"], tokens, start, 0.7, full_vocabulary)

    whole = jax.jit(run)(params)
    np.testing.assert_allclose(whole[0], expected, atol=2e-5)
    np.testing.assert_allclose(whole[1], entropies, atol=2e-5)
    # In pieces: no array of the program, nor of its gradient, holds all logits.
    size = logits.shape[-1]
    monkeypatch.setattr(logprobs, "MOST_LOGITS", 4 * size)
    pieces = jax.jit(lambda params: run(params))(params)
    np.testing.assert_allclose(pieces[0], whole[0], atol=1e-6)
    np.testing.assert_allclose(pieces[1], whole[1], atol=2e-5)
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(run(params)[0]))).lower(params)
    text = gradient.compile().as_text()
    assert f"4,{n},{size}]" not in text
    assert f"[{4 * n},{size}]" not in text
    assert f"4,1,{size}]" in text


def rollout_of(params, rows, rewards):
    tokens, start = rows
    drawn, _ = logprobs.image_logprobs(MODEL, params["qwen3"], tokens, start, 1.0)
    cfg = GrpoConfig(num_generations=2)
    gains, dropped = grpo.advantages(np.array(rewards)[:, None], [1.0], cfg)
    mask = np.float32(~np.any(list(dropped.values()), axis=0))
    return {
        "tokens": tokens, "start": start, "logprobs": drawn, "advantages": gains, "mask": mask
    }  # fmt: skip


def config(**section):
    constant = OptimizerConfig(learning_rate=1e-2, final_learning_rate=1e-2, eps=1e-4)
    section = GrpoConfig(**{"num_generations": 2, "beta": 0.05, **section})
    return TrainConfig(stage="grpo", batch_size=4, num_steps=5, grpo=section, optimizer=constant)


def updated(params, batch, cfg):
    state, _ = steps.init_state(cfg, {"qwen3": jax.tree.map(jnp.copy, params["qwen3"])})
    inputs = state, {}, {"qwen3": params["qwen3"]}, {"transformer": batch}
    return compile_update(MODEL, cfg, None)(*inputs)


def test_the_first_of_several_updates_is_on_policy_and_the_others_are_measured_from_it(
    params, rows
):
    """Three updates of one rollout are three of one update each whose old log-probabilities are
    those of the first."""
    batch = rollout_of(params, rows, [1.0, 0.0, 0.2, 0.3])
    state, metrics = updated(params, batch, config(num_iterations=3))
    assert state["step"] == 1
    assert state["opt_state"].count == 3
    assert metrics["logprob_gap"] < 1e-5
    assert metrics["clipped_high"] > 0

    cfg, old = config(num_iterations=3), batch["logprobs"]
    expected, _ = steps.init_state(cfg, {"qwen3": params["qwen3"]})

    def loss(current, old, is_first):
        found, entropies = logprobs.image_logprobs(MODEL, current["qwen3"], *rows, 1.0)
        before = jnp.where(is_first, jax.lax.stop_gradient(found), old)
        every = jnp.ones_like(found)
        inputs = before, batch["logprobs"], batch["advantages"], every, entropies, every
        value, metrics = grpo.policy_loss(cfg.grpo, found, *inputs)
        return value, (metrics, before)

    @jax.jit
    def one(state, old, is_first):
        gradients, (metrics, old) = jax.grad(loss, has_aux=True)(state["params"], old, is_first)
        return steps.advance(cfg, state, gradients, metrics, "transformer")[0], old

    for i in range(3):
        expected, old = one(expected, old, i == 0)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
        state["params"],
        expected["params"],
    )


def test_the_gradient_of_a_dropped_group_is_none(params, rows):
    """The second group agrees: what its rows hold changes nothing."""
    batch = rollout_of(params, rows, [1.0, 0.0, 0.4, 0.4])
    np.testing.assert_array_equal(batch["mask"], [1, 1, 0, 0])
    tokens = rows[0].copy()
    tokens[2:, 6:] = tokens[2:, 6:][:, ::-1]
    one, _ = updated(params, batch, config())
    other, _ = updated(params, batch | {"tokens": tokens}, config())
    jax.tree.map(np.testing.assert_array_equal, one["params"], other["params"])
    assert jax.tree.leaves(one["params"])[0].any()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("num_generations=1", "grpo.num_generations is at least 2, not 1."),
        ("num_generations=7", "batch_size 64 is no multiple of grpo.num_generations 7; "),
        ("loss_type=dapoo", "Unknown grpo.loss_type 'dapoo'; did you mean 'dapo'?"),
        ("epsilon=0", "grpo.epsilon is in (0, 1), not 0."),
        ("num_iterations=0", "grpo.num_iterations is at least 1, not 0."),
        ("top_entropy_quantile=0", "grpo.top_entropy_quantile is in (0, 1], not 0."),
    ],
)
def test_a_wrong_number_is_one_sentence_at_the_start(override, sentence):
    with pytest.raises(InputError) as error:
        read_config("emoji_grpo", [f"--config.grpo.{override}"])
    assert str(error.value).startswith(sentence)
