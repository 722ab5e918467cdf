"""TA-Tok against PyTorch's values, its quantiser by its properties, and its size."""

import dataclasses
import functools
from fnmatch import fnmatchcase
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.config import SiglipConfig, TaTokConfig
from blip3o_jax.convert.rules import to_jax, to_torch
from blip3o_jax.convert.ta_tok import ignored, published_name, ta_tok_rules
from blip3o_jax.models import ta_tok
from blip3o_jax.models.ta_tok import TaTok, choose, resize_positions, unit
from blip3o_jax.tree import flatten

FIXTURE = Path(__file__).parents[1] / "fixtures/ta_tok.npz"
TINY = TaTokConfig(
    encoder=SiglipConfig(
        hidden_size=20,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=37,
        patch_size=5,
    ),
    bottleneck_dim=16,
    codebook_size=64,
    decoder_depth=2,
    decoder_num_attention_heads=2,
    decoder_intermediate_size=28,
    decoder_num_patches=16,
)


def shapes(cfg: TaTokConfig, **kwargs):
    image = jax.ShapeDtypeStruct(
        (1, cfg.encoder.image_size, cfg.encoder.image_size, 3), jnp.float32
    )
    return jax.eval_shape(
        lambda key, x: TaTok(cfg).init(key, x, **kwargs), jax.random.key(0), image
    )["params"]


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def is_ignored(name: str, cfg: TaTokConfig) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in ignored(cfg))


@pytest.fixture(scope="module")
def reference():
    with np.load(FIXTURE) as file:
        return dict(file)


@pytest.fixture(scope="module")
def tensors(reference):
    """Every tensor of the published file that the model has."""
    weights = {
        name.removeprefix("weights/"): value
        for name, value in reference.items()
        if name.startswith("weights/")
    }
    return {name: value for name, value in weights.items() if not is_ignored(name, TINY)}


@pytest.fixture(scope="module")
def params(tensors):
    return to_jax(ta_tok_rules(TINY), tensors, shapes(TINY))


@functools.cache
def compiled(method: str, cfg: TaTokConfig, dtype):
    return jax.jit(functools.partial(TaTok(cfg, dtype).apply, method=method))


def run(params, method: str, *args, cfg=TINY, dtype=jnp.float32, **kwargs):
    return compiled(method, cfg, dtype)({"params": params}, *args, **kwargs)


def near(got, want) -> bool:
    return (
        got.shape == want.shape
        and np.abs(np.asarray(got) - want).max() <= 1e-5 * np.abs(want).max()
    )


def test_round_trip_gives_the_same_bytes(tensors, params):
    back = to_torch(ta_tok_rules(TINY), params)
    assert set(back) == set(tensors)
    for name, value in tensors.items():
        assert back[name].dtype == value.dtype, name
        np.testing.assert_array_equal(back[name], value, err_msg=name)


@pytest.mark.parametrize("pool_scale", [1, 2])
def test_every_stage_equals_pytorch(reference, params, pool_scale):
    """Grid 7 unpooled (positions 4x4 enlarged), grid 3 pooled by 2 with a row and column left over
    (positions reduced)."""
    cfg = dataclasses.replace(TINY, pool_scale=pool_scale)
    want = {
        key: reference[f"pool_{pool_scale}/{key}"]
        for key in ("features", "z", "cosines", "ids", "decoded")
    }
    features, decoded, quantized = run(params, "__call__", reference["images"], cfg=cfg)
    assert near(features, want["features"])
    assert near(quantized.z, want["z"])
    assert near(quantized.cosines, want["cosines"])
    np.testing.assert_array_equal(quantized.ids, want["ids"])
    assert near(decoded, want["decoded"])


def test_decode_at_the_learned_grid(reference, params):
    assert near(run(params, "decode", jnp.asarray(reference["ids_16"])), reference["decoded_16"])


def test_a_given_codebook_stands_for_its_parameters(reference, params):
    """Encoding then needs neither the 65536 x 1536 table nor the decoding half in memory."""
    codebook = run(params, "codebook")
    assert near(codebook, reference["codebook"])
    in_linear, out_linear = params["bottleneck"]["in_linear"], params["bottleneck"]["out_linear"]
    encoding = {
        **{key: params[key] for key in ("encoder", "encode_task_layer")},
        "bottleneck": {"in_linear": in_linear},
    }
    np.testing.assert_array_equal(
        run(encoding, "encode", reference["images"], codebook), reference["pool_1/ids"]
    )
    decoding = {
        **{key: params[key] for key in params if key.startswith("decode")},
        "bottleneck": {"out_linear": out_linear},
    }
    assert near(
        run(decoding, "decode", reference["pool_2/ids"], codebook), reference["pool_2/decoded"]
    )


def test_quantizer_is_f32_under_bf16(reference, params):
    got = run(params, "quantize", reference["pool_1/features"], dtype=jnp.bfloat16)
    assert got.cosines.dtype == jnp.float32
    np.testing.assert_array_equal(got.ids, reference["pool_1/ids"])
    assert near(got.cosines, reference["pool_1/cosines"])


def test_blocks_of_the_codebook_do_not_change_ids(monkeypatch):
    rng = np.random.default_rng(0)
    z, codebook = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 50, 8), (96, 8)))
    codebook /= np.linalg.norm(codebook, axis=-1, keepdims=True)
    z[0, 0] = codebook[70] = codebook[3]  # a tie between blocks: the first wins, as in argmax
    want = np.argmax(z @ codebook.T, axis=-1)
    assert want[0, 0] == 3
    np.testing.assert_array_equal(choose(z, codebook, 0.03), want)
    monkeypatch.setattr(ta_tok, "_CODES_AT_ONCE", 32)
    np.testing.assert_array_equal(choose(z, codebook, 0.03), want)


