"""Sampling of latents: what is computed once or left out changes nothing, and a cut batch stays
where it is."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SMALL, TEXT_ONLY

from blip3o_jax.config import replace
from blip3o_jax.convert.random_weights import random_params
from blip3o_jax.models.blip3o import Blip3o, write_codes
from blip3o_jax.parallel.mesh import BATCH, make_mesh
from blip3o_jax.parallel.parameters import shardings
from blip3o_jax.plan import collectives
from blip3o_jax.presets import preset
from blip3o_jax.sample import condition, flow, generate
from blip3o_jax.train import losses

ROWS, STEPS = 8, 3


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "positions"])
def case(request):
    """(model, params, hidden states, noise) of a small model, with and without positions."""
    depth = {
        "qwen3.num_hidden_layers": 2,
        "sana.num_layers": 2,
        "dc_ae.decoder_layers_per_block": (0, 1, 1, 1),
    }
    depth |= TEXT_ONLY | {"sana.condition_positions": request.param}
    cfg = replace(preset("emoji_64"), **depth)
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal(
        (ROWS, cfg.num_condition_tokens, cfg.qwen3.hidden_size), np.float32
    )
    noise = rng.standard_normal(
        (ROWS, cfg.sana.sample_size, cfg.sana.sample_size, cfg.sana.in_channels), np.float32
    )
    return Blip3o(cfg), random_params(cfg), hidden, noise


def test_guidance_is_against_hidden_states_of_zeros(case):
    """By the plain way: the condition of all 2B rows, encoded again at every step."""
    model, params, hidden, noise = case
    both = flow.alternating(np.zeros_like(hidden), hidden)
    given = model.connector.apply({"params": params["diffusion_connector"]}, both)

    @jax.jit
    def plain(noise):
        def velocity(x, t):
            return model.sana.apply({"params": params["sana"]}, x, t, given)

        guided = flow.guided_velocity(velocity, (2.5,))
        return flow.integrate(guided, noise, flow.sigmas(STEPS))[0]

    expected = plain(noise)
    found = jax.jit(
        lambda hidden, noise: generate.denoise(model, params, hidden, noise, STEPS, 2.5, 1.0)
    )(hidden, noise)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    unguided = jax.jit(
        lambda hidden, noise: generate.denoise(model, params, hidden, noise, STEPS, None, 1.0)
    )(hidden, noise)
    assert np.abs(unguided - expected).max() > 0.05 * np.abs(expected).max()


def test_every_step_can_be_seen(case):
    """A trajectory ends where denoising ends; each step is Euler's, with the guided velocity of two
    plain calls; any of its latents can be shown."""
    model, params, hidden, noise = case
    hidden, noise = hidden[:2], noise[:2]
    settings = {"num_inference_steps": STEPS, "guidance": 2.5, "shift": 1.5}
    steps = jax.jit(functools.partial(generate.trajectory, model, **settings))(
        params, hidden, noise
    )
    latents, velocities, sigmas = steps["latents"], steps["velocities"], steps["sigmas"]
    assert latents.shape == (STEPS + 1, *noise.shape)
    np.testing.assert_array_equal(latents[0], noise)
    end = jax.jit(functools.partial(generate.denoise, model, **settings))(params, hidden, noise)
    np.testing.assert_allclose(latents[-1], end, atol=1e-6)
    np.testing.assert_array_equal(sigmas, flow.sigmas(STEPS, 1.5))

    @jax.jit
    def velocity(x, sigma, hidden):
        given = condition.build(model, params, hidden)
        t = jnp.full(len(x), 1000 * sigma)
        return condition.velocity(model, params, x, t, given)

    for i in range(STEPS):
        without, given = (velocity(latents[i], sigmas[i], h) for h in (0 * hidden, hidden))
        expected = without + 2.5 * (given - without)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(velocities[i], expected, atol=2e-5 * scale)
        after = latents[i] + (sigmas[i + 1] - sigmas[i]) * velocities[i]
        np.testing.assert_allclose(latents[i + 1], after, atol=1e-5 * scale)
        estimate = latents[i] - sigmas[i] * velocities[i]
        np.testing.assert_allclose(steps["estimates"][i], estimate, atol=1e-5 * scale)
    np.testing.assert_array_equal(steps["estimates"][-1], latents[-1])


def test_frames_are_the_pictures_of_each_step(case):
    model, params, _, noise = case
    latents = jnp.stack([noise[:1], noise[1:2]])
    frames = jax.jit(functools.partial(generate.frames, model))(params, latents)
    pictures = jax.jit(functools.partial(generate.pictures, model))(params, noise[:2])
    assert frames.shape == (2, 1, *pictures.shape[1:])
    assert frames.dtype == jnp.uint8
    difference = np.abs(np.asarray(frames[:, 0], int) - np.asarray(pictures, int))
    assert difference.max() <= 1  # rounding
    assert (frames[0] != frames[1]).any()


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 4}], ids=str)
def test_large_images_pass_the_autoencoder_one_by_one(case, sizes, monkeypatch):
    """On each device, with the values, the order and the place of all at once, and less memory."""
    model, params, _, noise = case
    mesh = make_mesh(sizes)
    rows = jax.NamedSharding(mesh, BATCH)
    latents = np.concatenate([noise, noise[::-1] / 2, -noise])  # three a device
    latents[5] = 3.0
    images = np.random.default_rng(1).integers(0, 256, (24, 64, 64, 3), np.uint8)
    cases = [(generate.pixels, latents), (generate.pictures, latents)]
    cases += [(generate.encode_latents, images)]
    with jax.set_mesh(mesh):
        params = jax.device_put(params, shardings(jax.eval_shape(lambda: params), mesh))
        for function, given in cases:
            results, memory = [], []
            for large in (65, 64):
                monkeypatch.setattr(generate, "LARGE", large)
                program = jax.jit(functools.partial(function, model))
                placed = params, jax.device_put(given, rows)
                compiled = program.lower(*placed).compile()
                memory.append(compiled.memory_analysis().temp_size_in_bytes)
                results.append(compiled(*placed))
            whole, one_by_one = results
            assert one_by_one.sharding.is_equivalent_to(rows, one_by_one.ndim)
            assert one_by_one.dtype == whole.dtype
            whole, one_by_one = np.asarray(whole, np.float32), np.asarray(one_by_one, np.float32)
            most = 1 if function is generate.pictures else 1e-4 * np.abs(whole).max()
            assert np.abs(whole - one_by_one).max() <= most
            assert np.abs(whole[0] - whole[5]).max() > 10 * most
            assert memory[1] < 0.6 * memory[0]


def test_large_images_use_the_axes_that_divide_them(case, monkeypatch):
    """Four rows on eight devices, of which four hold rows of their own, and three rows anywhere."""
    model, params, _, noise = case
    mesh = make_mesh({"data": 2, "fsdp": 4})
    monkeypatch.setattr(generate, "LARGE", 64)
    decode = functools.partial(generate.pixels, model)
    whole = np.asarray(jax.jit(decode)(params, noise[:4]))
    with jax.set_mesh(mesh):
        for rows, count in ((jax.P("fsdp"), 4), (jax.P(), 3)):
            program = jax.jit(decode)
            given = params, jax.device_put(noise[:count], jax.NamedSharding(mesh, rows))
            images = program(*given)
            assert images.sharding.is_equivalent_to(jax.NamedSharding(mesh, rows), 4)
            scale = np.abs(whole).max()
            np.testing.assert_allclose(images, whole[:count], atol=1e-4 * scale)


def check(function, rows, *inputs):
    """Shapes of what a function makes, cut by rows; no device has sent anything for it."""
    program = jax.jit(function).lower(*inputs).compile()
    shape = jax.eval_shape(function, *inputs)
    assert collectives.collectives(program.as_text()) == {}
    assert program.output_shardings.is_equivalent_to(rows, shape.ndim)
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=rows)


def test_a_cut_batch_sends_nothing(case):
    """From prompts to pictures: every device keeps to its own rows in all programs."""
    model, params, *_ = case
    mesh, cfg = make_mesh(), model.config
    rows = jax.NamedSharding(mesh, BATCH)
    prompt, valid = (
        np.full((ROWS, cfg.max_prompt_tokens), 5, np.int32),
        np.ones((ROWS, cfg.max_prompt_tokens), bool),
    )
    placed = jax.device_put((prompt, valid, np.ones((ROWS, 3), np.uint32)), rows)

    def write(params, prompt, valid, numbers):
        return generate.write_tokens(
            model, params, prompt, valid, numbers, top_k=100, top_p=0.9, temperature=1.0
        )["hidden"]

    def draw(params, hidden, numbers):
        return generate.draw_latents(
            model, params, hidden, numbers, num_inference_steps=STEPS, guidance_scale=2.5, shift=1.0
        )

    with jax.set_mesh(mesh):
        params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
        hidden = check(write, rows, params, *placed)
        latents = check(draw, rows, params, hidden, placed[2])
        check(functools.partial(generate.pictures, model), rows, params, latents)
    assert mesh.size == 8


def test_tokens_with_positions_are_not_taken_for_equal(case):
    model, params, *_ = case
    token = jnp.ones((1, 1, model.config.sana.caption_channels))

    def constant():
        return model.sana.apply({"params": params["sana"]}, token, method="without_condition")

    if model.config.sana.condition_positions:
        with pytest.raises(ValueError, match="positions are not all equal"):
            constant()
    else:
        assert constant().shape == (2, 1, 1, model.config.sana.hidden_size)


def test_runs_on_two_devices_of_a_cpu_are_alike():
    """In a process of its own.

    Eight images a device, decoded by the program that denoises, came out in two ways, one of them
    damaged.
    """
    code = """
