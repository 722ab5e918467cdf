import importlib
import pathlib
import subprocess
import sys

import pytest

import blip3o_jax
from blip3o_jax.moved import MODULES, NAMES

PACKAGE = pathlib.Path(blip3o_jax.__file__).parent


def new_name(path: str):
    """The module or attribute at a dotted path inside the package."""
    try:
        return importlib.import_module(f"blip3o_jax.{path}")
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(f"blip3o_jax.{module}"), name)


@pytest.mark.parametrize(("old", "new"), MODULES.items())
def test_an_old_module_says_its_new_name(old, new):
    with pytest.raises(ModuleNotFoundError) as error:
        importlib.import_module(f"blip3o_jax.{old}")
    assert str(error.value) == f"blip3o_jax.{old} is now blip3o_jax.{new}."
    assert not (PACKAGE / f"{old.replace('.', '/')}.py").exists()
    assert new_name(new)


@pytest.mark.parametrize(("path", "new"), NAMES.items())
def test_an_old_attribute_says_its_new_name(path, new):
    module, _, old = path.rpartition(".")
    with pytest.raises(ImportError) as error:
        exec(f"from blip3o_jax.{module} import {old}")
    assert str(error.value) == f"blip3o_jax.{module}.{old} is now blip3o_jax.{new}."
    assert new_name(new)


def test_other_missing_names_are_missed_as_usual():
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'blip3o_jax.nowhere'"):
        importlib.import_module("blip3o_jax.nowhere")
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from blip3o_jax.config import nothing")
    assert not hasattr(blip3o_jax.config, "nothing")


def test_the_public_names_are_there():
    code = "from blip3o_jax import load, __version__; from blip3o_jax.pipeline import Pipeline"
    code += "; print(__version__, callable(load), Pipeline.generate and Pipeline.run and 1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-3:] == [blip3o_jax.__version__, "True", "1"]