def test_sampling_follows_the_softmax(monkeypatch):
    """40000 draws at one point, over two blocks, against softmax(cosine / temperature)."""
    monkeypatch.setattr(ta_tok, "_CODES_AT_ONCE", 4)
    codebook = unit(np.random.default_rng(0).normal(size=(8, 3)))
    z = jnp.broadcast_to(unit(jnp.asarray([0.3, 0.5, -0.2])), (4, 10_000, 3))
    draw = jax.jit(lambda key: choose(z, codebook, 0.5, key))
    ids = draw(jax.random.key(3))
    assert np.mean(draw(jax.random.key(4)) != ids) > 0.3
    frequencies = np.bincount(np.ravel(ids), minlength=8) / ids.size
    probabilities = jax.nn.softmax(codebook @ z[0, 0] / 0.5)
    assert np.abs(frequencies - probabilities).max() < 0.01


def test_encoding_samples_at_the_configured_temperature(reference, params):
    """0.03 moves some tokens off their nearest code; the mean chance of staying is that of the
    softmax."""
    ids = run(params, "encode", reference["images"], key=jax.random.key(0))
    scores = np.exp(reference["pool_1/cosines"] / 0.03)
    chance = (scores.max(axis=-1) / scores.sum(axis=-1)).mean()
    assert 0.5 < chance < 0.8
    assert abs(np.mean(ids == reference["pool_1/ids"]) - chance) < 0.1


def test_gradients_pass_the_quantizer(reference, params):
    """The decoder's gradient reaches the features unchanged, the codebook's map only through
    `codes`, the frozen table never."""

    weights = np.random.default_rng(0).normal(size=(2, 49, 16)).astype(np.float32)

    def loss(params, features, field):
        return jnp.sum(
            getattr(TaTok(TINY).apply({"params": params}, features, method="quantize"), field)
            * weights
        )

    def grads(field):
        of_params, of_features = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)(
            params, reference["pool_1/features"], field
        )
        regularizer = of_params["bottleneck"]["regularizer"]
        return (
            np.asarray(of_features),
            regularizer["embedding_proj"]["kernel"],
            regularizer["embedding"],
        )

    projected, through, codes = grads("z"), grads("straight_through"), grads("codes")
    assert np.any(projected[0])
    assert near(through[0], projected[0])
    assert not np.any(through[1])
    assert not np.any(codes[0])
    assert np.any(codes[1])
    assert not np.any(codes[2])


def test_equal_size_leaves_positions_alone():
    positions = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    np.testing.assert_array_equal(resize_positions(positions, 4), positions)


def test_decoding_a_number_of_tokens_that_is_no_square(params):
    with pytest.raises(ValueError, match="a square of tokens, which 12 is not"):
        run(params, "decode", jnp.zeros((1, 12), jnp.int32))


def test_codebook_starts_as_unit_scale_noise():
    table = jax.jit(functools.partial(TaTok(TINY).init, method="codebook"))(
        jax.random.key(0, impl="rbg")
    )["params"]["bottleneck"]["regularizer"]["embedding"]
    assert table.shape == (64, 16)
    assert abs(float(jnp.std(table)) - 0.25) < 0.02


def test_names_of_both_transformers_versions(tensors):
    newer = {
        name.replace("decoder.vision_model.", "decoder."): value for name, value in tensors.items()
    }
    assert set(newer) != set(tensors)
    assert {published_name(name) for name in newer} == set(tensors)
    assert all(published_name(name) == name for name in tensors)


def test_every_published_tensor_is_used_or_ignored_with_a_reason(reference, tensors):
    weights = {name.removeprefix("weights/") for name in reference if name.startswith("weights/")}
    assert len(weights) == 127
    assert weights - set(tensors) == {name for name in weights if is_ignored(name, TINY)}
    # last layer, post_layernorm, two heads, scale_layer
    assert len(weights - set(tensors)) == 16 + 2 + 11 + 11 + 2
    unseen = {
        pattern
        for pattern in ignored(TINY)
        if not any(fnmatchcase(name, pattern) for name in weights)
    }
    # a copy of the features' teacher, which the module of the fixture does not keep
    assert unseen == {"teacher.*"}
    assert all(len(reason) > 10 for reason in ignored(TINY).values())


def test_size_as_published():
    cfg, tree = TaTokConfig(), shapes(TaTokConfig())
    assert (cfg.num_encoder_layers, cfg.num_tokens) == (26, 729)
    flat = flatten(tree)
    assert count(tree["encode_task_layer"]) == 1_328_256
    assert count(tree["decode_task_layer_0"]) + count(tree["decode_task_layer_2"]) == 2_656_512
    assert count(tree["bottleneck"]["in_linear"]) == 1_771_008
    assert count(tree["bottleneck"]["out_linear"]) == 2_360_832
    assert flat["bottleneck/regularizer/embedding"].shape == (65536, 1536)
    assert count(tree["bottleneck"]["regularizer"]["embedding_proj"]) == 2_360_832
    assert count(shapes(cfg, method="encode")) == 503_868_832

    def head(mlp):  # probe, in_proj and out_proj, layernorm, MLP
        return 1152 + 4 * (1152**2 + 1152) + 2 * 1152 + 2 * 1152 * mlp + mlp + 1152

    last_layer, post_layernorm = 15_239_504, 2 * 1152
    assert count(tree["decoder"]) == 51_665_664 - head(3072)
    # The published total counts parameters, so scale_layer's two buffers are not in it.
    assert count(tree) == 591_032_000 - last_layer - post_layernorm - head(4304) - head(3072)
