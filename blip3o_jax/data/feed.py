"""Batches of a run, from the embedded world or a mixture of sources: batch s is a pure function of
(seed, s)."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import grain
import numpy as np

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.data.cache import open_cached
from blip3o_jax.data.captions import draw
from blip3o_jax.data.config import DataConfig
from blip3o_jax.data.mixture import HeldOut, host_rows, interleaved, mixture, whole_weights
from blip3o_jax.data.records import Record, RecordError, Source
from blip3o_jax.data.row_groups import RowGroups
from blip3o_jax.data.sources import first_record, open_source
from blip3o_jax.data.transform import (
    ENCODED,
    Tally,
    fit_caption,
    image_arrays,
    prompt_length,
    with_sources,
)
from blip3o_jax.errors import InputError, disk_reason, require
from blip3o_jax.paths import AnyPath
from blip3o_jax.scenes import builder, edits
from blip3o_jax.scenes.exercises import exercise
from blip3o_jax.scenes.scene import compose
from blip3o_jax.text import Text, row_length

ATTEMPTS = 100  # records in the place of one that cannot be used
ROWS = ("images", "captions", "exercises")
HELDOUT_SEED = 1 << 32  # of the exercises that a run is measured by; no run's own seed


def open_sources(data: DataConfig, model: Blip3oConfig) -> list[Source]:
    """The mixture's sources, from their cache where one is named.

    InputError for one that is missing, empty, too small or of edits that the model cannot take.
    """
    uncached = partial(open_source, groups=RowGroups(data.row_group_mb))
    opener = partial(open_cached, data.cache) if data.cache else uncached
    sources = list(map(opener, data.sources))
    check_sources(data, model, sources)
    return sources


def check_sources(data: DataConfig, model: Blip3oConfig, sources: list[Source]) -> None:
    """InputError when the model cannot take what the sources hold, or the first is too small."""
    for spec, source in zip(data.sources, sources, strict=True):
        count, limit = _num_sources(first_record(source)), model.max_sources
        holds = f"data.sources: {spec.path!r} holds edits of {count} source images"
        require(count <= limit, f"{holds}, and the model takes {limit} (model.max_sources).")
    if sources:
        HeldOut(sources[0], data.heldout)  # raises where the first is too small


def row_tokens(data: DataConfig, model: Blip3oConfig) -> int:
    """Tokens of a training row; InputError for a config that leaves no room in it, or asks for
    edits that the model cannot take."""
    longest, prompt = row_length(model), model.max_prompt_tokens
    length = data.row_length or longest
    too_short = f"does not hold a prompt of {prompt} tokens and its image; 0 finds the length."
    # captions of sources may be as long as the model allows
    require(not data.sources or length >= longest, f"data.row_length {length} {too_short}")
    takes = model.max_sources > 0 or data.edits == 0
    require(takes, "data.edits needs a model that takes some: model.max_sources.")
    return length


def _num_sources(record: Record | dict) -> int:
    """Source images of a Record or of a cache's dict."""
    return len(record.get("source_codes", ()) if isinstance(record, dict) else record.inputs)


