"""Which programs hand their matrix products to YNNPACK, and take sums in one pass."""

import os
import subprocess
import sys

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


CACHED = """
import jax
from blip3o_jax.kernels.platform import enable_compilation_cache
enable_compilation_cache()
print(float(jax.jit(lambda x: x * 2 + 1)(3.0)))
"""


def test_a_damaged_program_in_the_cache_is_written_anew(tmp_path):
    variables = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def start() -> tuple[str, str, dict[str, int]]:
        done = subprocess.run(
            [sys.executable, "-c", CACHED],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=True,
        )
        sizes = {file.name: file.stat().st_size for file in tmp_path.glob("*-cache")}
        return done.stdout, done.stderr, sizes

    printed, _, sizes = start()
    assert printed == "7.0\n"
    assert len(sizes) >= 1
    for name in sizes:
        os.truncate(tmp_path / name, 100)
    printed, error, again = start()
    assert printed == "7.0\n"
    assert error.count("is damaged (") == len(sizes)
    assert again.keys() == sizes.keys()
    assert min(again.values()) > 100
    assert "is damaged" not in start()[1]
