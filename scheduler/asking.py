"""What `reserve` and `acquire_async` return."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Self

from scheduler.lease import Lease
from scheduler.registry import Question
from scheduler.ticket import FutureTicket, Ticket, settle_in_loop

if TYPE_CHECKING:
    from scheduler.desk import Desk


class Reservation:
    """Memory of the program's own, out of the account until it is released; twice is harmless."""

    def __init__(self, desk: Desk, ticket: Ticket) -> None:
        self._desk = desk
        self._ticket = ticket

    def release(self) -> None:
        """Give the memory back to the account."""
        self._desk.give_back(self._ticket)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


class Acquiring:
    """A request that is awaited, or entered with `async with`; nothing is asked before."""

    def __init__(self, desk: Desk, question: Question) -> None:
        self._desk = desk
        self._question = question
        self._lease: Lease | None = None

    def __await__(self) -> Generator[Any, None, Lease]:
        return self._acquire().__await__()

    async def __aenter__(self) -> Lease:
        self._lease = await self._acquire()
        return self._lease

    async def __aexit__(self, *_: object) -> None:
        assert self._lease is not None, "entered before it is left"
        self._lease.release()

    async def _acquire(self) -> Lease:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Lease] = loop.create_future()

        def deliver(ticket: FutureTicket) -> None:
            lease = Lease(self._desk, ticket) if ticket.error is None else None
            settle_in_loop(loop, future, lease, ticket.error, lease.release if lease is not None else lambda: None)

        ticket = self._desk.submit(self._question, deliver)
        try:
            return await future
        except BaseException:
            self._desk.withdraw(ticket)
            raise
