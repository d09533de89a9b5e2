"""A child that has imported llama.cpp before there is a model for it: a load that takes it over does not wait for that.

There is one at most. It is begun before the first load, as its model's files are read, and after others in a moment
without one, only while the host's memory has room for it; it is the first to go when that has become scarce. It knows
nothing of a model: until it is taken over its standard input is empty, and only a load with exactly its arguments and
its environment takes it over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

import psutil

from scheduler.engines.child_process import Child, Exit, Listener, Program
from scheduler.engines.process_supervisor import ChildLauncher

SPARE_BYTES = 24 << 20  # what the child occupies, pages of its libraries included


class Loading(Listener, Protocol):
    """Hears of a runner's child."""

    @property
    def loads(self) -> bool:
        """Whether its model is still being loaded."""


class SpareChild:
    """Hears of a spare child, and passes on what it hears once a runner has taken the child over."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.child = Child(program, self)
        self.over = False  # it has ended, and no runner has taken it over
        self._runner: Listener | None = None
        self._lock = threading.Lock()  # so that a child's end is heard by either its runner or this object

    def hand_over(self, runner: Listener) -> bool:
        """Have a runner hear of the child from now on; return False where the child has ended."""
        with self._lock:
            if not self.over:
                self._runner = runner
            return not self.over

    def printed(self, line: str) -> None:
        """Pass a line on."""
        if self._runner is not None:
            self._runner.printed(line)

    def logged(self, chunk: bytes) -> None:
        """Pass on what the child wrote to its log."""
        if self._runner is not None:
            self._runner.logged(chunk)

    def on_tick(self) -> bool:
        """Pass a tick on; a spare child needs none."""
        return self._runner is not None and self._runner.on_tick()

    def ended(self, exit: Exit) -> None:
        """Pass the end on."""
        with self._lock:
            self.over = self._runner is None
        if self._runner is not None:
            self._runner.ended(exit)


class Spares:
    """Starts the children of runners, and keeps one in reserve where `enabled`; any thread may use it."""

    def __init__(self, launcher: ChildLauncher, *, enabled: bool) -> None:
        self._launcher = launcher
        self._enabled = enabled
        self._lock = threading.Lock()  # never held while a child is started or asked to stop
        self._spare: SpareChild | None = None
        self._next: Program | None = None  # of the next spare child; None: no load was begun since one has failed
        self._loads: list[Loading] = []  # runners whose models are being loaded, and some that have loaded

    def start(self, program: Program, library: str | None, runner: Loading) -> Child:
        """Have a runner's program carried out by the spare child, else by a new one, and return the child.

        Raises RuntimeError once the launcher is closed, and in a fork of the process that made it.
        """
        self._launcher.require()
        if not self._enabled or library is None:
            return self._start(program, runner)
        wanted = replace(program, arguments=(*program.arguments, library), input=b"")
        with self._lock:
            spare, self._spare = self._spare, None
            self._next = wanted
            self._loads.append(runner)
        if spare is not None and spare.program == wanted and spare.hand_over(runner):
            self._launcher.send(spare.child, program.input)
            return spare.child
        if spare is not None:
            spare.child.stop(0.0)
        return self._start(program, runner)

    @property
    def untried(self) -> bool:
        """Whether no load has begun yet, or none since a spare child has failed, where there is to be one."""
        return self._enabled and self._next is None

    def expect(self, program: Program, library: str | None) -> None:
        """Start a spare child for the first load, which is expected soon: its model's files are being read."""
        if self.untried and library is not None:
            self._next = replace(program, arguments=(*program.arguments, library), input=b"")
            self._begin()

    def look_round(self, room: Callable[[], int]) -> None:
        """Start a spare child where there is none and no model loads, or end it; `room` tells the host's free bytes.

        Called about once a second, by one thread.
        """
        spare = self._spare
        if spare is None:
            if self._next is not None and room() >= 2 * SPARE_BYTES:
                self._begin()
        elif spare.over:
            with self._lock:  # it might fail each time: the next load has another one tried
                self._spare = self._next = None
        elif room() < SPARE_BYTES:
            with self._lock:
                ours = self._spare is spare
                self._spare = None if ours else self._spare
            if ours:
                spare.child.stop(0.0)

    def held_bytes(self) -> int:
        """Return the bytes of the host that the spare child holds alone: a load takes them over, or they are freed."""
        spare = self._spare
        if spare is not None and spare.child.pid is not None and not spare.over:
            with suppress(psutil.Error, OSError):  # it has just ended
                memory = psutil.Process(spare.child.pid).memory_info()
                return max(0, memory.rss - getattr(memory, "shared", 0))  # shared: on Linux only
        return 0

    def _begin(self) -> None:
        with self._lock:
            self._loads = [each for each in self._loads if each.loads]
            if self._spare is not None or self._next is None or self._loads:
                return
            begun = self._spare = SpareChild(self._next)
        try:
            self._launcher.start(begun.child)
        except RuntimeError as error:  # closed meanwhile, or the system allows no more threads
            begun.ended(Exit(None, f"could not be started: {error}"))

    def _start(self, program: Program, runner: Listener) -> Child:
        child = Child(program, runner)
        self._launcher.start(child)
        return child
