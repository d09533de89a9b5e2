"""Reads models' files into the page cache before they are loaded: reads only, one at a time, out of everybody's way.

The files are read, and not announced with `posix_fadvise`: the kernel reads no more of what it is advised of than the
disk's read-ahead a call, and says neither when nor whether. Read through a buffer in steps it is certain, and can end
after any step. What is in the cache already is not read again, where the system can tell.
"""

from __future__ import annotations

import logging
import os
import stat
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import BinaryIO

from fsm.machine.request import ModelId
from scheduler.concurrency.thread_pool import ThreadPool

log = logging.getLogger("loadmaster")

STEP_BYTES = 4 << 20  # what is read between two looks at whether to go on
_PLACES = 3  # of a step that are looked for in the cache
_YIELD_S = 0.02  # between two looks at whether a model still loads
_LOWEST_PRIORITY = 19  # of this thread alone


@dataclass(slots=True, eq=False)
class _Reading:
    """How far one model's files have been read in this wait."""

    limit: int  # bytes
    begun: bool = False
    done: int = 0  # bytes


class Prefetcher:
    """Carries out Prefetch: who is named first is read first, and nothing is read while a model loads."""

    def __init__(self, files_of: Callable[[ModelId], Sequence[str]], loading: Callable[[], bool]) -> None:
        self.ahead_bytes = 0  # that were looked after in all
        self.copied_bytes = 0  # of those, what went through the buffer: the others were in the page cache by then
        self._files_of = files_of
        self._loading = loading
        self._workers = ThreadPool("loadmaster-prefetcher", 1)
        self._changed = threading.Condition()  # guards what follows
        self._readings: dict[ModelId, _Reading] = {}  # in the order in which they were named
        self._busy = False  # a job is queued or running
        self._closed = False  # nothing more is read

    def ask(self, files: Sequence[tuple[ModelId, int]]) -> None:
        """Take over what is to be read from now on; returns at once. What was read in this wait is not read again."""
        with self._changed:
            before = self._readings
            self._readings = {model: before.get(model) or _Reading(limit) for model, limit in files}
            for model, limit in files:
                self._readings[model].limit = limit
            self._changed.notify()
            if self._busy or self._closed or all(reading.begun for reading in self._readings.values()):
                return
            self._busy = True
        self._workers.put(self._run)

    def ensure_threads(self) -> None:
        """Start its thread where it could not be started."""
        self._workers.ensure_threads()

    def close(self, timeout_s: float) -> list[str]:
        """Read no further, and end the thread; return its name if it hangs, as on a disk that does not answer."""
        self._closed = True  # without the lock: a handler may interrupt this, and wait for one who asks
        return self._workers.close(timeout_s)

    def _run(self) -> None:
        _step_back()
        while (found := self._take()) is not None:
            model, reading = found
            try:
                self._read(model, reading)
            except Exception:  # there may be too little memory for the buffer
                log.exception("%s could not be read ahead", model)

    def _read(self, model: ModelId, reading: _Reading) -> None:
        with closing(self._steps(model, reading)) as steps:
            while self._goes_on(model, reading) and (count := next(steps, 0)):
                reading.done += count
                self.ahead_bytes += count

    def _take(self) -> tuple[ModelId, _Reading] | None:
        with self._changed:
            self._busy = False  # first: a finaliser may ask in between
            for model, reading in self._readings.items():
                if not reading.begun and not self._closed:
                    reading.begun = self._busy = True
                    return model, reading
            return None

    def _goes_on(self, model: ModelId, reading: _Reading) -> bool:
        """Tell whether more of it is wanted, as soon as no model loads: the disk is theirs."""
        with self._changed:
            while (wanted := self._wants(model, reading)) and self._loading():
                self._changed.wait(_YIELD_S)
            return wanted

    def _wants(self, model: ModelId, reading: _Reading) -> bool:
        return not self._closed and self._readings.get(model) is reading and reading.done < reading.limit

    def _steps(self, model: ModelId, reading: _Reading) -> Generator[int, None, None]:
        """Have a model's files in the page cache step by step; yield the bytes of each step."""
        buffer = memoryview(bytearray(STEP_BYTES))
        for path in self._files_of(model):
            try:
                with _open(path) as file:
                    at = 0
                    while count := self._step(file, at, buffer[: max(0, reading.limit - reading.done)]):
                        at += count
                        yield count
            except OSError:  # the load will say so
                log.debug("%s could not be read ahead", path, exc_info=True)

    def _step(self, file: BinaryIO, at: int, buffer: memoryview) -> int:
        left = os.fstat(file.fileno()).st_size - at
        if left > 0 and _cached(file, at, size := min(left, len(buffer))):
            return size
        file.seek(at)
        count = file.readinto(buffer) or 0  # type: ignore[attr-defined]  # of every raw file
        self.copied_bytes += count
        return count


def _open(path: str) -> BinaryIO:
    """Return a file to read without a buffer; a pipe that has taken its place must not hold the thread up."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is no file")
        return os.fdopen(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def _cached(file: BinaryIO, at: int, size: int) -> bool:
    """Tell whether a piece of a file seems to be in the page cache, by a few of its places; False if it cannot be told.

    A piece of which these are there by chance and others are not is left to the load.
    """
    if not hasattr(os, "RWF_NOWAIT"):  # on Linux only
        return False
    places = {at + (size - 1) * place // (_PLACES - 1) for place in range(_PLACES)}
    try:
        return all(os.preadv(file.fileno(), [bytearray(1)], place, os.RWF_NOWAIT) for place in sorted(places))
    except OSError:  # it would have to be read, or it is a file system that does not know
        return False


def _step_back() -> None:
    """Have this thread give way to all others, where a thread has a priority of its own."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
