"""A rollout with edits: its rows for the update are those that were decoded."""

import json

import jax
import numpy as np
import pytest
import tiny

from blip3o_jax.cli import main
from blip3o_jax.config import replace
from blip3o_jax.convert.random_weights import random_params
from blip3o_jax.data.config import DataConfig
from blip3o_jax.errors import InputError
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.parallel.mesh import make_mesh
from blip3o_jax.presets import preset
from blip3o_jax.rl import grpo, rollout
from blip3o_jax.rl.logprobs import image_logprobs
from blip3o_jax.rl.rewards.protocol import named
from blip3o_jax.rl.rewards.scoring import scorer
from blip3o_jax.rl.rollout import numbers_of
from blip3o_jax.rl.run import reinforced
from blip3o_jax.sample import generate, programs
from blip3o_jax.sample.condition import guidance
from blip3o_jax.scenes import edits, prompts
from blip3o_jax.scenes.config import WorldConfig
from blip3o_jax.scenes.scene import compose
from blip3o_jax.train.config import GrpoConfig

CHANNELS = {"max_sources": 1, "use_und_image_vae_as_channels": True, "sana.in_channels": 32}
EDITING = {**tiny.SMALL, **CHANNELS}


def test_rows_of_edits_hold_their_sources_and_have_the_probabilities_of_decoding():
    weights = {"scenes": 0.5, "ocr": 2.0}
    section = GrpoConfig(num_generations=4, num_inference_steps=1, rewards=weights)
    data = DataConfig(edits=0.5, row_length=0)
    cfg = tiny.config(stage="grpo", joint=None, grpo=section, model=EDITING, data=data)
    text, model = tiny.text(), Blip3o(replace(preset("emoji_64"), **EDITING))
    side, n = model.config.image_size, model.config.ta_tok.num_tokens
    source = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    asked = [{"prompt": "two red hearts"}, {"prompt": "make it blue", "source": source}]
    rewards = np.stack([np.arange(8.0), [5.0] * 4 + [np.nan] * 4], axis=1)

    def score(images, metadata):
        assert [m["prompt"] for m in metadata] == ["two red hearts"] * 4 + ["make it blue"] * 4
        assert images.shape == (8, side, side, 3)
        return lambda: (rewards, {})

    run = reinforced(cfg, lambda step: asked, asked, text, score, None)
    params = jax.device_put(random_params(model.config))
    with jax.set_mesh(make_mesh(cfg.mesh)):
        batch, numbers = run.batches(0)(1, {"params": params}, {})
    batch = batch["transformer"]
    total = 0.5 * np.arange(8.0) + 2.0 * np.array([5.0] * 4 + [0.0] * 4)
    assert numbers["reward"] == total.mean()
    expected, _ = grpo.advantages(total[:, None], [1.0], section)
    np.testing.assert_array_equal(batch["advantages"], expected)
    # The source's codes stand in the prompt of every edit, and nothing does in that of a prompt.
    codes = np.asarray(generate.encode_codes(model, params, source[None]))[0]
    first, tokens = model.config.vocab.image_start_token_id, np.asarray(batch["tokens"])
    for row, start, is_edit in zip(tokens, batch["start"], [0] * 4 + [1] * 4, strict=True):
        before = row[:start]
        inside = before[(before >= first) & (before < first + model.config.ta_tok.codebook_size)]
        np.testing.assert_array_equal(inside - first, codes if is_edit else [])
    assert len(codes) == n
    found, _ = image_logprobs(model, params["qwen3"], tokens, batch["start"], 1.0)
    np.testing.assert_allclose(found, batch["logprobs"], atol=2e-5)


@pytest.mark.parametrize("scale", [None, 2.0])
def test_a_model_that_edits_draws_prompts_without_sources(scale):
    section = GrpoConfig(num_generations=4, num_inference_steps=1, guidance_scale=scale)
    cfg = tiny.config(stage="grpo", joint=None, grpo=section, model=EDITING, data=DataConfig())
    asked = [{"prompt": "two red hearts"}, {"prompt": "a dog"}]
    rewards = np.arange(8.0)[:, None], {}
    run = reinforced(cfg, lambda step: asked, asked, tiny.text(), lambda *_: lambda: rewards, None)
    params = jax.device_put(random_params(Blip3o(replace(preset("emoji_64"), **EDITING)).config))
    with jax.set_mesh(make_mesh(cfg.mesh)):
        batch, _ = run.batches(0)(1, {"params": params}, {})
    batch = batch["transformer"]
    found, _ = image_logprobs(run.model, params["qwen3"], batch["tokens"], batch["start"], 1.0)
    np.testing.assert_allclose(found, batch["logprobs"], atol=2e-5)


