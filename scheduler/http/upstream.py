"""The way from the server to the runners: requests are passed on, and answers come back, as bytes."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2

from scheduler.api.lease import Lease
from scheduler.engines.loop_transport import LoopTransport

_LIMITS = {"timeout": httpx2.Timeout(None, connect=5.0).as_dict()}
_TRANSPORT = LoopTransport()  # without a client around it, which takes as long again for each chunk
_MODEL = re.compile(rb'"model":("(?:[^"\\]|\\.)*")')

BROKEN = (httpx2.NetworkError, httpx2.ProtocolError, httpx2.TimeoutException)


@asynccontextmanager
async def answer_of(lease: Lease, path: str, content: bytes, content_type: str) -> AsyncIterator[httpx2.Response]:
    """Send a request to the runner of a lease and yield the answer, whose content has not been read.

    The connection is used once: the runner stops its work when it is closed.
    """
    headers = {"Authorization": f"Bearer {lease.api_key}", "Content-Type": content_type}
    request = httpx2.Request("POST", f"{lease.url}{path}", content=content, headers=headers, extensions=_LIMITS)
    response = await _TRANSPORT.handle_async_request(request)
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
