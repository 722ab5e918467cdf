"""Runs of every mode with the tiny model: what moves, exact resume, and what stops a run."""

import contextlib
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from blip3o_jax import training_checkpoint
from blip3o_jax.convert.random_weights import random_params
from blip3o_jax.errors import InputError, RewardError
from blip3o_jax.rl.diffusion import METHODS
from blip3o_jax.rl.rollout import diversity
from blip3o_jax.rl.run import reinforced
from blip3o_jax.rl.update import compile_update
from blip3o_jax.train import loop, start, steps
from blip3o_jax.train.config import GrpoConfig, GuardConfig
from blip3o_jax.train.sections import HALVES, DiffusionRlConfig

PROMPTS = [{"prompt": "two red hearts"}, {"prompt": "a dog"}]
RAM = DiffusionRlConfig(num_train_timesteps=2, old_ramp=0.3)
MODES = {
    "diffusion": {"diffusion": RAM},
    "alternating": {"phase_steps": 2, "decodes": 2, "diffusion": RAM},
    "joint": {"diffusion": RAM},
    "nft": {"train": "diffusion", "diffusion": DiffusionRlConfig("nft", 1, beta=0.1)},
    "flow_grpo": {
        "train": "diffusion",
        "num_iterations": 2,
        "diffusion": DiffusionRlConfig("flow_grpo", 1, beta=0.1),
    },
}


def config(mode, **changes):
    section = {"num_generations": 4, "num_inference_steps": 2, "guidance_scale": None}
    section = {"train": mode, **section, **MODES[mode], **changes.pop("grpo", {})}
    names = ("qwen3", "ta_tok", "sana", "dc_ae", "diffusion_connector")
    values = {"stage": "grpo", "joint": None, "grpo": GrpoConfig(**section), "eval_every": 6}
    return tiny.config(**values | {"init": dict.fromkeys(names, "random"), **changes})


def reward(images, metadata):
    """How bright an image is."""
    return images.astype(np.float64).mean(axis=(1, 2, 3))[:, None] / 255, {}


def run_of(cfg, judge=reward):
    def load_part(name, part):
        return random_params(cfg.blip3o())[part]

    return reinforced(cfg, lambda step: PROMPTS, PROMPTS, tiny.text(), score_of(judge), load_part)


def score_of(judge):
    """Answers are there at once."""
    return lambda images, metadata: lambda: judge(images, metadata)


def trained(cfg, workdir, run):
    """(rows of the metrics, the newest state) of a run, which goes on where it was."""
    workdir.mkdir(exist_ok=True)
    loop.run(cfg, workdir, run)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    manager = training_checkpoint.open_manager(workdir, cfg.keep_checkpoints)
    with jax.set_mesh(run.mesh):
        state = start.begin(cfg, run.model, run.mesh, manager, run.params)[0]
    return [row for row in rows if "reward" in row], jax.device_get(state)


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b))


@pytest.mark.parametrize("mode", MODES)
def test_a_run_resumes_to_the_bit_and_trains_its_halves_alone(mode, tmp_path):
    """Six steps, and three and then three more: the same state and the same numbers."""
    cfg = config(mode)
    run = run_of(cfg)  # of all three, whose programs are compiled once
    whole, state = trained(cfg, tmp_path / "whole", run)
    cut = tmp_path / "cut"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.stop, "watch", functools.partial(watched, lambda step: step == 3))
        with pytest.raises(loop.stop.Preempted):
            trained(cfg, cut, run)
    resumed, again = trained(cfg, cut, run)
    assert same(state, again)
    timed = ("rollout_s", "reward_s", "update_s", "step_ms", "data_wait_ms", "images_per_s")
    timed += ("goodput",)
    for one, other in zip(whole, resumed, strict=True):
        differ = {name for name in one if name not in timed and one[name] != other[name]}
        assert differ == set()

    # What moved, and by how many updates.
    halves, iterations = cfg.grpo.halves, cfg.grpo.num_iterations
    first = random_params(cfg.blip3o())
    for half, parts in HALVES.items():
        moved = [not same(first[p], state["params"].get(p, first[p])) for p in parts]
        assert moved == [half in halves] * len(parts)
    opt_state = state["opt_state"] if cfg.groups else dict.fromkeys(halves, state["opt_state"])
    counts = {half: int(opt_state[half].count) for half in halves}
    expected = {"alternating": {"transformer": 4, "diffusion": 2}}
    assert counts == expected.get(mode, dict.fromkeys(halves, 6 * iterations))
    if "diffusion" in halves:
        assert any("diffusion/norm_ratio" in row for row in whole)


