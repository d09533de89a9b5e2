"""A thread pool for jobs that may block: bounded, of daemon threads, and growing when no thread waits for a job."""

from __future__ import annotations

import logging
import queue
import threading
import time
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable

Job = Callable[[], object]

log = logging.getLogger("loadmaster")


class ThreadPool:
    """At most `limit` daemon threads that run jobs in the order in which they were put.

    `put` takes no lock, not even one of `threading`: it is called under the driver's lock, in finalisers and in signal
    handlers. So it starts no thread before the close. A thread that takes a job first makes sure that another thread
    waits for the next job.

    Unlike `concurrent.futures`, nothing joins the threads when the interpreter exits: a job that hangs cannot hang the
    exit.
    """

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._limit = limit
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closed = False  # the threads end
        self._places = deque([None] * limit)  # for threads that run the jobs put after the close
        self._lock = threading.Lock()  # guards the attributes below
        self._threads: list[threading.Thread] = []
        self._idle = 0  # threads that wait for a job, or are about to
        self.ensure_threads()

    def put(self, job: Job) -> None:
        """Queue `job` and return at once.

        After the close, the job runs on a thread that ends when there is no job left.
        """
        self._jobs.put(job)
        if self._closed:
            self._staff_late()

    def ensure_threads(self) -> None:
        """Make sure that a thread waits for a job, unless all are busy.

        If no thread can be started, call this again later.
        """
        with self._lock:
            if self._idle or self._closed or len(self._threads) >= self._limit:
                return
            name = f"{self._name}-{len(self._threads)}"
            thread = threading.Thread(target=self._run, name=name, daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system allows no more threads now
                if not self._jobs.empty():
                    log.warning("no thread could be started for %s", self._name)
                return
            self._threads.append(thread)
            self._idle += 1

    @property
    def full(self) -> bool:
        """Whether every thread that may run is busy, and a job waits."""
        return not self._idle and len(self._threads) >= self._limit and not self._jobs.empty()

    def close(self, timeout_s: float) -> list[str]:
        """Let the threads end after the queued jobs, wait for them, and return the names of threads that hang."""
        self._closed = True
        with self._lock:
            threads = list(self._threads)
        for _ in threads:
            self._jobs.put(None)
        threads = [thread for thread in threads if thread is not threading.current_thread()]
        end = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        return [thread.name for thread in threads if thread.is_alive()]

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            with self._lock:
                self._idle -= 1
            self.ensure_threads()
            self._do(job)
            del job  # the job's objects must not live until the next job
            with self._lock:
                self._idle += 1

    def _staff_late(self) -> None:
        if not self._take_a_place():  # the threads that have a place look for jobs once more before they end
            return
        try:
            # `Thread.start` would wait for a lock of `threading`, which a thread may hold that a signal has interrupted
            start_new_thread(self._run_late, ())
        except RuntimeError:  # the system allows no more threads now: the job waits for the next put
            self._places.append(None)
            log.warning("no thread could be started for %s", self._name)

    def _run_late(self) -> None:
        ends = 0  # orders to end taken from other threads: put again below, since those threads may still hang
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                self._places.append(None)
                # a job that was put meanwhile may have found no place
                if self._jobs.empty() or not self._take_a_place():
                    break
                continue
            if job is None:
                ends += 1
            else:
                self._do(job)
            del job
        for _ in range(ends):
            self._jobs.put(None)

    def _take_a_place(self) -> bool:
        try:
            self._places.pop()
        except IndexError:
            return False
        return True

    def _do(self, job: Job) -> None:
        try:
            job()
        except BaseException:  # sys.exit() in a user's callback ends the callback, and not the thread
            log.exception("a job of %s failed", self._name)
