"""A check around tests with real threads and processes: nothing may be left over."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import psutil

from fsm.machine.runner import RunnerState
from scheduler import Scheduler

_SETTLE_S = 10.0
_ADOPT = 36  # PR_SET_CHILD_SUBREAPER: what loses its parent becomes a child of this process, and not of the first one


def _descriptors() -> set[tuple[str, str]]:
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add((entry.name, os.readlink(entry)))
        except FileNotFoundError:  # the one that listed them
            continue
    return found


def _processes() -> set[int]:
    """Return what descends from this process; what has ended and was not reaped is among it."""
    return {child.pid for child in psutil.Process().children(recursive=True)}


def _bury(pids: set[int]) -> None:
    """Reap those that have ended, where they are children of this process."""
    for pid in pids:
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


@contextmanager
def _orphans() -> Iterator[set[int]]:
    """Have this process adopt what its children leave behind; note the children that it starts itself."""
    started: set[int] = set()
    start = subprocess.Popen.__init__

    def note(self: subprocess.Popen[Any], *arguments: Any, **named: Any) -> None:
        start(self, *arguments, **named)
        started.add(self.pid)

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_ADOPT, 1, 0, 0, 0)  # from now on
    with patch.object(subprocess.Popen, "__init__", note):
        yield started


def _unnamed() -> dict[int, str]:
    """Return what threads run that the module threading knows nothing of, by their numbers."""
    known = {thread.ident for thread in threading.enumerate()}
    return {id: _begun_with(frame) for id, frame in sys._current_frames().items() if id not in known}


def _begun_with(frame: FrameType) -> str:
    while frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_qualname


@contextmanager
def _schedulers() -> Iterator[list[Scheduler]]:
    """Note every scheduler that is made meanwhile."""
    made: list[Scheduler] = []
    make = Scheduler.__init__

    def note(self: Scheduler, *arguments: Any, **named: Any) -> None:
        make(self, *arguments, **named)
        made.append(self)

    with patch.object(Scheduler, "__init__", note):
        yield made


def _held(scheduler: Scheduler) -> list[str]:
    """Return what a closed scheduler still has in its books.

    Of one that could not end, since an object's unload hung or a decision raised, runners that are on their way out.
    Each account of the ledger and each claim belongs to one of these, which the core's own check sees to.
    """
    books = scheduler.debug_state()
    left = [f"ticket {id}" for id in books.requests]
    left += [f"the lock of {device}" for device in books.locked]
    if books.error is not None:
        return left
    seen, expiring = books.snapshot, RunnerState.expiring
    runners = [one for one in seen.runners if books.ended or one.state is not expiring or one.leases]
    left += [f"{one.state.value} runner {one.id} of {one.model}" for one in runners]
    left += [f"request {one.request} waits" for one in seen.queue]
    return left + [f"request {one.request} holds what it was granted" for one in seen.held]


@contextmanager
def no_leaks() -> Iterator[None]:
    """Fail if anything is there afterwards that was not there before.

    Threads, file descriptors, descendants and zombies of this process, those too that lost their parents; and of each
    scheduler that was made meanwhile requests, tickets, runners, leases, bytes in the ledger, and the locks of devices.
    """
    gc.collect()
    threads, descriptors, processes = set(threading.enumerate()), _descriptors(), _processes()
    unnamed = _unnamed().keys()
    with _schedulers() as schedulers, _orphans() as started:
        yield
        _settle(schedulers, started, threads, unnamed, descriptors, processes)


def _settle(
    schedulers: list[Scheduler],
    started: set[int],
    threads: set[threading.Thread],
    unnamed: Collection[int],
    descriptors: set[tuple[str, str]],
    processes: set[int],
) -> None:
    """Wait until nothing is there that was not there before; fail if that takes long."""
    end = time.monotonic() + _SETTLE_S
    while True:
        gc.collect()
        _bury(_processes() - processes - started)  # the adopted: nobody else can
        left = {
            "threads": [thread.name for thread in set(threading.enumerate()) - threads],
            "unnamed threads": [what for id, what in _unnamed().items() if id not in unnamed],
            "descriptors": [target for _, target in _descriptors() - descriptors],
            "children": sorted(_processes() - processes),
            "books": [text for scheduler in schedulers for text in _held(scheduler)],
        }
        if not any(left.values()):
            return
        assert time.monotonic() < end, f"left over: {left}"
        threading.Event().wait(0.02)
