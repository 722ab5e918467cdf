"""BLIP3o-NEXT in JAX: `model = blip3o_jax.load("emoji_64"); images = model.generate(["two red
hearts"], seed=0)`."""

import sys

from blip3o_jax import moved

__version__ = "0.2.0"

sys.meta_path.insert(0, moved.Finder)


def load(name: str = "emoji_64", **options):
    """A model ready to generate; see `blip3o_jax.pipeline.load` for the options."""
    from blip3o_jax.pipeline import load as load_pipeline

    return load_pipeline(name, **options)
