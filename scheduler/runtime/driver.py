"""The inbox, and who drains it: whichever thread holds the core's lock, but never the main thread.

Five things would break this if they were not built in:

* **Ctrl-C** may raise inside a step at any point, and only in the main thread. So the main thread never runs a step:
  it wakes the driver's own thread. An exception that escapes a step all the same stops it and fails every waiter.
* **Finalisers** may run inside a step, in the thread that holds the lock. So `post` appends, and drains only as far as
  it gets the lock without blocking; who holds it looks at the inbox once more after letting go.
* **Order.** Commands are handed on under the lock, in order. `perform` only files them; it must not block, nor run the
  user's code.
* **Signal handlers** may interrupt the main thread wherever it is, and wait for a step there. So nothing that is done
  under the lock waits for a lock that the main thread may hold.
* **Exit.** The thread is a daemon; nothing joins it but `close`, which bounds its wait.
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

_LONGEST_SLEEP_S = 3600.0  # a time-out that every platform's wait accepts
_GAP_S = 5.0  # a tick that is late by so much: nothing ran here meanwhile, the machine or this program stood still
_CHECK_S = 1.0  # how often one who reads makes sure that the thread still runs
_TICK = Tick()


class _Query:
    """A wish to read the core, in its place among the events."""

    def __init__(self, look: Callable[[Core], object]) -> None:
        self.look = look
        self.done = Latch()
        self.value: object = None
        self.error: Exception | None = None
        self._once = allocate_lock()  # taken by the one who reads

    def run(self, core: Core) -> None:
        """Read, unless somebody does already, and let the one who wished know."""
        if not self._once.acquire(blocking=False):
            return
        try:
            self.value = self.look(core)
        except Exception as error:
            self.error = error
        self.done.set()


class Driver:
    """Feeds a core with events in one total order and hands its commands on."""

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
        self._perform = perform  # under the lock: files a command, does not block
        self._publish = publish  # under the lock: hands journal entries to the listeners; returns whether there is one
        self._fail = fail  # once, when a step raised: every waiter is to be told; again for each event after it
        self._step = step or core.step  # under the lock: decides, and does not block
        self._stood_still = stood_still  # before the first tick after a gap, on the driver's thread; may post
        self._inbox: deque[Event | _Query] = deque()
        self._lock = threading.Lock()  # held while steps run; taken without blocking, but for what is due
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()  # its put is safe in finalisers; False: stop
        self._deadline = math.inf  # the core's, as of the last step
        self._asleep_until = -math.inf  # when the thread wakes by itself
        self._main = threading.main_thread().ident
        self.broken: BaseException | None = None  # what a step raised; nothing is decided after it
        self._runs = False  # the thread drains for the main thread
        self._thread = threading.Thread(target=self._run, name="loadmaster-driver", daemon=True)

    def start(self) -> None:
        """Begin to keep time and to drain for the main thread."""
        self._runs = True
        self._thread.start()

    def post(self, item: Event | _Query) -> None:
        """Take in an event, or a wish to read; from any thread, in finalisers and signal handlers too. Never blocks."""
        if threading.get_ident() == self._main:
            try:
                self._inbox.append(item)
            finally:  # even if Ctrl-C came in between
                self._wake.put(True)
        else:
            self._inbox.append(item)
            self._drain()

    def query(self, look: Callable[[Core], Value]) -> Value:
        """Return what `look` finds in the core after everything that this thread posted before; it must be quick."""
        request = _Query(look)
        if self._runs:
            self.post(request)
        while not request.done.wait(_CHECK_S if self._runs else 0.0):
            if not self._runs:  # nobody drains for the main thread any more
                self._run_alone(request)
        if request.error is not None:
            raise request.error
        return cast(Value, request.value)

    def stop(self, timeout_s: float) -> bool:
        """End the thread; return whether it ended in time."""
        self._wake.put(False)
        if threading.current_thread() is not self._thread and self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run_alone(self, request: _Query) -> None:
        taken = self._lock.acquire(timeout=_CHECK_S)  # no longer: a handler may have interrupted this very thread here
        try:
            request.run(self._core)
        finally:
            if taken:
                self._lock.release()

    def _drain(self, *, wait: bool = False) -> None:
        while self._inbox and self._lock.acquire(blocking=wait):
            try:
                self._step_all()
            except BaseException as error:
                log.error("step %d failed; the scheduler has stopped", self._core.steps, exc_info=error)
                self.broken = error
                self._deadline = math.inf  # nothing is due any more
                self._fail(error)
            finally:
                self._lock.release()
            if self._deadline < self._asleep_until:
                self._wake.put(True)

    def _step_all(self) -> None:
        core, inbox = self._core, self._inbox
        while inbox:
            event = inbox.popleft()
            if isinstance(event, _Query):
                self._tell()  # first: whoever reads has been told of what is found
                event.run(core)
            elif self.broken is not None:
                self._fail(self.broken)  # not raised again: its traceback would grow with each event
            else:
                for command in self._step(self._clock(), event):
                    self._perform(command)
        if self.broken is None:
            self._deadline = core.deadline()
        self._tell()

    def _tell(self) -> None:
        if journal := self._core.decision_log:
            if self._publish(journal):
                journal.clear()
            else:  # nothing is noted any more
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
                continue  # it moved while it was noted: the drainer may not have seen that it must wake us
            due = False
            try:
                sleep_s = min(max(0.0, until - self._clock()), _LONGEST_SLEEP_S)
                if not self._wake.get(timeout=sleep_s):
                    return
            except queue.Empty:
                if self._clock() - until > _GAP_S:
                    self._stood_still()
                self._inbox.append(_TICK)
                due = True
            self._asleep_until = -math.inf  # awake: nobody needs to wake us
            self._drain(wait=due)  # what is due stays due until whoever holds the lock has seen it: that is waited for
