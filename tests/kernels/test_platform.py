"""Which programs hand their matrix products to YNNPACK, and take sums in one pass."""

import jax.numpy as jnp
import pytest

from blip3o_jax.kernels.platform import jit
from blip3o_jax.presets import preset


@pytest.mark.parametrize(
    ("name", "expected"), [("emoji_64", True), ("mid_128", False), (None, False)]
)
def test_only_narrow_models_generate_with_ynnpack(name, expected):
    x = jnp.ones((64, 64))
    text = (
        jit(lambda x: jnp.sum(x @ x, axis=-1), name and preset(name)).lower(x).compile().as_text()
    )
    assert ("ynn_fusion" in text) == expected
    assert ("reduce-window" not in text) == (name is not None)
