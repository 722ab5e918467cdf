"""The loss of a diffusion part of few steps, against its formula taken apart."""

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SMALL

from blip3o_jax.config import replace
from blip3o_jax.convert.random_weights import random_params
from blip3o_jax.errors import InputError
from blip3o_jax.models import sana_time
from blip3o_jax.models.blip3o import Blip3o, condition_slice
from blip3o_jax.parallel.mesh import make_mesh
from blip3o_jax.presets import preset
from blip3o_jax.sample import condition, flow, generate
from blip3o_jax.train import losses, start, steps
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.train.distill import distill_draws, distill_loss
from blip3o_jax.train.read_config import from_dict, read_config
from blip3o_jax.train.sections import DistillConfig
from blip3o_jax.tree import split

ROWS, CFG, KEY = 4, DistillConfig(), jax.random.key(3)
FEW = {"sana.few_steps": 4}
EDITS = {"max_sources": 1, "use_und_image_vae_as_channels": True, "sana.in_channels": 32}


@pytest.fixture(scope="module", params=[{}, EDITS], ids=["text", "edits"])
def case(request):
    """(model, params, batch as from a cache with all draws)."""
    config = replace(preset("emoji_64"), **SMALL | FEW | request.param)
    rng, n, side = np.random.default_rng(0), config.ta_tok.num_tokens, config.sana.sample_size
    params = jax.tree.map(jnp.asarray, random_params(config))
    tokens = rng.integers(10, 300, (ROWS, 40)).astype(np.int32)
    batch = {"tokens": tokens, "start": np.array([20, 24, 28, 30], np.int32)}
    latents = (ROWS, side, side, config.dc_ae.latent_channels)
    batch["codes"] = rng.integers(0, 256, (ROWS, n)).astype(np.int32)
    batch["latents"] = rng.standard_normal(latents, np.float32)
    if config.max_sources:
        batch["source_codes"] = rng.integers(0, 256, (ROWS, 1, n)).astype(np.int32)
        batch["source_latents"] = rng.standard_normal((ROWS, 1, *latents[1:]), np.float32)
        batch["num_sources"] = np.array([1, 0, 1, 1], np.int32)
    model = Blip3o(config)
    draws = distill_draws(model, CFG, batch, KEY)
    # All kinds of rows: no step, no condition, guidance elsewhere.
    draws |= {
        "sigma": jnp.array([0.9, 0.6, 0.5, 0.7]),
        "next_sigma": jnp.array([0.9, 0.2, 0.0, 0.4]),
        "dropped": jnp.array([False, False, True, False]),
        "source_dropped": jnp.array([False, False, True, False]),
        "scale": jnp.array([3.0, 2.0, 1.0, 2.5]),
        "begin": jnp.array([0.0, 0.0, 0.0, 0.1]),
        "end": jnp.array([1.0, 1.0, 1.0, 0.6]),
    }
    return model, params, batch | draws


def mean_velocity(model, params, batch, x, sigma, dropped, scaled=True):
    """u [B,Y,X,C] at levels `sigma` [B] with the batch's next levels; plain calls."""
    hidden, sources = losses.read_captions(model, params, batch)[1:]
    states = condition_slice(hidden, batch["start"], model.config.num_condition_tokens)
    given = condition.build(model, params, flow.drop_condition(states, dropped), sources, dropped)
    how = (1 - 1 / batch["scale"], batch["begin"], batch["end"]) if scaled else (0.0, 0.0, 1.0)
    numbers = sigma - batch["next_sigma"], *how
    span = jnp.stack([jnp.broadcast_to(number, (ROWS,)) for number in numbers], axis=1)
    return condition.velocity(model, params, x, 1000 * sigma, given, span)