@contextlib.contextmanager
def watched(leaves):
    """`stop.watch` by a function of the step."""
    yield leaves


@pytest.fixture(scope="module")
def model_and_params():
    cfg = config("alternating")
    model = start.build_model(cfg)
    return model, jax.tree.map(jnp.asarray, random_params(model.config))


def rollout_of(cfg, model, step, state, frozen, judge=reward):
    run = reinforced(cfg, lambda step: PROMPTS, PROMPTS, tiny.text(), score_of(judge), None)
    with jax.set_mesh(run.mesh):
        return run.batches(0)(step, state, frozen)


def test_a_phase_leaves_the_other_half_as_it_is(model_and_params):
    """Moments and guard too, in both kinds of phase."""
    model, params = model_and_params
    cfg = config("alternating", guard=GuardConfig(spike=5.0))
    state, frozen = steps.init_state(cfg, jax.tree.map(jnp.copy, params))
    reference = {part: params[part] for part in state["params"]}
    update = compile_update(model, cfg, None)
    for step, half, other in ((1, "transformer", "diffusion"), (3, "diffusion", "transformer")):
        batch, _ = rollout_of(cfg, model, step, state, frozen)
        assert set(batch) == {half}
        before = jax.device_get(state)
        state, metrics = update(state, frozen, reference, batch)
        after = jax.device_get(state)
        for name in ("opt_state", "guard"):
            assert same(before[name][other], after[name][other])
            assert not same(before[name][half], after[name][half])
        kept = {part: before["params"][part] for part in HALVES[other]}
        assert same(kept, {part: after["params"][part] for part in HALVES[other]})
        assert after["step"] == before["step"] + 1
        assert ("diffusion/kl" in metrics) == (half == "diffusion")
        assert ("entropy" in metrics) == (half == "transformer")


def test_tokens_are_rewarded_by_the_mean_of_their_renderings(model_and_params):
    model, params = model_and_params
    cfg, seen = config("alternating", grpo={"num_inference_steps": 1}), []

    def judge(images, metadata):
        seen.append((images, [m["prompt"] for m in metadata]))
        return rewards[len(seen) - 1][:, None], {"seen": np.full(8, len(seen))}

    state, rewards = {"params": params}, np.arange(16.0).reshape(2, 8) % 7
    batch, numbers = rollout_of(cfg, model, 1, state, {}, judge)
    (images, asked), (others, again) = seen
    assert asked == again == ["two red hearts"] * 4 + ["a dog"] * 4
    assert not np.array_equal(images, others)
    assert numbers["reward"] == rewards.mean()
    assert numbers["seen"] == 1.5
    groups = rewards.mean(axis=0).reshape(2, 4)
    expected = groups - groups.mean(axis=1, keepdims=True)
    expected /= groups.std(axis=1, ddof=1, keepdims=True) + 1e-4
    gains = batch["transformer"]["advantages"]
    np.testing.assert_allclose(gains, expected.ravel(), atol=1e-6)
    # The first rendering is the one without any more.
    once = config("alternating", grpo={"num_inference_steps": 1, "decodes": 1})
    rollout_of(once, model, 1, state, {}, lambda i, m: (seen.append((i, m)), reward(i, m))[1])
    np.testing.assert_array_equal(seen[2][0], images)


