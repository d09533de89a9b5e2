"""Sends requests from an event loop, each on a connection of its own, with nothing that belongs to one loop.

httpx2's own transport for event loops takes more than twice the time of the processor for each chunk of a stream, and a
loop that ends while a stream is open, or while a connection is being opened, writes warnings. Closing a stream here
awaits nothing, so that it is closed at once, by whatever closes it.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import cast

import httpx2
from httptools import HttpParserError, HttpResponseParser

_MOST_UNREAD_BYTES = 1 << 16  # of one answer; the server waits while as much has not been read


class LoopTransport(httpx2.AsyncBaseTransport):
    """Sends requests of any number of event loops.

    A request's extension `opened` is a function that is called with the socket as soon as the connection is open.
    Errors are those of httpx2's own transports.
    """

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Return an answer whose head has come; closing it closes its connection, whatever is still to come."""
        content = _head(request) + await request.aread()
        timeouts, url = request.extensions["timeout"], request.url
        secure = url.scheme == "https"
        return await answer_from(
            url.host, url.port or (443 if secure else 80), content, secure=secure,
            connect_timeout_s=timeouts["connect"], read_timeout_s=timeouts["read"],
            opened=request.extensions.get("opened"),
        )  # fmt: skip


async def answer_from(
    host: str,
    port: int,
    content: bytes,
    *,
    connect_timeout_s: float | None,
    read_timeout_s: float | None = None,
    secure: bool = False,
    opened: Callable[[socket.socket], None] | None = None,
) -> httpx2.Response:
    """Send the bytes of a whole request, and return the answer when its head has come.

    `read_timeout_s` is for each wait for more of the answer. Closing the answer closes its connection.
    """
    connection = await _connected(host, port, secure=secure, timeout_s=connect_timeout_s)
    try:
        if opened is not None:
            opened(connection.transport.get_extra_info("socket"))
        connection.transport.write(content)
        return await connection.response(read_timeout_s)
    except BaseException:
        connection.transport.abort()
        raise


async def _connected(host: str, port: int, *, secure: bool, timeout_s: float | None) -> _Connection:
    try:
        async with asyncio.timeout(timeout_s):
            _, connection = await asyncio.get_running_loop().create_connection(
                _Connection, host, port, ssl=secure or None
            )
    except TimeoutError as error:
        raise httpx2.ConnectTimeout("the server does not accept the connection") from error
    except OSError as error:
        raise httpx2.ConnectError(str(error)) from error
    return connection


def _head(request: httpx2.Request) -> bytes:
    lines = [b"%b %b HTTP/1.1" % (request.method.encode(), request.url.raw_path)]
    lines += [b"%b: %b" % header for header in request.headers.raw]
    return b"\r\n".join(lines) + b"\r\n\r\n"


class _Connection(asyncio.Protocol, httpx2.AsyncByteStream):
    """One connection, and the content of the answer to the request that is sent on it."""

    transport: asyncio.Transport  # from when the connection is open

    def __init__(self) -> None:
        self._parser = HttpResponseParser(self)
        self._status = 0  # until the head of the answer has come
        self._headers: list[tuple[bytes, bytes]] = []
        self._unread: list[bytes] = []  # parts of the content
        self._unread_bytes = 0
        self._is_whole = False
        self._error: httpx2.TransportError | None = None  # why no more will come, unless the answer is whole
        self._read_timeout_s: float | None = None
        self._more: asyncio.Future[None] | None = None  # that a reader waits for

    # -- for the reader -----------------------------------------------------------------------------------------------

    async def response(self, read_timeout_s: float | None) -> httpx2.Response:
        """Return the answer when its head has come; `read_timeout_s` is for each wait, of its content too."""
        self._read_timeout_s = read_timeout_s
        while not self._status:
            await self._wait()
        return httpx2.Response(self._status, headers=self._headers, stream=self)

    def __aiter__(self) -> _Connection:
        return self

    async def __anext__(self) -> bytes:
        """Return all that has come since the last call."""
        while not self._unread:
            if self._is_whole:
                raise StopAsyncIteration
            await self._wait()
        part = b"".join(self._unread)
        self._unread.clear()
        if self._unread_bytes > _MOST_UNREAD_BYTES:
            self.transport.resume_reading()
        self._unread_bytes = 0
        return part

    async def aclose(self) -> None:
        """Close the connection."""
        self.transport.abort()

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._more = asyncio.get_running_loop().create_future()
        if self._read_timeout_s is None:  # a timeout takes as long as all else
            await self._more
            return
        try:
            async with asyncio.timeout(self._read_timeout_s):
                await self._more
        except TimeoutError as error:
            raise httpx2.ReadTimeout("the server is silent") from error

    # -- for the event loop -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note the connection, which is open now."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's own is none by its class

    def data_received(self, data: bytes) -> None:
        """Parse some bytes; no more are read while too many are unread."""
        try:
            self._parser.feed_data(data)
        except HttpParserError as error:
            self._error = httpx2.RemoteProtocolError(str(error))
            self.transport.abort()
        if self._unread_bytes > _MOST_UNREAD_BYTES:
            self.transport.pause_reading()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        """Note that no more comes, and whether the answer is whole."""
        if error is not None:
            self._error = self._error or httpx2.ReadError(str(error))
        elif self._ends_with_connection():
            self._is_whole = True
        else:
            self._error = self._error or httpx2.RemoteProtocolError("the server closed the connection")
        self._wake()

    def _ends_with_connection(self) -> bool:
        """Return whether the answer has no other end than its connection's."""
        return self._status > 0 and not {name.lower() for name, _ in self._headers} & {
            b"content-length",
            b"transfer-encoding",
        }

    def _wake(self) -> None:
        if self._more is not None and not self._more.done():
            self._more.set_result(None)

    # -- for the parser -----------------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note a header."""
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Note that the head has come."""
        if (status := self._parser.get_status_code()) >= httpx2.codes.OK:
            self._status = status
        else:  # an interim answer, before the answer itself
            self._headers.clear()

    def on_body(self, body: bytes) -> None:
        """Keep a part of the content until it is read."""
        self._unread.append(body)
        self._unread_bytes += len(body)

    def on_message_complete(self) -> None:
        """Note that the answer is whole."""
        self._is_whole = self._status > 0


__all__ = ["LoopTransport", "answer_from"]
