"""The server that the command runs: bounds of a connection, its lines, and its end after a bug."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import socket
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from fsm.core import Core
from scheduler import Scheduler
from scheduler.http import server as server_module
from scheduler.http.access_log import AccessLog, logging_to_stderr
from scheduler.http.server import FAILED, HttpServer, ServerOptions
from tests.support.waiting import LIMIT_S, assert_soon


def running(scheduler: Scheduler, use: Callable[[int], Awaitable[None]]) -> HttpServer:
    """Run a server until `use`, which gets its port, returns, or until it ends; return it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = HttpServer(scheduler, {}, ServerOptions())
        port = listening.getsockname()[1]

        async def both() -> None:
            using = asyncio.ensure_future(use(port))
            using.add_done_callback(lambda _: setattr(server, "should_exit", True))
            await server._serve([listening])
            await using

        asyncio.run(asyncio.wait_for(both(), LIMIT_S))
    return server


@pytest.mark.parametrize("request_before", [False, True])
@pytest.mark.parametrize("sent", [b"G", b"GET / HTTP/1.1\r\nHost: loc"])
def test_a_connection_whose_request_does_not_come_is_closed(
    monkeypatch: pytest.MonkeyPatch, request_before: bool, sent: bytes
) -> None:
    """A client whose headers have no end does not stay for ever, at first or after a request."""
    monkeypatch.setattr(server_module, "_HEADERS_S", 0.2)

    async def use(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        if request_before:
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await reader.readuntil(b'{"status":"ok"}')
        writer.write(sent)
        assert await reader.read() == b""
        writer.close()

    with Scheduler(gpus=False) as scheduler:
        running(scheduler, use)


def test_a_connection_that_sends_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that only connects does not stay for ever."""
    monkeypatch.setattr(server_module, "_HEADERS_S", 0.2)

    async def use(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await reader.read() == b""
        writer.close()

    with Scheduler(gpus=False) as scheduler:
        running(scheduler, use)


def test_a_request_that_is_answered_slowly_is_not_cut(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only headers have to come in time: neither a load nor an answer."""
    monkeypatch.setattr(server_module, "_HEADERS_S", 0.05)

    async def use(port: int) -> None:
        body = {"model": "slow", "prompt": "a", "max_tokens": 60, "ignore_eos": True}
        async with httpx2.AsyncClient(trust_env=False, timeout=60) as client:
            answer = await client.post(f"http://127.0.0.1:{port}/v1/completions", json=body)
        assert answer.json()["usage"]["completion_tokens"] == 60

    with Scheduler(gpus=False, models=model_folder) as scheduler:
        running(scheduler, use)


@pytest.mark.parametrize("line", [b"a: b\r\n", b"a"])
def test_headers_have_a_most_size(line: bytes) -> None:
    """Headers without an end are refused, be they many or one."""

    async def use(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nb: " + line * 100000)
        answer = b""
        with suppress(ConnectionResetError):  # it does not read what comes after its answer
            answer = await reader.read()
        assert not answer or answer.startswith(b"HTTP/1.1 400")
        writer.close()

    with Scheduler(gpus=False) as scheduler:
        running(scheduler, use)


def test_a_bug_of_the_scheduler_ends_the_server(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A scheduler that decides nothing more answers no one: the server ends, with a status that says so."""

    async def use(port: int) -> None:
        async with httpx2.AsyncClient(trust_env=False, timeout=60) as client:
            monkeypatch.setattr(Core, "_handle", lambda self, event: 1 / 0)
            body = {"model": "m", "prompt": "a", "max_tokens": 1}
            answer = await client.post(f"http://127.0.0.1:{port}/v1/completions", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "scheduler_broken")
        await asyncio.sleep(LIMIT_S)  # it is the server that ends

    scheduler = Scheduler(gpus=False, models=model_folder)
    try:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            server = HttpServer(scheduler, {}, ServerOptions())

            async def both() -> None:
                using = asyncio.ensure_future(use(listening.getsockname()[1]))
                await server._serve([listening])
                using.cancel()

            asyncio.run(asyncio.wait_for(both(), LIMIT_S))
    finally:
        scheduler.close(0)
    assert server.exit_status == FAILED
    assert "the scheduler has failed: the server ends" in caplog.text


# -- lines -------------------------------------------------------------------------------------------------------------


class Blocked(io.StringIO):
    """Standard error whose reader has stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.goes_on = threading.Event()

    def write(self, text: str) -> int:
        self.goes_on.wait(LIMIT_S)
        return super().write(text)


def test_a_reader_of_the_log_that_stops_holds_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines wait for their reader, in a number that is limited, and whoever logs does not."""
    monkeypatch.setattr(sys, "stderr", blocked := Blocked())
    monkeypatch.setattr("scheduler.http.access_log._MOST_LINES", 10)
    with logging_to_stderr("text"):
        for number in range(100):
            logging.getLogger("loadmaster").info("line %d", number)
        blocked.goes_on.set()
    lines = blocked.getvalue().splitlines()
    assert 10 <= len(lines) <= 12 and lines[0].endswith("Z line 0")


def logged(monkeypatch: pytest.MonkeyPatch, form: str, scope: dict[str, Any], app: Any) -> str:
    """Return the line for a request that an application answers."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())

    async def send(message: Any) -> None:
        pass

    with logging_to_stderr(form):
        asyncio.run(AccessLog(app)({"type": "http", **scope}, send, send))  # type: ignore[arg-type]  # nothing is received
        stream = sys.stderr
    assert isinstance(stream, io.StringIO)
    return stream.getvalue()


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_strangers_send_is_one_line_in_the_log(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """A path with line breaks, colours or a thousand characters forges no line; a query is left out."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["loadmaster"]["model"] = 'a "b" \x1b[31m'
        await send({"type": "http.response.start", "status": 200, "headers": []})

    path = "/v1\n2026-12-01T00:00:00.000Z ERROR forged\x1b[2J" + "x" * 999
    line = logged(monkeypatch, form, {"method": "GET", "path": path, "query_string": b"secret"}, app)
    assert line.count("\n") == 1 and "\x1b" not in line and "secret" not in line and len(line) < 600
    if form == "json":
        assert json.loads(line)["path"] == path[:200]


def test_the_line_of_a_request_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request whose response never began has the status 500; one whose client has left has 499."""

    async def left(scope: Any, receive: Any, send: Any) -> None:
        scope["loadmaster"]["left"] = True

    async def nothing(scope: Any, receive: Any, send: Any) -> None:
        pass

    scope = {"method": "GET", "path": "/"}
    assert " GET / 499 answer_s=" in logged(monkeypatch, "text", scope, left)
    assert " GET / 500 answer_s=" in logged(monkeypatch, "text", scope, nothing)


def test_an_exception_is_one_object(monkeypatch: pytest.MonkeyPatch) -> None:
    """In JSON, a traceback is part of the line's message."""
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    with logging_to_stderr("json"):
        try:
            raise ValueError("what was wrong")
        except ValueError:
            logging.getLogger("loadmaster").exception("a request failed")
    (line,) = stream.getvalue().splitlines()
    told = json.loads(line)
    assert told["level"] == "error" and told["message"].startswith("a request failed\nTraceback")
    assert told["message"].endswith("ValueError: what was wrong")
    assert_soon(lambda: not any(thread.name == "QueueListener" for thread in threading.enumerate()))
