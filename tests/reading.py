"""A checkpoint of any kind, read through the one door."""

from blip3o_jax import checkpoints


def load(folder, dtype="float32", shardings=None, parts=None):
    """(config, parameters)."""
    checkpoint = checkpoints.open(folder)
    return checkpoint.config, checkpoint.load(parts, dtype, shardings)
