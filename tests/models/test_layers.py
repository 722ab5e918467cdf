"""Convolutions, biases and products computed another way than XLA's own: the same values and
gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.kernels.cpu import add_bias, product
from blip3o_jax.kernels.platform import jit
from blip3o_jax.models.layers import conv2d, conv2d_of_doubled
from blip3o_jax.parallel.mesh import BATCH, make_mesh
from blip3o_jax.plan import collectives


def close(found, expected):
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def with_gradients(function, *inputs):
    """The result, and the gradients of its sum weighted at random."""
    result, backward = jax.vjp(function, *inputs)
    return result, backward(jax.random.normal(jax.random.key(9), result.shape))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5)])
def test_doubled_pixels_need_not_be_made(rows, columns):
    rng = np.random.default_rng(0)
    x, kernel = (
        rng.standard_normal((2, rows, columns, 4), np.float32),
        rng.standard_normal((3, 3, 4, 6), np.float32),
    )

    def plain(x, kernel):
        return conv2d(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2), kernel)

    close(with_gradients(conv2d_of_doubled, x, kernel), with_gradients(plain, x, kernel))


@pytest.mark.parametrize("size", [3, 5])
def test_depthwise_as_a_sum_of_shifted_products(size):
    rng = np.random.default_rng(0)
    x, kernel = (
        rng.standard_normal((2, 6, 5, 8), np.float32),
        rng.standard_normal((size, size, 1, 8), np.float32),
    )

    def by(lowering):
        return with_gradients(
            lambda x, kernel: conv2d(x, kernel, groups=8, lowering=lowering), x, kernel
        )

    close(by("shift"), by("conv"))


@pytest.mark.parametrize("axes", [(6,), (2, 3)])
def test_a_bias_whose_gradient_is_a_product(axes):
    rng = np.random.default_rng(0)
    y, bias = rng.standard_normal((4, 5, *axes), np.float32), rng.standard_normal(axes, np.float32)
    close(with_gradients(add_bias, y, bias), with_gradients(lambda y, bias: y + bias, y, bias))


@pytest.mark.parametrize(
    ("sizes", "rows", "width", "products"),
    [
        ({"data": 8}, 24, 32, 3),  # one product a row
        ({"data": 8}, 24, 8192, 2),  # sums, between two products with ones
        ({"data": 8}, 64, 32, 2),
        ({"data": 8}, 72, 32, 1),
        ({"data": 2, "fsdp": 4}, 24, 32, 1),
    ],
)
def test_few_rows_of_a_device_that_has_all_weights(sizes, rows, width, products):
    rng, mesh = np.random.default_rng(0), make_mesh(sizes)
    x, kernel = (
        rng.standard_normal((rows, 1, width), np.float32),
        rng.standard_normal((width, 4, 6), np.float32),
    )
    placed = (
        jax.device_put(x, jax.NamedSharding(mesh, BATCH)),
        jax.device_put(kernel, jax.NamedSharding(mesh, jax.P())),
    )
    with jax.set_mesh(mesh):
        found = with_gradients(lambda x, w: product("btd,dnh->btnh", x, w, reused=True), *placed)
        program = (
            jit(lambda x, w: product("btd,dnh->btnh", x, w, reused=True))
            .lower(*placed)
            .compile()
            .as_text()
        )
    close(found, with_gradients(lambda x, w: jnp.einsum("btd,dnh->btnh", x, w), x, kernel))
    assert not collectives.collectives(program)
    assert program.count(" dot(") == products


@pytest.mark.parametrize("rows", [5, 8])
def test_few_rows_without_a_mesh(rows):
    rng = np.random.default_rng(0)
    x, kernel = (
        rng.standard_normal((rows, 32), np.float32),
        rng.standard_normal((32, 24), np.float32),
    )
    assert (
        jit(lambda x, w: product("bd,df->bf", x, w, reused=True))
        .lower(x, kernel)
        .compile()
        .as_text()
        .count(" dot(")
        == 2
    )
    close(
        with_gradients(lambda x, w: product("bd,df->bf", x, w, reused=True), x, kernel),
        with_gradients(jnp.matmul, x, kernel),
    )
