"""DC-AE against diffusers' values, its shortcuts by hand, and its size."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.config import DcAeConfig, replace
from blip3o_jax.convert.dc_ae import dc_ae_rules
from blip3o_jax.convert.rules import leaf_to_tensor, to_jax, to_torch
from blip3o_jax.errors import InputError
from blip3o_jax.models.dc_ae import DcAe, Down, Up, relu_linear_attention
from blip3o_jax.tree import flatten

FIXTURES = Path(__file__).parents[1] / "fixtures"
CONFIGS = {
    "published": DcAeConfig(
        latent_channels=4,
        attention_head_dim=8,
        block_types=("ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
        block_out_channels=(8, 16, 16),
        encoder_layers_per_block=(1, 1, 2),
        decoder_layers_per_block=(2, 1, 1),
        qkv_multiscales=((), (5,), (5,)),
    ),
    "shuffled": DcAeConfig(
        latent_channels=4,
        block_types=("ResBlock",) * 4,
        block_out_channels=(4, 8, 16, 16),
        encoder_layers_per_block=(0, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 2, 2),
        qkv_multiscales=((),) * 4,
        downsample_block_type="pixel_unshuffle",
        upsample_block_type="pixel_shuffle",
        scaling_factor=1.0,
    ),
}


def abstract_params(cfg):
    images = jnp.zeros((1, cfg.factor, cfg.factor, 3))
    return jax.eval_shape(DcAe(cfg).init, jax.random.key(0), images)["params"]


def apply(model, params, x, method):
    return jax.jit(partial(model.apply, method=method))({"params": params}, x)


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def without_convolution(module, x):
    return jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape), jax.eval_shape(module.init, jax.random.key(0), x)
    )


def relative_error(actual, expected):
    return np.abs(np.asarray(actual, np.float32) - expected).max() / np.abs(expected).max()


@pytest.fixture(scope="module", params=list(CONFIGS))
def case(request):
    """(config, tensors by torch name, our parameters, inputs and outputs by name)."""
    cfg = CONFIGS[request.param]
    with np.load(FIXTURES / f"dc_ae_{request.param}.npz") as file:
        arrays = dict(file)
    tensors = {
        name.removeprefix("weights/"): arrays.pop(name)
        for name in list(arrays)
        if name.startswith("weights/")
    }
    return cfg, tensors, to_jax(dc_ae_rules(cfg), tensors, abstract_params(cfg)), arrays


def test_weights_survive_the_round_trip(case):
    cfg, tensors, params, _ = case
    back = to_torch(dc_ae_rules(cfg), params)
    assert set(back) == set(tensors)
    assert all(
        back[name].tobytes() == tensors[name].tobytes() and back[name].shape == tensors[name].shape
        for name in tensors
    )


def test_values_are_those_of_diffusers(case):
    cfg, _, params, arrays = case
    latents = apply(DcAe(cfg), params, arrays["images"], "encode")
    assert relative_error(latents, arrays["latents"]) < 1e-5
    decoded = apply(DcAe(cfg), params, arrays["decoder_latents"], "decode")
    assert relative_error(decoded, arrays["decoded"]) < 1e-5


def test_bf16_stays_close(case):
    cfg, _, params, arrays = case
    latents = apply(DcAe(cfg, jnp.bfloat16), params, arrays["images"], "encode")
    assert latents.dtype == jnp.bfloat16
    assert relative_error(latents, arrays["latents"]) < 0.05


def test_scaled_latents(case):
    cfg, _, params, arrays = case
    model = DcAe(replace(cfg, scaling_factor=0.25))  # a power of two: scaling is exact
    scaled = apply(model, params, arrays["images"], "encode_scaled")
    assert relative_error(scaled, arrays["latents"] / 4) < 1e-5
    decoded = apply(model, params, arrays["decoder_latents"] / 4, "decode_scaled")
    assert relative_error(decoded, arrays["decoded"]) < 1e-5


def test_down_shortcut_by_hand():
    x = np.random.default_rng(0).normal(size=(1, 4, 6, 6)).astype(np.float32)
    down = Down(8, unshuffle=False)
    params = without_convolution(down, x)
    expected = np.zeros((1, 2, 3, 8), np.float32)
    for y, column, out in np.ndindex(2, 3, 8):
        for source in range(3 * out, 3 * out + 3):  # 6 * 4 channels in groups of 3
            channel, place = divmod(source, 4)
            expected[0, y, column, out] += (
                x[0, 2 * y + place // 2, 2 * column + place % 2, channel] / 3
            )
    np.testing.assert_allclose(down.apply(params, x), expected, atol=1e-6)


def test_up_shortcut_by_hand():
    x = np.random.default_rng(0).normal(size=(1, 2, 3, 8)).astype(np.float32)
    up = Up(6, interpolate=False)
    params = without_convolution(up, x)
    expected = np.zeros((1, 4, 6, 6), np.float32)
    for y, column, out in np.ndindex(4, 6, 6):
        source = (4 * out + 2 * (y % 2) + column % 2) // 3  # every channel three times
        expected[0, y, column, out] = x[0, y // 2, column // 2, source]
    np.testing.assert_array_equal(up.apply(params, x), expected)


def test_attention_is_a_weighted_mean_by_hand():
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 2, 3, 2, 4)).astype(np.float32)
    q[0, 0, 0, 1] = -1  # attends to nothing: zero, not NaN
    weights = np.einsum("tnh,snh->nts", *(np.maximum(a, 0).reshape(6, 2, 4) for a in (q, k)))
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    expected = np.einsum("nts,snh->tnh", weights, v.reshape(6, 2, 4)).reshape(q.shape)
    actual = relu_linear_attention(q, k, v)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert not np.any(actual[0, 0, 0, 1])


def test_published_size():
    params = abstract_params(DcAeConfig())
    assert (size(params["encoder"]), size(params["decoder"])) == (153_027_104, 159_223_171)
    rules = dc_ae_rules(DcAeConfig())
    assert len(rules) == len(jax.tree.leaves(params)) == len({rule.source for rule in rules}) == 375
    published = {  # some shapes, where the numbering inside a stage is easily one off
        "encoder.down_blocks.4.3.conv.weight": (1024, 1024, 3, 3),
        "decoder.up_blocks.0.0.conv.weight": (128, 256, 3, 3),
        "decoder.up_blocks.5.2.attn.to_qkv_multiscale.0.proj_out.weight": (3072, 32, 1, 1),
    }
    leaves = flatten(params)
    blanks = {
        rule.source: (np.broadcast_to(np.float32(0), leaves[rule.path].shape), rule)
        for rule in rules
        if rule.source in published
    }
    assert {name: leaf_to_tensor(*blank).shape for name, blank in blanks.items()} == published


def test_an_image_that_does_not_divide_is_refused():
    cfg = CONFIGS["published"]
    with pytest.raises(ValueError, match="10x8 pixels"):
        jax.eval_shape(DcAe(cfg).init, jax.random.key(0), jnp.zeros((1, 10, 8, 3)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"block_out_channels": (8, 8, 24)},
            "four times width 8 must divide by the next width, 24",
        ),
        ({"decoder_layers_per_block": (2, 0, 1)}, "only the first and the last stage"),
    ],
)
def test_stages_that_cannot_be_joined_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        replace(CONFIGS["published"], **changes)
