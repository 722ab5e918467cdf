"""Flow matching against diffusers' scheduler and by hand."""

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.parallel.mesh import BATCH, make_mesh
from blip3o_jax.plan import collectives
from blip3o_jax.sample import flow


def sample_by(velocity_fn, noise, schedule, scales=()):
    """The end of the flow."""
    return flow.integrate(flow.guided_velocity(velocity_fn, scales), noise, schedule)[0]


@pytest.fixture(scope="module")
def reference():
    with np.load(Path(__file__).parents[1] / "fixtures" / "sana.npz") as file:
        return {
            name.removeprefix("flow/"): file[name]
            for name in file.files
            if name.startswith("flow/")
        }


@pytest.mark.parametrize("shift", [1, 3])
def test_schedules_are_those_of_diffusers(reference, shift):
    sigmas, table = flow.sigmas(30, shift), flow.training_sigmas(shift)
    np.testing.assert_allclose(sigmas, reference[f"shift{shift}/sigmas"], rtol=1e-6)
    np.testing.assert_allclose(1000 * sigmas[:-1], reference[f"shift{shift}/timesteps"], rtol=1e-6)
    np.testing.assert_allclose(table, reference[f"shift{shift}/training_sigmas"], rtol=1e-6)
    np.testing.assert_allclose(
        1000 * table, reference[f"shift{shift}/training_timesteps"], rtol=1e-6
    )


def test_schedules_have_the_published_values():
    np.testing.assert_allclose(
        np.asarray(flow.sigmas(30))[[0, 1, 15, 29, 30]], [1, 0.966667, 0.5, 0.033333, 0], atol=1e-6
    )
    np.testing.assert_allclose(
        np.asarray(flow.sigmas(30, 3.0))[[0, 1, 15, 29, 30]],
        [1, 0.988636, 0.75, 0.09375, 0],
        atol=1e-6,
    )
    np.testing.assert_allclose(1000 * flow.training_sigmas(), np.arange(1000, 0, -1), rtol=1e-6)
    np.testing.assert_allclose(
        1000 * np.asarray(flow.training_sigmas(3.0))[[0, 1, 500, 999]],
        [1000, 999.666382, 750, 2.994012],
        rtol=1e-6,
    )
    assert flow.sigmas(30).dtype == flow.training_sigmas(3.0).dtype == np.float32


@pytest.mark.parametrize("shift", [1, 3])
def test_sampling_given_velocities_ends_where_diffusers_does(reference, shift):
    schedule = flow.sigmas(5, shift)

    velocities = jnp.asarray(reference["velocities"])

    def velocity_fn(x, t):
        return velocities[jnp.argmin(jnp.abs(1000 * schedule[:-1] - t[0]))]

    sampled = sample_by(velocity_fn, reference["noise"], schedule)
    np.testing.assert_allclose(sampled, reference[f"shift{shift}/sampled"], atol=1e-6)


def test_eulers_step_is_the_loop_that_images_were_published_with():
    """To the bit: the scan of version 0.1, written out."""
    rng = np.random.default_rng(3)
    noise = jnp.asarray(rng.normal(size=(3, 4, 4, 8)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(8, 8)), jnp.float32)
    schedule = flow.sigmas(7)

    def velocity_fn(x, t):
        return jnp.tanh(x @ kernel) * (t.reshape(-1, 1, 1, 1) / 1000)

    def step(x, levels):
        sigma, next_sigma = levels
        repeated = flow.alternating(x, x)
        velocity = velocity_fn(repeated, jnp.full(repeated.shape[:1], 1000 * sigma))
        velocity = flow.guided(velocity.reshape(-1, 2, *x.shape[1:]), (2.5,))
        return x + (next_sigma - sigma) * velocity, None

    expected = jax.jit(lambda x: jax.lax.scan(step, x, (schedule[:-1], schedule[1:]))[0])(noise)
    found = jax.jit(lambda x: sample_by(velocity_fn, x, schedule, (2.5,)))(noise)
    np.testing.assert_array_equal(found, expected)


def test_noising_is_that_of_diffusers(reference):
    noisy = flow.add_noise(
        reference["velocities"][0], reference["noise"], jnp.array([0.875, 0.003])
    )
    np.testing.assert_allclose(noisy, reference["noisy"], atol=1e-6)


