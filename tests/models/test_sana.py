"""SANA against diffusers' values, its conversion, and its size."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.config import SanaConfig, replace
from blip3o_jax.convert.rules import to_jax, to_torch, torch_shapes
from blip3o_jax.convert.sana import sana_rules
from blip3o_jax.models.sana import Sana, grid_positions
from blip3o_jax.models.sana_time import timestep_embedding
from blip3o_jax.presets import SANA_PRESETS

NORMED = SanaConfig(
    in_channels=4,
    out_channels=6,
    num_layers=2,
    num_attention_heads=4,
    attention_head_dim=8,
    num_cross_attention_heads=2,
    cross_attention_head_dim=16,
    caption_channels=24,
    sample_size=6,
)
CONFIGS = {"normed": NORMED, "positioned": replace(NORMED, qk_norm=False, interpolation_scale=2.0)}


def abstract_params(cfg):
    inputs = (
        jnp.zeros((1, 1, 1, cfg.in_channels)),
        jnp.zeros(1),
        jnp.zeros((1, 1, cfg.caption_channels)),
    )
    return jax.eval_shape(Sana(cfg).init, jax.random.key(0), *inputs)["params"]


def relative_error(actual, expected):
    return np.abs(np.asarray(actual, np.float32) - expected).max() / np.abs(expected).max()


def load(variant):
    """(config, tensors by torch name, our parameters, inputs and outputs by name)."""
    cfg = CONFIGS[variant]
    with np.load(Path(__file__).parents[1] / "fixtures" / "sana.npz") as file:
        tensors = {
            name.removeprefix("weights/"): file[name]
            for name in file.files
            if name.startswith("weights/")
        }
        arrays = {name.split("/")[1]: file[name] for name in file.files if name.startswith(variant)}
    if not cfg.qk_norm:
        tensors = {
            name: tensor
            for name, tensor in tensors.items()
            if "norm_q" not in name and "norm_k" not in name
        }
    return cfg, tensors, to_jax(sana_rules(cfg), tensors, abstract_params(cfg)), arrays


@pytest.fixture(scope="module", params=list(CONFIGS))
def case(request):
    return load(request.param)


def test_weights_survive_the_round_trip(case):
    cfg, tensors, params, _ = case
    back = to_torch(sana_rules(cfg), params)
    assert set(back) == set(tensors)
    assert all(
        back[name].tobytes() == tensors[name].tobytes() and back[name].shape == tensors[name].shape
        for name in tensors
    )


def test_values_are_those_of_diffusers(case):
    cfg, _, params, arrays = case
    apply = jax.jit(Sana(cfg).apply)
    latents, t, condition = (arrays[name] for name in ("latents", "t", "condition"))
    assert (
        relative_error(apply({"params": params}, latents, t, condition), arrays["velocity"]) < 1e-5
    )
    permuted = condition[:, ::-1]  # its tokens are a set
    assert (
        relative_error(apply({"params": params}, latents, t, permuted), arrays["velocity"]) < 1e-5
    )


def test_keys_and_values_of_the_condition_can_be_computed_beforehand():
    cfg, _, params, arrays = load("normed")
    encoded = Sana(cfg).apply({"params": params}, arrays["condition"], method="encode_condition")
    assert relative_error(encoded, arrays["encoded"]) < 1e-5
    keys, values = Sana(cfg).apply({"params": params}, arrays["condition"], method="keys_values")
    shape = (
        cfg.num_layers,
        *encoded.shape[:2],
        cfg.num_cross_attention_heads,
        cfg.cross_attention_head_dim,
    )
    assert keys.shape == values.shape == shape
    step = jax.jit(partial(Sana(cfg).apply, method="step"))
    assert (
        relative_error(
            step({"params": params}, arrays["latents"], arrays["t"], (keys, values)),
            arrays["velocity"],
        )
        < 1e-5
    )
    other = step({"params": params}, arrays["latents"], arrays["t"], (keys, 2 * values))
    assert relative_error(other, arrays["velocity"]) > 1e-3  # they are read


def test_bf16_stays_close_and_finite():
    cfg, _, params, arrays = load("positioned")
    apply = jax.jit(Sana(cfg, jnp.bfloat16).apply)
    latents, t, condition = (arrays[name] for name in ("latents", "t", "condition"))
    velocity = apply({"params": params}, latents, t, condition)
    assert velocity.dtype == jnp.bfloat16
    assert relative_error(velocity, arrays["velocity"]) < 0.05
    huge = apply({"params": params}, 1e4 * latents, t, 1e4 * condition)
    assert np.all(np.isfinite(huge.astype(np.float32)))


def test_remat_keeps_less_for_the_backward_pass():
    inputs = jnp.zeros((2, 4, 4, 4)), jnp.ones(2), jnp.zeros((2, 3, 24))

    def kept(remat):
        model = Sana(NORMED, remat=remat)
        residuals = jax.eval_shape(
            lambda params: jax.vjp(lambda p: model.apply({"params": p}, *inputs), params)[1],
            abstract_params(NORMED),
        )
        return sum(leaf.size for leaf in jax.tree.leaves(residuals))

    assert kept("full") < kept("dots") < kept("none")


def test_an_unknown_remat_is_refused():
    with pytest.raises(ValueError, match="unknown remat 'some'; known: none, full, dots"):
        jax.eval_shape(
            Sana(NORMED, remat="some").init,
            jax.random.key(0),
            jnp.zeros((1, 1, 1, 4)),
            jnp.zeros(1),
            jnp.zeros((1, 1, 24)),
        )


def test_positions_by_hand():
    positions = grid_positions(CONFIGS["positioned"], 3, 4)
    assert positions.shape == (3, 4, 32)
    column, row = 3 / (4 / 6) / 2, 2 / (3 / 6) / 2
    i = np.arange(8)
    expected = [f(place / 10000 ** (i / 8)) for place in (column, row) for f in (np.sin, np.cos)]
    np.testing.assert_allclose(positions[2, 3], np.concatenate(expected), atol=1e-6)


def few_steps(cfg, seed=0):
    """(a SANA of few steps, parameters: `params` of the one it came from and random spans')."""
    cfg = replace(cfg, few_steps=4)
    span = abstract_params(cfg)["span_embed"]
    rng = np.random.default_rng(seed)
    span = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32) * 0.1, span)
    return cfg, {"span_embed": span}


