"""Products, biases and sums in the forms of a CPU: the values and gradients of the plain formulas,
and the programs that they become."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.kernels import cpu
from blip3o_jax.kernels.convolutions import conv2d, conv2d_of_doubled, pointwise
from blip3o_jax.kernels.platform import jit
from blip3o_jax.kernels.products import (
    add_bias,
    logits_product,
    materialized,
    product,
    sum_of_squares,
    unstack,
)
from blip3o_jax.parallel.mesh import BATCH, make_mesh
from blip3o_jax.plan import collectives


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def close(ours, expected):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def with_gradients(function, *inputs):
    """The result, and the gradients of its sum weighted at random."""
    result, backward = jax.vjp(function, *inputs)
    return result, backward(jax.random.normal(jax.random.key(9), result.shape))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5)])
def test_doubled_pixels_need_not_be_made(rows, columns):
    x, kernel = normal(0, 2, rows, columns, 4), normal(1, 3, 3, 4, 6)

    def plain(x, kernel):
        return conv2d(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2), kernel)

    close(with_gradients(conv2d_of_doubled, x, kernel), with_gradients(plain, x, kernel))


def plain_conv(x, kernel, groups):
    pads = [(kernel.shape[0] // 2, kernel.shape[0] // 2)] * 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        pads,
        feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@pytest.mark.parametrize("size", [3, 5])
def test_depthwise_as_a_sum_of_shifted_products(size):
    x, kernel = normal(0, 2, 6, 5, 8), normal(1, size, size, 1, 8)
    expected = with_gradients(lambda x, kernel: plain_conv(x, kernel, 8), x, kernel)
    close(with_gradients(cpu.depthwise_conv, x, kernel), expected)
    close(with_gradients(lambda x, kernel: conv2d(x, kernel, groups=8), x, kernel), expected)


def test_depthwise_has_forward_derivatives():
    """Along the input, the kernel or both, as XLA's own."""
    x, kernel = normal(0, 2, 6, 5, 8), normal(1, 3, 3, 1, 8)
    dx, dkernel = normal(2, *x.shape), normal(3, *kernel.shape)

    def derivatives(conv):
        both = jax.jvp(conv, (x, kernel), (dx, dkernel))
        return both, jax.jvp(lambda x: conv(x, kernel), (x,), (dx,))

    expected = derivatives(lambda x, kernel: plain_conv(x, kernel, 8))
    close(derivatives(cpu.depthwise_conv), expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_of_single_pixels_is_a_product(groups):
    x, kernel = normal(0, 2, 3, 5, 8), normal(1, 1, 1, 8 // groups, 6)
    expected = with_gradients(lambda x, kernel: plain_conv(x, kernel, groups), x, kernel)
    close(with_gradients(lambda x, kernel: conv2d(x, kernel, groups=groups), x, kernel), expected)


def test_sums_of_squares_and_slices():
    x = normal(0, 3, 40, 5)
    close(with_gradients(sum_of_squares, x), with_gradients(lambda x: jnp.sum(x * x), x))
    assert sum_of_squares(jnp.full((2, 3), 2, jnp.bfloat16)).dtype == jnp.float32
    for axis in (0, 1):
        slices = unstack(x, axis)
        np.testing.assert_array_equal(jnp.stack(slices, axis=axis), x)
    np.testing.assert_array_equal(materialized({"x": x})["x"], x)


def test_logits_are_f32_with_gradients_in_the_inputs_dtype():
    hidden, table = (normal(i, 4, 8).astype(jnp.bfloat16) for i in (0, 1))
    logits, backward = jax.vjp(lambda *x: logits_product("td,vd->tv", *x), hidden, table)
    assert logits.dtype == jnp.float32
    exact = np.asarray(hidden, np.float32) @ np.asarray(table, np.float32).T
    np.testing.assert_allclose(logits, exact, rtol=1e-6, atol=1e-6)
    assert {g.dtype for g in backward(logits)} == {jnp.dtype("bfloat16")}
    program = str(jax.make_jaxpr(backward)(logits))
    assert "preferred_element_type=float32" not in program


@pytest.mark.parametrize("name", ["cpu", "gpu", "tpu"])
def test_only_a_cpu_has_forms_of_its_own(name):
    """Elsewhere each function is its plain formula: no barrier, and XLA's own convolution."""
    x, square, taps = jnp.ones((2, 4, 4, 8)), jnp.ones((8, 8)), jnp.ones((3, 3, 1, 8))

    def every(x, square, taps):
        return (
            product("byxc,cd->byxd", x, square),
            add_bias(x, square[0]),
            conv2d(x, taps, groups=8),
            pointwise(x, square[:4], 2),
            sum_of_squares(x),
            unstack(x, 1),
        )

    device = jax.sharding.AbstractDevice(device_kind=name, num_cores=None, platform=name)
    mesh = jax.sharding.AbstractMesh(
        (1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=device
    )
    with jax.sharding.use_abstract_mesh(mesh):
        program = str(jax.make_jaxpr(every)(x, square, taps))
    assert ("optimization_barrier" in program) == (name == "cpu")
    assert ("conv_general_dilated[" in program) == (name != "cpu")
    assert program.count("dot_general[") == (3 if name == "cpu" else 2)


@pytest.mark.parametrize("axes", [(6,), (2, 3)])
def test_a_bias_whose_gradient_is_a_product(axes):
    rng = np.random.default_rng(0)
    y, bias = rng.standard_normal((4, 5, *axes), np.float32), rng.standard_normal(axes, np.float32)
    close(with_gradients(add_bias, y, bias), with_gradients(lambda y, bias: y + bias, y, bias))


@pytest.mark.parametrize(
    ("sizes", "rows", "width", "products"),
    [
        ({"data": 8}, 24, 32, 1),  # a small matrix
        ({"data": 8}, 24, 8192, 2),  # sums, between two products with ones
        ({"data": 8}, 64, 8192, 2),
        ({"data": 8}, 72, 8192, 1),  # many rows
        ({"data": 2, "fsdp": 4}, 24, 8192, 1),
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
        found = with_gradients(
            lambda x, w: product("btd,dnh->btnh", x, w, loop_invariant=True), *placed
        )
        program = (
            jit(lambda x, w: product("btd,dnh->btnh", x, w, loop_invariant=True))
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
        rng.standard_normal((rows, 8192), np.float32),
        rng.standard_normal((8192, 24), np.float32),
    )
    assert (
        jit(lambda x, w: product("bd,df->bf", x, w, loop_invariant=True))
        .lower(x, kernel)
        .compile()
        .as_text()
        .count(" dot(")
        == 2
    )
    close(
        with_gradients(lambda x, w: product("bd,df->bf", x, w, loop_invariant=True), x, kernel),
        with_gradients(jnp.matmul, x, kernel),
    )
