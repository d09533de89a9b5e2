"""Timers: one deadline for each key, the earliest first."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from typing import Literal

from fsm.domain.record import Record

SPARE = 64  # outdated entries that the heap may hold beside as many as there are deadlines

Key = tuple[Literal["keep-alive", "load", "memory", "request", "plan", "close", "claim"], int]


@dataclass(slots=True, eq=False)
class Timers(Record):
    """Deadlines that can be moved and cleared at no cost: an outdated entry is dropped when it becomes due."""

    _at: dict[Key, float] = field(default_factory=dict)  # the deadlines
    _queued: dict[Key, float] = field(default_factory=dict)  # each key's earliest entry in the heap
    _heap: list[tuple[float, Key]] = field(default_factory=list)  # every key of _at has an entry at or before its time

    def set(self, key: Key, at: float) -> None:
        """Make `key` due at `at`, in place of its earlier deadline; infinite: never."""
        if at == math.inf:
            self.clear(key)
            return
        self._at[key] = at
        if len(self._heap) > 2 * len(self._at) + SPARE:  # most entries are outdated
            self._queued = dict(self._at)
            self._heap = [(at, key) for key, at in self._at.items()]
            heapq.heapify(self._heap)
        elif at < self._queued.get(key, math.inf):
            self._queued[key] = at
            heapq.heappush(self._heap, (at, key))

    def clear(self, key: Key) -> None:
        """Remove the deadline of `key`, if it has one."""
        self._at.pop(key, None)

    def at(self, key: Key) -> float:
        """Return the time at which `key` is due; infinite when it is not set."""
        return self._at.get(key, math.inf)

    def deadline(self) -> float:
        """Return a time at or before the first deadline, never after it; infinite when no deadline is set."""
        return self._heap[0][0] if self._heap else math.inf

    def take_due(self, now: float) -> Key | None:
        """Remove and return the earliest key that is due; None when no key is due (any more)."""
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
        """Return the deadlines with their keys, the earliest first."""
        return sorted((at, key) for key, at in self._at.items())
