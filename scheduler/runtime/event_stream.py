"""The event stream: every listener gets every transition and decision, or a gap that says how many were dropped."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from queue import Empty, SimpleQueue
from typing import Any, Protocol, assert_never
from weakref import ReferenceType, ref

from fsm.messages import decision_log
from fsm.messages.decision_log import Entry
from scheduler.concurrency.event_loops import warn_if_loop_runs
from scheduler.config.json_values import json_value
from scheduler.config.quantities import parse_duration, wait_limit
from scheduler.errors.exceptions import SchedulerForked
from scheduler.errors.formatting import shown
from scheduler.errors.from_refusals import decision_words
from scheduler.errors.kinds import kind_of
from scheduler.errors.wording import Name, device_reason, kept_reason, transition_reason


@dataclass(frozen=True, slots=True)
class ConsideredRunner(decision_log.ConsideredRunner):
    """A runner that was considered for eviction, and why it is kept."""

    __match_args__ = (
        "runner", "model", "held_bytes", "state", "leases", "unused_s", "cost_s", "taken", "reason", "why", "goes_in_s",
    )  # fmt: skip  # in the order of docs/api.md: a pattern that names no fields gets the text

    reason: str = ""  # why the runner is not evicted, in words; empty where it is evicted


@dataclass(frozen=True, slots=True)
class ConsideredDevice(decision_log.ConsideredDevice):
    """A device that was considered for a model, and why the model is not placed there."""

    reason: str = ""  # why the model is not placed there, in words; empty where it is


@dataclass(frozen=True, slots=True)
class Transition(decision_log.Transition):
    """A runner changed its state."""

    __match_args__ = (
        "at", "runner", "model", "trigger", "source", "destination", "reason", "leases", "why", "step",
    )  # fmt: skip

    reason: str = ""  # `why` in words, with the models' names

    def to_json(self, name: Name = str) -> dict[str, Any]:
        """Return the transition as JSON values; `name` gives the name to show for a model, as `Scheduler.name` does.

        `why` becomes the kind of the reason, and an infinite time None.
        """
        return _as_json(self, name)


@dataclass(frozen=True, slots=True)
class Decision(decision_log.Decision):
    """A decision about a request, or a finding about a runner."""

    __match_args__ = (
        "at", "what", "model", "reason", "request", "runner", "until", "runners", "devices", "why", "step",
    )  # fmt: skip

    runners: tuple[ConsideredRunner, ...] = ()
    devices: tuple[ConsideredDevice, ...] = ()
    reason: str = ""  # `why` in words, with the models' names

    def to_json(self, name: Name = str) -> dict[str, Any]:
        """Return the decision as JSON values; `name` gives the name to show for a model, as `Scheduler.name` does.

        `why` becomes the kind of the reason, and an infinite time None.
        """
        return _as_json(self, name)


def event_of(entry: Entry, name: Name) -> Transition | Decision:
    """Return an entry of the core's decision log with its reasons in words."""
    match entry:
        case decision_log.Transition():
            return Transition(**_values(entry), reason=transition_reason(entry.why, name, entry.model))
        case decision_log.Decision():
            runners = tuple(ConsideredRunner(**_values(one), reason=kept_reason(one)) for one in entry.runners)
            devices = tuple(
                ConsideredDevice(**_values(one), reason=device_reason(one, entry.devices)) for one in entry.devices
            )
            values = _values(entry) | {"runners": runners, "devices": devices}
            return Decision(**values, reason=decision_words(entry, name))
        case _:
            assert_never(entry)


def _values(entry: object) -> dict[str, Any]:
    return {each.name: getattr(entry, each.name) for each in fields(entry)}  # type: ignore[arg-type]  # a dataclass


def _as_json(entry: object, name: Name) -> dict[str, Any]:
    values = _values(entry)
    for part in ("runners", "devices"):
        if part in values:
            values[part] = tuple(_as_json(one, name) for one in values[part])
    if "held_bytes" in values:
        values["held_bytes"] = dict(values["held_bytes"])
    if "model" in values:
        values["model"] = shown(name(values["model"]))
    if values.get("why") is not None:
        values["why"] = kind_of(values["why"])
    return {each: json_value(value) for each, value in values.items()}


@dataclass(frozen=True, slots=True)
class Gap:
    """Marks the place where `missed` entries were dropped because the listener was too slow."""

    missed: int

    def to_json(self, name: Name = str) -> dict[str, Any]:
        """Return the gap as JSON values."""
        return {"missed": self.missed}


