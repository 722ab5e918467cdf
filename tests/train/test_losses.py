import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import SMALL

from blip3o_jax.config import replace
from blip3o_jax.convert.random_weights import random_params
from blip3o_jax.models.blip3o import Blip3o, write_codes
from blip3o_jax.presets import preset
from blip3o_jax.sample import generate
from blip3o_jax.train import losses, steps
from blip3o_jax.train.config import JointConfig, TokenizerConfig, TrainConfig
from blip3o_jax.tree import split

N = 4  # codes of an image of 16 x 16


@pytest.fixture(scope="module")
def joint():
    config = replace(preset("emoji_64"), **SMALL)
    model = Blip3o(config)
    # drawn by numpy: compiling `init` takes 58 CPU seconds
    params = jax.tree.map(jnp.asarray, random_params(config))
    rng = np.random.default_rng(0)
    length = 20 + N + 3
    tokens = rng.integers(0, 300, (4, length)).astype(np.int32)
    start = np.array([9, 12, 15, 19], np.int32)
    for row, at in zip(tokens, start, strict=True):
        row[at + 1 + N + 3 :] = config.vocab.pad_token_id
    batch = {
        "images": rng.integers(0, 256, (4, 16, 16, 3), np.uint8),
        "tokens": tokens,
        "start": start,
    }
    return model, params, batch


def run(joint, batch, **changes):
    """Metrics of the joint loss under a config, without dropping conditions."""
    model, params, _ = joint
    cfg = JointConfig(condition_dropout=0.0, **changes)
    loss = jax.jit(
        lambda params, batch: losses.joint_loss(model, cfg, params, batch, jax.random.key(1))
    )
    return loss(params, batch)[1]


@pytest.fixture(scope="module")
def encoded(joint):
    """(the batch as a cache would give it, the codes): what asks nothing of the encoders need not
    compile them."""
    model, params, batch = joint

    @jax.jit
    def encode(params, images):
        codes = losses.encode_codes(model, params, {"images": images})
        return {"codes": codes, "latents": generate.encode_latents(model, params, images)}

    rows = {name: batch[name] for name in ("tokens", "start")}
    return rows | encode(params, batch["images"])


@pytest.fixture(scope="module")
def from_images(joint):
    """condition_dropout -> (metrics, norm of the velocity loss's gradient by part), by one program
    that takes the draws of each config."""
    model, params, batch = joint
    cfg = JointConfig()
    key = jax.random.key(1)

    def flow(params, batch):
        metrics = losses.joint_loss(model, cfg, params, batch, key)[1]
        return metrics["flow"], metrics

    program = jax.jit(jax.grad(flow, has_aux=True))

    def metrics_and_norms(condition_dropout):
        draws = losses.joint_draws(
            model, JointConfig(condition_dropout=condition_dropout), batch, key
        )
        grads, metrics = program(params, {**batch, **draws})
        return metrics, {part: float(optax.tree.norm(tree)) for part, tree in grads.items()}

    return functools.cache(metrics_and_norms)


def test_codes_are_written_behind_s0():
    tokens = jnp.arange(20).reshape(2, 10)
    written = write_codes(tokens, jnp.array([2, 5]), jnp.array([[1, 2, 3], [4, 5, 6]]), 100)
    np.testing.assert_array_equal(written[0], [0, 1, 2, 101, 102, 103, 6, 7, 8, 9])
    np.testing.assert_array_equal(written[1], [10, 11, 12, 13, 14, 15, 104, 105, 106, 19])


def test_cross_entropy_is_the_mean_over_all_targets_and_chunks_do_not_change_it(
    joint, encoded, from_images
):
    model, params, batch = joint
    whole, _ = from_images(0.0)
    chunked = run(joint, encoded, ce_chunk=2)
    np.testing.assert_allclose(whole["ce"], chunked["ce"], rtol=1e-6)

    codes = encoded["codes"]

    @jax.jit
    def losses_of(row):
        """Of the next tokens of one row [1,T], on whose tokens later ones have no influence."""
        positions = jnp.arange(row.shape[1])[None]
        qwen3 = {"params": params["qwen3"]}
        hidden, _ = model.qwen3.apply(qwen3, row, positions, row >= 0)
        logits = model.qwen3.apply(qwen3, hidden, method="logits")
        log_probs = jax.nn.log_softmax(logits)[0, :-1]
        return -jnp.take_along_axis(log_probs, row[0, 1:, None], axis=-1)[:, 0]

    text, image = np.zeros(2), np.zeros(2)  # sum and number of each kind of target
    for row, at, ids in zip(batch["tokens"], batch["start"], codes, strict=True):
        row = row.copy()
        row[at + 1 : at + 1 + N] = np.asarray(ids) + model.config.vocab.image_start_token_id
        values = np.asarray(losses_of(row[None]))
        text += values[:at].sum(), at
        image += values[at : at + N + 3].sum(), N + 3
    total, count = text + image
    np.testing.assert_allclose(whole["ce"], total / count, rtol=1e-5)


