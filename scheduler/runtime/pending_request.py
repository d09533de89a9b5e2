"""What a request is waited for with, and what its lease knows of its runner."""

from __future__ import annotations

import asyncio
from _thread import allocate_lock
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Never

from fsm.machine.request import ModelId, RequestId

if TYPE_CHECKING:
    from scheduler.runtime.runner_handle import RunnerHandle

Callback = Callable[[], object]


class NonCopyable:
    """What is given back once: the end of a copy would give back what the original holds."""

    __slots__ = ()

    def __reduce__(self) -> Never:
        raise TypeError(f"a {type(self).__name__} cannot be copied or pickled: ask the scheduler for another")


class PendingRequest:
    """One request, from its Acquire to the end of what it was granted. Answered once.

    The one who waits blocks on `gate`; a lock is the cheapest thing that can be waited for, and Ctrl-C interrupts it.
    """

    __slots__ = (
        "answered",
        "callbacks",
        "closed",
        "error",
        "gate",
        "id",
        "lost",
        "model",
        "model_id",
        "runner",
        "wanted",
    )

    def __init__(self, id: RequestId, model_id: ModelId, model: str) -> None:
        self.id = id
        self.model_id = model_id
        self.model = model  # its name, for errors
        self.gate = allocate_lock()
        self.gate.acquire()
        self.answered = False
        self.runner: RunnerHandle | None = None  # the runner; None: not granted, or granted without one
        self.error: BaseException | None = None  # the refusal
        self.lost: str = ""  # why the runner is gone
        self.closed = False  # it is gone with the scheduler; set before `lost` is
        self.wanted = False  # others wait for the runner's memory
        self.callbacks: tuple[tuple[str, Callback], ...] = ()  # ("lost" or "wanted", what to call)

    def answer(self, life: RunnerHandle | None, error: BaseException | None) -> None:
        """Say what became of it; runs nobody's code, and may be called under the driver's lock."""
        self.runner = life
        self.error = error
        self.answered = True
        self.gate.release()


class FutureRequest(PendingRequest):
    """A ticket whose answer goes to a future, by way of a worker: a future's callbacks are the user's code."""

    __slots__ = ("deliver", "once", "put")

    def __init__(
        self,
        id: RequestId,
        model_id: ModelId,
        model: str,
        put: Callable[[Callback], None],
        deliver: Callable[[FutureRequest], None],
    ) -> None:
        super().__init__(id, model_id, model)
        self.put = put
        # None once answered: it leads to the lease, which nobody but its holder may keep alive.
        self.deliver: Callable[[FutureRequest], None] | None = deliver
        self.once = allocate_lock()  # taken by the one who completes the future: the answer, or its cancellation

    def answer(self, life: RunnerHandle | None, error: BaseException | None) -> None:
        """Say what became of it; the future hears it from a worker."""
        super().answer(life, error)
        deliver, self.deliver = self.deliver, None
        if deliver is not None:
            self.put(lambda: deliver(self))

    def settle(self, future: Future[Any], result: object) -> bool:
        """Complete a future, once; return False where it was cancelled, so that nobody receives the result."""
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
    """Complete a loop's future from outside of it; calls `unreceived` where nobody is there to receive the result."""

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
