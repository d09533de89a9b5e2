"""Threads for what may block: bounded, daemons, started when they are needed."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

Job = Callable[[], object]

log = logging.getLogger("loadmaster")


class Workers:
    """At most `limit` daemon threads that run jobs in the order in which they were put.

    Unlike `concurrent.futures`, nothing joins them when the interpreter exits: a job that hangs cannot hang the exit.
    """

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._limit = limit
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)  # threads that wait for a job, less the jobs on their way to them
        self._lock = threading.RLock()  # guards the list; re-entered by a finaliser that puts while a thread is started
        self._threads: list[threading.Thread] = []

    def put(self, job: Job) -> None:
        """Have `job` run; returns at once."""
        self._jobs.put(job)
        if self._idle.acquire(blocking=False):
            return
        with self._lock:
            if len(self._threads) >= self._limit:
                return
            thread = threading.Thread(target=self._run, name=f"{self._name}-{len(self._threads)}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # there can be no more threads now: the job waits for one, or for the next put
                log.warning("no thread could be started for %s", self._name)
            else:
                self._threads.append(thread)

    def close(self, timeout_s: float) -> list[str]:
        """Let the threads end after what is queued, wait for them, and return the names of those that hang."""
        with self._lock:
            threads = [thread for thread in self._threads if thread is not threading.current_thread()]
        for _ in threads:
            self._jobs.put(None)
        end = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        return [thread.name for thread in threads if thread.is_alive()]

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                log.exception("a job of %s failed", self._name)
            del job  # what it refers to must not live until the next one
            self._idle.release()
