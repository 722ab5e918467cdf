"""The guard, factors of learning rates and frozen parts, on states of two numbers a part."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.errors import InputError
from blip3o_jax.train import guard, steps
from blip3o_jax.train.config import GuardConfig, JointConfig, OptimizerConfig, TrainConfig
from blip3o_jax.train.meter import Meter
from blip3o_jax.train.read_config import from_dict

OPTIMIZER = OptimizerConfig(learning_rate=0.1, final_learning_rate=0.1, clip_norm=0, ema_decay=0.9)
CFG = TrainConfig(stage="joint", joint=JointConfig(trainable_sana="all"), optimizer=OPTIMIZER)


def init(cfg):
    params = {
        part: {"layer": {"kernel": jnp.array([1.0, 2.0])}}
        for part in ("qwen3", "diffusion_connector", "sana")
    }
    return steps.init_state(cfg, params)


@functools.partial(jax.jit, static_argnums=0)
def advance_jitted(stage_and_settings, state, grads, loss):
    return steps.advance(CONFIGS[stage_and_settings], state, grads, {"loss": loss})


CONFIGS = {"plain": CFG}


def advance(state, value, loss=1.0, name="plain"):
    return advance_jitted(
        name, state, jax.tree.map(lambda x: jnp.full(2, value), state["params"]), jnp.float32(loss)
    )


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b))


@pytest.mark.parametrize(("value", "loss"), [(np.nan, 1.0), (np.inf, 1.0), (0.5, np.nan)])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(value, loss):
    before, _ = advance(init(CFG)[0], 0.3)
    after, metrics = advance(before, value, loss)
    assert after["step"] == 2  # its batch is behind us
    assert same(
        [after[k] for k in ("params", "opt_state", "ema")],
        [before[k] for k in ("params", "opt_state", "ema")],
    )
    assert after["guard"]["usual"] == before["guard"]["usual"]
    assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (1, 1)
    assert metrics["learning_rate"] == np.float32(0.1)
    following, metrics = advance(after, 0.3)
    assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (1, 0)
    assert not same(following["params"], before["params"])
    # A skipped step leaves no trace: the same gradients without it give the same bits.
    straight, _ = advance(before, 0.3)
    assert same(straight["params"], following["params"])
    assert same(straight["opt_state"], following["opt_state"])


def test_a_spike_is_measured_against_the_average_once_that_has_settled():
    cfg, counters = GuardConfig(spike=3.0), guard.init()
    judge = jax.jit(functools.partial(guard.judge, cfg))
    good, counters = judge(counters, 0, 1.0, 100.0)
    assert good
    assert counters["usual"] == 100.0
    for step in range(1, guard.SETTLED):
        # large, but nothing is usual yet
        good, counters = judge(counters, step, 1.0, 2000.0 if step == 1 else 100.0)
        assert good
    usual = float(counters["usual"])
    np.testing.assert_allclose(usual, 100 + 1900 * 0.02 * 0.98 ** (guard.SETTLED - 2), rtol=1e-5)
    assert not judge(counters, guard.SETTLED, 1.0, 3.01 * usual)[0]
    assert judge(counters, guard.SETTLED, 1.0, 2.99 * usual)[0]
    # off by default
    assert jax.jit(functools.partial(guard.judge, GuardConfig()))(
        counters, guard.SETTLED, 1.0, 1e9
    )[0]


def test_a_run_stops_after_too_many_skipped_steps_in_a_row(tmp_path):
    meter = Meter(TrainConfig(stage="tokenizer", guard=GuardConfig(max_skipped=3)), tmp_path, 0, {})

    def add(step, in_a_row, skipped):
        row = {
            "loss": np.float32(np.nan if in_a_row else step),
            "skipped": skipped,
            "skipped_in_a_row": in_a_row,
            "learning_rate": 0.1,
        }
        meter.add(step, {}, row)

    for step, (in_a_row, skipped) in enumerate([(0, 0), (1, 1), (2, 2), (0, 2)], 1):
        add(step, in_a_row, skipped)
    meter.log(4, init(CFG)[0])
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (line["loss"], line["skipped"]) == (2.5, 2)  # the mean of steps 1 and 4
    for step, (in_a_row, skipped) in enumerate([(1, 3), (2, 4), (3, 5), (0, 5)], 5):
        add(step, in_a_row, skipped)
    with pytest.raises(
        InputError, match="3 steps in a row until step 8 had a loss or gradient that is not finite"
    ):
        meter.log(8, init(CFG)[0])


def test_a_factor_scales_the_update_of_its_part_alone():
    CONFIGS["factors"] = TrainConfig(
        stage="joint",
        joint=JointConfig(trainable_sana="all"),
        optimizer=OptimizerConfig(**vars(OPTIMIZER) | {"part_learning_rates": {"sana": 0.25}}),
    )
    state, _ = init(CONFIGS["factors"])
    after, metrics = advance(state, 0.3, name="factors")
    ratios = steps.update_ratios(CONFIGS["factors"], after)
    moved = {
        part: float(after["params"][part]["layer"]["kernel"][0] - 1) for part in after["params"]
    }
    np.testing.assert_allclose(
        [moved["qwen3"], moved["diffusion_connector"], moved["sana"]],
        [-0.1, -0.1, -0.025],
        rtol=1e-4,
    )
    np.testing.assert_allclose(
        ratios["update_ratio/qwen3"], 0.1 * 2**0.5 / (0.9**2 + 1.9**2) ** 0.5, rtol=1e-4
    )
    np.testing.assert_allclose(
        ratios["update_ratio/sana"], 0.025 * 2**0.5 / (0.975**2 + 1.975**2) ** 0.5, rtol=1e-4
    )
    np.testing.assert_allclose(metrics["grad_norm/sana"], 0.3 * 2**0.5, rtol=1e-6)


def test_frozen_parts_have_no_moments_and_are_kept_apart():
    cfg = TrainConfig(
        stage="joint",
        joint=JointConfig(trainable_sana="all"),
        frozen_parts=("qwen3",),
        optimizer=OPTIMIZER,
    )
    state, frozen = init(cfg)
    assert set(state["params"]) == {"diffusion_connector", "sana"}
    assert set(frozen) == {"qwen3"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frozen_parts": ("qwen",)}, "has no part 'qwen'; did you mean 'qwen3'"),
        ({"frozen_parts": ("qwen3", "sana", "diffusion_connector")}, "nothing is left to train"),
        ({"optimizer": {"part_learning_rates": {"dc_ae": 0.1}}}, "'dc_ae' is not trained"),
        ({"optimizer": {"part_learning_rates": {"sana": 0}}}, "factors above 0, not 0"),
        (
            {"batch_size": 30, "accumulate": 4},
            "30 does not divide by accumulate 4; the nearest that do are 28 and 32",
        ),
        ({"accumulate": 0}, "accumulate is at least 1"),
        ({"guard": {"spike": 0.5}}, "guard.spike is above 1"),
        ({"guard": {"max_skipped": 0}}, "guard.max_skipped is at least 1"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        from_dict(TrainConfig, {"stage": "joint", **changes})
