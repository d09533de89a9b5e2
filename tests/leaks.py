"""A check around tests with real threads and processes: nothing may be left over."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

from fsm.runner import RunnerState
from scheduler.desk import Desk

_SETTLE_S = 10.0


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


@contextmanager
def _desks() -> Iterator[list[Desk]]:
    """Note the desk of every scheduler that is made meanwhile."""
    made: list[Desk] = []
    make = Desk.__init__

    def note(self: Desk, *arguments: Any, **named: Any) -> None:
        made.append(self)
        make(self, *arguments, **named)

    with patch.object(Desk, "__init__", note):
        yield made


def _held(desk: Desk) -> list[str]:
    """Return what a closed scheduler still has in its books.

    Of one that could not end, since an object's unload hung or a decision raised, runners that are on their way out.
    """
    pool, locks = desk._core.pool, desk.executor.locks
    left = [f"ticket {id}" for id in desk.tickets]
    left += [f"the lock of {device}" for device in (locks._locks if locks is not None else ())]
    if desk.driver.broken is not None:
        return left
    ended = desk.finished.is_set()
    runners = [one for one in pool.runners.values() if ended or one.state is not RunnerState.expiring or one.leases]
    left += [f"{one.state.value} runner {one.id} of {one.model}" for one in runners]
    left += [f"request {id}" for id in pool.requests] + [f"the line for {want}" for want in pool.lines]
    left += [f"claim {number}" for number in pool.claims] if ended else []
    accounts = [owner for owner in pool.ledger.accounts if ended or owner[0] == "memory"]
    return left + [f"the bytes of {kind} {id}" for kind, id in accounts]


@contextmanager
def no_leaks() -> Iterator[None]:
    """Fail if anything is there afterwards that was not there before.

    Threads, file descriptors, children and zombies of this process; and of each scheduler that was made meanwhile
    requests, tickets, runners, leases, bytes in the ledger, and the locks of devices.
    """
    gc.collect()
    threads, descriptors, processes = set(threading.enumerate()), _descriptors(), _processes()
    with _desks() as desks:
        yield
    end = time.monotonic() + _SETTLE_S
    while True:
        gc.collect()
        left = {
            "threads": [thread.name for thread in set(threading.enumerate()) - threads],
            "descriptors": [target for _, target in _descriptors() - descriptors],
            "children": sorted(_processes() - processes),
            "books": [text for desk in desks for text in _held(desk)],
        }
        if not any(left.values()):
            return
        assert time.monotonic() < end, f"left over: {left}"
        threading.Event().wait(0.02)
