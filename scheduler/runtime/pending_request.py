"""A pending request, which its caller waits for, and what its lease knows of its runner."""

from __future__ import annotations

import asyncio
from _thread import allocate_lock
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Never

from fsm.machine.request import ModelId, RequestId
from scheduler.models.chat_defaults import NO_DEFAULTS

if TYPE_CHECKING:
    from scheduler.runtime.runner_handle import RunnerHandle

Callback = Callable[[], object]


class NonCopyable:
    """A base of objects that are released once: the end of a copy would release what the original holds."""

    __slots__ = ()

    def __reduce__(self) -> Never:
        raise TypeError(f"a {type(self).__name__} cannot be copied or pickled: ask the scheduler for another")


class PendingRequest:
    """One request, from its `Acquire` to the end of what it was granted; the request is answered once.

    The waiting caller blocks on `gate`: a lock is the cheapest thing to wait for, and Ctrl-C interrupts it.
    """

    __slots__ = (
        "answered",
        "callbacks",
        "chat",
        "closed",
        "error",
        "gate",
        "id",
        "lost",
        "model",
        "model_id",
        "runner",
        "scales",
        "scheduler",
        "wanted",
    )

    def __init__(self, id: RequestId, model_id: ModelId, model: str, scheduler: object) -> None:
        self.id = id
        self.model_id = model_id
        self.model = model  # name of the model, for errors
        # held for as long as the request waits or its lease exists: a scheduler that nothing holds is closed
        self.scheduler = scheduler
        self.chat = NO_DEFAULTS  # what the chats of a lease begin with
        self.scales: tuple[float, ...] = ()  # of the model's adapters, where there is one to choose from
        self.gate = allocate_lock()
        self.gate.acquire()
        self.answered = False
        self.runner: RunnerHandle | None = None  # None: the request is not granted, or granted without a runner
        self.error: BaseException | None = None  # the refusal, where the request was refused
        self.lost: str = ""  # why the runner is gone
        self.closed = False  # the runner is gone because the scheduler was closed; set before `lost` is
        self.wanted = False  # other requests have waited for the runner's memory; they may have left
        self.callbacks: tuple[tuple[str, Callback], ...] = ()  # ("lost" or "wanted", the callback)

    def answer(self, handle: RunnerHandle | None, error: BaseException | None) -> None:
        """Answer the request with a runner or an error; runs no user's code, may be called under the driver's lock."""
        self.runner = handle
        self.error = error
        self.answered = True
        self.gate.release()

    def raise_refusal(self) -> None:
        """Raise the error of a refusal, if the request was refused."""
        if (error := self.error) is not None:
            self.error = None  # the traceback of the error leads to the request: no cycle that holds the scheduler
            try:
                raise error
            finally:
                del error


class LoopRequest(PendingRequest):
    """A pending request whose answer wakes a task of an event loop."""

    __slots__ = ("wake",)

    def __init__(self, id: RequestId, model_id: ModelId, model: str, scheduler: object) -> None:
        super().__init__(id, model_id, model, scheduler)
        self.wake: Callback | None = None  # set before the task looks at `answered` and waits

    def answer(self, handle: RunnerHandle | None, error: BaseException | None) -> None:
        """Answer the request, and wake the task where it waits."""
        super().answer(handle, error)
        wake, self.wake = self.wake, None
        if wake is not None:
            wake()


class FutureRequest(PendingRequest):
    """A pending request that answers a future from a thread pool, since a future's callbacks are the user's code."""

    __slots__ = ("deliver", "once", "put")

    def __init__(
        self,
        id: RequestId,
        model_id: ModelId,
        model: str,
        scheduler: object,
        put: Callable[[Callback], None],
        deliver: Callable[[FutureRequest], None],
    ) -> None:
        super().__init__(id, model_id, model, scheduler)
        self.put = put
        # None once answered: `deliver` leads to the lease, and only the holder may keep the lease alive.
        self.deliver: Callable[[FutureRequest], None] | None = deliver
        self.once = allocate_lock()  # taken by the thread that completes the future, with an answer or a cancellation

    def answer(self, handle: RunnerHandle | None, error: BaseException | None) -> None:
        """Answer the request; a thread of the pool completes the future."""
        super().answer(handle, error)
        deliver, self.deliver = self.deliver, None
        if deliver is not None:
            self.put(lambda: deliver(self))

    def settle(self, future: Future[Any], result: object) -> bool:
        """Complete a future, once; return False where the future was cancelled, so that the result was not received."""
        if not self.once.acquire(blocking=False) or not future.set_running_or_notify_cancel():
            return False
        if self.error is not None:
            future.set_exception(self.error)
        else:
            future.set_result(result)
        return True


def settle_in_loop(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any], result: object, error: BaseException | None,
    unreceived: Callback,
) -> None:  # fmt: skip
    """Complete a loop's future from another thread; calls `unreceived` where the result cannot be received."""

    def complete() -> None:
        if future.done():
            unreceived()
        elif error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    try:
        loop.call_soon_threadsafe(complete)
    except RuntimeError:  # the loop was closed
        unreceived()
