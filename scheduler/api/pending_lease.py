"""The return values of `reserve` and `acquire_async`."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Generic, Self

from fsm.machine.request import RequestId
from scheduler.api.lease import Lease
from scheduler.engines.python import Value
from scheduler.errors.exceptions import WouldDeadlock
from scheduler.runtime.lease_holders import Held, this_asker
from scheduler.runtime.pending_request import FutureRequest, NonCopyable, PendingRequest, settle_in_loop
from scheduler.runtime.request_parser import ParsedRequest

if TYPE_CHECKING:
    from scheduler.runtime.request_broker import RequestBroker


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


class Acquiring(Generic[Value]):
    """A request that is submitted when it is awaited, or entered with `async with`, and not before.

    Each time that it is awaited or entered, it submits a new request. Raises RuntimeError where it is entered and not
    left yet.
    """

    def __init__(self, broker: RequestBroker, parsed: ParsedRequest, scheduler: object) -> None:
        self._broker = broker
        self._parsed = parsed
        self._scheduler = scheduler  # stays open: see `PendingRequest`
        self.request: RequestId | None = None  # of the request that was submitted last, as `Status` names it
        self._entered = False
        self._lease: Lease[Value] | None = None  # set while it is entered, once the lease is granted

    def __await__(self) -> Generator[Any, None, Lease[Value]]:
        return self._acquire().__await__()

    async def __aenter__(self) -> Lease[Value]:
        if self._entered:
            raise RuntimeError("this request is entered already: call acquire_async again for another lease")
        self._entered = True
        try:
            self._lease = await self._acquire()
            self._lease._hold(this_asker(), entered=True)
        finally:
            self._entered = self._lease is not None
        return self._lease

    async def __aexit__(self, *_: object) -> None:
        assert self._lease is not None, "entered before it is left"
        lease, self._lease, self._entered = self._lease, None, False
        lease.release()

    async def _acquire(self) -> Lease[Value]:
        held = self._broker.holders.held(this_asker())
        try:
            return await self._answer(held)
        except WouldDeadlock:
            if self._broker.holders.are_out_of_reach(held.keeps):
                raise
        return await self._answer(Held(held.holds))  # a lease may be released elsewhere: the request waits

    async def _answer(self, held: Held) -> Lease[Value]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Lease[Value]] = loop.create_future()

        def deliver(pending: FutureRequest) -> None:
            lease = Lease(self._broker, pending) if pending.error is None else None
            settle_in_loop(loop, future, lease, pending.error, lease.release if lease is not None else lambda: None)

        pending = self._broker.new_future_request(self._parsed, deliver, self._scheduler, held)
        self.request = pending.id
        try:
            lease = await future
            lease._hold(this_asker())
            return lease
        except BaseException:
            self._broker.cancel(pending)
            raise
