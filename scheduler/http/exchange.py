"""One request of a client and the response to it; a client that leaves cancels the work on its response."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from scheduler.errors.exceptions import UnsupportedOption

CLIENT_LEFT = 499  # the status, as nginx counts it, of a request whose client left before the response began


class ClientLeft(Exception):
    """The client has closed the connection before its request, or the response, was complete."""


class BodyRefused(Exception):
    """The body of a request is too large, or came too slowly: `status` is the HTTP status of the answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Exchange:
    """A request whose body is read once, and a response that is sent in parts."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.headers = Headers(scope=scope)
        self.client: str | None = (scope.get("client") or (None,))[0]  # its address
        self.path_params: Mapping[str, str] = scope.get("path_params", {})
        self.notes: dict[str, object] = scope.setdefault("loadmaster", {})  # for the access log
        self.more_headers: dict[str, str] = {}  # of the response, whatever it is
        self.status = 0  # of the response; 0: it has not begun
        self._receive, self._send = receive, send

    async def body(self, limit: int, timeout_s: float) -> bytes:
        """Return the body; raises `BodyRefused` where it has more than `limit` bytes, and `ClientLeft`."""
        parts: list[bytes] = []
        length = 0
        if int(self.headers.get("content-length") or 0) > limit:  # the server has checked that it is a number
            raise BodyRefused(413, f"the body has more than {limit} bytes")
        while True:
            try:
                message = await asyncio.wait_for(self._receive(), None if timeout_s == float("inf") else timeout_s)
            except TimeoutError:
                raise BodyRefused(408, f"the body did not come within {timeout_s:g} s") from None
            if message["type"] == "http.disconnect":
                raise ClientLeft
            part = message.get("body", b"")
            length += len(part)
            if length > limit:
                raise BodyRefused(413, f"the body has more than {limit} bytes")
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    async def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """Send the status and the headers."""
        self.status = status
        told = {**headers, **self.more_headers}.items()
        encoded = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in told]
        await self._tell({"type": "http.response.start", "status": status, "headers": encoded})

    async def write(self, content: bytes) -> None:
        """Send a part of the content; waits while the client reads too slowly."""
        await self._tell({"type": "http.response.body", "body": content, "more_body": True})

    async def end(self, content: bytes = b"") -> None:
        """Send the last part of the content."""
        await self._tell({"type": "http.response.body", "body": content, "more_body": False})

    async def _tell(self, message: Message) -> None:
        try:
            await self._send(message)
        except OSError:  # some servers tell by it that the client has left
            raise ClientLeft from None

    async def respond(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        """Send a whole response."""
        await self.begin(status, {**headers, "content-length": str(len(content))})
        await self.end(content)

    async def respond_json(self, status: int, value: object, headers: Mapping[str, str] | None = None) -> None:
        """Send a value as JSON."""
        await self.respond(status, as_json(value), {"content-type": "application/json", **(headers or {})})

    async def while_connected(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the work of the response; it is cancelled at once when the client leaves."""
        leaving = asyncio.ensure_future(self._left())
        try:
            async with asyncio.timeout(None) as scope:
                leaving.add_done_callback(lambda _: _end(scope))
                await work
        except Exception:
            if not scope.expired():
                raise
        finally:
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
        if scope.expired():
            self.notes["left"] = True

    async def _left(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


def _end(scope: asyncio.Timeout) -> None:
    """Cancel what runs in a scope, unless it has ended."""
    with suppress(RuntimeError):
        scope.reschedule(asyncio.get_running_loop().time())


def as_json(value: object) -> bytes:
    """Return a value as JSON; an infinite number, which JSON lacks, raises ValueError."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def body_of(value: object) -> bytes:
    """Return what a client has sent as JSON for a runner; raises `UnsupportedOption` for what JSON or UTF-8 lacks."""
    try:
        return as_json(value)
    except (ValueError, RecursionError) as error:
        raise UnsupportedOption("body", "…", f"it cannot be written as JSON ({error})") from None


def _refuse(name: str) -> None:
    raise ValueError(f"it has no number {name}")


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        _refuse(text[:40])
    return number


def object_of(content: bytes) -> dict[str, Any]:
    """Return the JSON object in a body; raises `UnsupportedOption` where the body is none."""
    try:
        value = json.loads(content, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise UnsupportedOption("body", "…", f"it is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UnsupportedOption("body", "…", "it must be a JSON object")
    return value
