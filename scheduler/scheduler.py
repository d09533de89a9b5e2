"""The scheduler that a program embeds: `with scheduler.acquire("model.gguf") as lease: …`."""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Self, Unpack, assert_never
from weakref import WeakSet

from fsm import commands as do
from fsm import events as on
from fsm.core import Core
from fsm.journal import Entry
from fsm.limits import Limits
from fsm.model import DeviceId, Options
from fsm.request import ModelId, Purpose, RequestId, Want
from scheduler.answers import error_of
from scheduler.asking import Acquiring, Reservation
from scheduler.clock import monotonic_clock
from scheduler.devices import Devices
from scheduler.driver import Driver
from scheduler.engines.llama import LlamaEngine
from scheduler.engines.python import PythonEngine
from scheduler.errors import SchedulerBroken, SchedulerClosed, SchedulerError, SchedulerForked
from scheduler.executor import Executor
from scheduler.hub import EventStream, Hub
from scheduler.lease import Lease
from scheduler.prober import Prober
from scheduler.registry import Asking, Model, Question, Registry
from scheduler.settings import Settings, parse_bytes, parse_duration
from scheduler.status import Status, status_of
from scheduler.ticket import Callback, FutureTicket, Ticket

log = logging.getLogger("loadmaster")

_FIRST_SAMPLE_S = 10.0  # how long a slow GPU driver may hold up the start
_EXIT_TIMEOUT_S = 0.0  # when the interpreter exits without close, nobody is left to release a lease
_LAST_WORDS_S = 2.0  # beyond the time-outs, for killed processes to be reaped and threads to end
_FRESH_S = 2.0  # how long a reservation waits for a sample of the devices
_CLOSE_LOOK_S = 0.1  # between two looks, while it closes, at whether leases are still held
_LOOK_UP_S = 1.0  # no single wait is longer: a Ctrl-C that comes right before one is only seen when it ends