def parts(case):
    """(x, what u + change is regressed to, change), from velocities and differences alone."""
    model, params, batch = case
    t, dropped = batch["sigma"], batch["dropped"]
    x = flow.add_noise(batch["latents"], batch["noise"], t)
    at_once = batch | {"next_sigma": t}
    u = jax.jit(functools.partial(mean_velocity, model, params))
    along = u(at_once, x, t, dropped)
    without = jax.jit(functools.partial(mean_velocity, model, params, scaled=False))(
        at_once, x, t, jnp.ones_like(dropped)
    )
    inside = (batch["begin"] <= t) & (t <= batch["end"])
    assert inside.tolist() == [True, True, True, False]
    share = jnp.where(inside, 1 - 1 / batch["scale"], 0)[:, None, None, None]
    target = batch["noise"] - batch["latents"] + share * (along - without)
    # By differences; the time's embedding moves along its own smooth slope.
    slope = jax.jvp(sana_time.timestep_embedding, (1000 * t,), (jnp.full(ROWS, 1000.0),))[1]

    @jax.jit
    def moved(by):
        straight = sana_time.sinusoids(1000 * t) + by * slope
        with mock.patch.object(sana_time, "timestep_embedding", return_value=straight):
            return mean_velocity(model, params, batch, x + by * along, t + by, dropped)

    h = 1e-3
    change = (t - batch["next_sigma"])[:, None, None, None] * (moved(h) - moved(-h)) / (2 * h)
    return x, target, change


def test_the_loss_is_its_formula_and_its_gradient_that_of_u_alone(case):
    model, params, batch = case
    x, target, change = parts(case)
    assert np.abs(change[0]).max() == 0  # no step
    assert np.abs(change[1]).max() > 0.01

    def plain(params):
        u = mean_velocity(model, params, batch, x, batch["sigma"], batch["dropped"])
        error = jnp.mean((u + change - target) ** 2, axis=(1, 2, 3))
        return jnp.mean(error / jax.lax.stop_gradient(error + CFG.softness)), error

    trained = ("sana", "diffusion_connector")
    own = {part: params[part] for part in trained}
    (value, error), expected = jax.jit(
        jax.value_and_grad(lambda own: plain(params | own), has_aux=True)
    )(own)

    def loss(own):
        return distill_loss(model, CFG, params | own, batch, KEY)

    (found, metrics), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(own)
    np.testing.assert_allclose(found, value, rtol=1e-3)
    np.testing.assert_allclose(metrics["error"], np.mean(error), rtol=1e-3)
    np.testing.assert_allclose(metrics["flow"], error[0], rtol=1e-3)
    for path, ours in jax.tree_util.tree_leaves_with_path(gradients):
        theirs = functools.reduce(lambda tree, key: tree[key.key], path, expected)
        np.testing.assert_allclose(ours, theirs, atol=3e-3 * np.abs(theirs).max() + 1e-9)


def test_micro_batches_have_the_gradient_of_the_whole(case):
    model, params, batch = case
    cfg = TrainConfig("distill", model=FEW, batch_size=ROWS, distill=CFG)
    own, frozen = split(params, cfg.trainable)
    assert set(own) == {"sana", "diffusion_connector"}

    def gradients(pieces):
        cut = TrainConfig("distill", model=FEW, batch_size=ROWS, accumulate=pieces, distill=CFG)
        return jax.jit(lambda *x: steps.gradients(model, cut, *x, KEY)[0])(own, frozen, batch)

    for whole, cut in zip(*map(jax.tree.leaves, (gradients(1), gradients(2))), strict=True):
        np.testing.assert_allclose(cut, whole, atol=2e-5 * np.abs(whole).max() + 1e-9)


def test_what_is_drawn(case):
    model = case[0]
    rows = {"tokens": np.zeros((4000, 1)), "latents": np.zeros((4000, 1, 1, 1))}
    draws = jax.device_get(distill_draws(model, CFG, rows, KEY))
    t, r = draws["sigma"], draws["next_sigma"]
    assert np.all((r >= 0) & (r <= t) & (t <= 1))
    assert abs(np.mean(t == r) - 0.5) < 0.05
    assert abs(np.mean(draws["dropped"]) - 0.1) < 0.02
    scale = draws["scale"]
    assert np.all(scale[draws["dropped"]] == 1)
    assert scale.min() == 1
    assert 3.9 < scale.max() < 4
    # Where nothing guides there is one span.
    assert np.all(draws["begin"][scale == 1] == 0)
    assert np.all(draws["end"][scale == 1] == 1)
    everywhere = (draws["begin"] == 0) & (draws["end"] == 1)
    assert 0.5 < np.mean(everywhere) < 0.7
    assert draws["begin"].max() <= 0.5
    assert draws["end"].min() >= 0.5


