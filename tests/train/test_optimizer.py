"""Norms and clipping: the textbook's values, however they are computed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from blip3o_jax.train.optimizer import clip_by_norm, norm


@pytest.fixture
def tree():
    rng = np.random.default_rng(0)
    return {"stack": rng.standard_normal((3, 40, 5), np.float32), "rows": {"kernel": rng.standard_normal((70, 2), np.float32)},
            "vector": rng.standard_normal(33, np.float32), "number": np.float32(7)}  # fmt: skip


def test_norm_is_over_all_numbers(tree):
    expected = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(tree)))
    np.testing.assert_allclose(jax.jit(norm)(tree), expected, rtol=1e-6)
    assert norm({"half": jnp.full((2, 9), 300, jnp.float16)}) == pytest.approx(300 * 18**0.5)  # a square alone is beyond float16


@pytest.mark.parametrize("largest", [1.0, 1000.0])
def test_clipping_is_optax_s(tree, largest):
    ours, theirs = (clip.update(tree, clip.init(tree))[0] for clip in (clip_by_norm(largest), optax.clip_by_global_norm(largest)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)
    assert norm(ours) == pytest.approx(min(largest, float(norm(tree))))
