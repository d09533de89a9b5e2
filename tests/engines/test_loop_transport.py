"""The transport of event loops: answers however they are framed, what breaks, and connections that are closed."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx2
import pytest
import uvloop

from scheduler.engines.loop_transport import LoopTransport
from tests.engines.test_runner_client import SILENCE_S, Act, Misbehaving, receive

LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\none two"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n4;x=y\r\n two\r\n0\r\nX-Sum: 1\r\n\r\n"
TO_THE_END = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\none two"
INTERIM = b"HTTP/1.1 100 Continue\r\nX-Early: 1\r\n\r\n" + LENGTH
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
Run = Callable[[Coroutine[Any, Any, Any]], Any]
HIGH_BYTES = 64 << 20  # more than every buffer on the way holds


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Run:
    """Return a function that runs a coroutine on an event loop of its own, as `asyncio.run` does."""

    def on_a_loop(work: Coroutine[Any, Any, Any]) -> Any:
        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            return runner.run(work)

    return on_a_loop


def sends(answer: bytes, size: int = 1 << 16) -> Act:
    """Answer a request with bytes, `size` at a time, and close the connection."""

    def act(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        receive(connection)
        for start in range(0, len(answer), size):
            connection.sendall(answer[start : start + size])

    return act


async def post(url: str, timeout_s: float | None = SILENCE_S) -> httpx2.Response:
    async with httpx2.AsyncClient(transport=LoopTransport(), timeout=timeout_s) as client:
        return await client.post(url, content=b"{}")


@pytest.mark.parametrize("size", [1, 7, 1 << 16])
@pytest.mark.parametrize("answer", [LENGTH, CHUNKED, TO_THE_END, INTERIM])
def test_an_answer_is_whole_however_it_is_framed(run: Run, answer: bytes, size: int) -> None:
    """Content with a length, in chunks, up to the connection's end, and after an interim answer comes whole."""
    with Misbehaving(sends(answer, size)) as server:
        response = run(post(server.url))
    assert (response.status_code, response.content, "X-Early" in response.headers) == (200, b"one two", False)


@pytest.mark.parametrize("answer", [b"", LENGTH[:20], LENGTH[:-1], CHUNKED[:-20], b"SSH-2.0-x\r\n\r\n"])
def test_an_answer_that_is_not_whole_is_an_error(run: Run, answer: bytes) -> None:
    """An answer that breaks off anywhere, and bytes that are no HTTP, are a protocol's error."""
    with Misbehaving(sends(answer)) as server, pytest.raises(httpx2.RemoteProtocolError):
        run(post(server.url))


@pytest.mark.parametrize("answer", [b"", LENGTH[:-1]])
def test_a_silent_server_is_a_timeout(run: Run, answer: bytes) -> None:
    """A server that says no more, before its answer or in it, is told apart from one that breaks off."""
    over = threading.Event()

    def silent(connection: socket.socket) -> None:
        sends(answer)(connection)
        over.wait(SILENCE_S)

    with Misbehaving(silent) as server:
        with pytest.raises(httpx2.ReadTimeout):
            run(post(server.url, timeout_s=0.2))
        over.set()


def test_a_server_that_is_gone_is_an_error(run: Run) -> None:
    """A connection that cannot be opened has the system's error as its cause."""
    with Misbehaving() as server:
        pass
    with pytest.raises(httpx2.ConnectError) as failed:
        run(post(server.url))
    assert isinstance(failed.value.__cause__, httpx2.ConnectError | ConnectionRefusedError)


async def begun(url: str) -> httpx2.Response:
    """Return a response of which only the head was read."""
    client = httpx2.AsyncClient(transport=LoopTransport(), timeout=SILENCE_S)
    return await client.send(client.build_request("POST", url, content=b"{}"), stream=True)


async def leaves(url: str) -> None:
    await (await begun(url)).aclose()


async def is_cancelled(url: str) -> None:
    task = asyncio.create_task((await begun(url)).aread())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def is_cancelled_before_the_head(url: str) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await begun(url)


@pytest.mark.parametrize(
    ("leave", "head"), [(leaves, True), (is_cancelled, True), (is_cancelled_before_the_head, False)]
)
def test_a_request_that_is_left_has_its_connection_closed(run: Run, leave: Callable[[str], object], head: bool) -> None:
    """A response that is closed, and a request that is cancelled before or in its answer, close their connection."""
    ended = threading.Event()

    def act(connection: socket.socket) -> None:
        sends(LENGTH[:-1] if head else b"")(connection)
        with suppress(ConnectionResetError):
            assert connection.recv(1) == b""
        ended.set()

    async def left(url: str) -> bool:
        await leave(url)  # type: ignore[misc]  # each is a coroutine's function
        return await asyncio.to_thread(ended.wait, SILENCE_S)  # while the loop still runs

    with Misbehaving(act) as server:
        assert run(left(server.url))


def test_a_server_waits_while_its_answer_is_not_read(run: Run) -> None:
    """An answer that is not read fills no memory here, and comes whole when it is read."""
    waited = threading.Event()

    def floods(connection: socket.socket) -> None:
        receive(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % HIGH_BYTES)
        connection.settimeout(0.5)
        sent, part = 0, memoryview(b"x" * (1 << 20))
        while sent < HIGH_BYTES:
            try:
                sent += connection.send(part[: HIGH_BYTES - sent])
            except TimeoutError:
                waited.set()

    async def read(url: str) -> int:
        response = await begun(url)
        assert await asyncio.to_thread(waited.wait, SILENCE_S)
        return len(await response.aread())

    with Misbehaving(floods) as server:
        assert run(read(server.url)) == HIGH_BYTES


def test_one_transport_serves_loops_at_once(run: Run) -> None:
    """Event loops of several threads may use one transport at the same time."""
    client = httpx2.AsyncClient(transport=LoopTransport(), timeout=SILENCE_S)

    async def several(url: str) -> list[bytes]:
        return [(await client.post(url, content=b"{}")).content for _ in range(10)]

    with Misbehaving(*[sends(CHUNKED)] * 40) as server, ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: run(several(server.url)), range(4)))
    assert answers == [[b"one two"] * 10] * 4
