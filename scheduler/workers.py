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
        self._lock = threading.RLock()  # guards what follows; re-entered by a finaliser that puts while a thread starts
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._late = 0  # threads that run what was put after the close

    def put(self, job: Job) -> None:
        """Have `job` run; returns at once. After the close too: on a thread that ends when there is nothing to do."""
        self._jobs.put(job)
        if not self._closed and self._idle.acquire(blocking=False):
            return
        with self._lock:
            number = self._late if self._closed else len(self._threads)
            if number >= self._limit:
                return
            run = self._run_late if self._closed else self._run
            thread = threading.Thread(target=run, name=f"{self._name}-{number}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # there can be no more threads now: the job waits for one, or for the next put
                log.warning("no thread could be started for %s", self._name)
            else:
                if self._closed:
                    self._late += 1
                else:
                    self._threads.append(thread)

    def close(self, timeout_s: float) -> list[str]:
        """Let the threads end after what is queued, wait for them, and return the names of those that hang."""
        with self._lock:
            self._closed = True
            for _ in self._threads:
                self._jobs.put(None)
            threads = [thread for thread in self._threads if thread is not threading.current_thread()]
        end = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        return [thread.name for thread in threads if thread.is_alive()]

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._do(job)
            del job  # what it refers to must not live until the next one
            self._idle.release()

    def _run_late(self) -> None:
        ends = 0  # of threads that have yet to end: given back, as those may hang for as long as they like
        while True:
            with self._lock:
                try:
                    job = self._jobs.get_nowait()
                except queue.Empty:
                    self._late -= 1
                    break
            if job is None:
                ends += 1
            else:
                self._do(job)
            del job
        for _ in range(ends):
            self._jobs.put(None)

    def _do(self, job: Job) -> None:
        try:
            job()
        except Exception:
            log.exception("a job of %s failed", self._name)