@dataclasses.dataclass
class Feed:
    """A run's batches as numpy arrays, opened once and read from any step. Their `rows`:

    - "images": `images` uint8 [B,H,W,3], of the embedded world with `patches` int32 [B,h,w];
    - "captions": `tokens` int32 [B,T] with the image's codes open, `start` int32 [B], and `images`
      (with crop "original" also `view`) or, from a cache, `codes` and `latents`; where some rows
      are edits also `num_sources` int32 [B], and `sources` or, from a cache, `source_codes` and
      `source_latents`, see train.losses;
    - "exercises": `tokens` and `positions` int32 [B,T], `weights` f32 [B,T].

    `own` are the rows of a batch that this process reads (`parallel.batches.rows_of_host`), by
    default all. The embedded world is written to `data_dir` when it is first read; bad
    records of sources are named in the file `bad_records`. InputError, while iterating too, when
    the data are not fit to train on.
    """

    data: DataConfig
    model: Blip3oConfig
    rows: str
    tokenizer: Text | None = None
    batch_size: int = 16
    seed: int = 0
    own: Sequence[int] | None = None
    data_dir: str = ""
    bad_records: AnyPath | None = None

    def __post_init__(self):
        if self.rows not in ROWS or (self.rows != "images" and self.tokenizer is None):
            raise ValueError(f"rows {self.rows!r} of {ROWS}, tokenizer {self.tokenizer}")
        self.length = row_tokens(self.data, self.model)
        self.tally = Tally(self.data.max_bad_fraction, self.bad_records)
        self.sources = open_sources(self.data, self.model)
        takes = self.model.max_sources > 0 and self.rows == "captions"
        self.has_sources = takes and self.data.may_hold_edits

    def train(self, step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """This process's rows of batch `step`, `step + 1`, ... without end, in a new order every
        epoch."""
        if self.rows == "exercises":
            records = self._exercises(self.seed)
        elif self.sources:
            records = self._mixture()
        else:
            records = self._world("train").seed(self.seed).shuffle().repeat()
            if self.data.edits:
                records = interleaved(self._edits("train", self.seed), records, self.data.edits)
        # This process's part of each batch, read ahead by threads.
        own = range(self.batch_size) if self.own is None else self.own
        batches = host_rows(records, self.batch_size, own)
        options = grain.ReadOptions(num_threads=self.data.reader_threads, prefetch_buffer_size=4)
        iterator = iter(batches.to_iter_dataset(options))
        iterator.set_state({"next_index": step})
        return iterator

    def heldout(self, count: int) -> dict[str, np.ndarray]:
        """`count` rows that are never trained on, the same on every host: the first ones; of a
        mixture evenly from its `data.heldout`, at most so many."""
        if self.sources:
            source = HeldOut(self.sources[0], self.data.heldout)
            size = min(count, len(source))
            places = [i * len(source) // size for i in range(size)]
            rows = [self._read(source, 0, i, 0) for i in places]
            return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        exercises = self.rows == "exercises"
        records = self._exercises(HELDOUT_SEED) if exercises else self._world("heldout")
        if self.data.edits:
            records = interleaved(self._edits("heldout", 0), records, self.data.edits)
        return next(iter(records[:count].batch(count)))

    def _world(self, split: str) -> grain.MapDataset:
        """Rows of the embedded world in its order; drawn first where `data_dir` does not hold
        it."""
        try:
            source = builder.open_source(self.data_dir, split, self.data.world)
        except (OSError, RuntimeError) as error:
            if not (reason := disk_reason(error)):
                raise
            full = f"cannot be drawn into {self.data_dir}: {reason}; name another data.data_dir."
            raise InputError(f"The scenes {full}") from error

        def row(record: dict) -> dict[str, np.ndarray]:
            images = {"images": record["image"]}
            if self.rows == "images":
                return images | {"patches": record["patches"].astype(np.int32)}
            row = images | self._tokens(record["prompt"].decode())
            return with_sources(row, self.model) if self.has_sources else row

        return grain.MapDataset.source(source).map(row)

    def _edits(self, split: str, seed: int) -> grain.MapDataset:
        """Rows of the embedded world's edits, made on demand. The inverse of a held-out one would
        start from the held-out combination."""
        world = dataclasses.replace(self.data.world, seed=seed)
        shares = self.data.inverted_edits * (split == "train"), self.data.composed_edits

        def row(index: int) -> dict[str, np.ndarray]:
            edit = edits.draw(world, index, split, *shares)
            images = {"images": compose(edit.after), "sources": compose(edit.before)[None]}
            return with_sources(images | self._tokens(edit.instruction, 1), self.model)

        return grain.MapDataset.range(np.iinfo(np.int32).max).map(row)

    def _exercises(self, seed: int) -> grain.MapDataset:
        """Rows made on demand; prompts may be as long as a row."""
        length = self.data.row_length
        text = dataclasses.replace(self.tokenizer, max_prompt_tokens=length)
        world = dataclasses.replace(self.data.world, seed=seed)
        make = partial(exercise, text, world, self.data.exercises, length)
        return grain.MapDataset.range(np.iinfo(np.int32).max).map(make)

    def _mixture(self) -> grain.MapDataset:
        """Endless rows of all sources; of the first without its held-out records."""
        first, *others = self.sources
        trained = [HeldOut(first, self.data.heldout, rest=True), *others]
        specs = self.data.sources
        weights = [spec.weight for spec in specs]
        if not any(weights):
            weights = [s.repeat * len(source) for s, source in zip(specs, trained, strict=True)]
        readers = [partial(self._read, source, k) for k, source in enumerate(trained)]
        return mixture(readers, trained, whole_weights(weights), self.seed)

    def _read(
        self, source: Source, source_number: int, i: int, epoch: int
    ) -> dict[str, np.ndarray]:
        """The row of record i in an epoch, or of the next that can be used."""
        for attempt in range(ATTEMPTS):
            number = (i + attempt) % len(source)
            self.tally.add(read=1)
            try:
                draw_by = self.seed, source_number, epoch, number
                if (row := self._row(source[number], draw_by)) is not None:
                    return row
            except RecordError as error:
                self.tally.bad(source.key(number), str(error))
        none = f"None of {ATTEMPTS} records from {source.key(i)} on can be used"
        raise InputError(f"{none}; see `blip3o-jax data check`.")

    def _row(self, record: Record | dict, draw_by: tuple[int, ...]) -> dict[str, np.ndarray] | None:
        """A row of a Record or of a cache's dict, with the caption that the numbers draw; None when
        it is dropped."""
        if self.rows == "images":
            return {"images": self._arrays(record)["images"]}
        # The caption: shortened, or the record dropped, when its prompt is too long.
        cached, text = isinstance(record, dict), self.tokenizer
        several = record.get("captions") or [record["caption"]] if cached else record.captions
        caption = draw(several, *draw_by)
        count = _num_sources(record)
        if count > (limit := self.model.max_sources):
            raise RecordError(f"it has {count} source images, and the model takes {limit}")
        if prompt_length(text, caption, count) > text.max_prompt_tokens:
            if self.data.long_captions == "drop":
                return self.tally.add(dropped=1)
            self.tally.add(truncated=1)
            caption = fit_caption(text, caption, count)
        try:
            row = self._tokens(caption, count)
        except InputError as error:
            raise RecordError(str(error).rstrip(".")) from error
        # The image: its encodings from a cache, or its pixels.
        if cached:
            arrays = {name: record[name] for name in record if name in ENCODED}
            self.tally.add(bytes=sum(array.nbytes for array in arrays.values()))
        else:
            arrays = self._arrays(record)
        row |= arrays
        return with_sources(row, self.model) if self.has_sources else row

    def _arrays(self, record: Record) -> dict[str, np.ndarray]:
        """The pixels of a Record, whose bytes are counted."""
        self.tally.add(bytes=sum(map(len, (record.image, *record.inputs))))
        return image_arrays(record, self.model, self.data.crop, self.data.limits)

    def _tokens(self, caption: str, num_sources: int = 0) -> dict[str, np.ndarray]:
        """`tokens` int32 [T] and `start` int32 of a caption and an image, or of an instruction, its
        source images and the result; codes are made on the device and written there."""
        text = self.tokenizer
        codes = np.zeros((num_sources + 1, self.model.ta_tok.num_tokens), int)
        edit = num_sources > 0
        prompt = text.encode_edit(caption, codes[1:]) if edit else text.encode_prompt(caption)
        tokens, start = text.training_rows([prompt], codes[:1], self.length)
        return {"tokens": tokens[0], "start": start[0]}
