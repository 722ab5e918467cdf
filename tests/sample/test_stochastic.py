"""Stochastic steps: each sampler by its published formula, and that zero noise is Euler's step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from blip3o_jax.config import replace
from blip3o_jax.convert.random_weights import random_params
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.presets import preset
from blip3o_jax.sample import flow, generate, stochastic

STEPS, ROWS = 4, 2
MODEL = Blip3o(replace(preset("emoji_64"), **tiny.SMALL))


def published(sampler, a, x, v, s, following):
    """(mean, std) as the authors write them, in float64; Flow-GRPO's and DanceGRPO's formulas have
    ds = next - s < 0."""
    ds = following - s
    if sampler == "flow_grpo":
        g = a * np.sqrt(s / (1 - (following if s == 1 else s)))
        mu = x * (1 + g**2 * ds / (2 * s)) + v * (1 + g**2 * (1 - s) / (2 * s)) * ds
        return mu, g * np.sqrt(-ds)
    if sampler == "dance":
        clean = x - s * v
        score = -(x - (1 - s) * clean) / s**2
        return x + ds * v - 0.5 * a**2 * ds * score, a * np.sqrt(-ds)
    std = following * np.sin(a * np.pi / 2)
    clean, noise = x - s * v, x + (1 - s) * v
    return (1 - following) * clean + np.sqrt(following**2 - std**2) * noise, std


@pytest.mark.parametrize("sampler", stochastic.SAMPLERS)
@pytest.mark.parametrize(("s", "following"), [(1.0, 0.75), (0.75, 0.5), (0.25, 0.125)])
def test_a_step_is_the_published_one(sampler, s, following):
    rng, a = np.random.default_rng(0), 0.7
    x, v, z = rng.normal(size=(3, ROWS, 2, 2, 3))
    mean, std = published(sampler, a, x, v, s, following)
    after = mean + std * z
    if sampler == "cps":
        logprob = -np.mean((after - mean) ** 2, axis=(1, 2, 3))
    else:
        density = -((after - mean) ** 2) / (2 * std**2) - np.log(std) - 0.5 * np.log(2 * np.pi)
        logprob = np.mean(density, axis=(1, 2, 3))
    given = [jnp.asarray(array, jnp.float32) for array in (x, v)]
    # Of the whole batch, and of each row by itself.
    for levels in ((s, following), (jnp.full(ROWS, s), jnp.full(ROWS, following))):
        found, spread = stochastic.transition(sampler, a, *given, *levels)
        np.testing.assert_allclose(found, mean, atol=1e-5)
        np.testing.assert_allclose(np.ravel(spread), std, rtol=1e-5)
        found = stochastic.logprob(sampler, jnp.asarray(after, jnp.float32), found, spread)
        np.testing.assert_allclose(found, logprob, atol=1e-5)


def test_the_last_step_of_cps_is_without_noise():
    x, v = np.random.default_rng(1).normal(size=(2, ROWS, 2, 2, 3)).astype(np.float32)
    mean, std = stochastic.transition("cps", 0.8, x, v, 0.25, 0.0)
    np.testing.assert_allclose(mean, x - 0.25 * v, atol=1e-6)
    assert not np.any(std)


@pytest.fixture(scope="module")
def case():
    """params, hidden states [ROWS,n+1,D] and keys [ROWS,3]."""
    cfg = MODEL.config
    shape = ROWS, cfg.num_condition_tokens, cfg.qwen3.hidden_size
    hidden = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    keys = np.array([generate.sample_key(3, "a cat", i) for i in range(ROWS)], np.uint32)
    return jax.tree.map(jnp.asarray, random_params(cfg)), hidden, keys


@functools.cache
def path(sampler):
    function = functools.partial(generate.path, MODEL, num_inference_steps=STEPS, sampler=sampler)
    return jax.jit(function)


@pytest.mark.parametrize("sampler", stochastic.SAMPLERS)
def test_without_noise_latents_and_picture_are_those_of_the_plain_flow(case, sampler):
    """Byte for byte. With noise they are others, and those of a key do not depend on the rest."""
    params, hidden, keys = case
    settings = {"num_inference_steps": STEPS, "guidance_scale": None, "shift": 1.0}
    plain = jax.jit(functools.partial(generate.draw_latents, MODEL, **settings))
    expected = plain(params, hidden, keys)
    pictures = jax.jit(functools.partial(generate.pictures, MODEL))
    latents = path(sampler)(params, hidden, keys, noise_level=0.0)["latents"]
    np.testing.assert_array_equal(latents[-1], expected)
    np.testing.assert_array_equal(pictures(params, latents[-1]), pictures(params, expected))
    noisy = path(sampler)(params, hidden, keys, noise_level=0.7)["latents"]
    np.testing.assert_array_equal(noisy[0], latents[0])
    assert np.all(np.std(noisy[1:] - latents[1:], axis=(1, 2, 3, 4)) > 0.01)
    turned = path(sampler)(params, hidden[::-1], keys[::-1], noise_level=0.7)["latents"]
    np.testing.assert_allclose(turned[:, ::-1], noisy, atol=1e-5)


def test_cps_keeps_as_much_noise_as_the_level_says():
    """For data of zeros the velocity of x is x / sigma: x stays N(0, sigma^2)."""
    x = jax.random.normal(jax.random.key(0), (1, 64, 64, 16))
    for kind, agrees in {"cps": True, "dance": False}.items():
        step = stochastic.step(kind, 0.8, jax.random.split(jax.random.key(1), 1))
        _, kept = flow.integrate(lambda x, sigma, _: x / sigma, x, flow.sigmas(STEPS), step)
        spreads = np.std(kept["latents"], axis=(1, 2, 3, 4))
        close = np.allclose(spreads, flow.sigmas(STEPS)[:-1], rtol=0.02)
        assert close == agrees
