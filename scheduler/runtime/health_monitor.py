"""A thread that looks after what nobody asks for: runners that hang or have settled, memory that grows, threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from scheduler.concurrency.latch import Latch

if TYPE_CHECKING:
    from scheduler.runtime.executor import Executor

_SAMPLE_INTERVAL_S = 1.0


class HealthMonitor:
    """Has memory sampled about once a second, and each loaded runner probed once an interval; waits for neither.

    Threads that could not be started when jobs needed them are started here, as soon as there can be more again.
    `let_go` is called about once a second too: it lets go of what nobody uses any more.
    Whether a runner has settled is looked at until it has: once an interval, and within a second after a lease on it.
    """

    def __init__(self, executor: Executor, interval_s: float, let_go: Callable[[], None]) -> None:
        self._executor = executor
        self._let_go = let_go
        self._interval_s = interval_s
        self._stop = Latch()
        self._thread = threading.Thread(target=self._run, name="loadmaster-prober", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """End, and wait for it."""
        self._stop.set()
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        waited_s = 0.0
        pause_s = min(_SAMPLE_INTERVAL_S, self._interval_s)
        while not self._stop.wait(pause_s):
            self._executor.ensure_threads()
            self._executor.request_sample()
            self._let_go()
            waited_s += pause_s
            due = waited_s >= self._interval_s
            waited_s = 0.0 if due else waited_s
            self._look_round(due=due)

    def _look_round(self, *, due: bool) -> None:
        """Look at each runner; not in the loop above, which would keep the last one until there is another."""
        for life in list(self._executor.runner_handles.values()):
            if life.endpoint is None or life.over:
                continue
            if due:
                self._executor.probe(life)
            if not life.settled and (due or life.lease_ended):
                self._executor.poll_context_filled(life)
