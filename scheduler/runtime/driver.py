"""The driver: steps the core with the events of an inbox, on any thread that holds its lock but the main thread.

The driver's own thread posts the ticks, and so makes the plans that events leave due (`CoreConfig.plans_later`).

Five things would break the driver if it did not provide for them:

* **Ctrl-C** may raise inside a step at any point, and only in the main thread. So the main thread never runs a step:
  it wakes the driver's own thread. An exception that still escapes from a step stops the driver and fails every
  pending request.
* **Finalisers** may run inside a step, in the thread that holds the lock. So `post` appends, and drains only as far as
  it gets the lock without blocking; the thread that holds the lock looks at the inbox once more after releasing it.
* **Order.** Commands are performed under the lock, in order. `perform` only queues a command; it must not block, nor
  run the user's code.
* **Signal handlers** may interrupt the main thread wherever it is, and wait for a step there. So no code under the
  lock waits for a lock that the main thread may hold.
* **Exit.** The driver's thread is a daemon. Only `stop` joins it, and `stop` bounds its wait.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
from _thread import allocate_lock
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

from fsm.core import Core
from fsm.messages.commands import Command
from fsm.messages.decision_log import Entry
from fsm.messages.events import Event, Tick
from scheduler.concurrency.clock import Clock
from scheduler.concurrency.latch import Latch

Value = TypeVar("Value")

log = logging.getLogger("loadmaster")

_LONGEST_SLEEP_S = 3600.0  # a timeout that every platform's wait accepts
_GAP_S = 5.0  # a tick that is this late shows that the machine or the program stood still
_CHECK_S = 1.0  # how often a thread that waits for a query checks that the driver's thread still runs
_TICK = Tick()


class _Query:
    """A query of the core, in its place among the events."""

    def __init__(self, look: Callable[[Core], object]) -> None:
        self.look = look
        self.done = Latch()
        self.value: object = None
        self.error: Exception | None = None
        self._once = allocate_lock()  # taken by the thread that runs the query

    def run(self, core: Core) -> None:
        """Run the query, unless another thread does already, and wake the thread that waits for it."""
        if not self._once.acquire(blocking=False):
            return
        try:
            self.value = self.look(core)
        except Exception as error:
            self.error = error
        self.done.set()


class Driver:
    """Steps a core with events in one total order and has its commands performed in that order."""

    def __init__(
        self,
        core: Core,
        clock: Clock,
        perform: Callable[[Command], None],
        publish: Callable[[Sequence[Entry]], bool],
        fail: Callable[[BaseException], None],
        stood_still: Callable[[], None] = lambda: None,
        step: Callable[[float, Event], Sequence[Command]] | None = None,
    ) -> None:
        self._core = core
        self._clock = clock
        self._perform = perform  # under the lock: queues a command, does not block
        # under the lock: offers the entries of the decision log, or none; returns whether anything listens
        self._publish = publish
        # called when a step raised, to fail every pending request, and again for each event after that
        self._fail = fail
        self._step = step or core.step  # under the lock: decides, and does not block
        self._stood_still = stood_still  # called before the first tick after a gap, on the driver's thread; may post
        self._inbox: deque[Event | _Query] = deque()
        self._lock = threading.Lock()  # held while steps run; taken without blocking, except for an event that is due
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()  # `put` is safe in finalisers; False stops the thread
        self._deadline = math.inf  # the core's deadline, as of the last step
        self._asleep_until = -math.inf  # when the thread wakes by itself
        self._main = threading.main_thread().ident
        self.broken: BaseException | None = None  # what a step raised; no event is decided after that
        self._runs = False  # the driver's thread runs, and drains for the main thread
        self._thread = threading.Thread(target=self._run, name="loadmaster-driver", daemon=True)

    def start(self) -> None:
        """Start the driver's thread, which keeps the time and drains the inbox for the main thread."""
        self._runs = True
        self._thread.start()

    def post(self, item: Event | _Query) -> None:
        """Add an event or a query to the inbox; never blocks, and may be called in finalisers and signal handlers."""
        if threading.get_ident() == self._main:
            try:
                self._inbox.append(item)
            finally:  # even if Ctrl-C came in between
                self._wake.put(True)
        else:
            self._inbox.append(item)
            self._drain(bounded=True)

    def query(self, look: Callable[[Core], Value]) -> Value:
        """Return what `look` returns for the core, after all events that this thread posted before; `look` is quick."""
        request = _Query(look)
        if self._runs:
            self.post(request)
        while not request.done.wait(_CHECK_S if self._runs else 0.0):
            if not self._runs:  # no thread drains for the main thread any more
                self._run_alone(request)
        if request.error is not None:
            raise request.error
        return cast(Value, request.value)

    def stop(self, timeout_s: float) -> bool:
        """End the driver's thread; return whether it ended within `timeout_s` seconds."""
        self._wake.put(False)
        if threading.current_thread() is not self._thread and self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run_alone(self, request: _Query) -> None:
        # no longer: a signal handler may have interrupted this very thread here
        taken = self._lock.acquire(timeout=_CHECK_S)
        try:
            request.run(self._core)
        finally:
            if taken:
                self._lock.release()

    def _drain(self, *, tick: bool = False, bounded: bool = False) -> None:
        """Step with all events of the inbox, where no other thread does; with `tick`, wait for the lock, and tick.

        A caller's thread is `bounded`: it steps with what was there when it got the lock, its own event among it, and
        leaves what others post meanwhile to the driver's thread.
        """
        while (tick or self._inbox) and self._lock.acquire(blocking=tick):
            failed: BaseException | None = None
            try:
                if tick:  # only now: no other thread makes the plan that may be due
                    self._inbox.append(_TICK)
                    tick = False
                self._step_all(len(self._inbox) if bounded and self._runs else math.inf)
            except BaseException as error:
                failed = self.broken = error
                self._deadline = math.inf  # no deadline is due any more
                self._fail(error)
            finally:
                self._lock.release()
            if failed is not None:  # not under the lock: a handler may block
                log.error("step %d failed; the scheduler has stopped", self._core.steps, exc_info=failed)
            if self._deadline < self._asleep_until:
                self._wake.put(True)
            if bounded and self._runs and self._inbox:
                self._wake.put(True)
                return

    def _step_all(self, most: float) -> None:
        core, inbox = self._core, self._inbox
        entries = core.decision_log
        if entries is None and self._publish(()):  # logging was set up, for example
            entries = core.decision_log = []
        while inbox and most > 0:
            event = inbox.popleft()
            most -= 1
            if isinstance(event, _Query) and core.plan_due and self.broken is None:
                inbox.appendleft(event)  # a query sees what became of the events before it
                most += 1
                event = _TICK
            if isinstance(event, _Query):
                self._tell()  # first: the listeners get the entries of a step before a query sees that step
                event.run(core)
            elif self.broken is not None:
                self._fail(self.broken)  # called and not raised: the traceback would grow with each event
            else:
                for command in self._step(self._clock(), event):
                    self._perform(command)
        if self.broken is None:
            self._deadline = core.deadline()
        if entries:
            self._tell()

    def _tell(self) -> None:
        if entries := self._core.decision_log:
            if self._publish(entries):
                entries.clear()
            else:  # the decision log has no listener any more
                self._core.decision_log = None

    def _run(self) -> None:
        try:
            self._keep_time()
        finally:
            self._runs = False

    def _keep_time(self) -> None:
        while True:
            until = self._asleep_until = self._deadline
            if self._deadline < until:
                # the deadline moved while it was noted: the draining thread may not have seen that it must wake this
                # thread
                continue
            due = False
            try:
                sleep_s = min(max(0.0, until - self._clock()), _LONGEST_SLEEP_S)
                if not self._wake.get(timeout=sleep_s):
                    return
            except queue.Empty:
                if self._clock() - until > _GAP_S:
                    self._stood_still()
                due = True
            self._asleep_until = -math.inf  # awake: no thread needs to wake this one
            self._drain(tick=due)
