"""Row groups of Parquet in memory: a budget of bytes that all sources of a run share."""

import logging
import threading
from collections import OrderedDict
from typing import Any, Protocol

import numpy as np

from blip3o_jax.data.mixture import WINDOW

log = logging.getLogger(__name__)


class Grouped(Protocol):
    """A source that is read a row group at a time."""

    blocks: np.ndarray
    paths: list[str]

    def read_group(self, group: int) -> Any: ...


class RowGroups:
    """The row groups used last, `megabytes` of them or one that is larger; thread-safe. Reading one
    holds up nobody who wants another that is in memory."""

    def __init__(self, megabytes: int = 1024):
        self.limit = megabytes << 20
        self.tables: OrderedDict[tuple[Grouped, int], Any] = OrderedDict()
        self.largest: dict[Grouped, int] = {}  # bytes of a source's largest group so far
        self._reading: dict[Grouped, int | None] = {}  # bytes expected, None of a first group
        self._changed = threading.Condition()

    @property
    def bytes(self) -> int:
        """Bytes of the groups in memory."""
        return sum(table.nbytes for table in self.tables.values())

    def table(self, source: Grouped, group: int) -> Any:
        """A row group of a source, read unless it is in memory."""
        key = source, group
        with self._changed:
            self._changed.wait_for(lambda: key in self.tables or self._may_read(source))
            if key in self.tables:
                self.tables.move_to_end(key)
                return self.tables[key]
            # Room is made first, for a group as large as any before, so that both are never there.
            self._reading[source] = self.largest.get(source)
            self._free(keep=0)
        table = None
        try:
            table = source.read_group(group)
        finally:
            with self._changed:
                del self._reading[source]
                if table is not None:
                    self.tables[key] = table
                    self._free(keep=1)
                    self._note(source, table.nbytes)
                self._changed.notify_all()
        return table

    def _may_read(self, source: Grouped) -> bool:
        """Whether a source may read now: not twice at once, which might be the same group, and
        beside other sources only where all their groups fit."""
        sizes = [*self._reading.values(), self.largest.get(source)]
        fit = None not in sizes and sum(sizes) <= self.limit
        return source not in self._reading and (fit or not self._reading)

    def _free(self, keep: int) -> None:
        """Drops the groups used longest ago until those being read fit too, or `keep` are left."""
        size = sum(filter(None, self._reading.values()))
        while len(self.tables) > keep and self.bytes + size > self.limit:
            self.tables.popitem(last=False)

    def _note(self, source: Grouped, size: int) -> None:
        """Keeps a source's largest group; warns, once a source, when the groups that a shuffle
        reads from at once do not fit, so that they will be read again and again."""
        is_new = source not in self.largest
        self.largest[source] = max(size, self.largest.get(source, 0))
        need = sum(n * min(WINDOW, len(s.blocks)) for s, n in self.largest.items())
        if is_new and need > self.limit:
            text = "Row groups of %s and the other Parquet sources need %d MB at once: set "
            advice = "data.row_group_mb to at least that, or write smaller row groups."
            log.warning(text + advice, source.paths[0], -(-need >> 20))
