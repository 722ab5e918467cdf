"""What all tests share: eight simulated CPU devices (set before jax is imported), one folder of
compiled programs for the whole run, the files that take longest first."""

import functools
import gc
import os
import resource
import signal
import sys
import tempfile

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
)

# Files that take longest, longest first: workers (launch/test.sh) then end at about the same time.
SLOWEST = (
    "plan/test_plan_tpu.py",
    "train/test_processes.py",
    "parity/test_edit_chain.py",
    "parity/test_chain.py",
    "train/test_loop.py",
    "bench/test_bench.py",
    "test_pipeline.py",
    "data/test_cache.py",
    "plan/test_plan.py",
    "verify/test_verify.py",
    "train/test_own_pictures.py",
    "test_buckets.py",
    "train/test_losses.py",
    "jobs/test_edit.py",
    "jobs/test_evaluate_edits.py",
    "sample/test_generate.py",
    "models/test_blip3o.py",
    "parallel/test_parameters.py",
    "kernels/test_cpu.py",
    "rl/test_grpo.py",
)
# Files whose programs, and those of the commands that they start, are compiled without LLVM's
# costly passes, which takes half as long. Not those that look at what the CPU is given, or at the
# bytes of what the embedded model makes.
PLAINLY_COMPILED = (
    "bench/test_bench.py",
    "convert/test_edit_checkpoint.py",
    "data/test_cache.py",
    "jobs/test_edit.py",
    "jobs/test_evaluate_edits.py",
    "models/test_blip3o.py",
    "parallel/test_parameters.py",
    "parity/test_chain.py",
    "parity/test_edit_chain.py",
    "plan/test_plan.py",
    "rl/test_diffusion.py",
    "rl/test_formulas.py",
    "rl/test_grpo.py",
    "rl/test_trainer.py",
    "sample/test_generate.py",
    "serve/test_api.py",
    "serve/test_batches.py",
    "serve/test_document.py",
    "serve/test_refusals.py",
    "serve/test_waiting.py",
    "test_buckets.py",
    "train/test_losses.py",
    "train/test_loop.py",
    "train/test_own_pictures.py",
    "train/test_processes.py",
    "verify/test_verify.py",
)
LARGE = 1 << 30  # bytes of a process that gives its compiled programs back between two files


def pytest_configure(config):
    """Programs are compiled once for all processes of a run, and kept for no other run, also when
    it is told to end."""
    if hasattr(config, "workerinput"):
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="blip3o-jax-tests-")
        config.add_cleanup(folder.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
        # A conftest.py of the folder that was asked for has imported JAX already.
        if "jax" in sys.modules:
            import jax

            jax.config.update("jax_compilation_cache_dir", folder.name)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def name_of(path) -> str:
    """A test file's path below this folder."""
    return path.relative_to(os.path.dirname(__file__)).as_posix()


def pytest_collection_modifyitems(items):
    def place(item) -> int:
        name = name_of(item.path)
        return SLOWEST.index(name) if name in SLOWEST else len(SLOWEST)

    items.sort(key=place)


@pytest.fixture(scope="module", autouse=True)
def programs_are_compiled_plainly(request):
    """For the files above, in this process and in those that they start."""
    if name_of(request.path) not in PLAINLY_COMPILED:
        yield
        return
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()  # no other file sees these programs


@pytest.fixture(scope="module", autouse=True)
def memory_is_given_back():
    """A process that has grown large forgets its compiled programs after each file; those that are
    needed again come from the run's folder."""
    yield
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * resource.getpagesize()
    if resident > LARGE:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session", autouse=True)
def shapes_are_traced_once():
    """Keeps the shapes of every model: tracing them takes half a second, and every reader and
    writer asks for them."""
    from blip3o_jax.models.blip3o import Blip3o

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Blip3o, "abstract", functools.cache(Blip3o.abstract))
        yield


@pytest.fixture(scope="session")
def tokenizer():
    """The embedded tokenizer as rows are made with it."""
    import tiny

    return tiny.text()


@pytest.fixture(scope="module")
def cloud():
    """Servers of buckets on loopback: their URLs by scheme."""
    import clouds

    with clouds.servers() as urls:
        yield urls


@pytest.fixture(params=["gs", "s3"])
def bucket(cloud, request):
    """A new bucket of each kind."""
    import clouds

    return clouds.new_bucket(cloud, request.param)
