"""HTTP clients beside each other: the processor time of a streamed chunk and of a request, on an event loop.

The clients that are not installed are left out. No client is told what to do with the bytes: they are only counted.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import socketserver
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import partial
from importlib import import_module, metadata
from multiprocessing.connection import Connection
from typing import Any

import httpx2

from scheduler.engines.loop_transport import LoopTransport

CHUNKS = 1_000  # of one stream
PACE_S = 0.001  # between two chunks, so that each is read by itself, as tokens are
REQUESTS = 300
ROUNDS = 7
BODY = b'{"messages": [{"role": "user", "content": "hello"}]}'
EVENT = b"data: " + b"x" * 192 + b"\n\n"
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
JSON = b'{"text": "' + b"x" * 988 + b'"}'
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(JSON), JSON)
LAST = b"0\r\n\r\n"
SIZES = {"/stream": CHUNKS * len(EVENT), "/ask": len(JSON)}  # of the contents that a client has to pass on

Request = Callable[[str], Awaitable[int]]  # from a path to the bytes of the answer's content
Opened = AbstractAsyncContextManager[Request]
Open = Callable[[str, int, bool], Opened]  # from a host, a port, and whether the connection is kept


class Server(socketserver.StreamRequestHandler):
    """Answers as llama.cpp's server does, a thread for each connection."""

    disable_nagle_algorithm = True

    def handle(self) -> None:
        """Answer until the client closes the connection."""
        while line := self.rfile.readline():
            length = 0
            while header := self.rfile.readline().strip().lower():
                if header.startswith(b"content-length:"):
                    length = int(header.partition(b":")[2])
            self.rfile.read(length)
            if b"/ask" in line:
                self.wfile.write(ANSWER)
                continue
            self.wfile.write(EVENTS)
            for _ in range(CHUNKS):
                self.wfile.write(CHUNK)
                time.sleep(PACE_S)
            self.wfile.write(LAST)


