"""Reads models' files into the page cache before their models are loaded, one file at a time, at low priority.

The files are read, and not announced with `posix_fadvise`: the kernel reads at most the disk's read-ahead for each
announcement, and reports neither when nor whether it has read. Reading through a buffer in steps is certain, and can
end after any step. A part that is in the page cache already is not read again, where the system can tell.
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

STEP_BYTES = 4 << 20  # read between two checks of whether to go on
_PLACES = 3  # places in a step that are looked up in the page cache
_YIELD_S = 0.02  # between two checks of whether a model still loads
_LOWEST_PRIORITY = 19  # of the prefetcher's thread alone


@dataclass(slots=True, eq=False)
class _Reading:
    """How far one model's files have been read while the model waits for memory."""

    limit: int  # bytes
    begun: bool = False
    done: int = 0  # bytes


class Prefetcher:
    """Carries out `Prefetch`: the model that is named first is read first, and no file is read while a model loads."""

    def __init__(self, files_of: Callable[[ModelId], Sequence[str]], loading: Callable[[], bool]) -> None:
        self.ahead_bytes = 0  # bytes that were read, or found in the page cache, in all
        # the part of `ahead_bytes` that was read through the buffer; the rest was in the page cache
        self.copied_bytes = 0
        self._files_of = files_of
        self._loading = loading
        self._workers = ThreadPool("loadmaster-prefetcher", 1)
        self._changed = threading.Condition()  # guards the attributes below
        self._readings: dict[ModelId, _Reading] = {}  # in the order in which the models were named
        self._busy = False  # a job is queued or running
        self._closed = False  # no more files are read

    def ask(self, files: Sequence[tuple[ModelId, int]]) -> None:
        """Replace the list of models and bytes to read, and return at once; a model is read once in its wait."""
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
        """Start the prefetcher's thread where it could not be started before."""
        self._workers.ensure_threads()

    def close(self, timeout_s: float) -> list[str]:
        """Stop reading and end the thread; return the thread's name if it hangs, as on a disk that does not answer."""
        # set without the lock: a signal handler may interrupt a thread in `ask`, which holds the lock
        self._closed = True
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
            self._busy = False  # first: a finaliser may call `ask` in between
            for model, reading in self._readings.items():
                if not reading.begun and not self._closed:
                    reading.begun = self._busy = True
                    return model, reading
            return None

    def _goes_on(self, model: ModelId, reading: _Reading) -> bool:
        """Return whether to read on, as soon as no model loads; a load has the disk to itself."""
        with self._changed:
            while (wanted := self._wants(model, reading)) and self._loading():
                self._changed.wait(_YIELD_S)
            return wanted

    def _wants(self, model: ModelId, reading: _Reading) -> bool:
        return not self._closed and self._readings.get(model) is reading and reading.done < reading.limit

    def _steps(self, model: ModelId, reading: _Reading) -> Generator[int, None, None]:
        """Bring a model's files into the page cache step by step; yields the bytes of each step."""
        buffer = memoryview(bytearray(STEP_BYTES))
        for path in self._files_of(model):
            try:
                with _open(path) as file:
                    at = 0
                    while count := self._step(file, at, buffer[: max(0, reading.limit - reading.done)]):
                        at += count
                        yield count
            except OSError:  # the load of the model reports the error
                log.debug("%s could not be read ahead", path, exc_info=True)

    def _step(self, file: BinaryIO, at: int, buffer: memoryview) -> int:
        left = os.fstat(file.fileno()).st_size - at
        if left > 0 and _cached(file, at, size := min(left, len(buffer))):
            return size
        file.seek(at)
        count = file.readinto(buffer) or 0  # type: ignore[attr-defined]  # every raw file has `readinto`
        self.copied_bytes += count
        return count


def _open(path: str) -> BinaryIO:
    """Return a file opened for unbuffered reading; raises OSError for a pipe and the like, without blocking on it."""
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
    """Return whether a piece of a file seems to be in the page cache, by a few of its places; False if unknown.

    A piece that is cached only in part, but at all the places that are looked up, is left to the load.
    """
    if not hasattr(os, "RWF_NOWAIT"):  # on Linux only
        return False
    places = {at + (size - 1) * place // (_PLACES - 1) for place in range(_PLACES)}
    try:
        return all(os.preadv(file.fileno(), [bytearray(1)], place, os.RWF_NOWAIT) for place in sorted(places))
    except OSError:  # the place would have to be read, or the file system does not support the flag
        return False


def _step_back() -> None:
    """Give this thread the lowest priority, on systems where a thread has a priority of its own."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
