"""The first picture of a fresh process: with nothing compiled, and with its programs on disk."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from blip3o_jax.errors import InputError

PROMPT = "two red hearts"


def sides(checkpoint: str, folder: Path) -> dict[str, Callable[[], dict]]:
    """{"ours": what starts a process that finds what the one before compiled, "cold": one that
    finds nothing}; each gives the picture that `generate` makes by its defaults. Compiled programs
    and pictures go into `folder`."""
    numbers = itertools.count()

    def start(cache: str) -> dict:
        out = folder / "picture.png"
        words = ["generate", PROMPT, "--checkpoint", checkpoint, "--out", str(out), "--overwrite"]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / cache)}
        command = [sys.executable, "-m", "blip3o_jax", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"generate ended with {done.returncode}: {done.stderr.strip()}")
        return {"pixels": np.asarray(Image.open(out), np.float32)}

    return {"ours": lambda: start("kept"), "cold": lambda: start(f"cold-{next(numbers)}")}
