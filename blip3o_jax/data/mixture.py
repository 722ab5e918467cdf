"""The order of records: which one is at position i is a pure function of (seed, i), for any number
of hosts."""

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import grain
import numpy as np

from blip3o_jax.data.records import Source
from blip3o_jax.errors import require

ENDLESS = 1 << 62  # records; grain rounds numbers of batches to floats
WINDOW = 4  # blocks whose records are shuffled together


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights in the same proportions as whole numbers without a common factor: 0.7 and 0.3 are 7
    and 3, exactly."""
    exact = [Fraction(str(w)) for w in weights]
    scale = math.lcm(*(w.denominator for w in exact))
    whole = [int(w * scale) for w in exact]
    return tuple(w // math.gcd(*whole) for w in whole)


def place(i: int, weights: tuple[int, ...]) -> tuple[int, int]:
    """Position of a mixture -> (source, how many of that source came before).

    The first source gets every position where the whole part of i w / sum(w) grows, the others
    share the rest in the same way, so each run of sum(w) positions holds exactly w of each source,
    evenly spread. (grain.MapDataset.mix does so too, but rounds weights to a hundredth of the
    smallest.)
    """
    total = sum(weights)
    for source, weight in enumerate(weights):
        # Those of this source among the first i, rounded up so that it starts.
        before, with_it = (-(-n * weight // total) for n in (i, i + 1))
        if with_it > before:
            return source, before
        i, total = i - before, total - weight
    raise AssertionError("the last source takes every position that is left")


def shuffled(size: int, seed: int):
    """Position -> record in [0, size): every epoch of `size` positions holds each record once, in
    an order of its own."""
    order = grain.MapDataset.range(size).seed(seed).shuffle().repeat()
    return lambda position: int(order[position])


def shuffled_blocks(starts: np.ndarray, size: int, seed: int):
    """As `shuffled`, for records that are read a block at a time from `starts`: blocks in random
    order, and records among those of `WINDOW` blocks."""
    lengths = np.diff([*starts, size])

    # The blocks of an epoch in their order, and where each ends.
    @functools.lru_cache(2)
    def epoch_order(epoch: int):
        order = np.random.default_rng([seed, epoch]).permutation(len(starts))
        return order, np.concatenate([[0], np.cumsum(lengths[order])])

    # The records of a window in their order, and where it begins.
    @functools.lru_cache(4)
    def window_order(epoch: int, window: int):
        order, ends = epoch_order(epoch)
        blocks = order[window * WINDOW : (window + 1) * WINDOW]
        records = np.concatenate([np.arange(starts[b], starts[b] + lengths[b]) for b in blocks])
        rng = np.random.default_rng([seed, epoch, window])
        return ends[window * WINDOW], rng.permutation(records)

    def record(position: int) -> int:
        epoch, position = divmod(position, size)
        block = int(np.searchsorted(epoch_order(epoch)[1], position, "right")) - 1
        first, records = window_order(epoch, block // WINDOW)
        return int(records[position - first])

    return record


class HeldOut:
    """`count` records of a source, evenly spread; with `rest`, all the others, renumbered."""

    def __init__(self, source: Source, count: int, rest: bool = False):
        self.source = source
        self.count = count
        self.rest = rest
        self.stride = len(source) // count
        few = f"too few of the first source's {len(source)} records; hold out at most half."
        require(self.stride >= 2, f"data.heldout {count} leaves {few}")

    def __len__(self) -> int:
        return len(self.source) - self.count if self.rest else self.count

    def index(self, i: int) -> int:
        """The record's number in the source: each stride's first is held out."""
        if not self.rest:
            return i * self.stride
        stride, offset = divmod(i, self.stride - 1)
        return stride * self.stride + 1 + offset if stride < self.count else i + self.count

    @property
    def blocks(self) -> np.ndarray | None:
        starts = self.source.blocks
        if starts is None or not self.rest:
            return None
        held_before = np.minimum(-(-np.asarray(starts) // self.stride), self.count)
        return np.unique(starts - held_before)

    def key(self, i: int) -> str:
        return self.source.key(self.index(i))

    def __getitem__(self, i: int):
        return self.source[self.index(i)]


def mixture(
    readers: list[Callable], sources: list[Source], weights: tuple[int, ...], seed: int
) -> grain.MapDataset:
    """Endless: position -> `readers[source](i, epoch)` of the record i there; `weights` as in
    `place`."""
    orders = [
        shuffled(len(source), seed + k)
        if source.blocks is None
        else shuffled_blocks(source.blocks, len(source), seed + k)
        for k, source in enumerate(sources)
    ]

    def row(i: int):
        source, position = place(i, weights)
        return readers[source](orders[source](position), position // len(sources[source]))

    return grain.MapDataset.range(ENDLESS).map(row)


def interleaved(first: Sequence, second: Sequence, share: float) -> grain.MapDataset:
    """Endless: `share` of the positions hold records of the first, the others of the second, each
    in its order."""
    records, weights = (first, second), whole_weights([share, 1 - share])

    def row(i: int):
        source, position = place(i, weights)
        return records[source][position]

    return grain.MapDataset.range(ENDLESS).map(row)


def host_rows(records: Sequence, batch_size: int, own: Sequence[int]) -> grain.MapDataset:
    """Batches of an endless sequence of records, of each the rows `own`: row r of the global batch
    is the same however hosts share it."""

    def row(i: int):
        batch, place = divmod(i, len(own))
        return records[batch * batch_size + int(own[place])]

    return grain.MapDataset.range(ENDLESS).map(row).batch(len(own))
