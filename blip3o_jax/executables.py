"""Compiled programs on disk: a process that finds its own traces and compiles nothing.

JAX's own cache, beside which they lie, saves the compilation alone: a process has to trace a
program before it knows which one it needs. Here the name of a file says what a program is traced
from (the model, shapes, shardings, settings) and the devices that it is for. Its first line says by
which code, versions and options it was compiled; one by others is never run, but made again.

A program is code, and so is what holds it: a folder in which others may write is not used.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import pathlib
import pickle
import platform
from collections.abc import Callable
from typing import Any

import flax
import jax
import jaxlib
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from blip3o_jax import paths
from blip3o_jax.errors import first_line
from blip3o_jax.kernels.platform import without_cache
from blip3o_jax.kernels.waiting import told

FOLDER = "programs"  # in the folder of JAX's cache
# What programs are traced from: these rooms and those that they import (setup.cfg).
ROOMS = (
    "config",
    "errors",
    "kernels",
    "models",
    "parallel",
    "pipeline",
    "pixels",
    "sample",
    "text",
)
# Settings of JAX that change no program.
HARMLESS = (
    "jax_compilation_cache_",
    "jax_enable_compilation_cache",
    "jax_enable_preemption_service",
    "jax_enable_recoverability",
    "jax_explain_cache_misses",
    "jax_log",
    "jax_num_cpu_devices",
    "jax_persistent_cache_",
    "jax_platforms",
    "jax_traceback",
)
PARAMS = "params"  # stands for the parameters among the arguments

log = logging.getLogger(__name__)


def keeper(model: Any, params: Any, mesh: Mesh) -> Callable[..., Callable] | None:
    """What puts programs of a model on disk: a function of a jitted function, its name and the
    names of its static arguments, which are passed by name, that returns a function of the same
    arguments.

    The parameters are recognised among the arguments as the very object `params`. None without a
    cache of compiled programs (`kernels.platform.enable_compilation_cache`).
    """
    if (place := folder()) is None:
        return None
    devices = mesh.devices.flatten().tolist()
    kinds = jax.tree.map(lambda x: repr(_kind(x)), params)
    made_for = [repr(model), repr(kinds), _machine(devices)]
    return functools.partial(_on_disk, place, made_for, _facts(devices[0]), params, devices)


def _on_disk(
    place: paths.AnyPath,
    made_for: list[str],
    facts: dict[str, str],
    params: Any,
    devices: list[jax.Device],
    function: Callable,
    name: str,
    static: tuple[str, ...] = (),
) -> Callable:
    programs: dict[tuple, Callable] = {}

    def find(key: tuple, args: tuple, kwargs: dict, fixed: dict) -> Callable:
        contents = json.dumps([*made_for, *map(repr, key)])
        file = place / f"{name}-{hashlib.sha256(contents.encode()).hexdigest()[:24]}"
        if (program := _read(file, facts, devices)) is not None:
            return program
        lowered = function.lower(*args, **kwargs, **fixed)
        # One that JAX's cache gives cannot be written again (jaxlib 0.10.2: it would run nowhere).
        with without_cache(), told():
            program = lowered.compile()
        _write(file, facts, program)
        return program

    def call(*args: Any, **kwargs: Any) -> Any:
        fixed = {key: kwargs.pop(key) for key in static if key in kwargs}
        given = tuple(PARAMS if x is params else x for x in args), kwargs
        leaves, tree = jax.tree.flatten(given)
        key = tuple(map(_kind, leaves)), tree, tuple(sorted(fixed.items()))
        if key not in programs:
            programs[key] = find(key, args, kwargs, fixed)
        return programs[key](*args, **kwargs)

    call.programs = programs
    return call


def _kind(x: Any) -> Any:
    """What a program is compiled for of an argument: shape, dtype, and where it lies."""
    if x is PARAMS:
        return x
    return jax.typeof(x), getattr(x, "sharding", None), getattr(x, "committed", None)


def folder() -> paths.AnyPath | None:
    """Where programs are kept, if they are."""
    cache = jax.config.jax_compilation_cache_dir
    if cache is None or not jax.config.jax_enable_compilation_cache:
        return None
    place = paths.path(cache) / FOLDER
    if paths.is_bucket(place) or not place.exists():
        return place
    stat = place.stat()
    is_own = stat.st_uid in (0, os.geteuid()) and not stat.st_mode & 0o002
    if not is_own:
        log.warning("%s is not used: others may write there, and it holds code.", place)
    return place if is_own else None


def kept(place: paths.AnyPath) -> dict[str, tuple[int, str]]:
    """The programs in a folder by name, and the state of each file."""
    states = {}
    for file in itertools.filterfalse(paths.is_left_over, paths.files_below(place)):
        with contextlib.suppress(FileNotFoundError):  # gone by now, as another process's trial
            states[file.name] = paths.state(file)
    return states


def _machine(devices: list[jax.Device]) -> str:
    """What a compiled program is bound to: the devices, and of a CPU its instructions."""
    processor = platform.machine()
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        is_of_kind = ("model name", "flags", "Features")
        processor += repr(sorted({line for line in lines if line.startswith(is_of_kind)}))
    return repr([[(d.platform, d.device_kind, d.id) for d in devices], processor])


def _facts(device: jax.Device) -> dict[str, str]:
    """By which code, versions and options programs are compiled here."""
    package, sources = pathlib.Path(__file__).parent, hashlib.sha256()
    for room in ROOMS:
        for file in sorted([package / f"{room}.py", *(package / room).rglob("*.py")]):
            if file.is_file():
                sources.update(file.read_bytes())
    options = {
        name: repr(value)
        for name, value in sorted(jax.config.values.items())
        if not name.startswith(HARMLESS)
    }
    flags = {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    digest = hashlib.sha256(json.dumps([options, flags]).encode()).hexdigest()
    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "flax": flax.__version__,
        "platform": device.client.platform_version,
        "blip3o_jax": sources.hexdigest()[:12],
        "options": digest[:12],
    }


def _read(file: paths.AnyPath, facts: dict[str, str], devices: list[jax.Device]) -> Any:
    """The program in a file, or None: where there is none, and where it is damaged or was compiled
    by others, which is said."""
    try:
        head, _, data = file.read_bytes().partition(b"\n")
        head = json.loads(head)
        own = facts | {"program": file.name, "sha256": hashlib.sha256(data).hexdigest()}
        if other := [name for name in own if head.get(name) != own[name]]:
            sentence = "The program %s has another %s than %s; it is compiled again."
            log.info(sentence, file, other[0], own[other[0]])
            return None
        program = serialize_executable.deserialize_and_load(
            *pickle.loads(data), execution_devices=devices
        )
        log.debug("Read %s.", file)
        return program
    except FileNotFoundError:
        return None
    except Exception as error:  # of a disk, the pickle, XLA: whatever it is, it is compiled
        sentence = "The program %s cannot be read (%s); it is compiled again."
        log.warning(sentence, file, first_line(error))
        return None


def _write(file: paths.AnyPath, facts: dict[str, str], program: Any) -> None:
    """Keeps a program, or says why that is not possible: it runs all the same."""
    try:
        data = pickle.dumps(serialize_executable.serialize(program))
        sha256 = hashlib.sha256(data).hexdigest()
        head = json.dumps(facts | {"program": file.name, "sha256": sha256})
        paths.write_bytes(file, head.encode() + b"\n" + data)
    except Exception as error:  # of a platform that cannot, of a full disk
        log.warning("The program %s is not kept: %s.", file, first_line(error))