class Scheduler:
    """Loads models on demand into runners, shares them by lease, and gives them up when room is needed.

    Safe to use from any thread, from event loops and from signal handlers. Close it, or use it in a `with` block; what
    is not closed is closed when the interpreter exits. After a fork only the parent may use it.

    `settings` defaults to the environment's (`LOADMASTER_…`), see `Settings`.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings.from_environment()
        self._forked = False  # this is the copy in a forked child: nothing here may be touched
        self._closing = False
        self._finished = threading.Event()  # every runner is unloaded after a close
        self._close_lock = threading.Lock()  # one closes, the others wait for it
        self._tickets: dict[RequestId, Ticket] = {}  # from Acquire until refused, lost or given back
        self._ids = itertools.count(1)
        self._hub = Hub(self.settings.event_buffer)
        self._core = Core(_limits(self.settings), self.settings.eviction)
        self._driver = Driver(self._core, monotonic_clock, self._perform, self._publish, self._fail)
        self._devices = Devices(memory_limit_bytes=self.settings.memory_limit, gpus=self.settings.gpus)
        self._engines = (LlamaEngine(cpu_threads=self.settings.cpu_threads), PythonEngine())
        self._registry = Registry(*self._engines, pin=lambda model: self._driver.post(on.Pin(model)))
        self._executor = Executor(
            self.settings, self._devices, self._registry.engine_of, self._driver.post, self._core.pool.runners
        )
        self._prober = Prober(self._executor, self.settings.probe_interval)
        _open_schedulers.add(self)
        self._driver.start()
        self._executor.sampler.refresh(_FIRST_SAMPLE_S)
        self._prober.start()

    # -- asking for models --------------------------------------------------------------------------------------------

    def acquire(self, model: Model, **asking: Unpack[Asking]) -> Lease:
        """Return a lease on a runner of `model`, loading it if need be; blocks until then.

        `model` is the path of a GGUF file, a `ModelSpec` or a `PythonModel`; `Asking` lists the keywords. Those of
        loading matter only if they are named: a runner that was loaded otherwise serves whoever does not care.

        Raises `QueueFull`, `ModelNotFound`, `InvalidModel`, `DoesNotFit`, `LoadFailed`, `LoadTimeout`,
        `AcquireTimeout`, `UnsupportedOption`, `InvalidSettings`, `SchedulerClosed`.
        """
        question = self._registry.question(model, asking)
        ticket = Ticket(RequestId(next(self._ids)), question.name)
        lease = Lease(self, ticket)  # made first: whatever Ctrl-C interrupts, its end gives back what was granted
        self._wait(ticket, question)
        return lease

    def submit(self, model: Model, **asking: Unpack[Asking]) -> Future[Lease]:
        """Like `acquire`, as a future. `cancel()` works until it is granted; then the lease is to be released."""
        future: Future[Lease] = Future()

        def deliver(ticket: FutureTicket) -> None:
            lease = Lease(self, ticket) if ticket.error is None else None
            if not ticket.settle(future, lease) and lease is not None:
                lease.release()

        self._promise(future, self._registry.question(model, asking), deliver)
        return future

    def acquire_async(self, model: Model, **asking: Unpack[Asking]) -> Acquiring:
        """Like `acquire`, for `await` and `async with`; a task that is cancelled while it waits has cancelled."""
        return Acquiring(self, self._registry.question(model, asking))

    def preload(self, model: Model, **asking: Unpack[Asking]) -> Future[None]:
        """Load a model without a lease; the future is done when it rests, loaded."""
        future: Future[None] = Future()

        def deliver(ticket: FutureTicket) -> None:
            self._tickets.pop(ticket.id, None)
            ticket.settle(future, None)

        self._promise(future, self._registry.question(model, asking, Purpose.preload), deliver)
        return future

    def expire(self, model: Model, **asking: Unpack[Asking]) -> None:
        """Have a model leave memory: at once if idle, after its leases if busy; harmless if it is not loaded."""
        self._post(on.Expire(self._registry.identity(model, asking)))

    def pin(self, model: Model, **asking: Unpack[Asking]) -> None:
        """Never give a model up for others, nor for its keep-alive, from now on; it need not be loaded yet."""
        self._post(on.Pin(self._registry.identity(model, asking)))

    def unpin(self, model: Model, **asking: Unpack[Asking]) -> None:
        """Treat a model like any other again."""
        self._post(on.Unpin(self._registry.identity(model, asking)))

    def reserve(self, device: str, size: str | int, *, timeout: str | float | None = None) -> Reservation:
        """Take memory of the program's own out of the account while it is held, giving up idle runners for it.

        `device` is "cpu" or a GPU's id as `status()` shows it. Blocks until there is room; raises `DoesNotFit` at once
        where there never can be, `AcquireTimeout`, `SchedulerClosed`.
        """
        amount = ((DeviceId(device), parse_bytes(size)),)
        self._executor.sampler.refresh(_FRESH_S)
        want = Want(ModelId(""), Options(), Purpose.memory, 0, amount)
        timeout_s = None if timeout is None else parse_duration(timeout, name="timeout")
        question = Question(want, f"{size} on {device}", None, timeout_s)
        ticket = Ticket(RequestId(next(self._ids)), question.name)
        reservation = Reservation(self, ticket)
        self._wait(ticket, question)
        return reservation

    # -- looking at it ------------------------------------------------------------------------------------------------

    def status(self) -> Status:
        """Return the runners, the queue and the devices as they are now."""
        snapshot, failure = self._driver.read(lambda core: (core.snapshot(), core.policy_failure))
        problems = self._devices.problems
        if failure:
            problems = (*problems, f"the eviction policy raised {failure}: the oldest runners go first instead")
        return status_of(snapshot, monotonic_clock(), self._registry, dict(self._executor.lives).get, problems)

    def name(self, model: ModelId) -> str:
        """Return the name of a model whose identity an event tells."""
        return self._registry.name(model)

    def events(self) -> EventStream:
        """Return an iterator over every transition and decision from now on, with its reason.

        It blocks for the next one and ends when the scheduler has closed. A reader that falls more than `event_buffer`
        entries behind finds a `Gap` in place of the oldest.
        """

        def listen(core: Core) -> EventStream:
            if core.journal is None:
                core.journal = []
            return self._hub.open()

        return self._driver.read(listen)

    # -- its end ------------------------------------------------------------------------------------------------------

    def close(self, timeout: str | float | None = None) -> None:
        """Refuse new requests, answer the queued ones, let leases finish for `timeout`, then stop every runner.

        `timeout` defaults to the setting `close_timeout`; leases that last longer are broken. Returns soon after it
        whatever happens; an object whose `unload` hangs is named in a warning. Calling it again is harmless.
        """
        if self._forked:
            return
        timeout_s = self.settings.close_timeout if timeout is None else parse_duration(timeout, name="timeout")
        self._closing = True
        self._driver.post(on.Close(timeout_s))
        try:
            if self._driver.broken is None:
                self._await_the_end(timeout_s)
        finally:  # after Ctrl-C too
            with self._close_lock:
                self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _await_the_end(self, timeout_s: float) -> None:
        """Wait until every runner is unloaded: for as long as leases may last, then for as long as a stop may take."""
        stop_s = self.settings.stop_grace + _LAST_WORDS_S
        now = time.monotonic()
        leases_end, end = now + timeout_s, now + stop_s
        while not self._finished.is_set() and (now := time.monotonic()) < end:
            if self._tickets and now < leases_end:
                end = now + stop_s
            self._finished.wait(min(end - now, _CLOSE_LOOK_S))

    def _end(self) -> None:
        """Stop what is left: processes first, then threads, then those who still wait."""
        _open_schedulers.discard(self)
        end = time.monotonic() + _LAST_WORDS_S
        self._prober.close(max(0.1, end - time.monotonic()))
        for engine in self._engines:
            engine.close(max(0.1, end - time.monotonic()))
        hung = self._executor.close(max(0.1, end - time.monotonic()))
        self._driver.stop(max(0.1, end - time.monotonic()))
        stuck = [self._registry.name(life.model) for life in self._executor.lives.values() if not life.over]
        if hung or stuck:
            log.warning("closed, but these did not end: %s", ", ".join([*stuck, *hung]))
        self._answer_all(SchedulerClosed)
        self._hub.close()
        self._devices.close()

    # -- between the callers and the core -----------------------------------------------------------------------------

    def _wait(self, ticket: Ticket, question: Question) -> None:
        """Ask and block until it is granted; raises the refusal."""
        try:
            self._ask(ticket, question)
            while not ticket.gate.acquire(timeout=_LOOK_UP_S):
                continue
        except BaseException:  # Ctrl-C, say: whoever leaves has cancelled
            self._withdraw(ticket)
            raise
        if ticket.error is not None:
            raise ticket.error

    def _promise(self, future: Future[Any], question: Question, deliver: Callable[[FutureTicket], None]) -> None:
        """Ask for a future; one that is cancelled while it waits has left."""
        ticket = self._submit(question, deliver)

        def leave(done: Future[Any]) -> None:
            if done.cancelled():
                self._withdraw(ticket)
                ticket.settle(done, None)

        future.add_done_callback(leave)

    def _submit(self, question: Question, deliver: Callable[[FutureTicket], None]) -> FutureTicket:
        """Ask and return; `deliver` is called from a worker when it is answered."""
        ticket = FutureTicket(RequestId(next(self._ids)), question.name, self._executor.callers.put, deliver)
        self._ask(ticket, question)
        return ticket

    def _ask(self, ticket: Ticket, question: Question) -> None:
        """Post a request; the ticket is answered some time after, or before this returns."""
        self._tickets[ticket.id] = ticket
        self._post(on.Acquire(ticket.id, question.want, question.keep_alive_s, question.timeout_s))
        if self._closing and self._finished.is_set() and self._tickets.pop(ticket.id, None) is not None:
            ticket.answer(None, SchedulerClosed())  # the driver has ended, or is about to

    def _post(self, event: on.Event) -> None:
        if self._forked:
            raise SchedulerForked()
        self._driver.post(event)

    def _withdraw(self, ticket: Ticket) -> None:
        """The asker is gone: whatever becomes of the request, nothing of it remains."""
        if ticket.id in self._tickets:
            self._driver.post(on.Cancel(ticket.id))  # first: if Ctrl-C comes in between, it is only said twice
            self._tickets.pop(ticket.id, None)

    def _give_back(self, ticket: Ticket) -> bool:
        """Release what a ticket holds; return False where that was done before, or it was lost."""
        if ticket.id not in self._tickets or self._forked:
            return False
        self._driver.post(on.Release(ticket.id))  # first: if Ctrl-C comes in between, it is only said twice
        self._tickets.pop(ticket.id, None)
        return True

    def _listen(self, ticket: Ticket, what: str, callback: Callback) -> None:
        """Have a callback run when a lease is lost or wanted; at once where it is already."""

        def add(_: Core) -> bool:
            happened = bool(ticket.lost) if what == "lost" else ticket.wanted
            if not happened:
                ticket.callbacks = (*ticket.callbacks, (what, callback))
            return happened

        if self._driver.read(add):
            self._executor.callers.put(lambda: _call(callback))

    def _notify(self, ticket: Ticket, what: str) -> None:
        for when, callback in ticket.callbacks:
            if when == what:
                self._executor.callers.put(lambda callback=callback: _call(callback))  # type: ignore[misc]  # binds now

    def _perform(self, command: do.Command) -> None:
        """File one command; under the driver's lock."""
        match command:
            case do.Grant(request, runner):
                if (ticket := self._tickets.get(request)) is not None:
                    ticket.answer(self._executor.lives.get(runner) if runner is not None else None, None)
            case do.Inspect() | do.Launch() | do.Stop() | do.Sample():
                self._executor.perform(command)
            case do.Reject(request, refusal):
                if (ticket := self._tickets.pop(request, None)) is not None:
                    ticket.answer(None, error_of(refusal, self._registry))
            case do.Revoke(request, reason):
                if (ticket := self._tickets.pop(request, None)) is not None:
                    ticket.lost = reason
                    self._notify(ticket, "lost")
            case do.Ask(_, requests):
                for id in requests:
                    if (ticket := self._tickets.get(id)) is not None:
                        ticket.wanted = True
                        self._notify(ticket, "wanted")
            case do.Finish():
                self._finished.set()
            case _:
                assert_never(command)

    def _publish(self, entries: Sequence[Entry]) -> None:
        """Hand on what was decided; under the driver's lock."""
        if not self._hub.publish(entries):
            self._core.journal = None

    def _fail(self, error: BaseException) -> None:
        """A step raised: tell everybody, and let close end the rest."""
        log.error("a decision failed; the scheduler has stopped", exc_info=error)
        self._answer_all(lambda: SchedulerBroken(repr(error)))
        self._finished.set()

    def _answer_all(self, error: Callable[[], SchedulerError]) -> None:
        while self._tickets:
            try:
                _, ticket = self._tickets.popitem()
            except KeyError:
                return
            if ticket.answered:
                ticket.lost = str(error())
            else:
                ticket.answer(None, error())  # one each: a traceback is added to it where it is raised


def _limits(settings: Settings) -> Limits:
    return Limits(
        max_queue=settings.max_queue,
        max_runners=settings.max_runners,
        keep_alive_s=settings.keep_alive,
        max_wait_s=settings.max_wait,
        min_residency_s=settings.min_residency,
        load_timeout_s=settings.load_timeout,
        recovery_timeout_s=settings.recovery_timeout,
        loads_per_gpu=settings.loads_per_device,
        loads_on_host=settings.loads_on_host,
    )


def _call(callback: Callback) -> None:
    try:
        callback()
    except Exception:
        log.exception("a callback of a lease failed")


_open_schedulers: WeakSet[Scheduler] = WeakSet()


def _close_all() -> None:
    for scheduler in list(_open_schedulers):
        scheduler.close(_EXIT_TIMEOUT_S)


def _disown() -> None:
    for scheduler in list(_open_schedulers):
        scheduler._forked = True


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown)
