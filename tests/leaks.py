"""A check around tests with real threads and processes: nothing may be left over."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_SETTLE_S = 10.0


def _descriptors() -> dict[str, str]:
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[entry.name] = os.readlink(entry)
        except FileNotFoundError:  # the one that listed them
            continue
    return found


def _processes() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


@contextmanager
def no_leaks() -> Iterator[None]:
    """Fail if threads, file descriptors, children or zombies are there afterwards that were not there before."""
    gc.collect()
    threads, descriptors, processes = set(threading.enumerate()), _descriptors(), _processes()
    yield
    end = time.monotonic() + _SETTLE_S
    while True:
        gc.collect()
        left = {
            "threads": [thread.name for thread in set(threading.enumerate()) - threads],
            "descriptors": [target for fd, target in _descriptors().items() if fd not in descriptors],
            "children": sorted(_processes() - processes),
        }
        if not any(left.values()):
            return
        assert time.monotonic() < end, f"left over: {left}"
        threading.Event().wait(0.02)
