"""Weights of eight bits: what they hold, and what the model computes with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import blip3o_jax
from blip3o_jax import checkpoints
from blip3o_jax.config import replace
from blip3o_jax.convert.random_weights import random_params
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.presets import preset
from blip3o_jax.sample import int8


@pytest.fixture(scope="module")
def case():
    """(model, its parameters, the same with int8 kernels, those as float32 again)."""
    depth = {"qwen3.num_hidden_layers": 2, "sana.num_layers": 2}
    model = Blip3o(replace(preset("emoji_64"), **depth))
    params = random_params(model.config)
    params = {name: params[name] for name in ("qwen3", "sana")}
    small = int8.quantized(params)
    flat = flatten_dict(small, sep="/")
    wide = {
        path: np.asarray(leaf, np.float32) * np.asarray(flat.get(f"{path}_scale", 1))
        for path, leaf in flat.items()
        if not path.endswith("kernel_scale")
    }
    return model, params, small, unflatten_dict(wide, sep="/")


def test_each_kernel_of_a_layer_is_int8_and_near(case):
    """Within half a step of its output channel, whose largest weight is 127 or -127."""
    _, params, small, wide = case
    before, after, again = (flatten_dict(tree, sep="/") for tree in (params, small, wide))
    layers = [path for path, leaf in after.items() if leaf.dtype == jnp.int8]
    attention = [f"self_attn/{name}_proj" for name in "qkvo"]
    mlp = [f"mlp/{name}_proj" for name in ("gate", "up", "down")]
    parts = [f"attn{i}/to_{name}" for i in (1, 2) for name in ("q", "k", "v", "out")]
    parts += ["ff/conv_inverted", "ff/conv_point"]
    expected = {f"qwen3/layers/{name}/kernel" for name in attention + mlp}
    expected |= {f"sana/transformer_blocks/{name}/kernel" for name in parts}
    assert set(layers) == expected
    for path in layers:
        summed = (1, 2) if path.endswith(("o_proj/kernel", "to_out/kernel")) else (1,)
        scale = np.asarray(after[f"{path}_scale"])
        assert scale.shape == np.max(before[path], axis=summed, keepdims=True).shape
        assert (np.abs(after[path]).max(axis=summed) == 127).all()
        assert (np.abs(again[path] - before[path]) <= 0.5001 * scale).all()
    for path in before.keys() - set(layers):
        assert after[path] is before[path]


def test_a_layer_multiplies_by_its_scale(case):
    """Qwen3 and SANA compute what they do with the rounded weights in float32, and not what they do
    with the true ones."""
    model, params, small, wide = case
    tokens = jnp.arange(24).reshape(2, 12)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 8, 8, model.config.sana.in_channels), np.float32)
    condition = rng.standard_normal((2, 65, model.config.sana.caption_channels), np.float32)

    @jax.jit
    def run(params):
        hidden = model.read_rows(params, tokens)
        inputs = latents, jnp.array([300.0, 900.0]), condition
        return hidden, model.apply(params, "sana", *inputs)

    results = zip(run(small), run(wide), run(params), strict=True)
    for result, expected, true in results:
        largest = np.abs(expected).max()
        np.testing.assert_allclose(result, expected, atol=1e-5 * largest)
        assert np.abs(result - true).max() > 1e-3 * largest


def test_a_model_is_loaded_with_weights_of_eight_bits():
    """And its pictures say so."""
    model = blip3o_jax.load("emoji_64", dtype="int8", devices=jax.devices()[:1])
    layer = model.params["qwen3"]["layers"]["mlp"]["up_proj"]
    assert {name: str(leaf.dtype) for name, leaf in layer.items()} == {
        "kernel": "int8",
        "kernel_scale": "float32",
    }
    assert model.identity == f"{checkpoints.open('emoji_64').identity}+int8"
    assert model.model.dtype == jnp.float32


def test_a_channel_of_zeros_stays_zero():
    kernel = jnp.zeros((1, 3, 2)).at[0, :, 1].set(2.0)
    layers = {"mlp": {"up_proj": {"kernel": kernel}}}
    after = int8.quantized({"qwen3": {"layers": layers}})["qwen3"]["layers"]["mlp"]["up_proj"]
    assert after["kernel"].tolist() == [[[0, 127]] * 3]
    np.testing.assert_allclose(after["kernel_scale"], [[[1, 2 / 127]]])
