"""The SigLIP encoder against transformers' values."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.config import SiglipConfig
from blip3o_jax.convert.rules import Rule, to_jax
from blip3o_jax.convert.ta_tok import ta_tok_rules
from blip3o_jax.models.siglip import SiglipEncoder, blocks

FIXTURE = Path(__file__).parents[1] / "fixtures/ta_tok.npz"
TINY = SiglipConfig(
    hidden_size=20,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=37,
    patch_size=5,
)
IMAGE = jax.ShapeDtypeStruct((1, TINY.image_size, TINY.image_size, 3), jnp.float32)


@functools.cache
def compiled(num_layers: int, dtype):
    return jax.jit(SiglipEncoder(TINY, num_layers, dtype).apply)


def run(num_layers: int, params, images, dtype=jnp.float32):
    return compiled(num_layers, dtype)({"params": params}, images)


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def reference():
    with np.load(FIXTURE) as file:
        return dict(file)


def encoder_params(reference, num_layers: int):
    """The first `num_layers` layers of the fixture."""
    abstract = jax.eval_shape(SiglipEncoder(TINY, num_layers).init, jax.random.key(0), IMAGE)[
        "params"
    ]
    rules = [
        Rule(r.source, r.path.removeprefix("encoder/"), r.pattern)
        for r in ta_tok_rules(None)
        if r.path.startswith("encoder/")
    ]
    names = {r.source.format(i) for r in rules for i in range(num_layers)}
    tensors = {name: reference[f"weights/{name}"] for name in names}
    return to_jax(rules, tensors, abstract)


@pytest.mark.parametrize("num_layers", [2, 3])
def test_hidden_states_equal_transformers(reference, num_layers):
    """Two of three layers are hidden_states[-2]; all three are hidden_states[-1], which no norm has
    touched."""
    params = encoder_params(reference, num_layers)
    got = run(num_layers, params, reference["images"])
    want = reference[f"hidden_{num_layers}"]
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_pixels_beyond_the_last_patch_are_ignored(reference):
    params, images = encoder_params(reference, 2), reference["images"]
    edge, inside = images.copy(), images.copy()
    edge[:, 35:], edge[:, :, 35:] = 9.0, -9.0
    inside[:, 34] = 9.0
    base = run(2, params, images)
    np.testing.assert_array_equal(run(2, params, edge), base)
    assert np.abs(run(2, params, inside) - base).max() > 0.1


def test_bf16_stays_near_f32(reference):
    params = encoder_params(reference, 2)
    got = run(2, params, reference["images"], jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    assert (
        np.abs(got.astype(np.float32) - reference["hidden_2"]).mean()
        < 0.02 * np.abs(reference["hidden_2"]).mean()
    )


def test_layers_start_different():
    scanned = blocks(num_layers=2, num_heads=2, mlp_hidden=8, eps=1e-6, dtype=jnp.float32)
    params = jax.jit(scanned.init)(jax.random.key(0, impl="rbg"), jnp.zeros((1, 3, 4)), None)[
        "params"
    ]
    kernel = params["self_attn"]["q_proj"]["kernel"]
    assert kernel.shape == (2, 4, 2, 2)
    assert np.abs(kernel[0] - kernel[1]).max() > 0.1


def test_another_image_size_is_refused():
    with pytest.raises(ValueError, match="37x37x3, not 40x37x3"):
        jax.eval_shape(SiglipEncoder(TINY, 2).init, jax.random.key(0), jnp.zeros((1, 40, 37, 3)))


def test_size_as_published():
    """S3.3: 15,239,504 per layer; the encoder without post_layernorm and head."""
    cfg = SiglipConfig()
    image = jax.ShapeDtypeStruct((1, 384, 384, 3), jnp.float32)
    shapes = jax.eval_shape(SiglipEncoder(cfg, 27).init, jax.random.key(0), image)["params"]
    assert cfg.grid == 27
    assert count(shapes["layers"]) == 27 * 15_239_504
    post_layernorm, head = (
        2 * 1152,
        1152 + 4 * (1152**2 + 1152) + 2 * 1152 + 2 * 1152 * 4304 + 4304 + 1152,
    )
    assert count(shapes) == 428_225_600 - post_layernorm - head
    hidden, _ = jax.eval_shape(SiglipEncoder(cfg, 26).init_with_output, jax.random.key(0), image)
    assert hidden.shape == (1, 729, 1152)
