"""The methods on the diffusion part: each by its published formula, and what must hold exactly."""

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
from blip3o_jax.rl import diffusion
from blip3o_jax.sample import condition, flow, generate, stochastic
from blip3o_jax.train.sections import DiffusionRlConfig

B, K, STEPS = 6, 3, 5
SHAPE = B, 2, 2, 3


def arrays(seed, *names):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=SHAPE) for name in names}


def loss_of(cfg, velocities, point, gains):
    point = {name: jnp.asarray(x, jnp.float32) for name, x in point.items()}
    velocities = [jnp.asarray(x, jnp.float32) for x in velocities]
    return diffusion.METHODS[cfg.method].loss(cfg, *velocities, point, jnp.asarray(gains))


def noisy_point(seed=0):
    rng = np.random.default_rng(seed)
    point = arrays(seed + 1, "x0", "noise") | {"sigma": rng.random(B)}
    sigma = point["sigma"][:, None, None, None]
    return point | {"x": (1 - sigma) * point["x0"] + sigma * point["noise"]}


def mean(x):
    return np.mean(x, axis=(1, 2, 3))


def test_ram_is_the_published_formula():
    new, old, reference = arrays(3, "new", "old", "reference").values()
    point, gains = noisy_point(), np.linspace(-1.5, 1.5, B)
    shares = 0.3 * gains[:, None, None, None]
    target = reference + shares * (point["noise"] - point["x0"] - old)
    found, _ = loss_of(DiffusionRlConfig(strength=0.3), (new, old, reference), point, gains)
    np.testing.assert_allclose(found, mean((new - target) ** 2), rtol=1e-5)


def test_without_advantages_ram_regresses_to_the_first_policy():
    """The loss is the distance from it, and its gradient vanishes there, to the bit."""
    cfg, zeros = DiffusionRlConfig(), jnp.zeros(B)
    new, old, reference = (
        jnp.asarray(x, jnp.float32) for x in arrays(3, "new", "old", "reference").values()
    )
    point = {name: jnp.asarray(x, jnp.float32) for name, x in noisy_point().items()}

    def loss(velocity):
        return diffusion.loss(cfg, velocity, old, reference, point, zeros, jnp.ones(B), B)[0]

    np.testing.assert_allclose(loss(new), jnp.mean((new - reference) ** 2), rtol=1e-6)
    assert loss(reference) == 0
    assert not np.any(jax.grad(loss)(reference))


@pytest.mark.parametrize("b", [1.0, 0.1])
def test_nft_is_the_published_formula(b):
    new, old = arrays(4, "new", "old").values()
    point, gains = noisy_point(), np.array([-7.0, -2.0, 0.0, 1.0, 4.0, 9.0])
    t = point["sigma"][:, None, None, None]
    share = np.clip(np.clip(gains, -5, 5) / 5 / 2 + 0.5, 0, 1)
    total = np.zeros(B)
    for weight, mixed in ((share, b * new + (1 - b) * old), (1 - share, (1 + b) * old - b * new)):
        estimate = point["x"] - t * mixed
        scale = np.maximum(mean(np.abs(estimate - point["x0"])), 1e-5)
        total += weight * mean((estimate - point["x0"]) ** 2) / scale / b
    found, _ = loss_of(DiffusionRlConfig(method="nft", mix=b), (new, old, new), point, gains)
    np.testing.assert_allclose(found, 5 * total, rtol=1e-5)


def test_flow_grpo_is_the_published_formula():
    a, gains = 0.7, np.array([-9.0, -1.0, -0.5, 0.5, 1.0, 9.0])
    cfg = DiffusionRlConfig(method="flow_grpo", sampler="flow_grpo", noise_level=a, epsilon=0.01)
    new, old, x, after = arrays(5, "new", "old", "x", "next").values()
    s, following = 0.6, 0.4
    ds, g = following - s, a * np.sqrt(s / (1 - s))

    def logprob(v):
        mu = x * (1 + g**2 * ds / (2 * s)) + v * (1 + g**2 * (1 - s) / (2 * s)) * ds
        return mean(-((after - mu) ** 2) / (2 * g**2 * -ds) - np.log(g * np.sqrt(-ds)))

    ratio = np.exp(logprob(new) - logprob(old))
    cut = np.clip(gains, -5, 5)
    expected = np.maximum(-cut * ratio, -cut * np.clip(ratio, 0.99, 1.01))
    point = {"x": x, "next": after, "sigma": np.full(B, s), "next_sigma": np.full(B, following)}
    found, metrics = loss_of(cfg, (new, old, new), point, gains)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_array_equal(metrics["clipped"], np.abs(ratio - 1) > 0.01)
    assert np.mean(metrics["clipped"]) > 0
    # Where both are the same, the ratio is 1 and nothing else.
    _, metrics = loss_of(cfg, (new, new, new), point, gains)
    np.testing.assert_array_equal(metrics["ratio"], np.ones(B))


