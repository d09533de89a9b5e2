"""The event log: transitions and decisions as lines of Python's logging, on a thread of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

from fsm.machine.runner import IDLE, READY
from fsm.messages import decision_log
from fsm.messages.decision_log import Entry
from fsm.messages.refusals import Cancelled, Refusal
from scheduler.concurrency.thread_pool import ThreadPool
from scheduler.errors.formatting import one_line, printable
from scheduler.errors.from_refusals import decision_line, error_of
from scheduler.errors.safe_log import NO_HANDLER
from scheduler.errors.wording import Name, transition_line
from scheduler.runtime.event_stream import Decision, EventStream, Gap, Transition

log = logging.getLogger("loadmaster")

_ROOT = logging.getLogger()
_SILENT: list[logging.Handler] = [NO_HANDLER]


class EventLog:
    """Logs every transition and decision in order; a handler that blocks holds up its thread, and no decision.

    A handler that falls more than `limit` entries behind loses the oldest ones, and a warning says how many.
    """

    def __init__(self, limit: int, name: Name, pool: Callable[[str, int], ThreadPool]) -> None:
        self._stream = EventStream(limit, name)
        self._name = name
        self._pool = pool("loadmaster-log", 1)  # of one thread: lines stay in order
        self._due = False  # a job that writes is queued

    @property
    def heard(self) -> bool:
        """Whether any entry would reach a handler; takes no lock, since the main thread may hold those of logging.

        This is asked with every request.
        """
        handled = log.handlers != _SILENT or (log.propagate and _ROOT.handlers)
        return bool(handled) and _least_level() <= logging.WARNING

    def offer(self, entries: Sequence[Entry]) -> None:
        """Have the entries of enabled levels written, and return at once; called under the driver's lock."""
        least = _least_level()
        told = [entry for entry in entries if level_of(entry) >= least]
        if told and self.heard:
            self._stream.offer(told)
            if not self._due:
                self._due = True
                self._pool.put(self._write)

    def ensure_threads(self) -> None:
        """Start the thread, if it could not be started before."""
        self._pool.ensure_threads()

    def close(self, timeout_s: float) -> list[str]:
        """Write what is left and end the thread; return its name if it hangs."""
        if not (hung := self._pool.close(timeout_s)):
            self._write()  # a job that came after the pool's end
        return hung

    def _write(self) -> None:
        self._due = False
        while (entry := self._stream.take(0)) is not None:
            with suppress(Exception):  # a handler of the user's raised: the lines that follow are written all the same
                self._log(entry)

    def _log(self, entry: Transition | Decision | Gap) -> None:
        if isinstance(entry, Gap):
            log.warning("%d lines of this log are missing: its handlers were too slow", entry.missed)
            return
        fields: dict[str, object] = {
            "event": "transition" if isinstance(entry, Transition) else "decision",
            "model": printable(self._name(entry.model)),
            "runner": entry.runner,
            "reason": one_line(entry.reason),
            "at_s": entry.at,
            "step": entry.step,
        }
        if isinstance(entry, Transition):
            source = entry.source.value if entry.source is not None else None
            fields |= {"what": entry.trigger, "source": source, "destination": entry.destination.value}
            fields |= {"leases": entry.leases}
            line = transition_line(entry, self._name)
        else:
            error = type(error_of(entry.why, self._name)).__name__ if isinstance(entry.why, Refusal) else None
            fields |= {"what": entry.what, "request": entry.request, "error": error}
            line = decision_line(entry, self._name)
        log.log(level_of(entry), "%s", line, extra=fields)


def level_of(entry: Entry) -> int:
    """Return the level that an entry is logged at.

    1. What has failed is a warning: crashes, failed loads, back-offs, and refusals, unless the caller has left.
    2. The transitions of a runner's life are for information.
    3. What happens with every request is for debugging: all other decisions, and a loaded runner's turns in use.
    """
    match entry:
        case decision_log.Transition():
            if entry.trigger == "crash":
                return logging.WARNING
            return logging.DEBUG if {entry.source, entry.destination} == {READY, IDLE} else logging.INFO
        case decision_log.Decision(what="backs off"):
            return logging.WARNING
        case decision_log.Decision(what="rejected") if not isinstance(entry.why, Cancelled):
            return logging.WARNING
        case _:
            return logging.DEBUG


def _least_level() -> int:
    """Return the lowest level that is enabled; unlike `isEnabledFor`, this takes no lock."""
    return max(log.getEffectiveLevel(), log.manager.disable + 1)