def test_a_model_of_few_steps_begins_as_the_one_it_came_from():
    """Whatever the span; and a fresh one adds exactly nothing."""
    cfg, _, params, arrays = load("normed")
    inputs = arrays["latents"], arrays["t"], arrays["condition"]
    few = Sana(replace(cfg, few_steps=4))
    fresh = jax.jit(few.init)(jax.random.key(0), *inputs)["params"]["span_embed"]
    span = np.random.default_rng(0).uniform(size=(len(arrays["t"]), 4)).astype(np.float32)
    apply = jax.jit(few.apply)
    found = apply({"params": params | {"span_embed": fresh}}, *inputs, span=span)
    plain = jax.jit(Sana(cfg).apply)({"params": params}, *inputs)
    np.testing.assert_array_equal(found, plain)


def test_no_step_without_guidance_is_the_velocity_of_a_plain_model():
    """Also of a trained one: what diffusers makes of the tensors that it knows."""
    cfg, _, params, arrays = load("normed")
    inputs = arrays["latents"], arrays["t"], arrays["condition"]
    few, spans = few_steps(cfg)
    apply = jax.jit(Sana(few).apply)
    here = np.tile(np.float32([[0, 0, 0, 1]]), (len(arrays["t"]), 1))
    plain = jax.jit(Sana(cfg).apply)({"params": params}, *inputs)
    for span in (None, here):
        found = apply({"params": params | spans}, *inputs, span=span)
        np.testing.assert_allclose(found, plain, atol=1e-6)
    # Each of the four numbers is read.
    for i in range(4):
        moved = here.copy()
        moved[:, i] = 0.5
        found = apply({"params": params | spans}, *inputs, span=moved)
        assert relative_error(found, plain) > 1e-3, i


def test_only_a_model_of_few_steps_takes_a_span():
    cfg, _, params, arrays = load("normed")
    inputs = arrays["latents"], arrays["t"], arrays["condition"]
    with pytest.raises(ValueError, match="this SANA has no few_steps, so it takes no span"):
        Sana(cfg).apply({"params": params}, *inputs, span=jnp.zeros((len(arrays["t"]), 4)))


def test_the_derivative_of_a_timestep_is_of_what_is_longer_than_a_few():
    """The quotient over 2 x 30 of each wave: nearly the slope of a slow one, nothing of a fast."""
    t, frequencies = 400.0, 10000.0 ** (-np.arange(128) / 128)
    found = jax.jvp(timestep_embedding, (jnp.array([t]),), (jnp.array([2.0]),))[1][0]
    damped = 2 * frequencies * np.sinc(frequencies * 30 / np.pi)
    expected = [-damped * np.sin(t * frequencies), damped * np.cos(t * frequencies)]
    np.testing.assert_allclose(found, np.concatenate(expected), atol=2e-5)


def test_timesteps_are_cosines_then_sines():
    embedding = np.asarray(timestep_embedding(jnp.array([1000.0])))[0]
    np.testing.assert_allclose(
        embedding[[0, 1, 128, 129]], [0.56238, 0.78963, 0.82688, 0.61359], atol=1e-4
    )


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("sana_0_6b", 591_747_872),
        ("sana_1_0_1_6b", 1_604_462_752),
        ("sana_1_6b", 1_604_641_952),
        ("sana_4_8b", 4_721_825_952),
    ],
)
def test_published_sizes(name, size):
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract_params(SANA_PRESETS[name]()))) == size


def test_published_names():
    shapes = torch_shapes(sana_rules(SanaConfig()), abstract_params(SanaConfig()))
    assert len(shapes) == 476
    published = {
        "time_embed.linear.weight": (13440, 2240),
        "time_embed.emb.timestep_embedder.linear_1.weight": (2240, 256),
        "patch_embed.proj.weight": (2240, 32, 1, 1),
        "transformer_blocks.19.attn1.norm_k.weight": (2240,),
        "transformer_blocks.0.attn2.to_q.bias": (2240,),
        "transformer_blocks.0.ff.conv_depth.weight": (11200, 1, 3, 3),
        "transformer_blocks.0.ff.conv_point.weight": (2240, 5600, 1, 1),
    }
    assert {name: shapes[name] for name in published} == published
