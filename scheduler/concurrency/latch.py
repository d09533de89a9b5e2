"""Something that happens once, and is waited for."""

from __future__ import annotations

from _thread import allocate_lock
from contextlib import suppress


class Latch:
    """Like `threading.Event`, but set for good, and `set` never blocks: it may be called under the driver's lock.

    An Event has a lock of its own. A signal handler may come while the main thread holds that, and wait for the very
    thread that is about to set the Event.
    """

    __slots__ = ("_is_set", "_lock")

    def __init__(self) -> None:
        self._is_set = False
        self._lock = allocate_lock()  # held until it is set, and then by nobody for longer than a moment
        self._lock.acquire()

    def is_set(self) -> bool:
        """Whether it has happened."""
        return self._is_set

    def set(self) -> None:
        """Let through whoever waits, and whoever comes; twice is harmless."""
        self._is_set = True
        self._let_through()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for it, None: for as long as it takes; return whether it has happened."""
        if not self._is_set and self._lock.acquire(timeout=-1 if timeout_s is None else max(0.0, timeout_s)):
            self._let_through()  # the next one who waits
        return self._is_set

    def _let_through(self) -> None:
        with suppress(RuntimeError):  # it is released already
            self._lock.release()
