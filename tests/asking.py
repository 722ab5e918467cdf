"""A job of eight prompts by the command, and what it gives."""

import json
import pathlib

from editing import FLAGS

from blip3o_jax.cli import main

PROMPTS = ["a cat", "two red hearts", "a blue fish left of a green tree on pink", "a moon"]
PROMPTS += [f"{n} hearts on {ground}" for n in ("two", "three") for ground in ("pink", "gray")]


def generate(channels, *more, out="made"):
    argv = ["generate", "--prompts", "prompts.jsonl", "--checkpoint", channels, *FLAGS]
    return main([*argv, "--out", out, *more])


def files(folder="made"):
    """All that the user gets: the pictures and the manifest."""
    paths = pathlib.Path(folder).glob("*.*")
    return {path.name: path.read_bytes() for path in paths}


def manifest(folder="made"):
    return [json.loads(line) for line in (pathlib.Path(folder) / "manifest.jsonl").open()]
