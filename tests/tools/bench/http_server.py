"""What the HTTP server adds: a request of one token beside the same to the runner itself, and to llama.cpp's router.

The server runs in a process of its own. The router takes part where there is a `llama-server` (LLAMA_SERVER=PATH).
"""

from __future__ import annotations

import json
import multiprocessing
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import psutil

from scheduler import Scheduler
from scheduler.http.server import HttpServer, ServerOptions
from tests.support.tiny_models import write_tiny_model
from tests.tools.bench.measure import summary
from tests.tools.race.contestants import Course
from tests.tools.race.router import find_binary, router_at

REQUESTS = 160
CLIENTS = 16
STREAMS = 200
ONE = {"model": "m", "prompt": "a", "max_tokens": 1}
LONG = {"model": "m", "prompt": "a", "max_tokens": 3000, "ignore_eos": True, "stream": True}


def serve(folder: str, told: Connection) -> None:
    """Serve the models of a folder; tell the address, and the runner's address and key once the model is loaded."""
    with (
        Scheduler(gpus=False, models=folder, num_parallel=CLIENTS) as scheduler,
        socket.create_server(("127.0.0.1", 0)) as listening,
    ):
        with scheduler.acquire("m", keep_alive=-1) as lease:
            told.send((f"http://127.0.0.1:{listening.getsockname()[1]}", lease.url, lease.api_key))
        HttpServer(scheduler, {}, ServerOptions()).run([listening])


def ask(url: str, key: str, body: object) -> bytes:
    """Send a request on a new connection and return all that comes, to the end of the connection."""
    address, content = urlsplit(url), json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n"
    with socket.create_connection((address.hostname, address.port)) as client:
        client.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        parts = []
        while part := client.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def milliseconds(request: Callable[[], bytes], clients: int) -> list[float]:
    """Return the milliseconds of each request, of so many clients at once."""
    taken: list[float] = []

    def client() -> None:
        for _ in range(REQUESTS // clients):
            begin = time.perf_counter()
            assert b" 200 " in request()[:20]
            taken.append((time.perf_counter() - begin) * 1000)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken


@contextmanager
def server(folder: Path) -> Iterator[tuple[int, str, str, str]]:
    """Run the server; yield its process, its address, and the runner's address and key."""
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    process = context.Process(target=serve, args=(str(folder), its))
    process.start()
    try:
        url, runner, key = mine.recv()
        assert process.pid is not None
        yield process.pid, url, runner, key
    finally:
        process.terminate()
        process.join()


def run() -> dict[str, Any]:
    """Return the figures, and print them: each way in turns."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        write_tiny_model(folder / "m.gguf", context=4096)
        pid, url, runner, key = stack.enter_context(server(folder))
        ways = {"the runner itself": lambda: ask(runner, key, ONE), "through the server": lambda: ask(url, key, ONE)}
        binary, missing = find_binary(None)
        if binary:
            course = Course(folder, ("m",), 1, 1)
            routers, _ = stack.enter_context(router_at(course, binary, ("--parallel", str(CLIENTS))))
            ways["through the router"] = lambda: ask(routers, key, ONE)
        else:
            print(missing)
        results: dict[str, Any] = {}
        for clients in (1, CLIENTS):
            taken: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(3):
                for way, request in ways.items():
                    taken[way] += milliseconds(request, clients)
            print(f"one token, {clients} clients (ms)                       p50      p99")
            for way, each in taken.items():
                figures = summary(each)
                print(f"  {way:<40} {figures['p50']:>9.2f} {figures['p99']:>8.2f}")
                results[f"{way}, {clients} clients"] = figures
        return results | _streams(pid, url, key)


def _streams(pid: int, url: str, key: str) -> dict[str, Any]:
    """Measure the server's processor time for each chunk of a stream, and its memory for each open stream."""
    process = psutil.Process(pid)
    ask(url, key, LONG)
    before = sum(process.cpu_times()[:2])
    chunks = sum(ask(url, key, LONG).count(b"data: ") for _ in range(5))
    chunk_us = (sum(process.cpu_times()[:2]) - before) * 1e6 / chunks
    rest = process.memory_info().rss
    threads = [threading.Thread(target=ask, args=(url, key, LONG | {"max_tokens": 100})) for _ in range(STREAMS)]
    for thread in threads:
        thread.start()
    most = 0
    while any(thread.is_alive() for thread in threads):
        most = max(most, process.memory_info().rss)
        time.sleep(0.02)
    stream_kib = (most - rest) / STREAMS / 1024
    print(f"the server takes {chunk_us:.0f} µs of the processor for a chunk, and {stream_kib:.0f} KiB for a stream")
    return {"chunk_us": chunk_us, "stream_kib": stream_kib}
