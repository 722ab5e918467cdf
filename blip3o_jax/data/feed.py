"""Batches of a run, from the embedded world or from a mixture of sources.

What is in batch s is a pure function of (seed, s).
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator

import grain
import numpy as np

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.data.cache import open_cached
from blip3o_jax.data.config import DataConfig
from blip3o_jax.data.mixture import HeldOut, HostRows, Mixture, whole_weights
from blip3o_jax.data.records import Source
from blip3o_jax.data.sources import first_record, open_source
from blip3o_jax.data.transform import Rows, Tally, token_row
from blip3o_jax.errors import InputError, disk_reason, multiples
from blip3o_jax.scenes import builder
from blip3o_jax.scenes.config import WorldConfig
from blip3o_jax.scenes.exercises import exercise
from blip3o_jax.text import Text, row_length

ROWS = ("patches", "captions", "exercises")
HELDOUT_SEED = 1 << 32  # of the exercises that a run is measured by; no run's own seed


def open_sources(data: DataConfig) -> list[Source]:
    """The mixture's sources, from their cache where one is named.

    InputError for one that is missing, empty, too small or of edits.
    """
    opener = functools.partial(open_cached, data.cache) if data.cache else open_source
    sources = [opener(spec) for spec in data.sources]
    for spec, source in zip(data.sources, sources, strict=True):
        if not data.cache and first_record(source).inputs:
            raise InputError(
                f"data.sources: {spec.path!r} holds edits, which can be checked but not "
                "yet trained on; leave it out."
            )
    if sources:
        HeldOut(sources[0], data.heldout)  # raises where the first is too small
    return sources


def world_rows(
    world: WorldConfig, data_dir: str, split: str, row: Callable[[dict], dict]
) -> grain.MapDataset:
    """`row(record)` of a split of the embedded world, in its order; drawn first where `data_dir`
    does not hold it."""
    try:
        source = builder.open_source(data_dir, split, world)
    except (OSError, RuntimeError) as error:
        if not (reason := disk_reason(error)):
            raise
        raise InputError(
            f"The scenes cannot be drawn into {data_dir}: {reason}; name another data.data_dir."
        ) from error
    return grain.MapDataset.source(source).map(row)


@dataclasses.dataclass
class Feed:
    """A run's batches as numpy arrays, opened once and read from any step.

    `rows` says what a batch holds:

    - "patches": `images` uint8 [B,H,W,3] and `patches` int32 [B,h,w] of the embedded world;
    - "captions": `tokens` int32 [B,T] with the image's codes open, `start` int32 [B], and `images`
      (with crop "original" also `view`) or, from a cache, `codes` and `latents`;
    - "exercises": `tokens` and `positions` int32 [B,T], `weights` f32 [B,T].

    `hosts` (i, n) are those of `parallel.batches.batch_hosts`: this one reads the i-th of n equal
    runs of a batch's rows, which together are the batch of a single host. The embedded world is
    written to `data_dir` when it is first read; bad records of sources are named in the file
    `bad_records`. InputError, while iterating too, when the data are not fit to train on.
    """

    data: DataConfig
    model: Blip3oConfig
    rows: str
    tokenizer: Text | None = None
    batch_size: int = 16
    seed: int = 0
    hosts: tuple[int, int] = (0, 1)
    data_dir: str = ""
    bad_records: pathlib.Path | None = None

    def __post_init__(self):
        if self.rows not in ROWS or (self.rows != "patches" and self.tokenizer is None):
            raise ValueError(f"rows {self.rows!r} of {ROWS}, tokenizer {self.tokenizer}")
        size, hosts = self.batch_size, self.hosts[1]
        if size % hosts:
            near = multiples(size, hosts)
            raise InputError(f"batch_size {size} is not divisible by {hosts} hosts; {near}")

        # The sources, whose captions may be as long as the model allows.
        longest = row_length(self.model)
        self.length = self.data.row_length or longest
        self.tally = Tally(self.data.max_bad_fraction, self.bad_records)
        self.sources = open_sources(self.data)
        if self.sources and self.length < longest:
            raise InputError(
                f"data.row_length {self.length} does not hold a prompt of "
                f"{self.model.max_prompt_tokens} tokens and its image; 0 finds the length."
            )

    def train(self, step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """This host's rows of batch `step`, `step + 1`, ... without end, in a new order every
        epoch."""
        if self.rows == "exercises":
            records = self._exercises(self.seed)
        elif self.sources:
            records = self._mixture()
        else:
            records = self._world("train").seed(self.seed).shuffle().repeat()

        # This host's part of each batch, read ahead by threads.
        host_rows = HostRows(records, self.batch_size, *self.hosts)
        batches = grain.MapDataset.source(host_rows).batch(self.batch_size // self.hosts[1])
        threads = self.data.reader_threads
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4)
        iterator = iter(batches.to_iter_dataset(options))
        iterator.set_state({"next_index": step})
        return iterator

    def heldout(self, count: int) -> dict[str, np.ndarray]:
        """The first `count` rows that are never trained on, the same on every host; of a mixture at
        most `data.heldout`."""
        if self.sources and self.rows == "captions":
            source = HeldOut(self.sources[0], self.data.heldout)
            read = self._reader(source)
            rows = [read(i) for i in range(min(count, len(source)))]
            return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        exercises = self.rows == "exercises"
        records = self._exercises(HELDOUT_SEED) if exercises else self._world("heldout")
        return next(iter(records[:count].batch(count)))

    def _world(self, split: str) -> grain.MapDataset:
        row = self._patches_row if self.rows == "patches" else self._caption_row
        return world_rows(self.data.world, self.data_dir, split, row)

    def _patches_row(self, record: dict) -> dict[str, np.ndarray]:
        return {"images": record["image"], "patches": record["patches"].astype(np.int32)}

    def _caption_row(self, record: dict) -> dict[str, np.ndarray]:
        caption, num_tokens = record["prompt"].decode(), self.model.ta_tok.num_tokens
        row = token_row(self.tokenizer, caption, num_tokens, self.length)
        return {"images": record["image"], **row}

    def _exercises(self, seed: int) -> grain.MapDataset:
        """Rows made on demand, of scenes without written words; prompts may be as long as a row."""
        text = dataclasses.replace(self.tokenizer, max_prompt_tokens=self.data.row_length)
        world = dataclasses.replace(self.data.world, seed=seed, text=0.0)
        make = functools.partial(exercise, text, world, self.data.exercises, self.data.row_length)
        return grain.MapDataset.range(np.iinfo(np.int32).max).map(make)

    def _reader(self, source: Source) -> Rows:
        return Rows(source, self.tokenizer, self.model, self.data, self.length, self.tally)

    def _mixture(self) -> Mixture:
        """Endless rows of all sources; of the first without its held-out records."""
        first, *others = self.sources
        trained = [HeldOut(first, self.data.heldout, rest=True), *others]
        weights = [spec.weight for spec in self.data.sources]
        if not any(weights):
            repeats = [spec.repeat for spec in self.data.sources]
            weights = [n * len(source) for n, source in zip(repeats, trained, strict=True)]
        readers = [self._reader(source) for source in trained]
        return Mixture(readers, trained, whole_weights(weights), self.seed)
