"""A server with a real scheduler and real llama.cpp on tiny models, reached over a socket as clients reach it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from scheduler import Scheduler
from scheduler.http import create_app
from tests.support.running import running
from tests.support.tiny_models import END, write_tiny_model


@dataclass(frozen=True)
class Served:
    """A server that runs, and its scheduler."""

    url: str
    scheduler: Scheduler

    def post(self, path: str, body: object, **headers: str) -> httpx2.Response:
        """Send JSON and return the whole answer."""
        return httpx2.post(f"{self.url}{path}", json=body, headers=headers, timeout=60, trust_env=False)

    def get(self, path: str, **headers: str) -> httpx2.Response:
        """Return the whole answer."""
        return httpx2.get(f"{self.url}{path}", headers=headers, timeout=60, trust_env=False)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models `m`, `other` and `deep/er`, and `slow`, whose answers do not end."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "deep").mkdir()
    write_tiny_model(folder / "m.gguf", context=4096)
    write_tiny_model(folder / "other.gguf", seed=1)
    write_tiny_model(folder / "deep" / "er.gguf", seed=2)
    write_tiny_model(folder / "slow.gguf", layers=8, width=512, context=32768, seed=3, biases={END: -40})
    return folder


def eventually(holds: Callable[[], bool], within_s: float = 10.0) -> None:
    """Wait until something holds; fails where it does not come to hold."""
    until = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < until, "it does not come to hold"
        time.sleep(0.02)


Serve = Callable[..., Served]


@pytest.fixture
def serve(model_folder: Path) -> Iterator[Serve]:
    """Return a function that starts a server; keywords of the application, and `settings` of its scheduler."""
    opened: list[Any] = []

    def start(settings: dict[str, Any] | None = None, **options: Any) -> Served:
        scheduler = Scheduler(gpus=False, models=model_folder, **(settings or {}))
        context = running(create_app(scheduler, **options))
        opened.append((context, scheduler))
        return Served(context.__enter__(), scheduler)

    yield start
    for context, scheduler in opened:
        scheduler.close(0)
        context.__exit__(None, None, None)


@pytest.fixture(scope="module")
def served(model_folder: Path) -> Iterator[Served]:
    """A server for the tests of one module that leave it as it was."""
    scheduler = Scheduler(gpus=False, models=model_folder, keep_alive="1h")
    with scheduler, running(create_app(scheduler)) as url:
        yield Served(url, scheduler)
