"""Batches of a run: of the embedded world, or of a mixture of sources.

What is in batch s is a pure function of (seed, s).
"""

import dataclasses
import functools
import pathlib

import grain
import jax
import numpy as np

from blip3o_jax import text as texts
from blip3o_jax.data.cache import open_cached
from blip3o_jax.data.mixture import HeldOut, HostRows, Mixture, whole_weights
from blip3o_jax.data.sources import first_record, open_source
from blip3o_jax.data.transform import Rows, Tally
from blip3o_jax.errors import InputError, multiples
from blip3o_jax.scenes import builder
from blip3o_jax.scenes.exercises import exercise
from blip3o_jax.scenes.prompts import WEIGHTS
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.training_checkpoint import why_unwritten

UNSEEN_SEED = 1 << 32  # of the exercises that a run is measured by; no run's own seed


def _image_record(record) -> dict[str, np.ndarray]:
    return {"images": record["image"], "patches": record["patches"].astype(np.int32)}


def _text_record(
    tokenizer: texts.Text, num_tokens: int, length: int, record
) -> dict[str, np.ndarray]:
    """The image and its token row; the image's codes are made on the device and written there."""
    prompt = tokenizer.encode_prompt(record["prompt"].decode())
    tokens, start = tokenizer.training_rows([prompt], np.zeros((1, num_tokens), np.int32), length)
    return {"images": record["image"], "tokens": tokens[0], "start": start[0]}


def row_length(cfg: TrainConfig, tokenizer: texts.Text) -> int:
    """Tokens of a training row: prompt, image and its end."""
    return cfg.data.row_length or tokenizer.max_prompt_tokens + cfg.blip3o().ta_tok.num_tokens + 3


def exercises(cfg: TrainConfig, tokenizer: texts.Text, seed: int) -> grain.MapDataset:
    """Rows of the practice stage, made on demand; prompts may be as long as a row."""
    long = dataclasses.replace(tokenizer, max_prompt_tokens=cfg.data.row_length)
    return grain.MapDataset.range(np.iinfo(np.int32).max).map(
        functools.partial(exercise, long, cfg.data, seed)
    )


def dataset(
    cfg: TrainConfig, data_dir: str, split: str, tokenizer: texts.Text | None
) -> grain.MapDataset:
    """Records of a split of `emoji_scenes`, transformed for the stage; without shuffling or
    batching."""
    data = cfg.data
    world = builder.EmojiScenesConfig(
        train=data.num_train,
        seed=data.seed,
        text=data.text_fraction,
        weights=data.weights or WEIGHTS,
        extra=data.extra,
        named_ground=data.named_ground,
    )
    try:
        source = builder.open_source(data_dir, split, world)
    except (OSError, RuntimeError) as error:
        if not (reason := why_unwritten(error)):
            raise
        raise InputError(
            f"The scenes cannot be drawn into {data_dir}: {reason}; name another data.data_dir."
        ) from error
    if tokenizer is None:
        return grain.MapDataset.source(source).map(_image_record)
    num_tokens, length = cfg.blip3o().ta_tok.num_tokens, row_length(cfg, tokenizer)
    return grain.MapDataset.source(source).map(
        functools.partial(_text_record, tokenizer, num_tokens, length)
    )


def open_sources(cfg: TrainConfig) -> list:
    """The mixture's sources, from their cache where the run names one; InputError for what is
    missing, empty or an edit, or too small."""
    opener = functools.partial(open_cached, cfg.data.cache) if cfg.data.cache else open_source
    sources = [opener(spec) for spec in cfg.data.sources]
    for spec, source in zip(cfg.data.sources, sources, strict=True):
        if not cfg.data.cache and first_record(source).inputs:
            raise InputError(
                f"data.sources: {spec.path!r} holds edits, which can be checked but not "
                "yet trained on; leave it out."
            )
    if sources:
        HeldOut(sources[0], cfg.data.heldout, kept=True)
    return sources


