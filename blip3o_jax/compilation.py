"""How programs are compiled: options of XLA, and the cache of compiled programs on disk."""

import os
import pathlib

import jax

from blip3o_jax.models.layers import on_cpu

# Without YNNPACK, which jaxlib 0.10 hands matrix products, sums and convolutions to: XLA's own are as fast or faster for everything here.
CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}


def jit(function, **options):
    """`jax.jit` with the compiler options that suit the platform; every program of more than a moment goes through it."""
    return jax.jit(function, **options, compiler_options=CPU_OPTIONS if on_cpu() else None)


def enable_compilation_cache() -> None:
    """Keeps compiled programs between processes, under $XDG_CACHE_HOME/blip3o_jax, unless JAX_COMPILATION_CACHE_DIR says where."""
    if jax.config.jax_compilation_cache_dir is None:
        root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "blip3o_jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