def test_the_loss_is_zero_at_the_true_velocity_and_per_sample():
    x0, noise = np.random.default_rng(0).normal(size=(2, 3, 2, 4, 5)).astype(np.float32)
    velocity = flow.velocity_target(x0, noise)
    noisy = flow.add_noise(x0, noise, jnp.array([0.25, 0.5, 1.0]))
    np.testing.assert_allclose(
        noisy - np.array([0.25, 0.5, 1.0]).reshape(3, 1, 1, 1) * velocity, x0, atol=1e-6
    )
    off = velocity + np.array([0, 1, -3]).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(flow.flow_loss(off, x0, noise), [0, 1, 9], atol=1e-5)
    assert (
        flow.flow_loss(off.astype(jnp.bfloat16), x0.astype(jnp.bfloat16), noise).dtype
        == jnp.float32
    )


def test_timesteps_cover_the_table_evenly():
    t, sigma = flow.sample_timesteps(jax.random.key(0), 100_000)
    assert sigma.dtype == t.dtype == jnp.float32
    values, counts = np.unique(t, return_counts=True)
    np.testing.assert_allclose(values, np.arange(1, 1001), rtol=1e-6)
    assert 50 < counts.min() < counts.max() < 160
    np.testing.assert_allclose(t, 1000 * sigma)
    _, shifted = flow.sample_timesteps(jax.random.key(0), 100_000, shift=3.0)
    np.testing.assert_allclose(shifted, 3 * sigma / (1 + 2 * sigma), rtol=1e-6)


def test_whole_conditions_are_dropped_and_take_their_gradient_along():
    hidden, dropped = jnp.ones((3, 2, 4), jnp.bfloat16), jnp.array([False, True, False])
    kept, gradient = jax.value_and_grad(
        lambda h: flow.drop_condition(h, dropped).sum().astype(jnp.float32)
    )(hidden)
    result = np.asarray(flow.drop_condition(hidden, dropped), np.float32)
    assert kept == 2 * 2 * 4
    np.testing.assert_array_equal(result, np.broadcast_to(~dropped[:, None, None], result.shape))
    np.testing.assert_array_equal(np.asarray(gradient, np.float32), result)


def test_guided_sampling_of_a_cut_batch_sends_nothing():
    mesh = make_mesh()
    place = jax.NamedSharding(mesh, BATCH)
    noise, condition = (jax.device_put(np.ones((8, 2, 2, 4), np.float32), place) for _ in range(2))

    @functools.partial(jax.jit, out_shardings=place)
    def sample(noise, condition):
        both = flow.alternating(jnp.zeros_like(condition), condition)
        return sample_by(
            lambda x, t: both + x * t.reshape(-1, 1, 1, 1) / 1000, noise, flow.sigmas(4), (2.0,)
        )

    assert mesh.size == 8
    assert collectives.collectives(sample.lower(noise, condition).compile().as_text()) == {}


def test_guidance_mixes_the_halves_of_each_sample():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(3, 2, 2, 4)).astype(np.float32)
    without, given = rng.normal(size=(2, 3, 1, 1, 4)).astype(np.float32)

    def velocity(x, t, condition):
        return condition + x * t.reshape(-1, 1, 1, 1) / 1000

    schedule = np.asarray(flow.sigmas(4))
    expected = noise
    for sigma, following in itertools.pairwise(schedule):
        u, c = (
            velocity(expected, np.full(3, 1000 * sigma), condition)
            for condition in (without, given)
        )
        expected = expected + (following - sigma) * (u + 2.5 * (c - u))
    traces = []

    @jax.jit
    def sample(guidance_scale, shift):
        traces.append(guidance_scale)
        both = flow.alternating(without, given)
        return sample_by(
            lambda x, t: velocity(x, t, both), noise, flow.sigmas(4, shift), (guidance_scale,)
        )

    np.testing.assert_allclose(sample(2.5, 1.0), expected, atol=1e-5)
    alone = sample_by(lambda x, t: velocity(x, t, given), noise, schedule)
    np.testing.assert_allclose(sample(1.0, 1.0), alone, atol=1e-5)
    assert not np.allclose(sample(1.0, 3.0), alone, atol=0.01)
    assert len(traces) == 1
    per_sample = sample(jnp.array([1.0, 2.5, 2.5]), 1.0)
    np.testing.assert_allclose(per_sample[0], alone[0], atol=1e-5)
    np.testing.assert_allclose(per_sample[1:], expected[1:], atol=1e-5)


def test_the_state_stays_f32_under_a_bf16_model():
    noise = jnp.ones((1, 1, 1, 1), jnp.bfloat16)
    sampled = sample_by(lambda x, t: jnp.full(x.shape, 0.01, jnp.bfloat16), noise, flow.sigmas(30))
    assert sampled.dtype == jnp.float32
    # a bf16 state would not notice steps of 0.0003
    np.testing.assert_allclose(sampled, 0.99, atol=1e-4)
