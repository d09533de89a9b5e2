"""Inspections: models' files are read on threads of their own, a few at once in each folder, and not without end."""

from __future__ import annotations

import os
import time
from _thread import allocate_lock
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fsm.domain.options import Options
from fsm.machine.request import ModelId
from scheduler.concurrency.clock import Clock
from scheduler.concurrency.thread_pool import ThreadPool

AT_ONCE = 2  # inspections at once in one folder
MOST_AT_ONCE = 64  # in all folders: so many threads may wait for files that cannot be read
LIMIT_S = 60.0  # how long files may take to be read; far beyond a cold disk, or a dry run


class Inspection:
    """One `Inspect`, which is answered once: with what was read, or with a refusal where that takes too long."""

    __slots__ = ("_once", "begun_at", "model", "options", "path", "put_at")

    def __init__(self, model: ModelId, options: tuple[Options, ...], path: str, now: float) -> None:
        self.model = model
        self.options = options
        self.path = path  # the model's own file; empty for an object
        self.put_at = now
        self.begun_at: float | None = None  # None: its files are not read yet
        self._once = allocate_lock()  # taken by the thread that answers

    def answer(self) -> bool:
        """Return whether the caller is to answer; True once."""
        return self._once.acquire(blocking=False)

    @property
    def answered(self) -> bool:
        """Whether it was answered, or is about to be."""
        return self._once.locked()


@dataclass(slots=True, eq=False)
class _Folder:
    """The inspections of the models in one folder, or in the same folders."""

    name: str
    waiting: deque[Inspection] = field(default_factory=deque)
    running: list[Inspection] = field(default_factory=list)
    places: deque[None] = field(default_factory=lambda: deque([None] * AT_ONCE))  # that are free

    @property
    def hangs(self) -> bool:
        """Whether an inspection was given up that still runs."""
        return any(each.answered for each in self.running)


class Inspections:
    """Has inspections made on threads of their own, so that a folder that does not answer keeps no other from loads.

    In a folder that does not answer at most `AT_ONCE` threads wait. `put` takes no lock and starts no thread, as it is
    called under the driver's lock.
    """

    def __init__(
        self,
        pool: ThreadPool,
        inspect: Callable[[Inspection], object],
        give_up: Callable[[Inspection, str], object],
        clock: Clock = time.monotonic,
    ) -> None:
        self._pool = pool
        self._inspect = inspect  # reads the files and answers the inspection, unless it is answered by then
        self._give_up = give_up  # answers an inspection whose files cannot be read, with the reason
        self._clock = clock
        self._folders: dict[str, _Folder] = {}

    def put(self, files: Sequence[str], model: ModelId, options: tuple[Options, ...]) -> None:
        """Queue the inspection of a model with these files, and return at once."""
        name = ", ".join(sorted({os.path.dirname(file) for file in files}))
        folder = self._folders.setdefault(name, _Folder(name))
        folder.waiting.append(Inspection(model, options, files[0], self._clock()))
        self._pool.put(lambda: self._run(folder))

    def look(self) -> None:
        """Give up the inspections that take too long; called about once a second."""
        end = self._clock() - LIMIT_S
        for name, folder in list(self._folders.items()):
            late = [each for each in folder.running.copy() if each.begun_at is not None and each.begun_at <= end]
            if folder.hangs and not folder.places:  # no other inspection can begin
                late += [each for each in folder.waiting.copy() if each.put_at <= end]
            for inspection in late:
                self._give_up(inspection, f"{name} has not answered for {LIMIT_S:g} s")
            if not folder.waiting and len(folder.places) == AT_ONCE:
                self._folders.pop(name, None)  # an inspection that comes at this moment is run all the same

    @property
    def problems(self) -> tuple[str, ...]:
        """The folders that do not answer, in sentences."""
        return tuple(
            f"{name} does not answer: models there cannot be read"
            for name, folder in list(self._folders.items())
            if folder.hangs
        )

    def ensure_threads(self) -> None:
        """Start the threads that could not be started before."""
        self._pool.ensure_threads()

    def close(self, timeout_s: float) -> list[str]:
        """End the threads; return the names of those that hang."""
        return self._pool.close(timeout_s)

    def _run(self, folder: _Folder) -> None:
        while folder.waiting:
            try:
                folder.places.pop()
            except IndexError:
                return  # a thread that has a place looks for inspections once more before it ends
            try:
                self._run_next(folder)
            finally:
                folder.places.append(None)

    def _run_next(self, folder: _Folder) -> None:
        try:
            inspection = folder.waiting.popleft()
        except IndexError:
            return
        if inspection.answered:  # given up while it waited
            return
        inspection.begun_at = self._clock()
        folder.running.append(inspection)
        try:
            self._inspect(inspection)
        except Exception as error:  # else its request, and others of the folder, would wait for ever
            self._give_up(inspection, f"its inspection failed with {type(error).__name__}: {error}")
        finally:
            folder.running.remove(inspection)
