"""The event stream: everybody who listens hears every transition and decision, or hears that a gap was left."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fsm.journal import Entry


@dataclass(frozen=True, slots=True)
class Gap:
    """The listener was too slow, and `missed` entries were dropped here."""

    missed: int


class EventStream(Iterator[Entry | Gap]):
    """Entries in order, each once; blocks for the next one, and ends when the scheduler has closed.

    Keeps at most `limit` entries: then the oldest are dropped and a `Gap` takes their place.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: deque[Entry] = deque()
        self._missed = 0
        self._lock = threading.Lock()  # held for an append or a pop
        self._there = threading.Semaphore(0)  # at least one for whatever there is to take
        self.ended = False  # nothing more is offered

    def offer(self, entries: Sequence[Entry]) -> None:
        """Take in what happened; drops the oldest where there is no room."""
        with self._lock:
            self._entries.extend(entries)
            while len(self._entries) > self._limit:
                self._entries.popleft()
                self._missed += 1
        self._there.release()

    def close(self) -> None:
        """End the stream after what it still holds."""
        self.ended = True
        self._there.release()

    def take(self, timeout_s: float | None = None) -> Entry | Gap | None:
        """Return the next one, None when none comes in time or the stream has ended."""
        while True:
            with self._lock:
                if self._missed:
                    gap, self._missed = Gap(self._missed), 0
                    return gap
                if self._entries:
                    return self._entries.popleft()
            if self.ended or not self._there.acquire(timeout=timeout_s):
                return None

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> EventStream:
        return self

    def __next__(self) -> Entry | Gap:
        while (entry := self.take()) is None:
            if self.ended:
                raise StopIteration
        return entry


class Hub:
    """Hands the journal to those who listen."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._streams: tuple[EventStream, ...] = ()  # replaced, never changed
        self._closed = False

    def open(self) -> EventStream:
        """Add a listener; called between two steps, so that nothing is missed or heard twice."""
        stream = EventStream(self._limit)
        self._streams = (*self._streams, stream)
        if self._closed:
            stream.close()
        return stream

    def publish(self, entries: Sequence[Entry]) -> bool:
        """Hand `entries` to every listener and return whether there is one; quick, and runs nobody's code."""
        self._streams = tuple(stream for stream in self._streams if not stream.ended)
        for stream in self._streams:
            stream.offer(entries)
        return bool(self._streams)

    def close(self) -> None:
        """End every stream."""
        self._closed = True
        for stream in self._streams:
            stream.close()