def test_the_slice_is_right_and_the_original_one_differs(joint, encoded):
    right = run(joint, encoded)
    original = run(joint, encoded, last_slice=True)
    assert abs(float(right["flow"]) - float(original["flow"])) > 1e-6
    np.testing.assert_allclose(right["ce"], original["ce"])


def test_the_original_slice_ends_with_the_longest_row_of_the_batch(joint, encoded):
    """More columns of padding change nothing; micro-batches get the length of the whole batch."""
    model = joint[0]
    original = run(joint, encoded, last_slice=True)
    pad = model.config.vocab.pad_token_id
    wide = np.pad(encoded["tokens"], [(0, 0), (0, 6)], constant_values=pad)
    again = run(joint, encoded | {"tokens": wide}, last_slice=True)
    np.testing.assert_allclose(again["flow"], original["flow"], rtol=1e-5)
    draws = losses.joint_draws(model, JointConfig(last_slice=True), encoded, jax.random.key(1))
    np.testing.assert_array_equal(draws["longest"], np.full(4, 19 + 1 + N + 3))


def test_frozen_networks_get_no_gradient_and_the_diffusion_part_reaches_the_transformer(
    from_images,
):
    _, norms = from_images(0.0)
    assert norms["ta_tok"] == norms["dc_ae"] == 0
    assert min(norms["qwen3"], norms["sana"], norms["diffusion_connector"]) > 0


def test_dropping_every_condition_cuts_the_transformer_off(from_images):
    _, norms = from_images(0.999999)
    assert norms["qwen3"] == 0
    assert norms["diffusion_connector"] > 0


def test_draws_that_a_batch_brings_are_kept_also_by_micro_batches(joint, encoded):
    """The gradient of the connector, which all three of them reach; keys differ, so that what is
    drawn again would show."""
    model, params, _ = joint
    trained, frozen = split(params, lambda path: path.startswith("diffusion_connector/"))
    draws = {
        "sigma": jnp.array([0.2, 0.9, 0.5, 0.7]),
        "noise": jax.random.normal(jax.random.key(5), (4, 2, 2, 16)),
        "dropped": jnp.array([True, False, False, True]),
    }

    def gradient(accumulate, key, **changes):
        section = JointConfig(condition_dropout=0.5)
        cfg = TrainConfig(stage="joint", batch_size=4, accumulate=accumulate, joint=section)
        grads, metrics = jax.jit(
            lambda batch, key: steps.gradients(model, cfg, trained, frozen, batch, key)
        )({**encoded, **draws, **changes}, jax.random.key(key))
        return np.asarray(grads["diffusion_connector"]["linear_1"]["kernel"]), metrics["flow"]

    whole, flow = gradient(1, 1)
    micro, flow_micro = gradient(2, 2)
    scale = np.abs(whole).max()
    np.testing.assert_allclose(micro, whole, atol=1e-5 * scale)
    np.testing.assert_allclose(flow_micro, flow, rtol=1e-5)
    # Each of the three is used.
    for change in ({"sigma": draws["sigma"][::-1]}, {"noise": -draws["noise"]}):
        assert np.abs(gradient(2, 2, **change)[0] - whole).max() > 0.01 * scale
    none = gradient(2, 2, dropped=jnp.ones(4, bool))[0]
    assert np.abs(none).max() == 0  # a condition of zeros has no kernel


def test_tokenizer_loss_is_small_only_for_the_right_words(joint, encoded):
    model, params, batch = joint
    images, cfg = batch["images"], TokenizerConfig()
    loss = jax.jit(
        lambda words: losses.tokenizer_loss(
            model, cfg, params, {"images": images, "patches": words}, None
        )[1]
    )
    own = encoded["codes"].reshape(4, 2, 2)
    right, wrong = loss(own), loss((own + 1) % 256)
    assert float(right["accuracy"]) == 1.0
    assert float(wrong["accuracy"]) == 0.0
    assert float(right["naming"]) < float(wrong["naming"])


def test_the_tokenizer_sees_the_same_frame_at_its_own_size():
    images = jnp.linspace(-1, 1, 64)[None, :, None, None] * jnp.ones((1, 64, 64, 3))
    assert losses.tokenizer_view(images, 64) is images
    small = losses.tokenizer_view(images, 32)
    np.testing.assert_allclose(
        small[0, :, 0, 0], images[0].reshape(32, 2, 64, 3).mean(1)[:, 0, 0], atol=0.01
    )


def test_unit_range():
    assert losses.to_unit(np.array([0, 255], np.uint8)).tolist() == [-1.0, 1.0]
