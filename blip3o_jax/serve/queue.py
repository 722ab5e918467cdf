"""Images that wait for the model: in one bounded queue, fair between clients."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from blip3o_jax.request import Request, Sample
from blip3o_jax.serve.bodies import Asked

MOST_PIXELS = 1 << 28  # of all source images that wait


class QueueFull(Exception):
    """There is no room for a call."""


@dataclass(frozen=True)
class Step:
    """An image of a call after `step` of its `steps`, and what it would become, uint8 [H,W,3],
    where the call asked for that."""

    index: int
    step: int
    steps: int
    partial: np.ndarray | None = None


@dataclass(frozen=True)
class Done:
    """An image of a call, or the sentence why it cannot be."""

    index: int
    sample: Sample | None
    error: str = ""


@dataclass(eq=False)
class Call:
    """What one HTTP call asks for, with the shape of its requests' programs; whoever answers it is
    told of each image by `tell`, from the worker's thread."""

    client: str
    asked: Asked
    shape: tuple
    tell: Callable[[Step | Done], None]
    is_batch: bool = False  # waits until nobody else does
    begun: float = field(default_factory=time.monotonic)

    @property
    def pixels(self) -> int:
        """Of its source images."""
        return sum(image.shape[0] * image.shape[1] for image in self.asked.requests[0].images)


@dataclass(eq=False)
class Item:
    """One image of a call."""

    call: Call
    request: Request


class Queue:
    """At most `limit` images of calls that are not batches, in the order of their arrival."""

    def __init__(self, limit: int):
        self.limit, self._items, self.is_closed = limit, [], False
        self._changed = threading.Condition()

    def put(self, call: Call) -> None:
        """QueueFull if its images do not fit."""
        with self._changed:
            # Batches are not counted: they have lines of their own to wait in.
            waiting = {item.call for item in self._items if not item.call.is_batch}
            count = self._waiting()
            pixels = call.pixels + sum(other.pixels for other in waiting)
            # One call alone may be larger than the queue.
            is_full = count + len(call.asked.requests) > self.limit or pixels > MOST_PIXELS
            if self.is_closed or (is_full and waiting and not call.is_batch):
                raise QueueFull
            self._items += [Item(call, request) for request in call.asked.requests]
            self._changed.notify_all()

    def take(self, size: int) -> list[Item]:
        """Waits for images, and gives up to `size` of one shape; none once the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self.is_closed)
            if self.is_closed:
                return []
            # The first one says the shape, and others of it fill the batch.
            order = self._order()
            batch = [item for item in order if item.call.shape == order[0].call.shape][:size]
            self._items = [item for item in self._items if item not in batch]
            self._changed.notify_all()
            return batch

    def ahead(self, call: Call) -> int | None:
        """Images that come before a call's first one; None if none of its images waits."""
        with self._changed:
            calls = [item.call for item in self._order()]
            return calls.index(call) if call in calls else None

    def cancel(self, call: Call) -> None:
        """Drops a call's images that wait."""
        with self._changed:
            self._items = [item for item in self._items if item.call is not call]
            self._changed.notify_all()

    def close(self) -> None:
        """Ends `take` and `put`."""
        with self._changed:
            self.is_closed = True
            self._changed.notify_all()

    def __len__(self) -> int:
        """Images that wait, but for those of batches."""
        with self._changed:
            return self._waiting()

    def _waiting(self) -> int:
        return sum(not item.call.is_batch for item in self._items)

    def _order(self) -> list[Item]:
        """The first image of every client, in the order of arrival, then the second of every one,
        and so on; then those of batches."""
        # How many of its client's images come before it decides, then when it came.
        turns: dict[str, int] = {}
        ranks = []
        for place, item in enumerate(self._items):
            client = item.call.client
            turns[client] = turns.get(client, 0) + 1
            ranks.append((item.call.is_batch, turns[client], place))
        return [self._items[place] for *_, place in sorted(ranks)]
