"""Every request between the one who asks and the core: tickets out, answers in."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, assert_never

from fsm.core import Core
from fsm.machine.request import ModelId, RequestId
from fsm.messages.commands import Finished, Grant, NotifyContention, Reject, RevokeLease
from fsm.messages.events import Acquire, Cancel, Event, Release, Unresponsive
from fsm.messages.reasons import NoAnswer
from fsm.messages.refusals import QueueFullRefusal
from scheduler.concurrency.latch import Latch
from scheduler.errors.exceptions import (
    InvalidSettings,
    SchedulerBroken,
    SchedulerClosed,
    SchedulerError,
    SchedulerForked,
)
from scheduler.errors.from_refusals import error_of
from scheduler.errors.wording import revoke_reason
from scheduler.runtime.driver import Driver, Value
from scheduler.runtime.executor import Executor
from scheduler.runtime.model_registry import ModelRegistry, ParsedRequest
from scheduler.runtime.pending_request import Callback, FutureRequest, PendingRequest

log = logging.getLogger("loadmaster")

Answer = Grant | Reject | RevokeLease | NotifyContention | Finished  # all other commands are the executor's

_LOOK_UP_S = 1.0  # no single wait is longer: a Ctrl-C that comes right before one is only seen when it ends


class RequestBroker:
    """Takes requests in and hands answers out: a peer of the driver, which decides, and of the executor."""

    def __init__(
        self,
        registry: ModelRegistry,
        driver: Driver,
        executor: Executor,
        knows: Callable[[ModelId], bool],
        probe_timeout_s: float,
    ) -> None:
        self.forked = False  # this is the copy in a forked child: nothing here may be touched
        self.closing = False
        self.finished = Latch()  # every runner is unloaded after a close
        self.requests: dict[RequestId, PendingRequest] = {}  # from Acquire until refused, lost or given back
        self._ids = itertools.count(1)
        self._registry = registry
        self._driver = driver
        self._executor = executor
        self._knows = knows  # whether the core knows a model; called under the driver's lock
        self._probe_timeout_s = probe_timeout_s

    def new_request(self, question: ParsedRequest) -> PendingRequest:
        """Return a ticket for a question that is still to be asked."""
        return PendingRequest(RequestId(next(self._ids)), question.spec.model, question.name)

    def submit_and_wait(self, ticket: PendingRequest, question: ParsedRequest) -> None:
        """Ask and block until it is granted; raises the refusal."""
        try:
            self.submit(ticket, question)
            while not ticket.gate.acquire(timeout=_LOOK_UP_S):
                continue
        except BaseException:  # Ctrl-C, say: whoever leaves has cancelled
            self.cancel(ticket)
            raise
        if ticket.error is not None:
            raise ticket.error

    def submit_future(
        self, future: Future[Any], question: ParsedRequest, deliver: Callable[[FutureRequest], None]
    ) -> None:
        """Ask for a future; one that is cancelled while it waits has left."""
        ticket = self.new_future_request(question, deliver)

        def leave(done: Future[Any]) -> None:
            if done.cancelled():
                self.cancel(ticket)
                ticket.settle(done, None)

        future.add_done_callback(leave)

    def new_future_request(self, question: ParsedRequest, deliver: Callable[[FutureRequest], None]) -> FutureRequest:
        """Ask and return; `deliver` is called from a worker when it is answered."""
        id, model = RequestId(next(self._ids)), question.spec.model
        ticket = FutureRequest(id, model, question.name, self._executor.call, deliver)
        self.submit(ticket, question)
        return ticket

    def submit(self, ticket: PendingRequest, question: ParsedRequest) -> None:
        """Post a request; the ticket is answered some time after, or before this returns."""
        self.requests[ticket.id] = ticket
        if question.model is not None:
            self._registry.register(question.model)  # once its ticket is there: see _drop
        self.post(Acquire(ticket.id, question.spec, question.keep_alive_s, question.timeout_s))
        if self.closing and self.finished.is_set() and self.requests.pop(ticket.id, None) is not None:
            ticket.answer(None, SchedulerClosed())  # the driver has ended, or is about to

    def check(self) -> None:
        """Raise `SchedulerForked` in a forked child: its copies of locks may be held by threads that it has not."""
        if self.forked:
            raise SchedulerForked()

    def post(self, event: Event) -> None:
        self.check()
        self._driver.post(event)

    def query(self, look: Callable[[Core], Value]) -> Value:
        """Return what `look` finds in the core."""
        self.check()
        return self._driver.query(look)

    def cancel(self, ticket: PendingRequest) -> None:
        """The asker is gone: whatever becomes of the request, nothing of it remains."""
        if ticket.id in self.requests and not self.forked:
            self._driver.post(Cancel(ticket.id))  # first: if Ctrl-C comes in between, it is only said twice
            self.requests.pop(ticket.id, None)

    def release(self, ticket: PendingRequest) -> bool:
        """Release what a ticket holds; return False where that was done before, or it was lost."""
        if ticket.id not in self.requests or self.forked:
            return False
        if ticket.runner is not None:
            ticket.runner.lease_ended = True
        self._driver.post(Release(ticket.id))  # first: if Ctrl-C comes in between, it is only said twice
        self.requests.pop(ticket.id, None)
        return True

    def add_listener(self, ticket: PendingRequest, what: str, callback: Callback) -> None:
        """Have a callback run when a lease is lost or wanted; at once where it is already."""
        if not callable(callback):
            raise InvalidSettings("callback", callback, "callable")

        def add(_: Core) -> bool:
            happened = bool(ticket.lost) if what == "lost" else ticket.wanted
            if not happened:
                ticket.callbacks = (*ticket.callbacks, (what, callback))
            return happened

        if self.query(add):
            self._executor.call(lambda: _call(callback))

    def verify_runner(self, ticket: PendingRequest) -> None:
        """A connection to a runner broke: have it known whether that is gone; blocks for as long as a probe may.

        Its exit may be heard of some time after its connections have ended, and it must be granted to nobody meanwhile.
        """
        life = ticket.runner
        if life is None or life.process is None or ticket.lost or self.finished.is_set():
            return
        if not life.over and life.process.healthy(self._probe_timeout_s):
            return
        if not life.over:
            self.post(Unresponsive(life.runner, NoAnswer(self._probe_timeout_s, disconnected=True)))
        self.query(lambda core: None)  # after that: the lease is lost

    def _notify(self, ticket: PendingRequest, what: str) -> None:
        for when, callback in ticket.callbacks:
            if when == what:
                self._executor.call(lambda callback=callback: _call(callback))  # type: ignore[misc]  # binds now

    def perform(self, command: Answer) -> None:
        """Hand on one answer; under the driver's lock."""
        match command:
            case Grant(request, runner):
                if (ticket := self.requests.get(request)) is not None:
                    ticket.answer(self._executor.runner_handles.get(runner) if runner is not None else None, None)
            case Reject(request, refusal):
                if request in self.requests:
                    error = error_of(refusal, self._registry.name)  # first: if it raises, `answer_all` finds the ticket
                    if (ticket := self.requests.pop(request, None)) is not None:
                        ticket.answer(None, error)
                        if isinstance(refusal, QueueFullRefusal):  # the core never heard of it
                            self._forget(ticket.model_id)
            case RevokeLease(request, reason):
                if (ticket := self.requests.pop(request, None)) is not None:
                    ticket.closed = reason is None
                    ticket.lost = revoke_reason(reason)
                    self._notify(ticket, "lost")
            case NotifyContention(_, requests):
                for id in requests:
                    if (ticket := self.requests.get(id)) is not None:
                        ticket.wanted = True
                        self._notify(ticket, "wanted")
            case Finished():
                self.finished.set()
            case _:
                assert_never(command)

    def drop_unused_objects(self) -> None:
        """Forget objects that nobody asks for or has pinned and that are not loaded, with what their loads refer to."""
        if self._registry.objects():
            self.query(self._let_go)

    def _let_go(self, core: Core) -> None:
        self._executor.forget_past()
        used = core.models_in_use()
        for id in self._registry.objects():
            if id not in used:
                self._drop(id)

    def forget(self, model: ModelId) -> None:
        """Forget a model that the core does not know, unless somebody asks for it."""
        self.query(lambda _: self._forget(model))

    def _forget(self, model: ModelId) -> None:
        """The same, under the driver's lock."""
        if not self._knows(model):
            self._drop(model)

    def _drop(self, model: ModelId) -> None:
        """Forget a model, unless somebody asks for it; under the driver's lock.

        Whoever asks at this moment has a ticket before the model is kept: it is seen here, or the model is kept again.
        """
        if (forgotten := self._registry.unregister(model)) is None:
            return
        if any(ticket.model_id == model for ticket in list(self.requests.values())):
            self._registry.register(forgotten)

    def fail(self, error: BaseException) -> None:
        """A step raised: tell everybody, and let close end the rest."""
        self.answer_all(lambda: SchedulerBroken(repr(error)))
        self.finished.set()

    def answer_all(self, error: Callable[[], SchedulerError]) -> None:
        """End every request that is left: refuse what waits, break what is held."""
        while self.requests:
            try:
                _, ticket = self.requests.popitem()
            except KeyError:
                return
            if ticket.answered:
                ticket.closed, ticket.lost = True, str(error())
            else:
                ticket.answer(None, error())  # one each: a traceback is added to it where it is raised


def _call(callback: Callback) -> None:
    try:
        callback()
    except Exception:
        log.exception("a callback of a lease failed")