def test_divergence_and_norm_are_added_where_the_mask_is_one():
    new, old, reference = arrays(6, "new", "old", "reference").values()
    new = new * np.array([0.5, 1, 2, 3, 1, 1])[:, None, None, None]
    point, gains, mask = noisy_point(), np.linspace(-1, 1, B), np.array([1, 1, 1, 1, 0, 0.0])
    cfg = DiffusionRlConfig(beta=0.2, norm_penalty=0.4)
    plain, _ = loss_of(cfg, (new, old, reference), point, gains)
    divergence = mean((new - reference) ** 2)
    ratio = np.sqrt(mean(new**2) / mean(reference**2))
    every = np.asarray(plain) + 0.2 * divergence + 0.4 * np.maximum(ratio - 1, 0)
    given = [jnp.asarray(x, jnp.float32) for x in (new, old, reference)]
    point = {name: jnp.asarray(x, jnp.float32) for name, x in point.items()}
    gains, mask = jnp.asarray(gains), jnp.asarray(mask)
    loss, metrics = diffusion.loss(cfg, *given, point, gains, mask, jnp.sum(mask))
    np.testing.assert_allclose(loss, every[:4].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["kl"], divergence[:4].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["norm_ratio"], ratio[:4].mean(), rtol=1e-5)
    assert np.any(ratio[:4] < 1)
    assert np.any(ratio[:4] > 1)


@pytest.mark.parametrize("method", ["ram", "nft"])
def test_noise_is_fresh_and_levels_are_those_of_the_method(method):
    cfg = DiffusionRlConfig(method=method, num_train_timesteps=K)
    x0, schedule = jnp.asarray(np.random.default_rng(0).normal(size=(256, 2, 2, 3))), flow.sigmas(5)
    points = diffusion.METHODS[method].points(cfg, {"x0": x0}, schedule, jax.random.key(0))
    sigma = np.asarray(points["sigma"])
    expected = flow.add_noise(points["x0"][1], points["noise"][1], sigma[1])
    np.testing.assert_allclose(points["x"][1], expected, atol=1e-6)
    assert np.std(points["noise"][0] - points["noise"][1]) > 1
    if method == "ram":  # of density 2 sigma: a mean of 2/3, a mean square of 1/2
        np.testing.assert_allclose([sigma.mean(), (sigma**2).mean()], [2 / 3, 1 / 2], atol=0.03)
    else:
        assert set(sigma.ravel()) == set(np.asarray(schedule[:4]))
        assert all(len(set(sample)) == K for sample in sigma.T)


MODEL = Blip3o(replace(preset("emoji_64"), **tiny.SMALL))


@pytest.mark.parametrize("sampler", stochastic.SAMPLERS)
def test_sampler_and_trainer_agree_on_every_step(sampler):
    """Log-probabilities of the path as it was drawn, from cached keys and values, and of the
    trainer's forward pass at its points, within 1e-5; every point is a step that was taken."""
    config, rng = MODEL.config, np.random.default_rng(0)
    params = jax.tree.map(jnp.asarray, random_params(config))
    shape = B, config.num_condition_tokens, config.qwen3.hidden_size
    hidden = rng.normal(size=shape).astype(np.float32)
    keys = np.array([generate.sample_key(0, "a dog", i) for i in range(B)], np.uint32)
    cfg = DiffusionRlConfig(method="flow_grpo", sampler=sampler, num_train_timesteps=STEPS - 1)
    draw = functools.partial(
        generate.path, MODEL, num_inference_steps=STEPS, sampler=sampler, noise_level=0.8
    )
    drawn, schedule = jax.jit(draw)(params, hidden, keys), flow.sigmas(STEPS)
    points = diffusion.path_points(cfg, {"path": drawn["latents"]}, schedule, jax.random.key(0))

    @jax.jit
    def trained(x, sigma):
        given = condition.build(MODEL, params, hidden)
        t = flow.NUM_TRAIN_TIMESTEPS * sigma
        return condition.velocity(MODEL, params, x, t, given)

    steps = np.argmax(np.asarray(schedule)[:, None, None] == np.asarray(points["sigma"]), axis=0)
    assert all(sorted(sample) == [0, 1, 2, 3] for sample in steps.T)
    for k in range(STEPS - 1):
        point = {name: x[k] for name, x in points.items()}
        velocity = trained(point["x"], point["sigma"])
        levels = point["sigma"], point["next_sigma"]
        moments = stochastic.transition(sampler, 0.8, point["x"], velocity, *levels)
        found = stochastic.logprob(sampler, point["next"], *moments)
        expected = np.asarray(drawn["logprobs"])[steps[k], np.arange(B)]
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert np.std(expected) > 1e-3


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"method": "rma"}, "Unknown grpo.diffusion.method 'rma'; did you mean 'ram'?"),
        ({"noise_level": 0.5}, "grpo.diffusion.noise_level has no effect on method 'ram'"),
        ({"method": "nft", "strength": 2.0}, "grpo.diffusion.strength has no effect on method"),
        ({"method": "flow_grpo", "noise_level": 0.0}, "grpo.diffusion.noise_level is above 0"),
        ({"num_train_timesteps": 0}, "grpo.diffusion.num_train_timesteps is at least 1, not 0."),
    ],
)
def test_a_wrong_value_is_one_sentence(values, sentence):
    with pytest.raises(InputError) as error:
        DiffusionRlConfig(**values)
    assert str(error.value).startswith(sentence)