class EventStream(Iterator[Transition | Decision | Gap]):
    """The entries in order, each once; `next` blocks until there is an entry, and the stream ends with the scheduler.

    The stream keeps at most `limit` entries: beyond the limit the oldest entries are dropped, and a `Gap` takes their
    place. In a fork of the process that made the stream, `take` and `next` raise `SchedulerForked`, since no entry
    arrives there.
    """

    def __init__(self, limit: int, name: Name) -> None:
        self._limit = limit
        self._name = name
        self._owner = os.getpid()
        self._entries: deque[tuple[int, Entry]] = deque()  # numbered: where numbers are missing, entries were dropped
        self._offered = 0  # entries offered since the stream was opened; written under the driver's lock
        self._lock = threading.RLock()  # held by the thread that takes an entry; `offer` never waits for it
        self._next = 0  # the number of the next entry to take
        self._there: SimpleQueue[None] = SimpleQueue()  # a token, while there may be an entry to take
        self.ended = False  # no more entries are offered

    def offer(self, entries: Sequence[Entry]) -> None:
        """Add entries without waiting for any listener; drops the oldest entries beyond the limit."""
        for entry in entries:
            self._entries.append((self._offered, entry))
            self._offered += 1
        with suppress(IndexError):  # a listener took the entries meanwhile
            while len(self._entries) > self._limit:
                self._entries.popleft()
        self._wake()

    def close(self) -> None:
        """End the stream after the entries that it still holds."""
        self.ended = True
        self._wake()

    def take(self, timeout_s: str | float | None = None) -> Transition | Decision | Gap | None:
        """Return the next entry, or None when none comes within `timeout_s` seconds or the stream has ended.

        Raises `InvalidSettings` for a `timeout_s` that is no duration, and `SchedulerForked` in a fork.
        """
        wait_s = None if timeout_s is None else wait_limit(parse_duration(timeout_s, name="timeout_s"))
        while True:
            if os.getpid() != self._owner:
                raise SchedulerForked()
            found = self._take_next()
            if self._entries or self.ended:
                self._wake()  # another thread that waits: a token wakes one
            if found is not None:
                return found if isinstance(found, Gap) else event_of(found, self._name)
            if self.ended:
                return None
            if wait_s != 0 and self._there.empty():
                warn_if_loop_runs("reading events", "read them on a thread, as with `asyncio.to_thread(events.take)`")
            try:
                self._there.get(timeout=wait_s)
            except Empty:
                return None

    def _wake(self) -> None:
        if self._there.empty():
            self._there.put(None)

    def _take_next(self) -> Entry | Gap | None:
        with self._lock:
            try:
                number, entry = self._entries.popleft()
            except IndexError:
                return None
            missed, self._next = number - self._next, max(number, self._next)
            if missed > 0:
                self._entries.appendleft((number, entry))
                return Gap(missed)
            self._next += 1
            return entry

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> EventStream:
        return self

    def __next__(self) -> Transition | Decision | Gap:
        while (entry := self.take()) is None:
            if self.ended:
                raise StopIteration
        return entry


class Log(Protocol):
    """What writes the entries of the decision log to Python's logging."""

    @property
    def heard(self) -> bool:
        """Whether any entry would reach a handler."""

    def offer(self, entries: Sequence[Entry]) -> None:
        """Have the entries written, and return at once."""


class Hub:
    """Hands the entries of the decision log to every open event stream, and to the event log."""

    def __init__(self, limit: int, name: Name, log: Log) -> None:
        self._limit = limit
        self._name = name
        self._log = log
        # replaced, never changed; a stream that its listener has dropped is gone
        self._streams: tuple[ReferenceType[EventStream], ...] = ()
        self._closed = False

    def open(self) -> EventStream:
        """Return a new event stream; called between two steps, so that no entry is missed or offered twice."""
        stream = EventStream(self._limit, self._name)
        self._streams = (*self._streams, ref(stream))
        if self._closed:
            stream.close()
        return stream

    def publish(self, entries: Sequence[Entry]) -> bool:
        """Offer `entries`, which may be none, to every stream and to the log; return whether anything listens.

        Never blocks, and runs no user's code.
        """
        if not entries and not self._streams:  # most requests of a program without logging
            return self._log.heard
        streams = [(reference, stream) for reference in self._streams if (stream := reference()) and not stream.ended]
        self._streams = tuple(reference for reference, _ in streams)
        for _, stream in streams:
            stream.offer(entries)
        if entries:
            self._log.offer(entries)
        return bool(streams) or self._log.heard

    @property
    def listening(self) -> bool:
        """Whether an event stream is open."""
        return any((stream := reference()) is not None and not stream.ended for reference in self._streams)

    def close(self) -> None:
        """End every stream."""
        self._closed = True
        for reference in self._streams:
            if (stream := reference()) is not None:
                stream.close()
