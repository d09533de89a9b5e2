"""Clients of the package openai for the runner of one lease: they hold it while they are answered, and end with it.

Imported only where such a client is asked for, since the package takes a second to import and is an extra. The package
passes on the errors of this library as they are.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

import httpx2
from openai import AsyncOpenAI, OpenAI

from scheduler.engines.answer_requests import refuse_fetches
from scheduler.engines.loop_transport import LoopTransport

if TYPE_CHECKING:
    from scheduler.api.lease import Lease

# A connection is used once: the server closes one that is kept while the next request is on its way.
_LIMITS = httpx2.Limits(max_keepalive_connections=0)
_NO_KEY = "none"  # of a server without one: the package wants a text
_BROKEN = (httpx2.NetworkError, httpx2.ProtocolError)


def client_of(lease: Lease) -> OpenAI:
    """Return a client that talks to the runner of a lease."""
    http_client = httpx2.Client(transport=_Transport(lease), trust_env=False)
    return OpenAI(base_url=f"{lease.url}/v1", api_key=lease.api_key or _NO_KEY, max_retries=0, http_client=http_client)


def async_client_of(lease: Lease) -> AsyncOpenAI:
    """As `client_of`, for an event loop."""
    http_client = httpx2.AsyncClient(transport=_AsyncTransport(lease), trust_env=False)
    return AsyncOpenAI(
        base_url=f"{lease.url}/v1", api_key=lease.api_key or _NO_KEY, max_retries=0, http_client=http_client
    )


class _Transport(httpx2.BaseTransport):
    """Sends requests while their lease is held, and holds it until they are answered."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._inner = httpx2.HTTPTransport(limits=_LIMITS, trust_env=False)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        _refuse_fetches(request.read())
        self._lease._begin_use()
        try:
            response = self._inner.handle_request(request)
        except _BROKEN as error:
            self._lease._end_use()
            raise self._lease._crashed(ConnectionError(str(error))) from None
        except BaseException:
            self._lease._end_use()
            raise
        assert isinstance(response.stream, httpx2.SyncByteStream)
        response.stream = _Held(response.stream, self._lease)
        return response

    def close(self) -> None:
        self._inner.close()


class _Held(httpx2.SyncByteStream):
    """The content of an answer, which holds the lease until it is closed."""

    def __init__(self, stream: httpx2.SyncByteStream, lease: Lease) -> None:
        self._stream = stream
        self._lease: Lease | None = lease  # None: closed

    def __iter__(self) -> Iterator[bytes]:
        yield from self._stream

    def close(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            try:
                self._stream.close()
            finally:
                lease._end_use()

    def __del__(self) -> None:
        self.close()


class _AsyncTransport(httpx2.AsyncBaseTransport):
    """As `_Transport`, for an event loop."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._inner = LoopTransport()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        _refuse_fetches(await request.aread())
        self._lease._begin_use()
        try:
            response = await self._inner.handle_async_request(request)
        except _BROKEN as error:
            self._lease._end_use()
            raise await asyncio.to_thread(self._lease._crashed, ConnectionError(str(error))) from None
        except BaseException:
            self._lease._end_use()
            raise
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _AsyncHeld(response.stream, self._lease)
        return response


class _AsyncHeld(httpx2.AsyncByteStream):
    """As `_Held`, for an event loop."""

    def __init__(self, stream: httpx2.AsyncByteStream, lease: Lease) -> None:
        self._stream = stream
        self._lease: Lease | None = lease

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._stream:
            yield part

    async def aclose(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            try:
                await self._stream.aclose()
            finally:
                lease._end_use()

    def __del__(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            lease._end_use()


def _refuse_fetches(content: bytes) -> None:
    """Raise `UnsupportedOption` for a request with an address that the runner would fetch."""
    try:
        asked = json.loads(content or b"null")
    except ValueError:
        return
    if isinstance(asked, dict):
        refuse_fetches(asked.get("messages"))
        refuse_fetches(asked.get("input"))
