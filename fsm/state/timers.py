"""One deadline per key, the earliest first."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from typing import Literal

from fsm.domain.record import Record

SPARE = 64  # entries that may be out of date, beside as many as hold

Key = tuple[Literal["keep-alive", "load", "memory", "request", "plan", "close", "claim"], int]


@dataclass(slots=True, eq=False)
class Timers(Record):
    """Deadlines that can be moved and cleared at no cost: what is out of date is dropped when it comes up."""

    _at: dict[Key, float] = field(default_factory=dict)  # what holds
    _queued: dict[Key, float] = field(default_factory=dict)  # each key's earliest entry in the heap
    _heap: list[tuple[float, Key]] = field(default_factory=list)  # every key of _at has an entry at or before its time

    def set(self, key: Key, at: float) -> None:
        """Make `key` due at `at`, in place of what it had; infinite: never."""
        if at == math.inf:
            self.clear(key)
            return
        self._at[key] = at
        if len(self._heap) > 2 * len(self._at) + SPARE:  # most of it is of keys that were cleared
            self._queued = dict(self._at)
            self._heap = [(at, key) for key, at in self._at.items()]
            heapq.heapify(self._heap)
        elif at < self._queued.get(key, math.inf):
            self._queued[key] = at
            heapq.heappush(self._heap, (at, key))

    def clear(self, key: Key) -> None:
        """Forget `key`."""
        self._at.pop(key, None)

    def at(self, key: Key) -> float:
        """Return when `key` is due; infinite when it is not set."""
        return self._at.get(key, math.inf)

    def deadline(self) -> float:
        """Return a time at or before the first that is due, never after it; infinite when nothing is set."""
        return self._heap[0][0] if self._heap else math.inf

    def take_due(self, now: float) -> Key | None:
        """Take out the earliest key whose time has come; None when there is none (any more)."""
        while self._heap and self._heap[0][0] <= now:
            queued, key = heapq.heappop(self._heap)
            if self._queued.get(key) == queued:
                del self._queued[key]
            at = self._at.get(key)
            if at is None:
                continue
            if at <= now:
                del self._at[key]
                return key
            self.set(key, at)
        return None

    def items(self) -> list[tuple[float, Key]]:
        """Return what is set, the earliest first."""
        return sorted((at, key) for key, at in self._at.items())
