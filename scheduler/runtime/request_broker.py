"""The request broker: every request between its caller and the core."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from fsm.core import Core
from fsm.machine.request import ModelId, RequestId
from fsm.messages.commands import Command, Finished, Grant, NotifyContention, Reject, RevokeLease
from fsm.messages.events import Acquire, Cancel, Event, Expire, FilesReplaced, Pin, Release, Unpin, Unresponsive
from fsm.messages.reasons import NoAnswer
from fsm.messages.refusals import InvalidModelRefusal, LoadFailedRefusal, QueueFullRefusal
from scheduler.concurrency.latch import Latch
from scheduler.engines.python import PythonModel
from scheduler.errors.exceptions import (
    EngineMissing,
    InvalidSettings,
    SchedulerBroken,
    SchedulerClosed,
    SchedulerError,
    SchedulerForked,
)
from scheduler.errors.from_refusals import error_of
from scheduler.errors.wording import revoke_reason
from scheduler.models.model_spec import ModelSpec
from scheduler.runtime.driver import Driver, Value
from scheduler.runtime.executor import Executor
from scheduler.runtime.lease_holders import NOTHING_HELD, Held, LeaseHolders
from scheduler.runtime.model_registry import ModelRegistry
from scheduler.runtime.pending_request import Callback, FutureRequest, LoopRequest, PendingRequest
from scheduler.runtime.request_future import RequestFuture
from scheduler.runtime.request_parser import ParsedRequest, RequestParser

log = logging.getLogger("loadmaster")

_MOST_MODELS = 1024  # files that stay registered although the core knows them no more
_LOOK_UP_S = 1.0  # longest single wait: a Ctrl-C that comes right before a wait is seen only when the wait ends


class RequestBroker:
    """Submits requests to the driver, which decides, and hands the core's answers to the callers."""

    def __init__(
        self,
        registry: ModelRegistry,
        parser: RequestParser,
        driver: Driver,
        executor: Executor,
        knows: Callable[[ModelId], bool],
        probe_timeout_s: float,
    ) -> None:
        self.forked = False  # this broker is a copy in a forked child, and must not be used
        self.closing = False
        self.holders = LeaseHolders()
        self._warned: set[RequestId] = set()  # requests that were warned of, and wait as before
        self.finished = Latch()  # every runner is unloaded after a close
        # from Acquire until the request is refused, lost or released
        self.requests: dict[RequestId, PendingRequest] = {}
        self._ids = itertools.count(1)
        self._registry = registry
        self._parser = parser
        self._driver = driver
        self._executor = executor
        self._knows = knows  # whether the core knows a model; called under the driver's lock
        self._probe_timeout_s = probe_timeout_s

    def new_request(self, parsed: ParsedRequest, scheduler: object) -> PendingRequest:
        """Return a pending request that has not been submitted; it holds the scheduler, which stays open with it."""
        return PendingRequest(RequestId(next(self._ids)), parsed.spec.model, parsed.name, scheduler)

    def new_loop_request(self, parsed: ParsedRequest, scheduler: object) -> LoopRequest:
        """Return a pending request of a task, whose event loop the answer wakes; it has not been submitted."""
        return LoopRequest(RequestId(next(self._ids)), parsed.spec.model, parsed.name, scheduler)

    def submit_and_wait(self, pending: PendingRequest, parsed: ParsedRequest, held: Held = NOTHING_HELD) -> None:
        """Submit a request and block until it is granted; raises the error of a refusal."""
        try:
            self.submit(pending, parsed, held)
            while not (pending.answered or pending.gate.acquire(timeout=_LOOK_UP_S)):
                continue  # not `pass`: Python 3.13 would leave the jump back out of the `try`
        except BaseException:  # Ctrl-C, for example: a caller that leaves cancels its request
            self.cancel(pending)
            raise
        if pending.error is not None:
            pending.raise_refusal()

    def submit_future(
        self, parsed: ParsedRequest, settle: Callable[[FutureRequest, Future[Any]], None], scheduler: object
    ) -> Future[Any]:
        """Submit a request and return its future, which `settle` completes; cancelling the future cancels the request.

        `settle` is called on a thread pool when the request is answered. The leases of the caller do not count: it may
        release them before it waits for the future, or never wait.
        """
        future: RequestFuture[Any] = RequestFuture(self._executor.call)
        pending = FutureRequest(
            RequestId(next(self._ids)), parsed.spec.model, parsed.name, scheduler,
            self._executor.deliver, lambda pending: settle(pending, future),
        )  # fmt: skip
        self.submit(pending, parsed)

        def leave(done: Future[Any]) -> None:
            if done.cancelled():
                self.cancel(pending)
                pending.settle(done, None)

        future.add_own_callback(leave)
        return future

    def submit(self, pending: PendingRequest, parsed: ParsedRequest, held: Held = NOTHING_HELD) -> None:
        """Post a request; the pending request is answered before this call returns or any time after."""
        self.requests[pending.id] = pending
        if isinstance(parsed.model, ModelSpec):
            pending.chat = parsed.model.chat
            pending.scales = parsed.model.scales
        if parsed.model is not None:  # after the pending request is in `requests`: see _drop
            self._registry.register(parsed.spec.model, parsed.model)
        if self.forked:
            raise SchedulerForked()
        self._driver.post(
            Acquire(pending.id, parsed.spec, parsed.keep_alive_s, parsed.timeout_s, parsed.max_leases, held[0], held[1])
        )
        if self.closing and self.finished.is_set() and self.requests.pop(pending.id, None) is not None:
            pending.answer(None, SchedulerClosed())  # the driver has ended, or is about to

    def held(self) -> list[str]:
        """Return the models, and the memory of the program's own, whose leases and reservations are not released."""
        return sorted({pending.model for pending in list(self.requests.values()) if pending.answered})

    def check(self) -> None:
        """Raise `SchedulerForked` in a forked child: threads that do not exist in the child may hold its locks."""
        if self.forked:
            raise SchedulerForked()

    def post(self, event: Event) -> None:
        self.check()
        self._driver.post(event)

    def pin(self, model: ModelId) -> None:
        """Pin a model for a call that names it."""
        self.post(Pin(model))
        self._registry.pinned_by_name.add(model)

    def unpin(self, model: ModelId) -> None:
        """Unpin a model for a call that names it."""
        self.post(Unpin(model))
        self._registry.pinned_by_name.discard(model)

    def end_life(self, past: ModelId, id: ModelId) -> None:
        """Have an object leave whose name has another `load` from now on; what was pinned by name stays pinned."""
        self.post(Unpin(past))
        if past in self._registry.pinned_by_name:
            self._registry.pinned_by_name.discard(past)
            self.pin(id)
        self.post(Expire(past))

    def query(self, look: Callable[[Core], Value]) -> Value:
        """Return what `look` returns for the core; raises `SchedulerForked` in a forked child."""
        self.check()
        return self._driver.query(look)

    def cancel(self, pending: PendingRequest) -> None:
        """Cancel a request whose caller has left, whether or not it was granted."""
        if pending.id in self.requests and not self.forked:
            self._driver.post(Cancel(pending.id))  # first: if Ctrl-C comes in between, Cancel is only posted twice
            self.requests.pop(pending.id, None)

    def release(self, pending: PendingRequest) -> bool:
        """Release what a request was granted; return False where it was released or lost before."""
        if pending.id not in self.requests or self.forked:
            return False
        if pending.runner is not None:
            pending.runner.lease_ended = True
        self._driver.post(Release(pending.id))  # first: if Ctrl-C comes in between, Release is only posted twice
        self.requests.pop(pending.id, None)
        return True

    def look_at_files(self, model: ModelSpec) -> None:
        """Tell the core if the files of a model that is asked for were replaced."""
        if (runner := self._executor.runner_of_other_files(model)) is not None:
            self.post(FilesReplaced(runner))

    def add_listener(self, pending: PendingRequest, what: str, callback: Callback) -> None:
        """Have a callback run when a lease is lost or contended, or at once where it is already.

        Raises `InvalidSettings` where `callback` is not callable.
        """
        if not callable(callback):
            raise InvalidSettings("callback", callback, "callable")

        def add(_: Core) -> bool:
            happened = bool(pending.lost) if what == "lost" else pending.wanted
            if not happened:
                pending.callbacks = (*pending.callbacks, (what, callback))
            return happened

        if self.query(add):
            self._executor.call(lambda: _call(callback))

    def is_wanted(self, pending: PendingRequest) -> bool:
        """Return whether other requests wait for the memory of a granted request's runner now."""
        return pending.wanted and not self.forked and self._driver.query(lambda core: core.is_wanted(pending.id))

    def verify_runner(self, pending: PendingRequest) -> None:
        """Check a runner whose connection broke, and revoke its leases if it is gone; blocks as long as a probe may.

        The exit of a runner may be reported some time after its connections have ended. Until then the runner must not
        be granted to another request.
        """
        handle = pending.runner
        if handle is None or handle.process is None or pending.lost or self.finished.is_set():
            return
        if not handle.over and handle.process.healthy(self._probe_timeout_s):
            return
        if not handle.over:
            self.post(Unresponsive(handle.runner, NoAnswer(self._probe_timeout_s, disconnected=True)))
        self.query(lambda core: None)  # when the query returns, the lease is lost

    def _notify(self, pending: PendingRequest, what: str) -> None:
        for when, callback in pending.callbacks:
            if when == what:
                self._executor.call(lambda callback=callback: _call(callback))  # type: ignore[misc]  # binds the callback now

    def perform(self, command: Command) -> None:
        """Perform one answer of the core, or pass another command to the executor; called under the driver's lock."""
        match command:
            case Grant(request, runner):
                if (pending := self.requests.get(request)) is not None:
                    pending.answer(self._executor.runner_handles.get(runner) if runner is not None else None, None)
            case Reject(request, refusal):
                if request in self.requests:
                    # first: if it raises, `answer_all` still finds the pending request
                    error = error_of(refusal, self._registry.name)
                    if isinstance(refusal, LoadFailedRefusal):
                        error.__cause__ = self._executor.load_errors.get(refusal.model)
                    elif isinstance(refusal, InvalidModelRefusal):
                        fault = self._executor.load_errors.get(self.requests[request].model_id)
                        error = replace(fault) if isinstance(fault, EngineMissing) else error
                    if (pending := self.requests.pop(request, None)) is not None:
                        pending.answer(None, error)
                        if isinstance(refusal, QueueFullRefusal):  # the core does not know the request
                            self._forget(pending.model_id)
            case RevokeLease(request, reason):
                if (pending := self.requests.pop(request, None)) is not None:
                    pending.closed = reason is None
                    pending.lost = revoke_reason(reason)
                    self._notify(pending, "lost")
            case NotifyContention(_, requests):
                for id in requests:
                    if (pending := self.requests.get(id)) is not None:
                        pending.wanted = True
                        self._notify(pending, "wanted")
            case Finished():
                self.finished.set()
            case _:
                self._executor.perform(command)

    def look_round(self) -> None:
        """Forget objects that are not used any more, and warn, once each, of requests that may wait for ever."""
        self.drop_unused_objects()
        if self._warned or any(not pending.answered for pending in list(self.requests.values())):
            self._warn(self.query(Core.held_up))

    def _warn(self, held_up: Mapping[RequestId, Sequence[ModelId]]) -> None:
        for id in held_up.keys() - self._warned:
            if (pending := self.requests.get(id)) is not None:
                holders = ", ".join(map(self._registry.name, held_up[id]))
                log.warning(
                    "request %d for %s waits for leases on %s, which are held by callers that wait for other leases "
                    "themselves: unless one of these leases is released elsewhere, it waits for ever",
                    id, pending.model, holders,
                )  # fmt: skip
        self._warned = set(held_up)

    def drop_unused_objects(self) -> None:
        """Forget objects that are not requested, pinned or loaded, and the load-time options of their launches.

        Of many files, those that the core has forgotten are forgotten too.
        """
        if self._registry.objects() or self._parser.objects() or len(self._registry.known()) > _MOST_MODELS:
            self.query(self._let_go)

    def _let_go(self, core: Core) -> None:
        self._executor.forget_past()
        used = core.models_in_use()
        for id in self._registry.objects():
            if id not in used:
                self._drop(id)
        for id in sorted(self._parser.objects().difference(self._registry.objects())):
            self._parser.forget(id)  # parsed for a request that was not made
        if len(self._registry.known()) > _MOST_MODELS:
            for id in sorted(self._registry.known()):
                if not core.knows(id):
                    self._drop(id)

    def forget(self, model: ModelId) -> None:
        """Forget a model that the core does not know, unless a request for it is pending."""
        self.query(lambda _: self._forget(model))

    def _forget(self, model: ModelId) -> None:
        """Forget a model as `forget` does; called under the driver's lock."""
        if not self._knows(model):
            self._drop(model)

    def _drop(self, model: ModelId) -> None:
        """Forget a model, unless a request for it is pending; called under the driver's lock.

        A request that is submitted at this moment is in `requests` before its model is registered. So either the
        request is seen here, or its model is registered again after this.
        """
        if (forgotten := self._registry.unregister(model)) is None:
            return
        if isinstance(forgotten, PythonModel):
            self._parser.forget(model)
        self._executor.forget_model(model)
        if any(pending.model_id == model for pending in list(self.requests.values())):
            self._registry.register(model, forgotten)

    def fail(self, error: BaseException) -> None:
        """Refuse every pending request after a step raised, and let `close` end the runners."""
        self.answer_all(lambda: SchedulerBroken(repr(error)))
        self.finished.set()

    def answer_all(self, error: Callable[[], SchedulerError]) -> None:
        """End every request that is left: refuse the waiting ones, and revoke what the granted ones hold."""
        while self.requests:
            try:
                _, pending = self.requests.popitem()
            except KeyError:
                return
            if pending.answered:
                pending.closed, pending.lost = True, str(error())
            else:
                # an error for each request: a traceback is added to an error where it is raised
                pending.answer(None, error())


def _call(callback: Callback) -> None:
    try:
        callback()
    except Exception:
        log.exception("a callback of a lease failed")