def _rows(cfg: TrainConfig, tokenizer: texts.Text, tally: Tally, source) -> Rows:
    model, data = cfg.blip3o(), cfg.data
    sizes = model.image_size, model.ta_tok.encoder.image_size
    length = row_length(cfg, tokenizer)
    if length < tokenizer.max_prompt_tokens + model.ta_tok.num_tokens + 3:
        raise InputError(
            f"data.row_length {length} does not hold a prompt of "
            f"{tokenizer.max_prompt_tokens} tokens and its image; 0 finds the length."
        )
    return Rows(
        source,
        tokenizer,
        model.ta_tok.num_tokens,
        length,
        sizes,
        data.crop,
        data.long_captions,
        tally,
    )


def mixture(cfg: TrainConfig, sources: list, tokenizer: texts.Text, tally: Tally) -> Mixture:
    """The endless training rows of opened sources; the first without its held-out records."""
    data = cfg.data
    first, *others = sources
    trained = [HeldOut(first, data.heldout, kept=False), *others]
    weights = [s.weight for s in data.sources]
    if not any(weights):
        weights = [s.repeat * len(source) for s, source in zip(data.sources, trained, strict=True)]
    readers = [_rows(cfg, tokenizer, tally, source) for source in trained]
    return Mixture(
        readers,
        [len(s) for s in trained],
        [s.blocks for s in trained],
        whole_weights(weights),
        cfg.seed,
    )


def tally_of(cfg: TrainConfig, workdir=None) -> Tally:
    """An account that names bad records under the workdir, if there is one, in a file of this
    host's."""
    return Tally(
        cfg.data.max_bad_fraction,
        workdir and pathlib.Path(workdir) / f"bad_records.{jax.process_index()}.jsonl",
    )


def train_batches(
    cfg: TrainConfig,
    data_dir: str,
    tokenizer: texts.Text | None,
    start: int = 0,
    sources=None,
    tally=None,
    hosts: tuple[int, int] = (0, 1),
):
    """Endless iterator of this host's rows of batch `start`, `start + 1`, ...: shuffled anew every
    epoch.

    `hosts` (i, n) are those of `mesh.batch_hosts`: this one reads the i-th of n equal runs of a
    batch's rows, which together are the batch of a single host. `sources` are those of
    `open_sources`, if opened before; `tally`, as of `tally_of`, counts what is read of them.
    InputError, while iterating too, when the data are not fit to train on.
    """
    host, count = hosts
    if cfg.batch_size % count:
        raise InputError(
            f"batch_size {cfg.batch_size} does not divide by {count} hosts; "
            f"{multiples(cfg.batch_size, count)}"
        )
    if cfg.data.sources:
        records = mixture(cfg, sources or open_sources(cfg), tokenizer, tally or tally_of(cfg))
    elif cfg.stage == "practice":
        records = exercises(cfg, tokenizer, cfg.seed)
    else:
        records = dataset(cfg, data_dir, "train", tokenizer).seed(cfg.seed).shuffle().repeat()
    rows = HostRows(records, cfg.batch_size, host, count)
    batches = grain.MapDataset.source(rows).batch(cfg.batch_size // count)
    options = grain.ReadOptions(num_threads=cfg.data.reader_threads, prefetch_buffer_size=4)
    iterator = iter(batches.to_iter_dataset(options))
    iterator.set_state({"next_index": start})
    return iterator


def heldout_batch(
    cfg: TrainConfig,
    data_dir: str,
    tokenizer: texts.Text | None,
    count: int,
    sources=None,
    tally=None,
) -> dict[str, np.ndarray]:
    """The first `count` records that are held out; of a mixture at most `data.heldout`.

    Otherwise as `train_batches`.
    """
    if cfg.stage == "practice":
        return next(iter(exercises(cfg, tokenizer, UNSEEN_SEED)[:count].batch(count)))
    if not cfg.data.sources:
        return next(iter(dataset(cfg, data_dir, "heldout", tokenizer)[:count].batch(count)))
    source = HeldOut((sources or open_sources(cfg))[0], cfg.data.heldout, kept=True)
    row = _rows(cfg, tokenizer, tally or tally_of(cfg), source)
    rows = [row(i) for i in range(min(count, len(source)))]
    return {name: np.stack([r[name] for r in rows]) for name in rows[0]}
