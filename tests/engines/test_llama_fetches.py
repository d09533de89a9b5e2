"""A runner makes no connections: what a request names is not fetched, whoever sends the request."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx2
import pytest

from scheduler import Lease, Scheduler
from tests.support.leaks import no_leaks
from tests.support.real import SHORT, settings
from tests.support.tiny_models import write_tiny_model
from tests.support.waiting import LIMIT_S
from tests.support.written_projector import write_projector

LANDLOCK_CREATE_RULESET, LANDLOCK_VERSION, LANDLOCK_OF_CONNECTIONS = 444, 1, 4


def kernel_can_refuse() -> bool:
    """Return whether the kernel lets a program give up connections: Linux from 6.7 on, where Landlock is on."""
    if sys.platform != "linux":
        return False
    import ctypes

    return ctypes.CDLL(None).syscall(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_VERSION) >= LANDLOCK_OF_CONNECTIONS


class Bait:
    """A server that counts who connects to it."""

    def __init__(self) -> None:
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                with connection:
                    connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def bait() -> Iterator[Bait]:
    """Yield a server that nothing may connect to."""
    bait = Bait()
    yield bait
    bait.close()


@pytest.fixture(scope="module")
def seeing(served_by: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lease]:
    """Yield a lease on a model that takes images."""
    folder = tmp_path_factory.mktemp("models")
    model = write_tiny_model(folder / "a.gguf", width=64, context=1024)
    projector = write_projector(folder / "projector.gguf", 64)
    with (
        no_leaks(),
        Scheduler(settings()) as scheduler,
        scheduler.acquire(model, projectors=projector, num_ctx=1024) as lease,
    ):
        yield lease


def post(lease: Lease, path: str, body: dict[str, Any]) -> httpx2.Response:
    """Send a request to the runner itself, past the lease."""
    headers = {"Authorization": f"Bearer {lease.api_key}"}
    return httpx2.post(f"{lease.url}{path}", headers=headers, json={"max_tokens": 4, **body}, timeout=LIMIT_S)


def requests_with(address: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return requests of several forms that name an address of an image."""
    chat = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": "a"}]
    claude = [{"type": "image", "source": {"type": "url", "url": address}}]
    response = [{"type": "input_image", "image_url": address}]
    return {
        "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": chat}]}),
        "messages": ("/v1/messages", {"messages": [{"role": "user", "content": claude}]}),
        "responses": ("/v1/responses", {"input": [{"role": "user", "content": response}]}),
    }


@pytest.mark.skipif(not kernel_can_refuse(), reason="the kernel does not let a program give up connections")
@pytest.mark.parametrize("form", ["chat", "messages", "responses"])
def test_u36_a_runner_that_is_asked_past_its_lease_fetches_nothing(seeing: Lease, bait: Bait, form: str) -> None:
    """U36: a request that another client sends to a runner with an address of an image reaches no server."""
    path, body = requests_with(f"http://127.0.0.1:{bait.port}/a.png")[form]
    answer = post(seeing, path, body)
    assert (answer.status_code >= 400, bait.connections) == (True, 0)


def test_u36_a_runner_that_fetches_nothing_still_answers(seeing: Lease) -> None:
    """U36: a runner that may not connect is connected to, and its context is known."""
    assert seeing.chat("hello", **SHORT).finish_reason == "length"
    assert post(seeing, "/v1/completions", {"prompt": "a"}).status_code == 200
