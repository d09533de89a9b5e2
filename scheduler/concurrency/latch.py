"""A latch: a thing that happens once, and that threads wait for."""

from __future__ import annotations

from _thread import allocate_lock
from contextlib import suppress


class Latch:
    """Like `threading.Event`, but set for good, and `set` never blocks: it may be called under the driver's lock.

    An Event has a lock of its own. A signal handler may come while the main thread holds that lock, and wait for the
    very thread that is about to set the Event.
    """

    __slots__ = ("_is_set", "_lock")

    def __init__(self) -> None:
        self._is_set = False
        self._lock = allocate_lock()  # held until the latch is set, and then by each thread for a moment only
        self._lock.acquire()

    def is_set(self) -> bool:
        """Return whether the latch is set."""
        return self._is_set

    def set(self) -> None:
        """Set the latch and let every thread through that waits now or later; a second call is harmless."""
        self._is_set = True
        self._let_through()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the latch is set, for at most `timeout_s` seconds (None: without limit).

        Return whether it is set.
        """
        if not self._is_set and self._lock.acquire(timeout=-1 if timeout_s is None else max(0.0, timeout_s)):
            self._let_through()  # let the next waiting thread through
        return self._is_set

    def _let_through(self) -> None:
        with suppress(RuntimeError):  # the lock is released already
            self._lock.release()
