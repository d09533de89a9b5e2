"""A client that goes away ends its request at once, whatever the request does, and nothing is left of it."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from tests.http.conftest import Serve, Served, eventually

LONG: dict[str, Any] = {"max_tokens": 20000, "ignore_eos": True}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}], **LONG},
    "/v1/completions": {"prompt": "hello", **LONG},
    "/v1/messages": {"messages": [{"role": "user", "content": "hello"}], **LONG},
    "/v1/responses": {"input": "hello", "max_output_tokens": 20000, "ignore_eos": True},
}


def ask(served: Served, path: str, body: dict[str, Any]) -> socket.socket:
    """Send a request and return its connection, from which nothing has been read."""
    address = urlsplit(served.url)
    client = socket.create_connection((address.hostname, address.port), 10)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
    client.sendall(head.encode() + content)
    return client


def computing(pid: int, within_s: float = 0.5) -> bool:
    """Tell whether a process computes: whether it takes much of a processor's time."""
    process = psutil.Process(pid)
    before = sum(process.cpu_times()[:2])
    time.sleep(within_s)
    return sum(process.cpu_times()[:2]) - before > 0.3 * within_s


def left(served: Served) -> Callable[[], bool]:
    """Return whether no request waits and no lease is held."""

    def nothing() -> bool:
        status = served.scheduler.status()
        return not status.queue and not any(runner.leases for runner in status.runners)

    return nothing


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(("streamed", "read"), [(False, False), (True, False), (True, True)])
def test_a_client_that_leaves_an_answer_stops_its_computing(
    served: Served, path: str, streamed: bool, read: bool
) -> None:
    """The engine computes no further and the lease is released, also where nothing was ever read of the answer."""
    with ask(served, path, {"model": "slow", "stream": streamed, **BODIES[path]}) as client:
        eventually(lambda: any(runner.leases for runner in served.scheduler.status().runners))
        (runner,) = [one for one in served.scheduler.status().runners if one.leases]
        assert runner.pid is not None
        eventually(lambda: computing(runner.pid or 0))
        if read:
            assert b"data: " in client.recv(65536) + client.recv(65536)
    eventually(left(served), 1.0)
    eventually(lambda: not computing(runner.pid or 0), 2.0)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_leaves_the_queue_is_not_loaded_for(serve: Serve, streamed: bool) -> None:
    """A request that waits for memory leaves the queue with its client, and its model is not loaded."""
    served = serve({"max_runners": 1}, sign_of_life="0.1s")
    with served.scheduler.acquire("other"):
        with ask(served, "/v1/completions", {"model": "m", "stream": streamed, "prompt": "a"}):
            eventually(lambda: len(served.scheduler.status().queue) == 1)
        eventually(lambda: not served.scheduler.status().queue, 1.0)
    time.sleep(0.3)
    assert {runner.model for runner in served.scheduler.status().runners} <= {"other"}


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_leaves_a_load_keeps_nothing(serve: Serve, streamed: bool) -> None:
    """A load that has begun goes on, so that the next request finds its model; no lease is held."""
    served = serve(sign_of_life="0.1s")
    with ask(served, "/v1/completions", {"model": "slow", "stream": streamed, "prompt": "a"}):
        eventually(lambda: bool(served.scheduler.status().runners))
    eventually(left(served), 1.0)
    eventually(lambda: [runner.state for runner in served.scheduler.status().runners] == ["idle"])


def test_a_client_that_reads_too_slowly_and_leaves_keeps_nothing(served: Served) -> None:
    """The answer waits for a client that does not read, and ends when the client goes."""
    with ask(served, "/v1/completions", {"model": "slow", "stream": True, **BODIES["/v1/completions"]}) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        eventually(lambda: any(runner.leases for runner in served.scheduler.status().runners))
        time.sleep(1.0)
    eventually(left(served), 2.0)


def test_a_client_that_leaves_within_its_body_is_forgotten(served: Served) -> None:
    address = urlsplit(served.url)
    with socket.create_connection((address.hostname, address.port), 10) as client:
        client.sendall(b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    assert served.get("/health").status_code == 200
    eventually(left(served), 1.0)
