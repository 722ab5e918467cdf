"""Sampling from a model of few steps: one forward a step, which guides by itself."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SMALL, text

from blip3o_jax.config import replace
from blip3o_jax.convert.random_weights import random_params
from blip3o_jax.errors import InputError
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.presets import preset
from blip3o_jax.request import Request, encode, settled
from blip3o_jax.sample import condition, flow, generate
from blip3o_jax.sample.settings import EditSettings, Settings, check_few_steps, defaults

STEPS = 3


@pytest.fixture(scope="module")
def case():
    """(model, params, hidden states, noise)."""
    config = replace(preset("emoji_64"), **SMALL | {"sana.few_steps": STEPS})
    rng, side = np.random.default_rng(0), config.sana.sample_size
    hidden = rng.standard_normal((2, config.num_condition_tokens, 32), np.float32)
    noise = rng.standard_normal((2, side, side, config.dc_ae.latent_channels), np.float32)
    return Blip3o(config), random_params(config), hidden, noise


def denoise(case, guidance, steps=STEPS, shift=1.0):
    model, params, hidden, noise = case
    return jax.jit(
        lambda hidden, noise: generate.denoise(model, params, hidden, noise, steps, guidance, shift)
    )(hidden, noise)


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_a_step_is_the_mean_velocity_times_its_length(case, shift):
    model, params, hidden, noise = case
    given = condition.build(model, params, hidden)
    x, levels = noise, np.asarray(flow.sigmas(STEPS, shift))
    one = jax.jit(functools.partial(condition.velocity, model, params))
    for sigma, below in itertools.pairwise(levels):
        span = np.tile(np.float32([[sigma - below, 0.5, 0, 1]]), (2, 1))
        x = x - (sigma - below) * one(x, jnp.full(2, 1000 * sigma), given, span)
    found = denoise(case, 2.0, shift=shift)
    np.testing.assert_allclose(found, x, atol=1e-5 * np.abs(x).max())
    assert np.abs(denoise(case, 3.0, shift=shift) - found).max() > 1e-3 * np.abs(x).max()


def test_guidance_costs_no_rows(case):
    """SANA sees as many rows as there are images."""
    model, params, hidden, noise = case

    def program(guidance):
        return str(
            jax.make_jaxpr(lambda *x: generate.denoise(model, params, *x, STEPS, guidance, 1.0))(
                hidden, noise
            )
        )

    side, width = model.config.sana.sample_size, model.config.sana.hidden_size
    doubled = f"f32[4,{side},{side},{width}]"
    assert doubled not in program(2.0)
    plain = replace(model.config, **{"sana.few_steps": 0})
    model = Blip3o(plain)
    assert doubled in program(2.0)


def test_every_way_of_stepping_is_the_same(case):
    model, params, hidden, noise = case
    expected = denoise(case, 2.0)
    levels = flow.levels(STEPS, 10)
    between = jax.jit(functools.partial(generate.denoise_between, model, guidance_scale=2.0))
    latents = noise
    for begin, end in ((0, 1), (1, STEPS)):
        latents, _ = between(params, hidden, latents, None, levels, begin, end, shift=1.0)
    np.testing.assert_allclose(latents, expected, atol=1e-6)
    seen = jax.jit(functools.partial(generate.trajectory, model), static_argnums=3)
    steps = seen(params, hidden, noise, STEPS, 2.0, 1.0)
    np.testing.assert_allclose(steps["latents"][-1], expected, atol=1e-6)


def test_stochastic_steps_are_of_the_velocity_where_they_begin(case):
    """Without noise they are Euler's, of a model that was never told of spans."""
    model, params, hidden, _ = case
    keys = np.array([[0, 0, i] for i in range(2)], np.uint32)
    how = {"num_inference_steps": STEPS, "sampler": "dance", "noise_level": 0.0}
    path = jax.jit(functools.partial(generate.path, model, **how))(params, hidden, keys)
    plain = Blip3o(replace(model.config, **{"sana.few_steps": 0}))
    sana = {name: x for name, x in params["sana"].items() if name != "span_embed"}
    noise = generate.first_noise(model, keys)
    expected = denoise((plain, params | {"sana": sana}, hidden, noise), None)
    np.testing.assert_allclose(path["latents"][-1], expected, atol=1e-5)


def test_other_guidance_is_refused(case):
    for guidance in (
        condition.guidance(2.0, 1.0),
        condition.guidance(2.0, 3.0),
        condition.guidance(2.0, 2.0, renorm_min=0.5),
    ):
        with pytest.raises(ValueError, match="a model of few steps guides by one scale"):
            denoise(case, guidance)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (Settings(guidance_scale=0.5), "has a guidance_scale from 1 on, not 0.5"),
        (EditSettings(guidance_scale=2.0), "2.0 and image_guidance_scale 1.0 must be equal"),
        (EditSettings(renorm_min=0.5), "renorm_min and reference_quirks have no effect on"),
        (EditSettings(reference_quirks=True), "renorm_min and reference_quirks have no effect"),
    ],
)
def test_settings_it_does_not_know_are_refused(case, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        check_few_steps(settings)
    images = (np.zeros((4, 4, 3), np.uint8),) if isinstance(settings, EditSettings) else ()
    request = Request("a red heart", images, settings=settings)
    with pytest.raises(InputError, match=sentence):
        encode(request, case[0].config, None)


def test_it_has_its_own_number_of_steps(case):
    config = case[0].config
    for kind in (Settings, EditSettings):
        assert defaults(config, kind).num_inference_steps == STEPS
        assert defaults(config, kind, num_inference_steps=7).num_inference_steps == 7
        assert defaults(preset("mid_128"), kind) == kind()
    # A request without settings has those of the model.
    image = np.zeros((4, 4, 3), np.uint8)
    for images, kind in (((), Settings), ((image,), EditSettings)):
        request = Request("a red heart", images)
        assert settled(request, config).settings == defaults(config, kind)
        assert settled(request, preset("mid_128")).settings == kind()
        own = Request("a red heart", images, settings=kind(num_inference_steps=7))
        assert settled(own, config) is own
    (tokens,) = encode(Request("a red heart"), config, text())
    assert tokens == text().encode_prompt("a red heart")
    check_few_steps(defaults(config))
    check_few_steps(EditSettings(guidance_scale=2.0, image_guidance_scale=2.0))
