"""The server that a command runs: uvicorn with bounds, an end in two steps, and what systemd is told."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from scheduler.api.scheduler import Scheduler
from scheduler.config.settings import Settings
from scheduler.errors.exceptions import SchedulerBroken, SchedulerClosed
from scheduler.errors.formatting import format_duration
from scheduler.http.access_log import AccessLog
from scheduler.http.app import create_app, protocol_of
from scheduler.http.errors import answer_to, code_of
from scheduler.http.exchange import Exchange
from scheduler.http.guard import path_of
from scheduler.http.service import refuse
from scheduler.http.settings import ServerArguments

log = logging.getLogger("loadmaster")

FAILED = 1  # the exit status after a bug
_HEADER_BYTES = 64 * 1024  # of one request, beyond what comes with its end
_HEADERS_S = 30.0  # for so long they may take
_IDLE_S = 75  # for so long a connection without a request stays: longer than usual proxies keep theirs
_LAST_WORDS_S = 2  # for the ends of streams to be sent, when all leases are back
_SPARE_CONNECTIONS = 1000  # beyond those whose requests are answered: idle ones, and those that are refused
_ENDING = answer_to(SchedulerClosed())
_WHILE_ENDING = ("/health", "/metrics", "/status")  # what is answered until the end: it can be watched


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How a server is reached."""

    tls: ssl.SSLContext | None = None
    root_path: str = ""  # under which a proxy publishes it
    proxies: Sequence[str] = ()  # addresses whose forwarded headers count


class Served(Protocol):
    """What a server ends when it ends itself, as it ends a scheduler."""

    settings: Settings  # its `close_timeout` counts

    async def aclose(self) -> None:
        """Wait for answers for `close_timeout`, then end them."""


class HttpServer(uvicorn.Server):
    """A server of a scheduler's models, which closes the scheduler; or of another application that ends as one does.

    The first SIGINT or SIGTERM lets answers finish for the setting `close_timeout` while new requests are refused, the
    second ends the process at once. SIGHUP calls `reload` on a thread; without it, SIGHUP ends the server too.
    """

    def __init__(
        self,
        scheduler: Scheduler | Served,
        arguments: ServerArguments,
        options: ServerOptions,
        *,
        app: ASGIApp | None = None,
        ready: Callable[[], None] = lambda: None,
        reload: Callable[[], None] | None = None,
    ) -> None:
        self.exit_status = 0
        self._scheduler = scheduler
        self._ready = ready
        self._reload = reload
        self._loop: asyncio.AbstractEventLoop | None = None  # once it runs
        self._ending = False
        self._end_task: asyncio.Task[None] | None = None
        if app is None:
            assert isinstance(scheduler, Scheduler)
            app = create_app(scheduler, **arguments)
        most = int(arguments.get("max_connections", 0)) + _SPARE_CONNECTIONS
        super().__init__(
            uvicorn.Config(
                AccessLog(self._front(app)), http=_Protocol, ws="none", lifespan="on", workers=1,
                interface="asgi3", log_config=None, log_level=logging.WARNING, access_log=False, server_header=False,
                timeout_keep_alive=_IDLE_S, limit_concurrency=most,
                timeout_graceful_shutdown=_LAST_WORDS_S, root_path=options.root_path,
                proxy_headers=bool(options.proxies), forwarded_allow_ips=[*options.proxies],
                ssl_context_factory=None if options.tls is None else lambda config, usual: _given(options.tls),
            )
        )  # fmt: skip

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal ends it, on a thread of its own: a scheduler decides nothing on the main thread."""
        with ThreadPoolExecutor(1, "loadmaster-server") as thread, self._signals():
            thread.submit(super().run, sockets).result()

    def run_without_signals(self, sockets: list[socket.socket]) -> None:
        """Serve on this thread until `should_exit` is set; signals are left alone."""
        super().run(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve, and say so."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._ready()
        tell_systemd("READY=1")
        if self._ending:  # since before there was a loop to tell
            self._begin_end()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Have signals end the server while it runs, and read its file again."""

        def end(number: int, frame: FrameType | None) -> None:
            if self._ending:
                os._exit(128 + number)  # runners end with this process, whatever ends it
            self._ending = True
            if self._loop is not None:
                with suppress(RuntimeError):  # the loop has ended by itself
                    self._loop.call_soon_threadsafe(self._begin_end)

        def hang_up(number: int, frame: FrameType | None) -> None:
            if self._reload is None:
                end(number, frame)
            elif not self._ending:
                threading.Thread(target=self._read_again, name="loadmaster-reload", daemon=True).start()

        handlers = {signal.SIGINT: end, signal.SIGTERM: end, signal.SIGHUP: hang_up}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _begin_end(self) -> None:
        if self._end_task is None:
            self._end_task = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        """Close the scheduler, which waits for answers and refuses what is new, and then the server."""
        tell_systemd("STOPPING=1")
        left = format_duration(self._scheduler.settings.close_timeout)
        log.info("ending: answers may take up to %s more; the next signal ends them at once", left)
        try:
            await self._scheduler.aclose()
        finally:
            self.should_exit = True

    def _read_again(self) -> None:
        assert self._reload is not None
        tell_systemd(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            self._reload()
        except Exception:
            log.exception("reading the file again has failed")
        finally:
            tell_systemd("READY=1")

    def _front(self, app: ASGIApp) -> ASGIApp:
        """Return an application that refuses new requests at the end, and that ends the server after a bug."""

        async def front(scope: Scope, receive: Receive, send: Send) -> None:
            if self._ending and scope["type"] == "http" and (path := path_of(scope)) not in _WHILE_ENDING:
                await refuse(Exchange(scope, receive, send), protocol_of(path), _ENDING)
                return
            await app(scope, receive, send)
            if scope.get("loadmaster", {}).get("error") == code_of(SchedulerBroken) and not self.should_exit:
                log.error("the scheduler has failed: the server ends")
                self.exit_status, self.should_exit = FAILED, True

        return front


def _given(context: ssl.SSLContext | None) -> ssl.SSLContext:
    assert context is not None
    return context


class _Protocol(HttpToolsProtocol):
    """A connection that is closed when the headers of a request do not come in time, or do not end."""

    _due: asyncio.TimerHandle | None = None  # set while the end of headers is awaited
    _unfinished_bytes = 0  # of headers without an end

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as its base
        super().connection_made(transport)
        self._await_headers()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_headers()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._call_off()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._due is not None:
            self._unfinished_bytes += len(data)
            if self._unfinished_bytes > _HEADER_BYTES and not self.transport.is_closing():
                self.send_400_response("The headers are too large.")

    def connection_lost(self, exc: Exception | None) -> None:
        self._call_off()
        super().connection_lost(exc)

    def _await_headers(self) -> None:
        if self._due is None:
            self._due = self.loop.call_later(_HEADERS_S, self.timeout_keep_alive_handler)

    def _call_off(self) -> None:
        if self._due is not None:
            self._due.cancel()
        self._due, self._unfinished_bytes = None, 0


def tell_systemd(state: str) -> None:
    """Tell systemd the state of this service, where it has started it and wants to know."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.connect(address.replace("@", "\0", 1) if address.startswith("@") else address)
            notify.sendall(state.encode())
