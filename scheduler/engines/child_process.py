"""One child process as others see it: what to run, what is heard of it, and how it is stopped."""

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
    """What to run: an argument list, never a shell's line."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    input: bytes = field(default=b"", repr=False)  # for its standard input, which stays open after that; some KiB


@dataclass(frozen=True, slots=True)
class Exit:
    """How a child ended."""

    code: int | None  # its status, or the negative signal; None: it never started
    reason: str = ""  # why it never started, or why it was ended although nobody asked
    tail: str = ""  # the last of what it wrote to standard error
    asked: bool = False  # it was told to stop


class Listener(Protocol):
    """Hears of one child, on the watcher's thread; what it raises is logged. It must not block."""

    def printed(self, line: str) -> None:
        """The child wrote a line to standard output."""

    def logged(self) -> None:
        """The child wrote to standard error."""

    def on_tick(self) -> bool:
        """About a second has passed; return whether to go on with these calls."""

    def ended(self, exit: Exit) -> None:
        """The child is gone and reaped, or was never started: exactly once, and the last call."""


class Child:
    """One child process, from before it is started until it is gone; any thread may use it."""

    def __init__(self, program: Program, listener: Listener) -> None:
        self.program = program
        self.listener = listener
        self.pid: int | None = None  # from its start on, also after its end
        self.watcher: ChildSupervisor | None = None  # since it was handed over
        self._lock = threading.Lock()
        self._settled = False  # it is being started, or never will be

    def settle(self) -> bool:
        """Take the right to start it, or to call it off: True for the first who asks."""
        with self._lock:
            first, self._settled = not self._settled, True
            return first

    def stop(self, grace_s: float) -> None:
        """Terminate it, and kill it and its group after `grace_s`; before its start this calls it off.

        Returns at once. Again is harmless, and may shorten the grace; in a fork of the host it does nothing.
        """
        if self.watcher is not None:
            self.watcher.post(functools.partial(self.watcher.stop, self, grace_s))
