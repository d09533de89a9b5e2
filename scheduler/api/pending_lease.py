"""The return values of `reserve`, `acquire_async` and `acquire_all_async`."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from fsm.machine.request import RequestId
from scheduler.api.lease import Lease, Leases
from scheduler.concurrency.latch import Latch
from scheduler.config.quantities import wait_limit
from scheduler.engines.python import Value
from scheduler.errors.exceptions import AcquireTimeout, WouldDeadlock, not_beside
from scheduler.runtime.lease_holders import Held, LeaseHolders, this_asker
from scheduler.runtime.pending_request import NonCopyable, PendingRequest, settle_in_loop
from scheduler.runtime.request_parser import ParsedRequest

if TYPE_CHECKING:
    from scheduler.runtime.request_broker import RequestBroker

Granted = TypeVar("Granted", bound=Lease[Any] | Leases)


class Reservation(NonCopyable):
    """Memory of the program's own that no model is placed in until it is released; a second release is harmless."""

    def __init__(self, broker: RequestBroker, pending: PendingRequest) -> None:
        self._broker = broker
        self._pending = pending

    def release(self) -> None:
        """Release the memory for models."""
        self._broker.release(self._pending)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


class PendingGrant(ABC, Generic[Granted]):
    """A request that is submitted when it is awaited, or entered with `async with`, and not before.

    Each time that it is awaited or entered, it submits a new request. Raises RuntimeError where it is entered and not
    left yet.
    """

    def __init__(self, broker: RequestBroker, scheduler: object) -> None:
        self._broker = broker
        self._scheduler = scheduler  # stays open: see `PendingRequest`
        self.request: RequestId | None = None  # of the request that was submitted last, as `Status` names it
        self._entered = False
        self._granted: Granted | None = None  # set while it is entered, once it is granted

    def __await__(self) -> Generator[Any, None, Granted]:
        return self._acquire().__await__()

    async def __aenter__(self) -> Granted:
        if self._entered:
            raise RuntimeError("this request is entered already: ask the scheduler again for another lease")
        self._entered = True
        try:
            self._granted = await self._acquire()
            self._granted.__enter__()
        finally:
            self._entered = self._granted is not None
        return self._granted

    async def __aexit__(self, *_: object) -> None:
        assert self._granted is not None, "entered before it is left"
        granted, self._granted, self._entered = self._granted, None, False
        granted.release()

    @abstractmethod
    async def _acquire(self) -> Granted:
        """Submit the request, and return what is granted."""

    async def _answer(self, parsed: ParsedRequest, held: Held) -> Lease[Any]:
        pending = self._broker.new_loop_request(parsed, self._scheduler)
        self.request = pending.id
        try:
            self._broker.submit(pending, parsed, held)
            if not pending.answered:
                loop = asyncio.get_running_loop()
                woken: asyncio.Future[None] = loop.create_future()
                pending.wake = partial(settle_in_loop, loop, woken, None, None, partial(self._broker.cancel, pending))
                if not pending.answered:  # in the meantime, by another thread that saw nothing to wake
                    await woken
            pending.raise_refusal()
            lease: Lease[Any] = Lease(self._broker, pending)
            lease._hold(this_asker())
            return lease
        except BaseException:
            pending.wake = None  # it leads to the request
            self._broker.cancel(pending)
            raise


class Acquiring(PendingGrant[Lease[Value]], Generic[Value]):
    """A request for a lease on one model."""

    def __init__(self, broker: RequestBroker, parsed: ParsedRequest, scheduler: object) -> None:
        super().__init__(broker, scheduler)
        self._parsed = parsed

    async def _acquire(self) -> Lease[Value]:
        held = self._broker.holders.held(this_asker())
        try:
            return await self._answer(self._parsed, held)
        except WouldDeadlock:
            if self._broker.holders.are_out_of_reach(held.keeps):
                raise
        return await self._answer(self._parsed, Held(held.holds))  # a lease may be released elsewhere: it waits


class AcquiringAll(PendingGrant[Leases]):
    """A request for leases on several models at once."""

    def __init__(
        self, broker: RequestBroker, parsed: Sequence[ParsedRequest], scheduler: object, lock: threading.RLock
    ) -> None:
        super().__init__(broker, scheduler)
        self._parsed = parsed
        self._lock = lock  # held by the caller whose turn it is

    async def _acquire(self) -> Leases:
        group = GroupRequest(self._parsed)
        try:
            async with _turn(self._lock, group):
                for one, held in group.requests(self._broker.holders):
                    group.leases.append(await self._answer(one, held))
        except WouldDeadlock as error:
            group.leases.release()
            raise not_beside(error) from None
        except BaseException:  # a cancellation, for example
            group.leases.release()
            raise
        return group.leases


class GroupRequest:
    """One call for several models, whose requests are submitted one after the other by a caller that has its turn."""

    def __init__(self, parsed: Sequence[ParsedRequest]) -> None:
        self._parsed = parsed
        self._timeout_s = min((one.timeout_s for one in parsed if one.timeout_s is not None), default=math.inf)
        self._end = time.monotonic() + self._timeout_s
        self.leases = Leases()  # granted so far

    @property
    def left_s(self) -> float | None:
        """How long the call may last from now on, in seconds; None: without limit."""
        return wait_limit(max(0.0, self._end - time.monotonic()))

    def requests(self, holders: LeaseHolders) -> Iterator[tuple[ParsedRequest, Held]]:
        """Yield each request with what its caller holds by then; the leases granted so far are kept until the end."""
        for one in self._parsed:
            taken = tuple([lease._pending.id for lease in self.leases])
            yield one._replace(timeout_s=self.left_s), Held((*holders.held(this_asker()).holds, *taken), taken)

    def too_late(self) -> AcquireTimeout:
        """Return the error of a call whose turn did not come in time."""
        return AcquireTimeout(self._parsed[0].name, self._timeout_s, "earlier callers of acquire_all")


@asynccontextmanager
async def _turn(lock: threading.RLock, group: GroupRequest) -> AsyncIterator[None]:
    """Have the turn of a task: a thread of its own holds the lock, since the tasks of one loop share their thread."""
    loop, over = asyncio.get_running_loop(), Latch()
    began: asyncio.Future[None] = loop.create_future()

    def hold() -> None:
        with lock:
            settle_in_loop(loop, began, None, None, over.set)
            over.wait()

    threading.Thread(target=hold, name="loadmaster-turn", daemon=True).start()
    try:
        try:
            await asyncio.wait_for(began, group.left_s)
        except TimeoutError:
            raise group.too_late() from None
        yield
    finally:
        over.set()
