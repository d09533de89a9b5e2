"""Clients of the package openai that belong to a lease: they hold it while they are answered, and end with it."""

from __future__ import annotations

import asyncio
import builtins
import gc
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scheduler import LeaseReleased, PythonModel, RunnerCrashed, Scheduler, UnsupportedOption
from tests.support.leaks import no_leaks
from tests.support.real import send, settings, write_models
from tests.support.waiting import assert_soon

pytest.importorskip("openai", reason="it comes with the extra called openai")
HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a tiny model."""
    return write_models(tmp_path_factory.mktemp("models"), "a") / "a.gguf"


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    """Yield a scheduler for files."""
    with no_leaks(), Scheduler(settings()) as scheduler:
        yield scheduler


def leases(scheduler: Scheduler) -> list[int]:
    """Return how many leases each runner has."""
    return [runner.leases for runner in scheduler.status().runners]


def test_u47_a_client_talks_to_the_runner_of_its_lease(scheduler: Scheduler, model: Path) -> None:
    """U47: a client of the package openai is answered by the lease's runner, whole and piece by piece."""
    with scheduler.acquire(model) as lease, lease.openai() as client:
        whole = client.chat.completions.create(model="any", messages=HELLO, max_tokens=5, temperature=0)
        pieces = client.chat.completions.create(model="any", messages=HELLO, max_tokens=5, temperature=0, stream=True)
        text = "".join(each.choices[0].delta.content or "" for each in pieces if each.choices)
        assert text == whole.choices[0].message.content == lease.chat("hello", max_tokens=5, temperature=0)
        assert client.models.list().data[0].id == "a"
    assert leases(scheduler) == [0]


def test_u47_a_client_of_an_event_loop_talks_to_the_runner_of_its_lease(scheduler: Scheduler, model: Path) -> None:
    """U47: so is one in an event loop."""

    async def main() -> None:
        async with scheduler.acquire_async(model) as lease, lease.async_openai() as client:
            whole = await client.chat.completions.create(model="any", messages=HELLO, max_tokens=5, temperature=0)
            pieces = await client.chat.completions.create(
                model="any", messages=HELLO, max_tokens=5, temperature=0, stream=True
            )
            text = "".join([each.choices[0].delta.content or "" async for each in pieces if each.choices])
            assert text == whole.choices[0].message.content

    asyncio.run(main())
    assert leases(scheduler) == [0]


def test_u47_a_client_that_is_kept_is_of_no_use_after_the_release(scheduler: Scheduler, model: Path) -> None:
    """U47: a client that outlives its lease is refused at once, although the runner is still there."""
    with scheduler.acquire(model) as lease:
        client, other = lease.openai(), lease.async_openai()
        assert client.chat.completions.create(model="any", messages=HELLO, max_tokens=2).choices

    async def ask() -> None:
        await other.chat.completions.create(model="any", messages=HELLO, max_tokens=2)

    with pytest.raises(LeaseReleased):
        client.chat.completions.create(model="any", messages=HELLO, max_tokens=2)
    with pytest.raises(LeaseReleased):
        asyncio.run(ask())
    client.close()
    for use in (lease.openai, lease.async_openai, lambda: lease.url):
        with pytest.raises(LeaseReleased):
            use()


def test_u47_an_answer_under_way_holds_the_lease(scheduler: Scheduler, model: Path) -> None:
    """U47: an answer that has begun before the release goes on to its end, and holds the runner until then."""
    with scheduler.acquire(model) as lease:
        client = lease.openai()
        pieces = client.chat.completions.create(model="any", messages=HELLO, max_tokens=400, stream=True)
        next(pieces)
    assert leases(scheduler) == [1]
    assert [each for each in pieces][-1].choices[0].finish_reason  # noqa: C416  # read to its end
    assert leases(scheduler) == [0]
    client.close()


def test_u47_an_answer_that_is_forgotten_gives_the_lease_back(scheduler: Scheduler, model: Path) -> None:
    """U47: an answer that its reader leaves gives the lease back, closed or lost."""
    with scheduler.acquire(model) as lease, lease.openai() as client:
        for close in (True, False):
            pieces = client.chat.completions.create(model="any", messages=HELLO, max_tokens=400, stream=True)
            next(pieces)
            if close:
                pieces.close()
            del pieces
            gc.collect()
    assert_soon(lambda: leases(scheduler) == [0])


def test_u47_a_runner_that_is_gone_is_told(scheduler: Scheduler, model: Path) -> None:
    """U47: a client whose runner was killed raises RunnerCrashed."""
    with scheduler.acquire(model) as lease, lease.openai() as client:
        send(lease.pid, signal.SIGKILL)
        with pytest.raises(RunnerCrashed):
            while True:
                client.chat.completions.create(model="any", messages=HELLO, max_tokens=2)


def test_u36_an_address_in_a_message_of_a_client_is_refused(scheduler: Scheduler, model: Path) -> None:
    """U36: a client of a lease's own refuses an address that the runner would fetch, as the lease does."""
    part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}}
    with scheduler.acquire(model) as lease, lease.openai() as client:
        with pytest.raises(UnsupportedOption, match="the runner would fetch it"):
            client.chat.completions.create(model="any", messages=[{"role": "user", "content": [part]}])

        async def ask() -> None:
            async with lease.async_openai() as other:
                await other.chat.completions.create(model="any", messages=[{"role": "user", "content": [part]}])

        with pytest.raises(UnsupportedOption, match="the runner would fetch it"):
            asyncio.run(ask())


def test_u47_a_package_that_is_missing_is_named(
    scheduler: Scheduler, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """U47: where the package is not installed, the error says how to install it; an object has no client."""
    original = builtins.__import__

    def missing(name: str, *arguments: Any, **named: Any) -> Any:
        if name == "openai" or name.endswith("openai_clients"):
            raise ImportError(name)
        return original(name, *arguments, **named)

    monkeypatch.delitem(sys.modules, "scheduler.api.openai_clients", raising=False)
    with scheduler.acquire(model) as lease, monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", missing)
        for ask in (lease.openai, lease.async_openai):
            with pytest.raises(UnsupportedOption, match=r"pip install 'loadmaster\[openai\]'"):
                ask()
    with (
        scheduler.acquire(PythonModel("b", load=object)) as lease,
        pytest.raises(UnsupportedOption, match="use the value"),
    ):
        lease.openai()


def test_u47_the_package_is_not_imported_with_the_library() -> None:
    """U47: a program that asks for no such client does not wait for the package."""
    import subprocess

    command = [sys.executable, "-c", "import scheduler, sys; print('openai' in sys.modules)"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"
