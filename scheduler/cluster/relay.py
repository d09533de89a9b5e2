"""Answers of another server, passed on as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

import httpx2

from scheduler.http.exchange import Exchange

# Of a request, what goes along; headers of ours go along too. Keys, cookies and what browsers say of a page stay here.
_ALONG = ("content-type", "accept", "user-agent", "traceparent", "tracestate", "baggage")
# Of an answer, what is between two servers alone.
_BETWEEN = frozenset(
    {"connection", "content-length", "date", "keep-alive", "server", "transfer-encoding", "access-control-allow-origin"}
)
_OURS = "x-loadmaster-"


def headers_along(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers of a client's request that go along to another server."""
    return {name: value for name, value in headers.items() if name in _ALONG or name.startswith(_OURS)}


def headers_back(response: httpx2.Response) -> dict[str, str]:
    """Return the headers of an answer that are passed on to a client."""
    return {name: value for name, value in response.headers.items() if name.lower() not in _BETWEEN}


def is_stream(response: httpx2.Response) -> bool:
    """Tell whether an answer comes in parts, whose number was not known before."""
    return "content-length" not in response.headers


async def content_of(response: httpx2.Response, method: str) -> bytes:
    """Return the content of an answer that is no stream; that to HEAD has none, whatever its head says."""
    return b"" if method == "HEAD" else await response.aread()


def parts_of(response: httpx2.Response) -> AsyncIterator[bytes]:
    """Return the parts of an answer as they come."""
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    return aiter(response.stream)


async def pass_answer(exchange: Exchange, response: httpx2.Response, method: str) -> None:
    """Pass on a whole answer, be it a stream or not."""
    if not is_stream(response):
        await exchange.respond(response.status_code, await content_of(response, method), headers_back(response))
        return
    await exchange.begin(response.status_code, headers_back(response))
    async for part in parts_of(response):
        await exchange.write(part)
    await exchange.end()