import blip3o_jax
pipeline = blip3o_jax.load("emoji_64", batch_size=16)
counts, shapes = ("two", "three", "four", "five"), ("stars", "hearts", "trees", "keys")
prompts = [f"{count} red {shape}" for count in counts for shape in shapes]
runs = set()
for _ in range(8):
    images = pipeline.generate(prompts, num_inference_steps=10)
    runs.add(b"".join(image.tobytes() for image in images))
print(pipeline.mesh.size, len(prompts), len(runs))
"""
    # As users compile it.
    others = {"XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    environment = {name: value for name, value in os.environ.items() if name not in others}
    environment["JAX_NUM_CPU_DEVICES"] = "2"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["2", "16", "1"]


def test_true_tokens_are_read_from_pictures_at_the_tokenizers_resolution():
    """As training reads them: by the codes of the resized picture, not of a corner of it."""
    cfg = replace(preset("emoji_64"), **SMALL)
    model, params = Blip3o(cfg), random_params(cfg)
    rng = np.random.default_rng(1)
    n, start = cfg.ta_tok.num_tokens, np.array([5, 3], np.int32)
    images = rng.integers(0, 256, (2, *[2 * cfg.ta_tok.encoder.image_size] * 2, 3), np.uint8)
    tokens = rng.integers(300, 330, (2, 6 + n), np.int32)

    codes = losses.encode_codes(model, params, {"images": images})
    assert len(np.unique(codes)) > 1
    written = write_codes(tokens, start, codes, cfg.vocab.image_start_token_id)
    positions = np.arange(6 + n)[None].repeat(2, axis=0)
    hidden, _ = model.qwen3.apply(
        {"params": params["qwen3"]}, written, positions, np.ones(written.shape, bool)
    )
    result = generate.read_tokens(model, params, images, tokens, start)
    for row, begin in enumerate(start):
        expected = hidden[row, begin : begin + n + 1]
        np.testing.assert_allclose(result[row], expected, atol=1e-5)
