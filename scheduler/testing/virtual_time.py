"""Time that moves only when the scheduler has nothing else to do, and the one thread that moves it.

The jobs of the executor run on this thread, so that none is under way while time moves. The scheduler has nothing to do
when no job is queued, the driver has handled every event that was posted before, and no timer is due.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import threading
from _thread import allocate_lock
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from fsm.core import Core
from fsm.messages.commands import Command
from fsm.messages.decision_log import Entry
from fsm.messages.events import Event, Tick
from scheduler.concurrency.latch import Latch
from scheduler.concurrency.thread_pool import Job, ThreadPool
from scheduler.runtime.driver import Driver

log = logging.getLogger("loadmaster")


class VirtualTime:
    """A clock in seconds from 0 on, its timers, and the jobs that run between two movements of the clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self._driver: Driver | None = None  # set before the thread starts
        self._waits: Callable[[], bool] = lambda: False  # whether time is to move by itself
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._timers: list[tuple[float, int, Job]] = []  # a heap; touched by the thread alone, like what follows
        self._numbers = itertools.count()  # timers of one moment go off in the order in which they were set
        self._until = 0.0  # the moment up to which `advance` moves
        self._settled: list[Latch] = []  # set when there is nothing left to do
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="loadmaster-virtual-time", daemon=True)

    def start(self, driver: Driver, waits: Callable[[], bool]) -> None:
        """Run the jobs, and move on to whatever is due next while `waits` returns True."""
        self._driver, self._waits = driver, waits
        self._thread.start()

    def put(self, job: Job) -> None:
        """Have a job run on the thread; never blocks. After the close nothing runs."""
        self._jobs.put(job)

    def after(self, delay_s: float, job: Job) -> None:
        """Have a job run once time has moved on by so much; called on the thread alone."""
        heapq.heappush(self._timers, (self.now + delay_s, next(self._numbers), job))

    def settle(self, job: Job = lambda: None) -> None:
        """Run a job, and return when the scheduler has nothing left to do at the present moment."""
        assert threading.current_thread() is not self._thread, "load() and unload() cannot wait for virtual time"
        done = Latch()

        def begin() -> None:
            self._settled.append(done)
            job()

        self.put(begin)
        while not self._closed and not done.wait(1.0):
            continue

    def advance(self, duration_s: float) -> None:
        """Move time on, and stop on the way wherever something is due."""

        def begin() -> None:
            self._until = max(self._until, self.now + duration_s)

        self.settle(begin)

    def close(self, timeout_s: float) -> list[str]:
        """End the thread; return its name if it hangs in a job."""
        self._closed = True
        self._jobs.put(None)
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
        return [self._thread.name] if self._thread.is_alive() else []

    def _run(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                self._do(job)
                if self._jobs.empty():
                    self._move()
        finally:
            self._closed = True  # callers of `settle` are let go, whatever ended the thread

    def _do(self, job: Job) -> None:
        try:
            job()
        except Exception:
            log.exception("a job on virtual time failed")

    def _move(self) -> None:
        """Move on to what is due next, as long as nothing comes in between."""
        assert self._driver is not None
        while self._jobs.empty():
            if self._go_off():
                continue
            due = self._next()
            if not self._jobs.empty() or self._due():
                continue
            limit = math.inf if self._waits() else max(self._until, self.now)
            if due == math.inf or due > limit:
                self.now = max(self.now, self._until)
                while self._settled:
                    self._settled.pop().set()
                return
            self.now = max(self.now, due)
            if not self._due():
                self._driver.post(Tick())

    def _next(self) -> float:
        """Return when something is due, after every event that was posted before; infinite if nothing is."""
        driver = self._driver
        assert driver is not None
        deadline = driver.query(lambda core: core.deadline() if driver.broken is None else math.inf)
        return min(deadline, self._timers[0][0] if self._timers else math.inf)

    def _due(self) -> bool:
        return bool(self._timers) and self._timers[0][0] <= self.now

    def _go_off(self) -> bool:
        """Run the job of a timer that is due; return whether there was one."""
        if not self._due():
            return False
        self._do(heapq.heappop(self._timers)[2])
        return True


class VirtualDriver(Driver):
    """A driver that never wakes by itself: `VirtualTime` posts its ticks, and hears of every other event."""

    def __init__(
        self,
        time: VirtualTime,
        core: Core,
        perform: Callable[[Command], None],
        publish: Callable[[Sequence[Entry]], bool],
        fail: Callable[[BaseException], None],
        step: Callable[[float, Event], Sequence[Command]] | None,
    ) -> None:
        super().__init__(core, lambda: time.now, perform, publish, fail, step=step)
        decide = self._step

        def decide_and_tell(now: float, event: Event) -> Sequence[Command]:
            if not isinstance(event, Tick):
                time.put(lambda: None)  # the thread sees whether time is to move
            return decide(now, event)

        self._step = decide_and_tell

    def _keep_time(self) -> None:
        while self._wake.get():
            self._drain()

    def _drain(self, *, tick: bool = False, bounded: bool = False) -> None:
        super()._drain(tick=tick)  # all of it here: time would move on before another thread comes


class VirtualPool(ThreadPool):
    """Jobs that may block: they run on the thread of `VirtualTime`, one after the other."""

    def __init__(self, time: VirtualTime) -> None:
        self._time = time

    def put(self, job: Job) -> None:
        """Have `job` run; never blocks."""
        self._time.put(job)

    def ensure_threads(self) -> None:
        """There is one thread, and it runs."""

    def close(self, timeout_s: float) -> list[str]:
        """End the thread."""
        return self._time.close(timeout_s)


class InlinePool(ThreadPool):
    """Jobs that are over at once: they run where they are put, one at a time, each after the one before has returned.

    Readings of fake devices are such jobs. Jobs on the thread of `VirtualTime` wait for them.
    """

    def __init__(self) -> None:
        self._queued: deque[Job] = deque()
        self._busy = allocate_lock()  # held while jobs run; never waited for

    def put(self, job: Job) -> None:
        """Run `job`, here or where another one is running."""
        self._queued.append(job)
        while self._queued and self._busy.acquire(blocking=False):
            try:
                while self._queued:
                    self._queued.popleft()()
            finally:
                self._busy.release()

    def ensure_threads(self) -> None:
        """No threads are needed."""

    def close(self, timeout_s: float) -> list[str]:
        """Nothing is left when `put` has returned."""
        return []
