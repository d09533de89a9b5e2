"""The way from a server to the runners, or to another server: requests are passed on, answers come back, as bytes."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import httpx2

from scheduler.api.lease import Lease
from scheduler.engines.loop_transport import answer_from
from scheduler.engines.runner_client import authorization

_CONNECT_S = 5.0
_MODEL = re.compile(rb'"model":("(?:[^"\\]|\\.)*")')

BROKEN = (httpx2.NetworkError, httpx2.ProtocolError, httpx2.TimeoutException)


@asynccontextmanager
async def answer_of(lease: Lease, path: str, content: bytes, content_type: str) -> AsyncIterator[httpx2.Response]:
    """Send a request to the runner of a lease and yield the answer, whose content has not been read."""
    headers = {"Content-Type": content_type}
    async with answer_at(lease.url, lease.api_key, "POST", path, content, headers) as response:
        yield response


@asynccontextmanager
async def answer_at(
    url: str, key: str, method: str, target: str, content: bytes, headers: Mapping[str, str]
) -> AsyncIterator[httpx2.Response]:
    """Send a request to a server and yield the answer, whose content has not been read.

    The connection is used once: the server stops its work when it is closed. No client of httpx2's is around it, nor a
    request of its own: they take as long again for each chunk, and a tenth of the time of a short answer.
    """
    server = urlsplit(url)
    assert server.hostname is not None
    assert server.port is not None
    more = "".join(f"{name}: {value}\r\n" for name, value in (*authorization(key).items(), *headers.items()))
    head = f"{method} {target} HTTP/1.1\r\nHost: {server.netloc}\r\n{more}Content-Length: {len(content)}\r\n\r\n"
    response = await answer_from(
        server.hostname, server.port, head.encode("latin-1") + content, connect_timeout_s=_CONNECT_S
    )
    try:
        yield response
    finally:
        await response.aclose()


class Renaming:
    """Puts the client's name for a model where an answer has the runner's; the rest of it is not looked at.

    In JSON text these bytes are a field and nothing else, since a quote inside a string has a backslash before it.
    """

    def __init__(self, name: bytes) -> None:
        self._there = b'"model":' + name
        self._found: bytes | None = None  # as the runner has it, once it has come
        self._held = b""  # the beginning of a line

    def feed(self, chunk: bytes) -> bytes:
        """Return what can be sent of an answer that comes in lines."""
        if self._found == self._there:
            return chunk
        chunk = self._held + chunk
        end = chunk.rfind(b"\n") + 1
        lines, self._held = chunk[:end], chunk[end:]
        if self._found is None and (found := _MODEL.search(lines)):
            self._found = found[0]
            if self._found == self._there:  # nothing is renamed, and nothing held back any more
                lines, self._held = chunk, b""
        return lines if self._found is None else lines.replace(self._found, self._there)

    def whole(self, content: bytes) -> bytes:
        """Return a whole answer."""
        if (found := _MODEL.search(content)) and found[0] != self._there:
            return content.replace(found[0], self._there)
        return content

    def rest(self) -> bytes:
        """Return what is held back at the end of the answer."""
        return self.whole(self._held)