def test_a_run_begins_with_the_pictures_of_its_teacher():
    """In as many steps and without guidance, to the bit; from a checkpoint that has no spans."""
    config = replace(preset("emoji_64"), **SMALL)
    params, parts = random_params(config), ("sana", "diffusion_connector")
    init = dict.fromkeys(parts, "there")
    cfg = TrainConfig("distill", model=SMALL | FEW, init=init)
    few = Blip3o(cfg.blip3o())
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    begun = start.initial_params(cfg, few, lambda _, part: params[part], mesh, parts)
    rng, side = np.random.default_rng(0), config.sana.sample_size
    hidden = rng.standard_normal((2, config.num_condition_tokens, 32), np.float32)
    noise = rng.standard_normal((2, side, side, config.dc_ae.latent_channels), np.float32)

    def pictures(model, params, guidance):
        function = functools.partial(generate.denoise, model, guidance=guidance, shift=1.0)
        return jax.jit(lambda *x: function(*x, num_inference_steps=3))(params, hidden, noise)

    expected = pictures(Blip3o(config), params, None)
    np.testing.assert_array_equal(pictures(few, begun, 1.0), expected)
    np.testing.assert_array_equal(pictures(few, begun, 2.0), expected)  # not learned yet


@pytest.mark.parametrize("stage", ["joint", "grpo"])
def test_a_plain_run_may_begin_with_a_model_of_few_steps(stage, caplog):
    """Whose velocities without steps and guidance it takes over; where they are not trained, the
    log says how to keep the few steps."""
    config = replace(preset("emoji_64"), **SMALL | FEW)
    params = random_params(config)
    cfg = TrainConfig(stage, model=SMALL, init={"sana": "there"})
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    model = Blip3o(cfg.blip3o())
    plain = start.initial_params(cfg, model, lambda _, part: params[part], mesh, ("sana",))["sana"]
    expected = {name: x for name, x in params["sana"].items() if name != "span_embed"}
    jax.tree.map(np.testing.assert_array_equal, plain, expected)
    keep = "; --config.model.sana.few_steps=4 keeps it so" if stage == "grpo" else ""
    sentence = f"init.sana: there is of few steps, which this run's checkpoints are not{keep}."
    assert caplog.messages == [sentence]


def test_a_run_that_trains_the_transformer_keeps_the_spans_of_its_model():
    config = replace(preset("emoji_64"), **SMALL | FEW)
    params = random_params(config)
    cfg = TrainConfig("grpo", model=SMALL | FEW, init={"sana": "there"})
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    model = Blip3o(cfg.blip3o())
    kept = start.initial_params(cfg, model, lambda _, part: params[part], mesh, ("sana",))["sana"]
    jax.tree.map(np.testing.assert_array_equal, kept, params["sana"])


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"stage": "distill"}, "Stage 'distill' trains a model of few steps; say how many by"),
        ({"stage": "joint", "model": FEW}, "Stage 'joint' would train velocities of a model of"),
        (
            {"stage": "grpo", "model": FEW, "grpo": {"train": "diffusion", "guidance_scale": None}},
            "Stage 'grpo' would train velocities of a model of few steps",
        ),
        ({"stage": "distill", "model": FEW, "distill": {"max_scale": 1.0}}, "above 1, not 1.0"),
        ({"stage": "distill", "model": FEW, "distill": {"instant_share": 1.0}}, "in [0, 1)"),
        ({"stage": "distill", "model": FEW, "joint": {}}, "joint has no effect in stage 'distill'"),
    ],
)
def test_what_contradicts_itself_is_refused(values, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        from_dict(TrainConfig, values)


def test_the_shipped_config_trains_the_diffusion_part_alone():
    cfg = read_config("emoji_few_steps", [])
    assert cfg.blip3o().sana.few_steps == 4
    assert cfg.trained_parts == ("diffusion_connector", "sana")
    assert cfg.trainable("sana/span_embed/linear_1/kernel")
    assert not cfg.trainable("qwen3/embed_tokens/embedding")
