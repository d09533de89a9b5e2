"""What `reserve` and `acquire_async` return."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Self

from scheduler.api.lease import Lease
from scheduler.runtime.model_registry import ParsedRequest
from scheduler.runtime.pending_request import FutureRequest, NonCopyable, PendingRequest, settle_in_loop

if TYPE_CHECKING:
    from scheduler.runtime.request_broker import RequestBroker


class Reservation(NonCopyable):
    """Memory of the program's own, out of the account until it is released; twice is harmless."""

    def __init__(self, desk: RequestBroker, ticket: PendingRequest) -> None:
        self._desk = desk
        self._ticket = ticket

    def release(self) -> None:
        """Give the memory back to the account."""
        self._desk.release(self._ticket)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


class Acquiring:
    """A request that is awaited, or entered with `async with`; nothing is asked before.

    Each time that it is awaited or entered it asks anew. Raises RuntimeError where it is entered and not left yet.
    """

    def __init__(self, desk: RequestBroker, question: ParsedRequest) -> None:
        self._desk = desk
        self._question = question
        self._entered = False
        self._lease: Lease | None = None  # while it is entered, once it is granted

    def __await__(self) -> Generator[Any, None, Lease]:
        return self._acquire().__await__()

    async def __aenter__(self) -> Lease:
        if self._entered:
            raise RuntimeError("this request is entered already: call acquire_async again for another lease")
        self._entered = True
        try:
            self._lease = await self._acquire()
        finally:
            self._entered = self._lease is not None
        return self._lease

    async def __aexit__(self, *_: object) -> None:
        assert self._lease is not None, "entered before it is left"
        lease, self._lease, self._entered = self._lease, None, False
        lease.release()

    async def _acquire(self) -> Lease:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Lease] = loop.create_future()

        def deliver(ticket: FutureRequest) -> None:
            lease = Lease(self._desk, ticket) if ticket.error is None else None
            settle_in_loop(loop, future, lease, ticket.error, lease.release if lease is not None else lambda: None)

        ticket = self._desk.new_future_request(self._question, deliver)
        try:
            return await future
        except BaseException:
            self._desk.cancel(ticket)
            raise