def test_a_group_of_the_diffusion_part_shares_its_tokens_and_is_drawn_by_the_old_policy(
    model_and_params,
):
    model, params = model_and_params
    cfg = config("diffusion")
    state, frozen = steps.init_state(cfg, params)
    old = jax.tree.map(lambda x: x * 1.1, state["old"])
    batch, numbers = rollout_of(cfg, model, 1, state | {"old": old}, frozen)
    arrays = batch["diffusion"]
    hidden = np.asarray(arrays["hidden"]).reshape(2, 4, *arrays["hidden"].shape[1:])
    np.testing.assert_array_equal(hidden, np.repeat(hidden[:, :1], 4, axis=1))
    assert not np.array_equal(hidden[0, 0], hidden[1, 0])
    assert numbers["diversity"] > 0
    # The present policy plays no part in it.
    other = state | {"old": old, "params": jax.tree.map(lambda x: x * 2, state["params"])}
    np.testing.assert_array_equal(
        rollout_of(cfg, model, 1, other, frozen)[0]["diffusion"]["x0"], arrays["x0"]
    )
    assert not np.array_equal(
        rollout_of(cfg, model, 1, state, frozen)[0]["diffusion"]["x0"], arrays["x0"]
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_first_update_is_on_policy(model_and_params, method):
    """The ratio is 1 and nothing else, and the velocity is still the first one."""
    model, params = model_and_params
    cfg = config("diffusion", grpo={"diffusion": DiffusionRlConfig(method, 1)})
    state, frozen = steps.init_state(cfg, jax.tree.map(jnp.copy, params))
    reference = {part: params[part] for part in state["params"]}
    batch, _ = rollout_of(cfg, model, 1, state, frozen)
    _, metrics = compile_update(model, cfg, None)(state, frozen, reference, batch)
    assert metrics["diffusion/kl"] < 1e-9
    np.testing.assert_allclose(metrics["diffusion/norm_ratio"], 1, atol=1e-5)
    if method == "flow_grpo":
        assert metrics["diffusion/ratio"] == 1


@pytest.mark.parametrize("mode", ["joint", "nft", "flow_grpo"])
def test_micro_batches_give_the_update_of_the_batch(model_and_params, mode):
    model, params = model_and_params
    cfg = config(mode)
    state, frozen = steps.init_state(cfg, jax.tree.map(jnp.copy, params))
    # Another policy than the present one, from which there is a divergence.
    reference = {p: jax.tree.map(lambda x: 1.01 * x, params[p]) for p in state["params"]}
    batch, _ = rollout_of(cfg, model, 1, state, frozen)
    (one, metrics), (other, others) = (
        compile_update(model, dataclasses.replace(cfg, accumulate=count), None)(
            jax.tree.map(jnp.copy, state), frozen, reference, batch
        )
        for count in (1, 4)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), metrics, others
    )
    for a, b in zip(*(jax.tree.leaves(x["opt_state"]) for x in (one, other)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(a).max())


@pytest.mark.parametrize("mode", ["joint", "nft"])
def test_micro_batches_that_teach_nothing_are_not_computed(model_and_params, mode):
    """Else what is not a number among them would be in every weight."""
    model, params = model_and_params
    cfg = dataclasses.replace(config(mode), accumulate=4)
    state, frozen = steps.init_state(cfg, jax.tree.map(jnp.copy, params))
    reference = {p: jax.tree.map(lambda x: 1.01 * x, params[p]) for p in state["params"]}
    batch, _ = rollout_of(cfg, model, 1, state, frozen)
    idle = np.arange(cfg.batch_size) % 2 == 0
    batch = {half: own | {"mask": np.float32(~idle)} for half, own in batch.items()}
    names = ("advantages", "logprobs", "hidden")
    spoiled = {
        half: own | {x: own[x].at[idle].set(np.nan) for x in names if x in own}
        for half, own in batch.items()
    }
    update = compile_update(model, cfg, None)
    results = [
        update(jax.tree.map(jnp.copy, state), frozen, reference, own) for own in (batch, spoiled)
    ]
    assert np.isfinite([float(value) for value in results[1][1].values()]).all()
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_diversity_is_within_groups():
    images = np.zeros((4, 2, 2, 3), np.uint8)
    images[2:] = 255
    assert diversity(images, 2) == 0
    np.testing.assert_allclose(diversity(images[[0, 2, 0, 2]], 2), 0.5**0.5, rtol=1e-6)


def test_a_divergence_above_the_ceiling_ends_the_run_with_its_state_saved(tmp_path):
    section = {"diffusion": DiffusionRlConfig(num_train_timesteps=2, max_kl=1e-12)}
    cfg = config("diffusion", grpo=section)
    with pytest.raises(
        InputError, match=r"diffusion/kl is .*, above grpo\.diffusion\.max_kl"
    ) as error:
        trained(cfg, tmp_path / "run", run_of(cfg))
    step = int(str(error.value).split("Step ")[1].split()[0])
    assert 1 < step < 6
    folders = training_checkpoint.complete((tmp_path / "run" / "checkpoints").absolute())
    assert max(int(folder.name) for folder in folders) == step


def test_a_reward_that_fails_ends_the_run_with_its_state_saved(tmp_path):
    calls = []

    def fragile(images, metadata):
        calls.append(len(images))
        if len(calls) == 3:
            raise RewardError("The reward 'it' fails.")
        return reward(images, metadata)

    cfg = config("joint")
    with pytest.raises(InputError, match=r"^The reward 'it' fails\. Step 2 is saved\.$"):
        trained(cfg, tmp_path / "run", run_of(cfg, fragile))
    folders = training_checkpoint.complete((tmp_path / "run" / "checkpoints").absolute())
    assert [int(folder.name) for folder in folders] == [2]


def test_a_signal_while_rewards_are_waited_for_saves_and_leaves_to_be_started_again(tmp_path):
    def interrupted(images, metadata):
        calls.append(len(images))
        if len(calls) == 3:
            patch.setattr(loop.stop, "is_asked", lambda: True)
            raise RewardError("The reward 'it' was interrupted.")
        return reward(images, metadata)

    cfg, calls = config("joint"), []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(loop.stop.Preempted):
        trained(cfg, tmp_path / "run", run_of(cfg, interrupted))
    folders = training_checkpoint.complete((tmp_path / "run" / "checkpoints").absolute())
    assert [int(folder.name) for folder in folders] == [2]


def test_a_reward_that_fails_at_once_leaves_no_checkpoint(tmp_path):
    def broken(images, metadata):
        raise RewardError("The reward 'it' fails.")

    cfg = config("joint")
    with pytest.raises(InputError, match=r"^The reward 'it' fails\.$"):
        trained(cfg, tmp_path / "run", run_of(cfg, broken))
    assert training_checkpoint.complete((tmp_path / "run" / "checkpoints").absolute()) == set()


def test_a_rollout_without_any_reward_teaches_nothing(model_and_params):
    model, params = model_and_params
    nothing = np.full((8, 1), np.nan), {}
    batch, numbers = rollout_of(
        config("joint"), model, 1, {"params": params}, {}, lambda *_: nothing
    )
    assert batch == {}
    assert "reward" not in numbers
    assert numbers["zero_spread"] == 1


def test_a_step_whose_groups_all_agree_is_counted_and_updates_nothing(tmp_path):
    """The first of all, and one after another."""
    calls = []

    def agreed(images, metadata):
        calls.append(len(images))
        rewards, numbers = reward(images, metadata)
        return (np.ones_like(rewards) if len(calls) in (1, 3) else rewards), numbers

    cfg = config("joint", log_every=1, num_steps=3)
    rows, state = trained(cfg, tmp_path / "run", run_of(cfg, agreed))
    assert [row["zero_spread"] for row in rows] == [1, 0, 1]
    # No forward pass, no gradient: only what every step has.
    assert ["loss" in row for row in rows] == [False, True, False]
    assert int(state["step"]) == 3
    counts = {half: int(own.count) for half, own in state["opt_state"].items()}
    assert counts == dict.fromkeys(cfg.grpo.halves, 1)
    rates = [row["learning_rate"] for row in rows]
    assert rates[0] == rates[1] != rates[2]


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"diffusion": DiffusionRlConfig()}, "grpo.diffusion has no effect where grpo.train is"),
        ({"phase_steps": 3}, "grpo.phase_steps has no effect where grpo.train is 'transformer'"),
        ({"train": "joint", "decodes": 2}, "grpo.decodes has no effect where grpo.train is"),
        ({"train": "diffusion", "loss_type": "grpo"}, "grpo.loss_type has no effect where grpo"),
        ({"rewards": {}}, "grpo.rewards names no reward."),
        ({"rewards": {"ocr": 0}}, "grpo.rewards are weights above 0, not 0 (ocr)."),
        ({"reward_timeout": 0.0}, "grpo.reward_timeout is above 0, not 0.0."),
        ({"train": "both"}, "Unknown grpo.train 'both'"),
        ({"train": "diffusion", "max_kl": 0.1}, "grpo.max_kl bounds the transformer's divergence"),
        (
            {"train": "diffusion", "diffusion": DiffusionRlConfig("nft")},
            "Method 'nft' trains the policy that draws, without guidance",
        ),
        (
            {
                "train": "diffusion",
                "diffusion": DiffusionRlConfig("flow_grpo", 8),
                "guidance_scale": None,
                "num_inference_steps": 8,
            },
            "grpo.diffusion.num_train_timesteps is 8: 'flow_grpo' has one less than",
        ),
    ],
)
def test_a_wrong_section_is_one_sentence(section, sentence):
    with pytest.raises(InputError) as error:
        GrpoConfig(**section)
    assert str(error.value).startswith(sentence)


def test_a_half_cannot_be_frozen_whole_nor_go_without_a_phase():
    with pytest.raises(InputError, match="frozen_parts qwen3: nothing is left to train"):
        config("joint", frozen_parts=("qwen3",))
    with pytest.raises(InputError, match="leaves the diffusion part none of the 6 num_steps"):
        config("alternating", grpo={"phase_steps": 6})
    assert config("joint", frozen_parts=("sana",)).trained_parts == ("qwen3", "diffusion_connector")
