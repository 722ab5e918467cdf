"""Attention against a per-head numpy loop; the TPU kernel in Pallas' interpreter."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from blip3o_jax.kernels.attention import (
    attention,
    best_implementation,
    linear_attention,
    softmax_attention,
)
from blip3o_jax.kernels.cpu import few_query_attention, one_query_attention
from blip3o_jax.kernels.masks import Causal
from blip3o_jax.kernels.platform import on_cpu, platform


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def by_hand(q, k, v, mask, scale):
    """One head and one row at a time, in f64."""
    (batch, length, heads, _), group = q.shape, q.shape[2] // k.shape[2]
    mask = np.broadcast_to(True if mask is None else mask, (batch, heads, length, k.shape[1]))
    out = np.zeros(q.shape)
    for b, n, t in np.ndindex(batch, heads, length):
        logits = scale * k[b, :, n // group].astype(np.float64) @ q[b, t, n]
        weights = np.exp(logits - logits.max()) * mask[b, n, t]
        out[b, t, n] = weights / weights.sum() @ v[b, :, n // group]
    return out


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("mask_heads", [None, 1, 6])
def test_grouped_heads_and_masks(mask_heads, queries):
    q, k, v = normal(0, 2, queries, 6, 4), normal(1, 2, 7, 3, 4), normal(2, 2, 7, 3, 4)
    mask = None if mask_heads is None else normal(3, 2, mask_heads, queries, 7) > -0.5
    np.testing.assert_allclose(
        attention(q, k, v, mask, 0.3), by_hand(q, k, v, mask, 0.3), atol=2e-6
    )


@pytest.mark.parametrize("form", [one_query_attention, few_query_attention])
@pytest.mark.parametrize("mask_heads", [None, 1, 6])
def test_few_queries_on_a_cpu_are_the_plain_formula(mask_heads, form):
    length = 1 if form == one_query_attention else 5
    q, k, v = normal(0, 2, length, 6, 4), normal(1, 2, 7, 3, 4), normal(2, 2, 7, 3, 4)
    mask = None if mask_heads is None else normal(3, 2, mask_heads, length, 7) > -0.5
    probe = normal(4, *q.shape)

    def with_gradients(function):
        result, backward = jax.vjp(lambda *inputs: function(*inputs, mask, 0.3), q, k, v)
        return result, *backward(probe)

    pairs = zip(with_gradients(form), with_gradients(softmax_attention), strict=True)
    for ours, plain in pairs:
        np.testing.assert_allclose(ours, plain, atol=2e-6)


def test_causal_sees_valid_tokens_up_to_itself():
    q, k, v = normal(0, 2, 4, 2, 4), normal(1, 2, 4, 2, 4), normal(2, 2, 4, 2, 4)
    valid = np.array([[True, True, True, False], [False, True, False, True]])
    allowed = np.array(
        [[[s <= t and row[s] for s in range(4)] for t in range(4)] for row in valid]
    )[:, None]
    np.testing.assert_array_equal(Causal(jnp.asarray(valid)).array(), allowed)
    out = attention(q, k, v, Causal(jnp.asarray(valid)), 0.5)
    assert np.isfinite(out).all()  # the second row's first token sees nothing
    allowed[1, 0, 0] = True
    np.testing.assert_allclose(
        np.asarray(out)[valid], by_hand(q, k, v, allowed, 0.5)[valid], atol=2e-6
    )


@pytest.mark.parametrize("queries", [1, 3])
def test_softmax_is_f32_in_bf16(queries):
    """Logits 64.25 and 64 differ in f32 only: bf16 has steps of 0.5 there."""
    q = jnp.tile(jnp.array([64, 0.25], jnp.bfloat16).reshape(1, 1, 1, 2), (1, queries, 1, 1))
    keys = jnp.array([[1, 1], [1, 0]], jnp.bfloat16).reshape(1, 2, 1, 2)
    out = attention(q, keys, jnp.eye(2, dtype=jnp.bfloat16).reshape(1, 2, 1, 2), None, 1.0)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(out, np.float32).ravel(), [0.5622, 0.4378] * queries, atol=2e-3
    )


def test_cudnn_takes_the_same_arguments(monkeypatch):
    """The GPU's kernel cannot run here; jax's own fallback for the same call stands in for it."""
    call = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *a, implementation, **kw: call(*a, implementation="xla", **kw),
    )
    q, k, v = normal(0, 2, 5, 6, 4), normal(1, 2, 5, 3, 4), normal(2, 2, 5, 3, 4)
    mask = Causal(jnp.asarray(np.arange(5) < np.array([[5], [3]])))
    np.testing.assert_allclose(
        attention(q, k, v, mask, 0.3, "cudnn"), attention(q, k, v, mask, 0.3), atol=2e-6
    )


@pytest.fixture
def interpreted(monkeypatch):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    make = partial(splash.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(splash, "make_splash_mha_single_device", make)


# three blocks; one block a device
@pytest.mark.parametrize(("length", "shards"), [(384, None), (128, (2, 1, 2))])
def test_splash_values_and_gradients(interpreted, length, shards):
    (q, probe), (k, v) = normal(0, 2, 2, length, 4, 128), normal(1, 2, 2, length, 2, 128)
    valid = np.arange(length) >= np.array([[0], [90]])
    valid[0, 110:] = False
    # Padding behind valid tokens sees those too: the PyTorch code conditions on it.
    sees = np.maximum.accumulate(valid, axis=1)

    def loss(q, k, v, implementation):
        out = attention(q, k, v, Causal(jnp.asarray(valid)), 128**-0.5, implementation)
        return jnp.sum(jnp.where(sees[:, :, None, None], out * probe, 0))

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)), static_argnums=3)
    expected = run(q, k, v, "xla")
    if shards:
        mesh = jax.make_mesh(shards, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
        with jax.set_mesh(mesh):
            actual = run(q, k, v, "splash")
    else:
        actual = run(q, k, v, "splash")
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_errors_name_what_is_wrong():
    q = jnp.zeros((1, 100, 2, 128))
    valid = jnp.ones((1, 100), bool)
    with pytest.raises(ValueError, match=r"'flash'.*auto, xla, cudnn, splash"):
        attention(q, q, q, None, 1.0, "flash")
    with pytest.raises(ValueError, match="Causal"):
        attention(q, q, q, None, 1.0, "splash")
    with pytest.raises(ValueError, match="multiples of 128, not 100 and 128"):
        attention(q, q, q, Causal(valid), 1.0, "splash")


def test_linear_attention_is_normalised_relu_attention():
    q, k, v = (
        np.maximum(normal(0, 2, 5, 3, 4), 0),
        np.maximum(normal(1, 2, 7, 3, 4), 0),
        normal(2, 2, 7, 3, 4),
    )
    q[0, 0, 0] = 0  # sees nothing: 0 / eps
    weights = np.einsum("btnh,bsnh->bnts", q, k).astype(np.float64)
    expected = np.einsum("bnts,bsnh->btnh", weights / (weights.sum(-1, keepdims=True) + 1e-15), v)
    np.testing.assert_allclose(linear_attention(q, k, v), expected, atol=1e-5)
    assert not np.asarray(linear_attention(q, k, v))[0, 0, 0].any()
    # eps is added: with one key equal to the query the output is v / (1 + eps / |q|^2).
    one = jnp.ones((1, 1, 1, 4))
    np.testing.assert_allclose(linear_attention(one, one, one, eps=4.0), one / 2)


def test_linear_attention_sums_in_f32():
    """257 equal tokens: a bf16 sum stops at 256."""
    ones = jnp.ones((1, 257, 1, 1), jnp.bfloat16)
    out = linear_attention(ones[:, :1], ones, ones, eps=257.0)
    assert out.dtype == jnp.bfloat16
    assert float(out[0, 0, 0, 0]) == 0.5


def test_the_meshs_platform_chooses_the_kernel(monkeypatch):
    """A mesh of devices that are not here is what the program is traced for; without a mesh nothing
    is cut, so no kernel."""
    mask = Causal(jnp.ones((1, 128), bool))
    whole, short = (
        jnp.zeros((1, 128, 2, 128), jnp.bfloat16),
        jnp.zeros((1, 100, 2, 128), jnp.bfloat16),
    )
    assert best_implementation(whole, mask) == "xla"
    shape = {"axis_names": ("data",), "axis_types": (AxisType.Auto,)}
    chosen = {}
    for name in ("cpu", "gpu", "tpu"):
        device = jax.sharding.AbstractDevice(device_kind=name, num_cores=None, platform=name)
        mesh = jax.sharding.AbstractMesh((1,), **shape, abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            assert (platform(), on_cpu()) == (name, name == "cpu")
            chosen[name] = [
                best_implementation(q, m)
                for q, m in (
                    (whole, mask),
                    (short, mask),
                    (whole.astype("float32"), mask),
                    (whole, None),
                )
            ]
    assert chosen["cpu"] == ["xla"] * 4
    assert chosen["gpu"] == ["cudnn", "cudnn", "xla", "xla"]
    assert chosen["tpu"] == ["splash", "xla", "splash", "xla"]
