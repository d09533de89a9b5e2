"""A check around tests with real threads and processes: no thread, process, file or lock may be left over."""

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
import uvloop

from fsm.machine.runner import RunnerState
from scheduler import Scheduler
from tests.support.invariants import check_scheduler

uvloop.new_event_loop().close()  # libuv opens a pipe for signals once, and keeps it

_SETTLE_S = 10.0
_ADOPT = 36  # PR_SET_CHILD_SUBREAPER: orphans become children of this process


def _descriptors() -> set[tuple[str, str]]:
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add((entry.name, os.readlink(entry)))
        except FileNotFoundError:  # the descriptor that listed the folder
            continue
    return found


def _processes() -> set[int]:
    """Return the processes that descend from this one, also those that have ended and were not reaped."""
    return {child.pid for child in psutil.Process().children(recursive=True)}


def _bury(pids: set[int]) -> None:
    """Reap the children of this process that have ended."""
    for pid in pids:
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


@contextmanager
def _orphans() -> Iterator[set[int]]:
    """Make this process adopt orphans of its children; note the children that it starts itself."""
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
    """Return what threads run that the module threading does not know, by their numbers."""
    known = {thread.ident for thread in threading.enumerate()}
    return {id: _begun_with(frame) for id, frame in sys._current_frames().items() if id not in known}


def _is_a_ghost(thread: threading.Thread) -> bool:
    """Tell whether the module threading still lists a thread that was not started by it, and has ended."""
    return isinstance(thread, threading._DummyThread) and thread.ident not in sys._current_frames()


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
    """Return what a closed scheduler still holds.

    A scheduler that could not end, because an object's unload hung or a decision raised, may hold expiring runners.
    Each account of the ledger and each claim belongs to one of these runners, by properties of a state.
    """
    check_scheduler(scheduler)
    books = scheduler.debug_state()
    left = [f"pending request {id}" for id in books.requests]
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
    """Fail if a thread, process, descriptor or lock is there afterwards that was not there before.

    Checked are threads, file descriptors, descendants of this process (orphans and zombies too), and of each scheduler
    that was made meanwhile its requests, pending requests, runners, leases, bytes in the ledger, and locks of devices.
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
    """Wait until nothing is left over; fail if that takes long."""
    end = time.monotonic() + _SETTLE_S
    while True:
        gc.collect()
        _bury(_processes() - processes - started)  # adopted processes, which only this one can reap
        left = {
            "threads": [thread.name for thread in set(threading.enumerate()) - threads if not _is_a_ghost(thread)],
            "unnamed threads": [what for id, what in _unnamed().items() if id not in unnamed],
            "descriptors": [target for _, target in _descriptors() - descriptors],
            "children": sorted(_processes() - processes),
            "books": [text for scheduler in schedulers for text in _held(scheduler)],
        }
        if not any(left.values()):
            return
        assert time.monotonic() < end, f"left over: {left}"
        threading.Event().wait(0.02)
