"""Answers that come piece by piece, each of which holds its lease until it ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Self

from scheduler.engines.answer import Answer
from scheduler.runtime.pending_request import NonCopyable

if TYPE_CHECKING:
    from scheduler.api.lease import Lease
    from scheduler.engines.runner_client import Call, RunnerClient


class Stream(NonCopyable, Iterator[str]):
    """The pieces of an answer; holds its lease until it is exhausted, closed, or lost to the garbage collector.

    Any thread may read or close a stream.
    """

    _lease: Lease | None = None  # None: not begun, or ended

    def __init__(self, lease: Lease, client: RunnerClient, call: Call) -> None:
        self._call = call
        self._pieces = client.pieces(call)
        self._closed = False  # by `close`
        self._turn = threading.Lock()  # held by the thread that reads; the last one to leave ends a closed stream
        lease._begin_use()
        self._lease = lease

    @property
    def answer(self) -> Answer:
        """What has come of the answer; all of it once the stream is exhausted."""
        return self._call.partial.answer()

    def __next__(self) -> str:
        if (lease := self._lease) is None:
            raise StopIteration
        lease._broker.check()
        try:
            with self._turn:
                return self._read()
        finally:
            self._end_if_closed()

    def _read(self) -> str:
        if (lease := self._lease) is None or self._closed:
            raise StopIteration
        try:
            return next(self._pieces)
        except Exception as error:
            told = lease._crashed(error) if isinstance(error, ConnectionError) and not self._closed else error
            self._finish()
            raise StopIteration if self._closed else told from None
        except BaseException:
            self._finish()
            raise

    def close(self) -> None:
        """End the answer here, and the engine's work on it; a second call is harmless.

        A thread that waits for the next piece sees the stream end.
        """
        if (lease := self._lease) is None or lease._broker.forked:
            return
        self._closed = True
        self._call.connection.cut()
        self._end_if_closed()

    def _end_if_closed(self) -> None:
        """End a closed stream, unless another thread reads: that thread comes here when it leaves."""
        if self._lease is not None and self._closed and self._turn.acquire(blocking=False):
            try:
                self._finish()
            finally:
                self._turn.release()

    def _finish(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None and not lease._broker.forked:
            try:
                self._pieces.close()
            finally:
                lease._end_use()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._finish()


class AsyncStream(NonCopyable, AsyncIterator[str]):
    """Like `Stream`, for `async for`; any task of the loop may read or close it."""

    _lease: Lease | None = None

    def __init__(self, lease: Lease, client: RunnerClient, call: Call) -> None:
        self._call = call
        self._pieces = client.apieces(call)
        self._closed = False  # by `aclose`
        self._turn = asyncio.Lock()  # held by the task that reads or ends the stream
        lease._begin_use()
        self._lease = lease

    @property
    def answer(self) -> Answer:
        """What has come of the answer; all of it once the stream is exhausted."""
        return self._call.partial.answer()

    async def __anext__(self) -> str:
        if (lease := self._lease) is None:
            raise StopAsyncIteration
        lease._broker.check()
        async with self._turn:
            return await self._read()

    async def _read(self) -> str:
        if (lease := self._lease) is None or self._closed:
            raise StopAsyncIteration
        try:
            return await anext(self._pieces)
        except Exception as error:
            told: Exception = error
            if isinstance(error, ConnectionError) and not self._closed:
                told = await asyncio.to_thread(lease._crashed, error)
            await self._finish()
            raise StopAsyncIteration if self._closed else told from None
        except BaseException:
            await self._finish()
            raise

    async def aclose(self) -> None:
        """End the answer here; a second call is harmless.

        A task that waits for the next piece sees the stream end, before this returns.
        """
        if (lease := self._lease) is None or lease._broker.forked:
            return
        self._closed = True
        self._call.connection.cut()
        async with self._turn:
            await self._finish()

    async def _finish(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None and not lease._broker.forked:
            try:
                await self._pieces.aclose()
            finally:
                lease._end_use()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None and not lease._broker.forked:
            try:
                self._call.connection.cut()  # the event loop closes the generator, unless the loop ends before
            finally:
                lease._end_use()
