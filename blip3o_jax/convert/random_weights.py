"""Random checkpoints to measure and compare: no bias or scale trivial, ordinary activations."""

from pathlib import Path

import numpy as np

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.convert.published import published_rules, save_published
from blip3o_jax.convert.rules import to_jax, torch_shapes
from blip3o_jax.models.blip3o import Blip3o

TABLES = ("scale_shift_table", "position_embedding", "embed_tokens", "regularizer.embedding.")


def random_params(cfg: Blip3oConfig, seed: int = 0) -> dict:
    """A model's parameters, drawn in the order of the published names."""
    abstract, rules = Blip3o(cfg).abstract(), published_rules(cfg)
    rng, tensors = np.random.default_rng(seed), {}
    for name, shape in torch_shapes(rules, abstract).items():
        # Tables small, matrices by fan-in, scales around 1, biases not zero.
        values = rng.standard_normal(shape, np.float32)
        if any(table in name for table in TABLES):
            values *= 0.5
        elif len(shape) > 1:
            values *= np.float32(np.prod(shape[1:]) ** -0.5)
        elif name.endswith("weight"):
            values = 1 + np.float32(0.3) * values
        else:
            values *= 0.3
        tensors[name] = values
    return to_jax(rules, tensors, abstract)


def random_checkpoint(folder: Path, cfg: Blip3oConfig, seed: int = 0) -> dict:
    """Writes a float32 checkpoint in the published layout; returns its parameters."""
    params = random_params(cfg, seed)
    save_published(folder, cfg, params)
    return params
