"""The platform a program is compiled for, its compiler options, and the cache on disk."""

import contextlib
import functools
import logging
import os
import pathlib
from collections.abc import Callable, Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.errors import first_line
from blip3o_jax.kernels.waiting import tell_of_compilation

log = logging.getLogger(__name__)

# jaxlib 0.10 hands products, sums and convolutions to YNNPACK by default. XLA's own are as fast or
# faster, except for the products of a narrow model, where sharing one among the cores costs more
# than the product, above all if each core is a device (parallel.mesh.split_cpu_into_devices).
# Measured at widths of 192 (narrow) and 672 (not).
YNNPACK = "xla_cpu_experimental_ynn_fusion_type"
NARROW = 256
FOR_NARROW = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
# By default XLA takes a sum of more than 32 numbers in two passes. For training's sums of millions
# of numbers that is more exact; a program that generates has none of these, and between the passes
# it would write what it sums (`cpu._sums_of_products`: a matrix for each row).
ONE_PASS = {"xla_disable_hlo_passes": "tree_reduction_rewriter"}
UNROLLED_LAYERS = 16  # at most, on a CPU

_tell_of_compilation_once = functools.cache(tell_of_compilation)


def platform() -> str:
    """What a program is traced for, "cpu", "gpu" or "tpu": the devices of the mesh of
    `jax.set_mesh`, which may belong to a topology that is not here; without a mesh, this machine's.
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
    """Whether programs are compiled for the CPU, for which XLA needs different formulations."""
    return platform() == "cpu"


def is_unrolled(length: int) -> bool:
    """Whether a stack of this many layers is unrolled instead of a loop, which on a CPU copies each
    layer's weights before it uses them; programs of deep stacks would be long."""
    return on_cpu() and length <= UNROLLED_LAYERS


def is_narrow(config: Blip3oConfig) -> bool:
    """Whether sharing this model's operations among cores costs more than the operations."""
    return max(config.qwen3.hidden_size, config.sana.hidden_size) <= NARROW


def tokens_of_a_round(width: int, rows: int) -> int:
    """How many tokens of each of a device's rows a transformer of this width should take at once,
    the first known and the others guessed (`sample.decode`); the further on, the fewer guesses are
    right."""
    # A TPU or GPU computes 200 to 300 products in bfloat16 while it reads a number: more tokens
    # cost nothing until then. To a CPU each row is work, from the second on; what a round of a
    # narrow model costs besides is worth as much. Measured, see docs/speed.md.
    if on_cpu():
        return min(4, 12 // rows) if width <= NARROW and rows <= 4 else 1
    return max(1, min(8, 256 // rows))


def jit(
    function: Callable,
    generates: Blip3oConfig | None = None,
    writes_tokens: bool = False,
    **options,
):
    """`jax.jit` with the compiler options that suit the platform; for every program of more than a
    moment.

    `generates` is the model whose images, or a part of them, the program makes; `writes_tokens`
    says that it is the loop over their tokens, whose products are of a few rows.
    """
    if on_cpu():
        is_ynnpacks = generates and is_narrow(generates) and not writes_tokens
        library = FOR_NARROW if is_ynnpacks else ""
        options["compiler_options"] = {YNNPACK: library} | (ONE_PASS if generates else {})
    return jax.jit(function, **options)


def enable_compilation_cache() -> None:
    """Keeps compiled programs between processes, under $XDG_CACHE_HOME/blip3o_jax, unless
    JAX_COMPILATION_CACHE_DIR names another folder; says so when a program takes long to compile."""
    _tell_of_compilation_once()
    if jax.config.jax_compilation_cache_dir is None:
        root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "blip3o_jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    _rewrite_damaged_programs()


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
    """Programs are neither taken from JAX's cache on disk nor written there."""
    before = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # which remembers whether it is in use
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _rewrite_damaged_programs() -> None:
    """Lets JAX delete a program in the cache that it cannot read: it compiles it again, but writes
    no file that is there, so that every later process would compile it too."""
    from jax._src import compilation_cache

    read = getattr(compilation_cache, "get_executable_and_time", None)
    if read is None or hasattr(read, "rewrites"):
        return

    def read_or_delete(cache_key: str, *arguments):
        try:
            return read(cache_key, *arguments)
        except Exception as error:  # of the decompressor, of XLA: whatever it is, it is compiled
            file = pathlib.Path(jax.config.jax_compilation_cache_dir, f"{cache_key}-cache")
            sentence = "The compiled program %s is damaged (%s); it is compiled again."
            log.warning(sentence, file, first_line(error))
            with contextlib.suppress(OSError):
                file.unlink()
            return None, None

    read_or_delete.rewrites = True
    compilation_cache.get_executable_and_time = read_or_delete
