"""A thread that probes and polls runners, samples memory and starts threads that could not be started before."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from scheduler.concurrency.latch import Latch

if TYPE_CHECKING:
    from scheduler.runtime.executor import Executor

_SAMPLE_INTERVAL_S = 1.0


class HealthMonitor:
    """Has memory sampled about once a second and each loaded runner probed once an interval, and waits for neither.

    Threads that could not be started when jobs needed them are started here, as soon as the system allows more again.
    Inspections that take too long are given up. `let_go` is called about once a second too, to forget the objects that
    are not used any more. A runner is polled within a second after the end of a lease on it, and until its context is
    filled once an interval too.
    """

    def __init__(self, executor: Executor, interval_s: float, let_go: Callable[[], None]) -> None:
        self._executor = executor
        self._let_go = let_go
        self._interval_s = interval_s
        self._stop = Latch()
        self._thread = threading.Thread(target=self._run, name="loadmaster-prober", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """End the thread and wait for its end."""
        self._stop.set()
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        waited_s = 0.0
        pause_s = min(_SAMPLE_INTERVAL_S, self._interval_s)
        while not self._stop.wait(pause_s):
            self._executor.ensure_threads()
            self._executor.inspections.look()
            self._executor.request_sample()
            self._let_go()
            waited_s += pause_s
            due = waited_s >= self._interval_s
            waited_s = 0.0 if due else waited_s
            self._look_round(due=due)

    def _look_round(self, *, due: bool) -> None:
        """Poll each runner; not in the loop above, which would keep the last runner alive until there is another."""
        for handle in list(self._executor.runner_handles.values()):
            in_this_process = handle.process is None or handle.process.pid is None
            if handle.over or not handle.serves or (handle.endpoint is None and in_this_process):
                continue
            if due:
                self._executor.probe(handle)
            if handle.lease_ended or (due and not handle.settled):
                self._executor.poll_context_filled(handle)
