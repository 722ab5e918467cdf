"""How programs are compiled: options of XLA, and the cache of compiled programs on disk."""

import os
import pathlib

import jax

from blip3o_jax.config import Blip3oConfig

# What jaxlib 0.10 hands to YNNPACK: by itself products, sums and convolutions. XLA's own are as
# fast or faster, but for a narrow model's products, where sharing them out among the cores costs
# more than they do, above all if each core is a device (parallel.mesh.split_cpu_into_devices) that
# waits for the others' threads. Measured at widths of 192 (narrow) and 672 (not).
YNNPACK, NARROW = "xla_cpu_experimental_ynn_fusion_type", 256
FOR_NARROW = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
# By itself XLA takes a sum of more than 32 numbers in two passes. For the sums of training, of
# millions of numbers, that is more exact; a program that generates has none of these, and between
# the passes it would write down what it sums (`kernels.cpu._sums_of_products`: a matrix for each
# row).
ONE_PASS = {"xla_disable_hlo_passes": "tree_reduction_rewriter"}


def is_narrow(config: Blip3oConfig) -> bool:
    """Whether a CPU spends more on sharing this model's operations out than on them."""
    return max(config.qwen3.hidden_size, config.sana.hidden_size) <= NARROW


def jit(function, generates: Blip3oConfig | None = None, **options):
    """`jax.jit` with the compiler options that suit the platform; every program of more than a
    moment goes through it. `generates`: the model whose pictures the program makes, or a part of
    them."""
    given = {YNNPACK: FOR_NARROW if generates and is_narrow(generates) else ""} | (
        ONE_PASS if generates else {}
    )
    return jax.jit(function, **options, compiler_options=given if on_cpu() else None)


def enable_compilation_cache() -> None:
    """Keeps compiled programs between processes, under $XDG_CACHE_HOME/blip3o_jax, unless
    JAX_COMPILATION_CACHE_DIR says where."""
    if jax.config.jax_compilation_cache_dir is None:
        root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "blip3o_jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def platform() -> str:
    """What a program is traced for, "cpu", "gpu" or "tpu": the devices of the mesh of
    `jax.set_mesh`, which may be those of a topology that is not here; without one, this machine's.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def dtype_for(name: str, on: str | None = None) -> str:
    """`name`, or for "auto" float32 on a CPU and bfloat16 elsewhere; `on` is the platform, if not
    this machine's."""
    if name != "auto":
        return name
    return "float32" if (on or jax.default_backend()) == "cpu" else "bfloat16"


def on_cpu() -> bool:
    """Whether programs are compiled for the CPU, whose XLA wants a few things said differently to
    be fast."""
    return platform() == "cpu"