def serve(told: Connection) -> None:
    """Serve at a free port, which is told, until the process is ended."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Server) as server:
        told.send(server.server_address)
        server.serve_forever()


@contextmanager
def server() -> Iterator[tuple[str, int]]:
    """Run the server in a process of its own, whose time is not counted."""
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    process = context.Process(target=serve, args=(its,), daemon=True)
    process.start()
    try:
        yield mine.recv()
    finally:
        process.terminate()
        process.join()


class _Bytes:
    """Takes all bytes for content, and knows the end of an answer by its last ones."""

    def __init__(self, answer: _Answer) -> None:
        self._answer = answer

    def feed_data(self, data: bytes) -> None:
        """Take in some bytes."""
        self._answer.on_body(data)
        if data.endswith((LAST, JSON)):
            self._answer.on_message_complete()


class _H11:
    """Parses with h11."""

    def __init__(self, answer: _Answer) -> None:
        self._answer, self._h11 = answer, import_module("h11")
        self._state = self._h11.Connection(self._h11.CLIENT)
        self._state.send(self._h11.Request(method="POST", target="/", headers=[("Host", "localhost")]))

    def feed_data(self, data: bytes) -> None:
        """Take in some bytes."""
        self._state.receive_data(data)
        while (event := self._state.next_event()) is not self._h11.NEED_DATA:
            if type(event) is self._h11.Data:
                self._answer.on_body(event.data)
            elif type(event) is self._h11.EndOfMessage:
                return self._answer.on_message_complete()


def _httptools(answer: _Answer) -> Any:
    """Return a parser of httptools."""
    return import_module("httptools").HttpResponseParser(answer)


class _Answer(asyncio.Protocol):
    """One connection, with the answer to the request that was sent last."""

    def begin(self, done: asyncio.Future[int], parser: Any) -> None:
        """Await an answer."""
        self._count, self._done, self._parser = 0, done, parser

    def data_received(self, data: bytes) -> None:
        """Take in some bytes."""
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        """Take in a part of the content."""
        self._count += len(body)

    def on_message_complete(self) -> None:
        """Take in the end."""
        self._done.set_result(self._count)


@asynccontextmanager
async def of_parser(parser: Callable[[_Answer], Any], host: str, port: int, kept: bool) -> AsyncIterator[Request]:
    """Parse what a protocol of asyncio receives."""
    loop = asyncio.get_running_loop()
    left: list[tuple[Any, _Answer]] = []  # connections that are kept

    async def request(path: str) -> int:
        transport, answer = left.pop() if left else await loop.create_connection(_Answer, host, port)
        done: asyncio.Future[int] = loop.create_future()
        answer.begin(done, parser(answer))
        head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {len(BODY)}\r\n\r\n"
        transport.write(head.encode() + BODY)
        count = await done
        left.append((transport, answer)) if kept else transport.close()
        return count

    yield request
    for transport, _ in left:
        transport.close()


@asynccontextmanager
async def of_httpcore(name: str, host: str, port: int, kept: bool) -> AsyncIterator[Request]:
    """Use the layer below httpx or httpx2."""
    url, headers = f"http://{host}:{port}", [("Host", f"{host}:{port}"), ("Content-Length", str(len(BODY)))]
    async with import_module(name).AsyncConnectionPool(max_keepalive_connections=None if kept else 0) as pool:

        async def request(path: str) -> int:
            async with pool.stream("POST", url + path, headers=headers, content=BODY) as response:
                return sum([len(part) async for part in response.aiter_stream()])

        yield request


@asynccontextmanager
async def of_httpx(
    name: str, host: str, port: int, kept: bool, transport: Callable[[], Any] = lambda: None
) -> AsyncIterator[Request]:
    """Use httpx or httpx2, with a transport of its own or another one."""
    library = import_module(name)
    limits = library.Limits(max_keepalive_connections=None if kept else 0)
    told = {"base_url": f"http://{host}:{port}", "limits": limits, "timeout": None, "trust_env": False}
    async with library.AsyncClient(transport=transport(), **told) as client:

        async def request(path: str) -> int:
            async with client.stream("POST", path, content=BODY) as response:
                return sum([len(part) async for part in response.aiter_raw()])

        yield request


@asynccontextmanager
async def of_our_transport(host: str, port: int, kept: bool) -> AsyncIterator[Request]:
    """Use the transport of event loops, which keeps no connection, without a client of httpx2."""
    transport, extensions = LoopTransport(), {"timeout": httpx2.Timeout(None).as_dict()}

    async def request(path: str) -> int:
        sent = httpx2.Request("POST", f"http://{host}:{port}{path}", content=BODY, extensions=extensions)
        response = await transport.handle_async_request(sent)
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        count = sum([len(part) async for part in response.stream])
        await response.aclose()
        return count

    yield request


@asynccontextmanager
async def of_aiohttp(host: str, port: int, kept: bool) -> AsyncIterator[Request]:
    """Use aiohttp."""
    library = import_module("aiohttp")
    connector = library.TCPConnector(force_close=not kept)
    async with library.ClientSession(f"http://{host}:{port}", connector=connector, auto_decompress=False) as session:

        async def request(path: str) -> int:
            async with session.post(path, data=BODY) as response:
                return sum([len(part) async for part in response.content.iter_any()])

        yield request


CLIENTS: dict[str, Open] = {
    "aiohttp": of_aiohttp,
    "h11": partial(of_parser, _H11),
    "httpcore": partial(of_httpcore, "httpcore"),
    "httpcore2": partial(of_httpcore, "httpcore2"),
    "httptools": partial(of_parser, _httptools),
    "httpx": partial(of_httpx, "httpx"),
    "httpx2": partial(of_httpx, "httpx2"),
}


OURS: dict[str, tuple[str, Open]] = {
    "httpx2 with our transport": ("", partial(of_httpx, "httpx2", transport=LoopTransport)),
    "our transport alone": ("", of_our_transport),
}


def installed() -> dict[str, tuple[str, Open]]:
    """Return the version of each client that is installed, with how it is opened."""
    found = {distribution.metadata["Name"]: distribution.version for distribution in metadata.distributions()}
    return {name: (found[name], open_) for name, open_ in CLIENTS.items() if name in found}


async def processor_us(open_: Open, address: tuple[str, int], path: str, kept: bool) -> float:
    """Return the µs of the processor for each chunk of a stream, or for each of many requests."""
    times = 1 if path == "/stream" else REQUESTS
    async with open_(*address, kept) as request:
        await request("/ask")
        begin = time.process_time()
        for _ in range(times):
            assert await request(path) >= SIZES[path]  # the floor counts the framing too
        return (time.process_time() - begin) * 1e6 / (CHUNKS if path == "/stream" else REQUESTS)


FLOOR = "floor: bytes alone"
MEASURED = {"a chunk": ("/stream", True), "a request, kept": ("/ask", True), "a request, new": ("/ask", False)}


def run() -> dict[str, Any]:
    """Return the figures in µs of the processor, and print them beside the floor's of the same round."""
    clients = {FLOOR: ("", partial(of_parser, _Bytes)), **installed(), **OURS}
    taken: dict[str, dict[str, list[float]]] = {name: {what: [] for what in MEASURED} for name in clients}
    with server() as address:
        for _ in range(ROUNDS):
            for name, (_, open_) in clients.items():
                for what, (path, kept) in MEASURED.items():
                    taken[name][what].append(asyncio.run(processor_us(open_, address, path, kept)))
    print(
        f"{f'µs of the processor (× the floor), medians of {ROUNDS}':<44}" + "".join(f"{what:>22}" for what in MEASURED)
    )
    results: dict[str, Any] = {}
    for name, (version, _) in clients.items():
        middle = {what: statistics.median(each) for what, each in taken[name].items()}
        ratios = {
            what: statistics.median(mine / least for mine, least in zip(each, taken[FLOOR][what], strict=True))
            for what, each in taken[name].items()
        }
        print(
            f"  {name + ' ' + version:<42}"
            + "".join(f"{middle[what]:>14.1f} ({ratios[what]:>5.2f})" for what in MEASURED)
        )
        results[name] = {"version": version, "processor_us": middle, "over_floor": ratios}
    return results
