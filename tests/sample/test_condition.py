"""What an edit adds to the condition, for every way in which a model takes its source."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SMALL

from blip3o_jax.config import replace
from blip3o_jax.convert.random_weights import random_params
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.presets import preset
from blip3o_jax.sample import condition, flow, generate
from blip3o_jax.sample.condition import Sources

TOKENS = {"use_und_image_vae": True}
NOISE = {"use_und_image_vae_as_noise": True}
VARIANTS = {
    "tokens": TOKENS | {"max_sources": 2},
    "noise": NOISE,
    "only_noise": TOKENS | NOISE | {"only_use_und_image_vae_as_noise": True},
    "both": TOKENS | NOISE,
    "channels": {"use_und_image_vae_as_channels": True, "sana.in_channels": 32},
}
ROWS, STEPS = 3, 2


def small(variant: str, positions: bool):
    """A narrow emoji_64 of the variant, random weights, and inputs of three rows: an edit, text to
    image, and an edit."""
    changes = {"max_sources": 1} | VARIANTS[variant]
    if not positions:
        changes |= {"sana.condition_positions": False, "sana.interpolation_scale": None}
    cfg = replace(preset("emoji_64"), **{**SMALL, **changes})
    rng = np.random.default_rng(0)
    side, channels = cfg.sana.sample_size, cfg.dc_ae.latent_channels

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    hidden = normal(ROWS, cfg.num_condition_tokens, cfg.qwen3.hidden_size)
    latents = normal(ROWS, cfg.max_sources, side, side, channels)
    exists = jnp.arange(cfg.max_sources) < jnp.array([1, 0, cfg.max_sources])[:, None]
    noise = normal(ROWS, side, side, channels)
    return Blip3o(cfg), random_params(cfg), hidden, Sources(latents, exists), noise


def velocity(model, params, x, t, hidden, sources, dropped=None):
    given = condition.build(model, params, hidden, sources, dropped)
    return condition.velocity(model, params, x, t, given)


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_without_source_is_text_to_image_and_one_with_it_is_not(variant, positions):
    model, params, hidden, sources, noise = small(variant, positions)
    t = jnp.array([900.0, 500.0, 100.0])
    function = jax.jit(functools.partial(velocity, model, params))
    mixed = function(noise, t, hidden, sources)
    alone = function(noise, t, hidden, None)
    scale = np.abs(alone).max()
    np.testing.assert_allclose(mixed[1], alone[1], atol=1e-5 * scale)
    assert np.abs(mixed[0] - alone[0]).max() > 1e-2 * scale
    assert np.abs(mixed[2] - alone[2]).max() > 1e-2 * scale
    # Where no source exists the latents do not matter; where one does they do.
    other = sources.replace(latents=sources.latents[::-1])
    changed = function(noise, t, hidden, other)
    np.testing.assert_allclose(changed[1], mixed[1], atol=1e-5 * scale)
    assert np.abs(changed[0] - mixed[0]).max() > 1e-3 * scale


@pytest.mark.parametrize("variant", VARIANTS)
def test_guidance_on_two_scales_is_three_plain_calls(variant):
    """Nothing, the source alone, and all: v_u + image (v_i - v_u) + text (v_t - v_i)."""
    model, params, hidden, sources, noise = small(variant, positions=False)
    guidance = condition.guidance(4.0, image=1.5)
    assert guidance.nulls == ("nothing", "source")
    steps = jax.jit(functools.partial(generate.trajectory, model), static_argnums=3)(
        params, hidden, noise, STEPS, guidance, 1.0, sources
    )
    function = jax.jit(functools.partial(velocity, model, params))
    everywhere = jnp.ones(ROWS, bool)
    for i in range(STEPS):
        x, t = steps["latents"][i], jnp.full(ROWS, 1000 * steps["sigmas"][i])
        nothing = function(x, t, 0 * hidden, sources, everywhere)
        source = function(x, t, 0 * hidden, sources)
        text = function(x, t, hidden, sources)
        expected = nothing + 1.5 * (source - nothing) + 4.0 * (text - source)
        atol = 2e-5 * np.abs(expected).max()
        np.testing.assert_allclose(steps["velocities"][i], expected, atol=atol)


def test_scales_of_one_are_the_result_without_guidance():
    assert condition.guidance(1.0, image=1.0) == condition.Guidance()
    assert condition.guidance(None) == condition.Guidance()


@pytest.mark.parametrize(
    ("scales", "nulls", "numbers"),
    [
        ((2.0, None), ("nothing",), (2.0,)),
        ((2.0, 1), ("source",), (2.0,)),
        ((2.0, 2.0), ("nothing",), (2.0,)),
        ((1, 1.5), ("nothing", "source"), (1.5, 1)),
    ],
)
def test_guidance_takes_no_more_forwards_than_its_scales_need(scales, nulls, numbers):
    """And each form is the same sum of the three velocities."""
    guidance = condition.guidance(*scales)
    assert (guidance.nulls, guidance.scales) == (nulls, numbers)
    u, i, t = np.random.default_rng(0).standard_normal((3, 1, 2, 2, 1)).astype(np.float32)
    text, image = scales[0], scales[0] if scales[1] is None else scales[1]
    expected = u + image * (i - u) + text * (t - i)
    rows = [{"nothing": u, "source": i}[null] for null in nulls] + [t]
    found = flow.guided(jnp.stack(rows, axis=1), guidance.scales)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_guidance_by_a_source_needs_one():
    model, params, hidden, _, noise = small("channels", positions=True)
    for image in (1.0, 1.5):
        guidance = condition.guidance(2.0, image=image)
        with pytest.raises(ValueError, match="guidance by the source image needs `sources`"):
            generate.denoise(model, params, hidden, noise, STEPS, guidance, 1.0)


def test_renormalisation_shortens_to_the_conditional_norm():
    given = jnp.ones((2, 1, 1, 2))
    rows = jnp.stack([-given, given], axis=1)
    plain = flow.guided(rows, (3.0,))
    np.testing.assert_allclose(plain, 5 * given)
    np.testing.assert_allclose(flow.guided(rows, (3.0,), 0.0), given, rtol=1e-5)
    np.testing.assert_allclose(flow.guided(rows, (3.0,), 0.5), 2.5 * given, rtol=1e-5)
    shorter = flow.guided(rows, (0.75,), 0.0)  # already shorter: left alone
    np.testing.assert_allclose(shorter, 0.5 * given, rtol=1e-5)


def test_the_reference_beside_the_noise_need_not_be_stepped():
    """The original steps the whole wide grid, and puts the clean reference back each time."""
    model, params, hidden, sources, noise = small("noise", positions=False)
    expected = jax.jit(functools.partial(generate.denoise, model), static_argnums=3)(
        params, hidden, noise, STEPS, None, 1.0, sources
    )
    given = condition.build(model, params, hidden[:1]).tokens
    reference, x = sources.latents[:1, 0], noise[:1]
    levels = np.asarray(flow.sigmas(STEPS))
    for sigma, following in itertools.pairwise(levels):
        wide = jnp.concatenate([x, reference], axis=2)
        v = model.apply(params, "sana", wide, jnp.full(1, 1000 * sigma), given)
        x = (wide + (following - sigma) * v)[:, :, : x.shape[2]]
    np.testing.assert_allclose(x, expected[:1], atol=1e-4 * np.abs(expected).max())


def test_source_codes_are_written_in_order_and_nowhere_else():
    tokens = jnp.array([[1, 50, 50, 2, 50, 50, 3, 99, 60, 60], [1, 2, 50, 50, 5, 3, 3, 99, 60, 60]])
    codes = jnp.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    written = generate.write_source_codes(tokens, jnp.array([7, 7]), codes, 50)
    np.testing.assert_array_equal(written[0], [1, 51, 52, 2, 53, 54, 3, 99, 60, 60])
    np.testing.assert_array_equal(written[1], [1, 2, 55, 56, 5, 3, 3, 99, 60, 60])
