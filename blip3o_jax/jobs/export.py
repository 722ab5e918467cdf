"""`blip3o-jax export`: a training run's weights in the published PyTorch layout."""

import json
import pathlib

from blip3o_jax import checkpoint
from blip3o_jax.config import ConfigError
from blip3o_jax.convert import published
from blip3o_jax.pipeline import find_checkpoint, tokenizer_of
from blip3o_jax.train.config import TrainConfig, from_dict


def run(source: str, destination: str, dtype: str, overwrite: bool) -> None:
    """Writes DIR and prints one JSON line: files, parameters, step."""
    folder = find_checkpoint(source)
    if not checkpoint.is_workdir(folder):
        raise ConfigError(f"{source} is not a training run; it is in the published layout already.")
    saved, params = checkpoint.load_run(folder)
    run_config = from_dict(TrainConfig, saved)
    if run_config.stage != "joint":
        raise ConfigError(f"{source} is a run of stage {run_config.stage!r}; only a 'joint' run holds the whole model.")
    config = run_config.blip3o()
    published.save_published(destination, config, params, tokenizer_file=tokenizer_of(config.name), dtype=dtype, overwrite=overwrite)
    size = sum(file.stat().st_size for file in pathlib.Path(destination).iterdir())
    print(json.dumps({"checkpoint": destination, "preset": config.name, "dtype": dtype, "bytes": size}))
