"""A child process as its engine sees it: its program, its listener, its end, and how it is stopped."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from scheduler.engines.process_supervisor import ChildSupervisor


@dataclass(frozen=True, slots=True)
class Program:
    """The program of a child: an argument list, never a line of a shell."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    input: bytes = field(default=b"", repr=False)  # written to standard input, which stays open after that; some KiB
    passed: tuple[int, ...] = ()  # descriptors that it has too, under the same numbers


@dataclass(frozen=True, slots=True)
class Exit:
    """The end of a child."""

    code: int | None  # the exit status, or the negative signal; None: the child never started
    reason: str = ""  # why the child never started, or why it was ended without an order to stop
    tail: str = ""  # the end of what the child wrote to standard error
    asked: bool = False  # the child was told to stop


class Listener(Protocol):
    """Hears of one child, on the supervisor's thread; must not block, and an exception that it raises is logged."""

    def printed(self, line: str) -> None:
        """Called when the child has written a line to standard output."""

    def logged(self, chunk: bytes) -> None:
        """Called when the child has written to standard error, with what it wrote."""

    def on_tick(self) -> bool:
        """Called about once a second; returns whether to go on with these calls."""

    def ended(self, exit: Exit) -> None:
        """Called exactly once, and last: the child is gone and reaped, or was never started."""


class Child:
    """One child process, from before its start until its end; any thread may use it."""

    def __init__(self, program: Program, listener: Listener) -> None:
        self.program = program
        self.listener = listener
        self.pid: int | None = None  # set at its start, and kept after its end
        self.watcher: ChildSupervisor | None = None  # set when the child was handed to its supervisor
        self._lock = threading.Lock()
        self._settled = False  # the child is being started, or never will be

    def settle(self) -> bool:
        """Take the right to start the child or to call the start off; return True for the first call only."""
        with self._lock:
            first, self._settled = not self._settled, True
            return first

    def stop(self, grace_s: float) -> None:
        """Terminate the child, and kill it and its group after `grace_s` seconds.

        Before its start, call the start off.

        Returns at once. A second call is harmless, and may shorten the grace. In a fork of the host this does nothing.
        """
        if self.watcher is not None:
            self.watcher.post(functools.partial(self.watcher.stop, self, grace_s))
