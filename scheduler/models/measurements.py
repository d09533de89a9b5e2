"""The measurements of earlier runners, read and kept on a thread of their own: nothing waits for a slow disk."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

from fsm.messages.commands import Launch, PersistMeasurement
from fsm.sizing.load_history import NOTHING, LoadHistory
from scheduler.concurrency.latch import Latch
from scheduler.concurrency.thread_pool import ThreadPool
from scheduler.models.measurement_store import Identity, MeasurementStore
from scheduler.models.model_spec import ModelSpec

WAIT_S = 0.5  # how long an inspection waits for measurements; after that the footprint is predicted
MOST_JOBS = 100  # jobs that wait for the disk; more are dropped


class Measurements:
    """The measurements of one scheduler, with a thread of their own; safe to use from any thread."""

    def __init__(self, path: Path) -> None:
        self._store = MeasurementStore(path)
        self._workers = ThreadPool("loadmaster-footprints", 1)
        # one item for each job queued or under way; without a lock, so that no thread waits
        self._jobs: deque[None] = deque()
        self._late: Latch | None = None  # of the last job whose wait timed out: until that job is done no thread waits

    @property
    def problem(self) -> str:
        """Why no measurements are kept, in a sentence; empty where they are kept."""
        return self._store.problem

    def recall(self, identity: Identity | None, timeout_s: float = WAIT_S) -> LoadHistory:
        """Return the measurements of a model's files.

        Empty where the disk does not answer within `timeout_s` seconds.
        """
        found: list[LoadHistory] = []
        done, late = Latch(), self._late

        def read(identity: Identity) -> None:
            try:
                found.append(self._store.read(identity))
            finally:
                done.set()

        if identity is None or (late is not None and not late.is_set()) or not self._put(lambda: read(identity)):
            return NOTHING
        if not done.wait(timeout_s):
            self._late = done
        return found[0] if found else NOTHING

    def remember(self, identity: Identity, launch: Launch, showed: PersistMeasurement) -> None:
        """Order a runner's measurements to be written, and return at once."""
        options, split = launch.options, launch.placement.gpu_layers
        self._put(lambda: self._store.write(identity, options, split, showed.took, showed.load_s))

    def ensure_threads(self) -> None:
        """Start the thread where it could not be started before."""
        self._workers.ensure_threads()

    def close(self, timeout_s: float) -> list[str]:
        """Write everything that is queued and end the thread; return the thread's name if it hangs."""
        return self._workers.close(timeout_s)

    def _put(self, job: Callable[[], object]) -> bool:
        def done() -> None:
            with suppress(IndexError):
                self._jobs.pop()

        def run() -> None:
            try:
                job()
            finally:
                done()

        if len(self._jobs) >= MOST_JOBS:
            return False
        self._jobs.append(None)
        try:
            self._workers.put(run)
        except BaseException:  # Ctrl-C, for example; a job that was queued all the same is counted off twice
            done()
            raise
        return True


def identity_of(model: object, engine_version: str = "") -> Identity | None:
    """Return what tells a model's files from any others; None for an object, and for files that cannot be read.

    Sizes and times are read anew. The engine's version is part of the identity: another version takes other buffers. It
    is that of the installed llama.cpp unless another one is given.
    """
    if not isinstance(model, ModelSpec):
        return None  # an object declares its bytes, and another program's object of this name is a different one
    try:
        found = [os.stat(path) for path in model.files]
    except (OSError, ValueError):
        return None
    files = [model.path, model.all_adapters, model.projectors, model.embedding, *([model.draft] if model.draft else [])]
    state = [
        *((each.st_size, each.st_mtime_ns) for each in found),
        engine_version or installed_version("xllamacpp"),
        installed_version("loadmaster"),
    ]
    return Identity(json.dumps(files), json.dumps(state))


@cache
def installed_version(distribution: str) -> str:
    """Return the version of an installed distribution; empty where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
