"""Files that travel with the package: the embedded checkpoint's folder, and the configs.

`blip3o_jax/configs` is a link to the clone's top-level `configs/`; a wheel holds real files there.
So one path serves the clone, the editable install and the wheel.
"""

import os
from pathlib import Path

from blip3o_jax import paths
from blip3o_jax.errors import nearest, require
from blip3o_jax.paths import AnyPath

ASSETS = Path(__file__).parent / "assets"
CONFIGS = Path(__file__).parent / "configs"
NO_CONFIGS = ("__init__", "common")


def shipped_configs() -> dict[str, Path]:
    """The configs that travel with the package, by name; common.py is what some of them share."""
    return {file.stem: file for file in sorted(CONFIGS.glob("*.py")) if file.stem not in NO_CONFIGS}


def find_config(name_or_path: str) -> Path:
    """The file at this path, else the shipped config of this name; InputError if there is neither.

    "NAME", "NAME.py" and "configs/NAME.py" are the same.
    """
    path, shipped = Path(name_or_path), shipped_configs()
    if path.is_file():
        return path
    is_name = path.parent in (Path(), Path("configs")) and path.suffix in ("", ".py")
    unknown = f"No config {name_or_path!r}, neither a file nor a shipped name;"
    require(is_name and path.stem in shipped, f"{unknown} {nearest(path.stem, shipped)}")
    return shipped[path.stem]


def find_tokenizer(preset: str, given: str = "") -> AnyPath:
    """The tokenizer.json that a run's config names (`given`), or that travels with its preset."""
    path = paths.path(given) if given else ASSETS / preset / "tokenizer.json"
    missing = f"No tokenizer travels with preset {preset!r}; name one with data.tokenizer."
    if given:
        missing = f"No tokenizer at {given!r}; a checkpoint folder holds it as tokenizer.json."
    require(path.is_file(), missing)
    return path


def cache_folder() -> Path:
    """Where things stay between processes: $XDG_CACHE_HOME/blip3o_jax or ~/.cache/blip3o_jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blip3o_jax"
