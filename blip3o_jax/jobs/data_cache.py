"""`blip3o-jax data cache`: encodes a mixture, a shard at a time; shards that exist stay."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import time
from typing import TYPE_CHECKING

from blip3o_jax.errors import require
from blip3o_jax.jobs.options import config_option

if TYPE_CHECKING:
    import numpy as np

    from blip3o_jax.train.config import TrainConfig

HELP = (
    "codes and latents of a mixture, for training without image encoders; resumes where it stopped"
)

log = logging.getLogger(__name__)


def options(parser: argparse.ArgumentParser) -> None:
    config_option(parser)
    parser.add_argument("--out", required=True, help="folder of the cache, for data.cache")
    dtypes, text = ["float32", "bfloat16"], "how latents are stored (default: %(default)s)"
    parser.add_argument("--latents", default="float32", choices=dtypes, help=text)
    text = "records of a file (default: %(default)s)"
    parser.add_argument("--shard-records", type=int, default=4096, help=text)
    text = "images encoded at once on a host (default: %(default)s)"
    parser.add_argument("--batch-size", type=int, default=32, help=text)
    parser.set_defaults(run=run)


def read_mixture(args: argparse.Namespace, otherwise: str, *overrides: str) -> TrainConfig:
    """The config of a run that names sources; InputError, ending `otherwise`, if it names none."""
    from blip3o_jax.train.read_config import read_config

    cfg = read_config(args.config, [*args.overrides, *overrides])
    require(bool(cfg.data.sources), f"{args.config} names no data.sources, {otherwise}.")
    return cfg


def make_encoder(cfg: TrainConfig, params: dict, batch_size: int, dtype: np.dtype):
    """list of image arrays -> (codes int32 [b,n], latents [b,Y,X,C] of `dtype`), `batch_size`
    images at a time over this host's devices."""
    import jax
    import numpy as np

    from blip3o_jax.kernels.platform import jit
    from blip3o_jax.parallel.mesh import BATCH, make_mesh
    from blip3o_jax.sample import generate
    from blip3o_jax.train import losses
    from blip3o_jax.train.start import build_model

    mesh = make_mesh(devices=jax.local_devices())
    devices = f"the {mesh.size} devices of this host"
    divides = batch_size % mesh.size == 0
    require(divides, f"--batch-size {batch_size} is not divisible by {devices}.")
    # The encoders on every device, images divided among them.
    model, place = build_model(cfg), jax.NamedSharding(mesh, BATCH)
    params = jax.device_put(params, jax.NamedSharding(mesh, jax.sharding.PartitionSpec()))

    @jit
    def encode(params, batch):
        codes = losses.encode_codes(model, params, batch)
        return codes, generate.encode_latents(model, params, batch["images"])

    def run_batch(images: list[dict]) -> tuple[np.ndarray, np.ndarray]:
        padded = images + [images[-1]] * (batch_size - len(images))
        batch = {name: np.stack([image[name] for image in padded]) for name in images[0]}
        # From the mesh the model knows how the batch is sharded.
        with jax.set_mesh(mesh):
            codes, latents = jax.device_get(encode(params, jax.device_put(batch, place)))
        codes, latents = codes.astype(np.int32), latents.astype(dtype)
        return codes[: len(images)], latents[: len(images)]

    def run(images: list[dict]) -> tuple[np.ndarray, np.ndarray]:
        starts = range(0, len(images), batch_size)
        batches = [run_batch(images[start : start + batch_size]) for start in starts]
        codes, latents = map(np.concatenate, zip(*batches, strict=True))
        return codes, latents

    return run


def run(args) -> None:
    """Writes the shards that are missing, those of this host; prints one JSON line."""
    import jax
    import jax.numpy as jnp

    from blip3o_jax import checkpoints, paths
    from blip3o_jax.data import cache
    from blip3o_jax.data.feed import open_sources
    from blip3o_jax.data.transform import Tally, image_arrays
    from blip3o_jax.kernels.platform import enable_compilation_cache
    from blip3o_jax.parallel.processes import barrier, start_processes
    from blip3o_jax.train.config import CACHE_WITHOUT_FEATURES
    from blip3o_jax.train.start import encoder_params

    for name in ("shard_records", "batch_size"):
        number = getattr(args, name)
        require(number >= 1, f"--{name.replace('_', '-')} is at least 1, not {number}.")
    cfg = read_mixture(args, "so there is nothing to cache", "--config.data.cache=")
    unread = f"Stage {cfg.stage!r} trains the encoders that fill a cache, and reads none;"
    require("cache" in cfg.record.data, f"{unread} name the config of a joint run.")
    require(not cfg.blip3o().use_tar_siglip_features, CACHE_WITHOUT_FEATURES)
    for directory in cfg.init.values():
        checkpoints.find(directory)
    # The folder, with what its records depend on.
    start_processes()
    sources = open_sources(cfg.data, cfg.blip3o())
    params = encoder_params(cfg, checkpoints.load_part)
    entries = [cache.source_entry(*pair) for pair in zip(cfg.data.sources, sources, strict=True)]
    description = cache.describe(cfg.blip3o(), cfg.data, params)
    description |= {"latents": args.latents, "shard_records": args.shard_records}
    folder, host, hosts = paths.path(args.out), jax.process_index(), jax.process_count()
    encode = make_encoder(cfg, params, args.batch_size, jnp.dtype(args.latents))
    cache.begin(folder, description | {"sources": entries})
    enable_compilation_cache()
    # This host's shards that are missing.
    shards = cache.shards([len(source) for source in sources], args.shard_records)
    missing = [shard for shard in shards[host::hosts] if not (folder / shard.name).exists()]
    log.info("%d of %d shards to make on host %d of %d.", len(missing), len(shards), host, hosts)
    tally = Tally(cfg.data.max_bad_fraction, folder / f"bad_records.{host}.jsonl")
    start = time.perf_counter()
    how = {"crop": cfg.data.crop, "limits": cfg.data.limits}
    decode = functools.partial(image_arrays, model=cfg.blip3o(), **how)
    for done, shard in enumerate(missing, 1):
        own = sources[shard.source], shard.numbers
        records = cache.encoded_records(*own, decode, encode, tally, args.batch_size)
        cache.write_shard(folder / shard.name, records)
        seconds = time.perf_counter() - start
        rate, eta = tally.counts["read"] / seconds, seconds / done * (len(missing) - done) / 60
        progress = f"{done}/{len(missing)} {shard.name}"
        log.info("shard %s, %.1f records/s, eta %.0f min", progress, rate, eta)
    # A process that left before the others would end them.
    barrier("the end of the cache", timeout=86_400)
    size = sum(file.stat().st_size for file in folder.glob("*.array_record"))
    report = {"cache": str(folder), "shards": len(shards), "made": len(missing), "bytes": size}
    print(json.dumps(report | {name: tally.counts[name] for name in ("read", "bad")}))
