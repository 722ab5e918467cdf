"""`blip3o-jax data cache`: the tokenizer and the autoencoder over a mixture, a shard at a time;
what is there already stays."""

from __future__ import annotations

import argparse
import json
import logging
import pathlib
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from blip3o_jax.errors import InputError
from blip3o_jax.jobs.options import config_option
from blip3o_jax.train.config import TrainConfig

if TYPE_CHECKING:
    import numpy as np

    from blip3o_jax.data.transform import Tally

HELP = (
    "codes and latents of a mixture, for training without image encoders; resumes where it stopped"
)

log = logging.getLogger(__name__)


def options(parser: argparse.ArgumentParser) -> None:
    config_option(parser)
    parser.add_argument("--out", required=True, help="folder of the cache, for data.cache")
    parser.add_argument(
        "--latents",
        default="float32",
        choices=["float32", "bfloat16"],
        help="how latents are stored (default: %(default)s)",
    )
    parser.add_argument(
        "--shard-records", type=int, default=4096, help="records of a file (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=32,
        help="images encoded at once on a host (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def make_encoder(cfg: TrainConfig, params: dict, batch_size: int):
    """list of image arrays -> (codes int32 [b,n], latents f32 [b,Y,X,C]), `batch_size` images at a
    time over this host's devices."""
    import jax
    import numpy as np

    from blip3o_jax.kernels.platform import jit
    from blip3o_jax.parallel.mesh import BATCH, make_mesh
    from blip3o_jax.train import losses
    from blip3o_jax.train.loop import build_model

    mesh = make_mesh(devices=jax.local_devices())
    if batch_size % mesh.size:
        raise InputError(
            f"--batch-size {batch_size} does not divide by the {mesh.size} devices of this host."
        )
    model, place = build_model(cfg), jax.NamedSharding(mesh, BATCH)
    params = jax.device_put(params, jax.NamedSharding(mesh, jax.sharding.PartitionSpec()))

    @jit
    def encode(params, batch):
        return losses.encode_codes(model, params, batch), losses.encode_latents(
            model, params, batch["images"]
        )

    def run(images: list[dict]) -> tuple[np.ndarray, np.ndarray]:
        padded = images + [images[-1]] * (batch_size - len(images))
        batch = {name: np.stack([image[name] for image in padded]) for name in images[0]}
        codes, latents = jax.device_get(encode(params, jax.device_put(batch, place)))
        return codes[: len(images)], latents[: len(images)]

    return run


def shard_records(source, numbers, decode, encode, tally: Tally, dtype, batch_size: int):
    """The cached records of some record numbers, in order: encoded, or with the reason why not."""
    import numpy as np

    from blip3o_jax.data.records import RecordError

    def load(number):
        tally.add(read=1)
        try:
            record = source[number]
            return record.key, record.caption, decode(record)
        except RecordError as error:
            tally.bad(source.key(number), str(error))
            return source.key(number), None, str(error)

    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(numbers), batch_size):
            loaded = list(pool.map(load, numbers[start : start + batch_size]))
            good = [arrays for _, caption, arrays in loaded if caption is not None]
            made = iter(zip(*encode(good), strict=True)) if good else iter(())
            for key, caption, arrays in loaded:
                if caption is None:
                    yield {"key": key, "error": arrays}
                    continue
                codes, latents = next(made)
                yield {
                    "key": key,
                    "caption": caption,
                    "codes": codes.astype(np.int32),
                    "latents": latents.astype(dtype),
                }


def begin(folder: pathlib.Path, description: dict) -> None:
    """Makes the folder and writes its description; InputError when it holds another cache or
    something else."""
    import jax

    from blip3o_jax.data import cache

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "cache.json").exists():
            if others := sorted(
                p.name for p in folder.iterdir() if not p.name.startswith((".", "bad_records"))
            ):
                raise InputError(
                    f"{folder} holds {others[0]} and no cache.json; name another folder."
                )
            temporary = folder / f".cache.json.{jax.process_index()}"
            temporary.write_text(json.dumps(description, indent=1) + "\n")
            temporary.replace(folder / "cache.json")
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}.") from error
    there = cache.read_description(str(folder))
    if there != description:
        differs = cache.difference(there, description) or "other fields"
        raise InputError(
            f"{folder} holds a cache with other settings ({differs}); name another folder."
        )


def run(args) -> None:
    """Writes the shards that are missing; several hosts share them by number.

    Prints one JSON line.
    """
    import jax
    import jax.numpy as jnp

    from blip3o_jax import checkpoints
    from blip3o_jax.data import cache
    from blip3o_jax.data.feed import open_sources
    from blip3o_jax.data.transform import Tally, image_arrays
    from blip3o_jax.jobs.train import read_config
    from blip3o_jax.kernels.platform import enable_compilation_cache
    from blip3o_jax.parallel.processes import barrier, start_processes
    from blip3o_jax.train.start import encoder_params

    cfg = read_config(args.config, [*args.overrides, "--config.data.cache="])
    for name in ("shard_records", "batch_size"):
        if getattr(args, name) < 1:
            raise InputError(
                f"--{name.replace('_', '-')} is at least 1, not {getattr(args, name)}."
            )
    if not cfg.data.sources:
        raise InputError(f"{args.config} names no data.sources, so there is nothing to cache.")
    for directory in cfg.init.values():
        checkpoints.find(directory)
    start_processes()
    sources = open_sources(cfg.data)
    params = encoder_params(cfg, checkpoints.load_part)
    description = cache.describe(cfg.blip3o(), cfg.data.crop, params) | {
        "latents": args.latents,
        "shard_records": args.shard_records,
        "sources": [
            cache.source_entry(spec, source)
            for spec, source in zip(cfg.data.sources, sources, strict=True)
        ],
    }
    folder, host, hosts = pathlib.Path(args.out), jax.process_index(), jax.process_count()
    encode = make_encoder(cfg, params, args.batch_size)
    begin(folder, description)
    enable_compilation_cache()
    model = cfg.blip3o()
    sizes = model.image_size, model.ta_tok.encoder.image_size
    names = [
        (s, k, name)
        for s, source in enumerate(sources)
        for k, name in enumerate(cache.shard_names(s, len(source), args.shard_records))
    ]
    todo = [item for item in names[host::hosts] if not (folder / item[2]).exists()]
    log.info("%d of %d shards are to be made on host %d of %d.", len(todo), len(names), host, hosts)
    tally = Tally(cfg.data.max_bad_fraction, folder / f"bad_records.{host}.jsonl")
    dtype, began = jnp.dtype(args.latents), time.perf_counter()
    for done, (s, k, name) in enumerate(todo, 1):
        numbers = range(k * args.shard_records, min(len(sources[s]), (k + 1) * args.shard_records))

        def decode(record):
            return image_arrays(record, sizes, cfg.data.crop)

        cache.write_shard(
            folder / name,
            shard_records(sources[s], numbers, decode, encode, tally, dtype, args.batch_size),
        )
        rate = tally.counts["read"] / (time.perf_counter() - began)
        eta = (time.perf_counter() - began) / done * (len(todo) - done) / 60
        log.info("shard %d/%d %s, %.1f records/s, eta %.0f min", done, len(todo), name, rate, eta)
    # a process that left earlier would take the others along
    barrier("the end of the cache", timeout=86_400)
    size = sum(file.stat().st_size for file in folder.glob("*.array_record"))
    report = {"cache": str(folder), "shards": len(names), "made": len(todo), "bytes": size}
    print(json.dumps(report | {name: tally.counts[name] for name in ("read", "bad")}))