def test_a_model_of_few_steps_renders_prompts_and_edits_in_its_own_way():
    """With one forward a step, guided by instruction and source together; and is evaluated so."""
    few = {**EDITING, "sana.few_steps": 2}
    section = GrpoConfig(num_generations=4, num_inference_steps=2, guidance_scale=2.0)
    data = DataConfig(edits=0.5, row_length=0)
    cfg = tiny.config(stage="grpo", joint=None, grpo=section, model=few, data=data)
    config = cfg.blip3o()
    source = np.random.default_rng(0).integers(0, 256, (config.image_size,) * 2 + (3,), np.uint8)
    asked = [{"prompt": "two red hearts"}, {"prompt": "make it blue", "source": source}]
    seen = []

    def score(images, metadata):
        seen.append(images)
        return lambda: (np.arange(float(len(images)))[:, None], {"scenes": np.ones(len(images))})

    run = reinforced(cfg, lambda step: asked, asked, tiny.text(), score, None)
    params = jax.device_put(random_params(config))
    with jax.set_mesh(make_mesh(cfg.mesh)):
        run.batches(0)(1, {"params": params}, {})
        numbers, _ = run.evaluate(params)
    assert numbers == {"heldout/scenes": 1.0}
    # The same tokens and noise, rendered by hand.
    drawn, rows = seen[0], [m for m in asked for _ in range(4)]
    inputs = rollout.prompt_arrays(tiny.text(), run.model, rows, True)
    keys = rollout.key_numbers(rows, cfg.seed + rollout.SEEDS)
    how = {"num_inference_steps": 2, "guidance_scale": guidance(2.0, 2.0), "shift": 1.0}
    how |= {"top_k": 0, "top_p": 1.0, "temperature": 1.0}
    prompt, valid, images, exists = inputs
    own = programs.programs(run.model)
    expected = programs.edit(own, params, prompt, valid, keys, images, exists, **how)
    np.testing.assert_array_equal(drawn, expected["images"])
    plain = programs.edit(
        own, params, prompt, valid, keys, images, exists, **how | {"guidance_scale": None}
    )
    assert (drawn != plain["images"]).any()


def test_models_whose_prompts_hold_no_sources_are_refused(tmp_path, capsys):
    config = ["--config", "emoji_grpo", "--config.init=emoji_64", "--config.data.edits=0.5"]
    config += [
        f"--config.model.{name}={json.dumps(value)}" for name, value in tiny.TEXT_ONLY.items()
    ]
    assert main(["grpo", *config, "--workdir", str(tmp_path / "run")]) == 2
    assert "data.edits needs a model that takes some" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    features = {**EDITING, "use_tar_siglip_features": True}
    edits, section = DataConfig(edits=0.5), GrpoConfig(num_generations=4)
    cfg = tiny.config(stage="grpo", joint=None, grpo=section, model=features, data=edits)
    with pytest.raises(InputError, match="use_tar_siglip_features"):
        reinforced(cfg, None, [], tiny.text(), None, None)


def test_an_edit_is_rewarded_for_what_it_did_and_for_what_it_left():
    world = WorldConfig(seed=3)
    edit = edits.sample(world, 0, weights={"recolor": 1.0})
    metadata, scene = prompts.sample(world, 0)
    pictures = np.stack([compose(edit.after), compose(edit.before), compose(scene)])
    asked = [{"prompt": edit.instruction, "edit": edit}] * 2 + [metadata]
    names = ("scenes", "strict", "edit_done", "edit_kept")
    with scorer({name: named(name) for name in names}, 60.0) as score:
        rewards, columns = score(pictures, asked)()
    numbers = numbers_of([columns])
    # Left as it was, the thing in its new colour is missing and the old one is still there.
    parts = len(edit.after.things) + 2
    dense = 1 - 2 / parts
    expected = [[1, 1, 1, 1], [dense, 0, 0, 1], [1, 1, np.nan, np.nan]]
    np.testing.assert_allclose(rewards, expected, rtol=1e-6)
    assert numbers["edit_success"] == numbers["edit_done"] == 0.5
    assert numbers["edit_kept"] == numbers["strict"] == 1.0
