"""The embedded world as batches: TFDS records read at random by Grain. What is in batch s is a pure function of (seed, s)."""

import functools

import grain
import jax
import numpy as np

from blip3o_jax import text as texts
from blip3o_jax.config import ConfigError
from blip3o_jax.scenes import builder
from blip3o_jax.scenes.prompts import WEIGHTS
from blip3o_jax.scenes.scene import SKETCH_WORDS
from blip3o_jax.train.config import TrainConfig


def _image_record(record) -> dict[str, np.ndarray]:
    return {"images": record["image"], "patches": record["patches"].astype(np.int32)}


def _text_record(tokenizer: texts.Text, num_tokens: int, length: int, sketch_length: int, record) -> dict[str, np.ndarray]:
    """The image and its token row; the image's codes are made on the device and written there."""
    prompt = tokenizer.encode_prompt(record["prompt"].decode())
    tokens, start = tokenizer.training_rows([prompt], np.zeros((1, num_tokens), np.int32), length)
    made = {"images": record["image"], "tokens": tokens[0], "start": start[0]}
    if sketch_length:
        kept = np.arange(length) <= start[0]
        kept[start[0] + 1 : start[0] + 1 + num_tokens] = SKETCH_WORDS[record["patches"].ravel()]
        if kept.sum() > sketch_length:
            raise ConfigError(f"A sketch of {kept.sum()} tokens does not fit data.sketch_length {sketch_length}.")
        # Columns to keep, in order, then some other one, which is marked by its sign.
        columns = np.argsort(~kept, kind="stable")[:sketch_length]
        made["columns"] = np.where(kept[columns], columns, -1).astype(np.int32)
    return made


def dataset(cfg: TrainConfig, data_dir: str, split: str, tokenizer: texts.Text | None) -> grain.MapDataset:
    """Records of a split of `emoji_scenes`, transformed for the stage; without shuffling or batching."""
    data = cfg.data
    world = builder.EmojiScenesConfig(
        train=data.num_train,
        seed=data.seed,
        text=data.text_fraction,
        weights=data.weights or WEIGHTS,
        extra=data.extra,
        named_ground=data.named_ground,
    )
    source = builder.open_source(data_dir, split, world)
    if tokenizer is None:
        return grain.MapDataset.source(source).map(_image_record)
    num_tokens = cfg.blip3o().ta_tok.num_tokens
    length = cfg.data.row_length or tokenizer.max_prompt_tokens + num_tokens + 3
    return grain.MapDataset.source(source).map(functools.partial(_text_record, tokenizer, num_tokens, length, data.sketch_length))


def train_batches(cfg: TrainConfig, data_dir: str, tokenizer: texts.Text | None, start: int = 0):
    """Endless iterator of this host's part of batch `start`, `start + 1`, ...: shuffled anew every epoch."""
    records = dataset(cfg, data_dir, "train", tokenizer).seed(cfg.seed).shuffle().repeat()
    host, hosts = jax.process_index(), jax.process_count()
    batches = records[host::hosts].batch(cfg.batch_size // hosts)
    options = grain.ReadOptions(num_threads=cfg.data.reader_threads, prefetch_buffer_size=4)
    iterator = iter(batches.to_iter_dataset(options))
    iterator.set_state({"next_index": start})
    return iterator


def heldout_batch(cfg: TrainConfig, data_dir: str, tokenizer: texts.Text | None, count: int) -> dict[str, np.ndarray]:
    """The first `count` records of the held-out split."""
    return next(iter(dataset(cfg, data_dir, "heldout", tokenizer)[:count].batch(count)))
