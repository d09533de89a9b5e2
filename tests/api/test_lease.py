"""Leases by themselves: what keeps one alive, and what is known of a runner after its lease holder saw it end."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import signal
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from scheduler import Lease, PythonModel, RunnerCrashed, Scheduler, Settings
from scheduler.engines.llama import LlamaProcess
from scheduler.engines.runner_client import RunnerClient
from tests.engines.test_runner_client import Misbehaving, event, stream
from tests.support.leaks import no_leaks
from tests.support.real import LONG, SHORT, send, settings, write_models
from tests.support.waiting import LIMIT_S, assert_soon

MODEL = PythonModel("a", load=object)


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    """Yield a scheduler for objects."""
    with no_leaks(), Scheduler(Settings(gpus=False)) as scheduler:
        yield scheduler


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a tiny model that loads."""
    return write_models(tmp_path_factory.mktemp("models"), "a") / "a.gguf"


@pytest.fixture
def serving() -> Iterator[Scheduler]:
    """Yield a scheduler for files."""
    with no_leaks(), Scheduler(settings()) as scheduler:
        yield scheduler


def leases(scheduler: Scheduler) -> list[int]:
    """Return how many leases each runner has."""
    return [runner.leases for runner in scheduler.status().runners]


async def awaited(scheduler: Scheduler) -> Lease:
    """Await a lease."""
    return await scheduler.acquire_async(MODEL)


ASK: dict[str, Callable[[Scheduler], Any]] = {
    "acquire": lambda scheduler: scheduler.acquire(MODEL),
    "submit": lambda scheduler: scheduler.submit(MODEL).result(LIMIT_S),
    "a future": lambda scheduler: [future := scheduler.submit(MODEL), future.result(LIMIT_S)][0],
    "acquire_async": lambda scheduler: asyncio.run(awaited(scheduler)),
}


@pytest.mark.parametrize("ask", ASK)
def test_a_forgotten_lease_is_released_however_it_was_asked_for(scheduler: Scheduler, ask: str) -> None:
    """A lease that its holder forgets is released with a warning, because the scheduler does not keep it alive."""
    held = ASK[ask](scheduler)
    assert held and leases(scheduler) == [1]
    with pytest.warns(ResourceWarning, match="never released"):
        del held
        assert_soon(lambda: gc.collect() >= 0 and leases(scheduler) == [0])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_what_is_held_cannot_be_copied(scheduler: Scheduler, copied: Callable[[object], object]) -> None:
    """A lease cannot be copied, because the end of the copy would release the original."""
    with scheduler.acquire(MODEL) as lease, scheduler.reserve("cpu", "1MiB") as reservation:
        for held in (lease, reservation):
            with pytest.raises(TypeError, match=rf"a {type(held).__name__} cannot be copied"):
                copied(held)
        gc.collect()
        assert leases(scheduler) == [1] and scheduler.status().devices[0].held_bytes >= 2**20


def test_a_stream_cannot_be_copied(serving: Scheduler, file: Path) -> None:
    """A stream cannot be copied, because it ends once."""
    with serving.acquire(file) as lease, lease.stream("hello", **SHORT) as pieces:
        for stream in (pieces, lease.astream("hello")):
            with pytest.raises(TypeError, match="cannot be copied"):
                copy.copy(stream)
        assert "".join(pieces)


def test_what_is_entered_cannot_be_entered_again(scheduler: Scheduler) -> None:
    """A pending lease cannot be entered twice at once, and after its end it requests a new lease."""
    acquiring = scheduler.acquire_async(MODEL)

    async def enter() -> None:
        async with acquiring:
            pass

    async def main() -> None:
        async with acquiring:
            with pytest.raises(RuntimeError, match="ask the scheduler again"):
                await enter()
        assert leases(scheduler) == [0]
        await enter()
        refused = await asyncio.gather(enter(), enter(), return_exceptions=True)
        assert [type(each) for each in refused] == [type(None), RuntimeError]

    asyncio.run(main())
    assert leases(scheduler) == [0]


def read_to_its_end(lease: Lease) -> None:
    """Read an answer, and kill the runner in the middle of it."""
    pieces = lease.stream("hello", **LONG)
    next(pieces)
    send(lease.pid, signal.SIGKILL)
    list(pieces)


def await_to_its_end(lease: Lease) -> None:
    """Await an answer, and kill the runner in the middle of it."""

    async def main() -> None:
        pieces = lease.astream("hello", **LONG)
        await anext(pieces)
        send(lease.pid, signal.SIGKILL)
        async for _ in pieces:
            continue

    asyncio.run(main())


@pytest.mark.parametrize("read", [read_to_its_end, await_to_its_end])
def test_who_was_told_of_a_crash_is_not_given_the_same_runner(
    serving: Scheduler, file: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Lease], None]
) -> None:
    """A caller whose connection broke is not granted the same runner again, even if the exit is reported much later."""
    heard, tell = threading.Event(), LlamaProcess.ended
    monkeypatch.setattr("scheduler.engines.child_runner.EXIT_S", 0.01)
    monkeypatch.setattr(LlamaProcess, "ended", lambda self, exit: (heard.wait(LIMIT_S), tell(self, exit)))
    lease = serving.acquire(file)
    with pytest.raises(RunnerCrashed):
        read(lease)
    assert lease.lost
    lease.release()
    again = serving.submit(file)
    assert_soon(lambda: again.done() or serving.status().queue)
    heard.set()
    with again.result(LIMIT_S) as other:
        assert other.runner != lease.runner


def test_the_reason_of_a_crash_is_how_its_process_ended(serving: Scheduler, file: Path) -> None:
    """The error of a broken connection says how the process ended, for which it waits."""
    with serving.acquire(file) as lease, pytest.raises(RunnerCrashed, match="killed by SIGKILL") as told:
        read_to_its_end(lease)
    assert lease.lost and "SIGKILL" in told.value.reason


def test_a_connection_that_breaks_does_not_end_a_runner_that_answers(
    serving: Scheduler, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runner whose connection breaks is probed, and goes on if it answers."""

    def break_off(*_: object, **__: object) -> str:
        raise ConnectionError("broken")

    with serving.acquire(file) as lease:
        with monkeypatch.context() as patch, pytest.raises(RunnerCrashed, match="broken"):
            patch.setattr(RunnerClient, "answer", break_off)
            lease.chat("hello")
        assert lease.chat("hello", **SHORT) and not lease.lost


async def leave(lease: Lease) -> None:
    """Leave the loop over an answer in its middle."""
    async for _ in lease.astream("hello"):
        break


async def fail(lease: Lease) -> None:
    """Leave the loop over an answer in its middle by an exception."""
    with suppress(LookupError):
        async for _ in lease.astream("hello"):
            raise LookupError


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # only its loop could have closed the transport
@pytest.mark.parametrize("end", [leave, fail])
def test_an_answer_that_is_left_as_the_last_of_its_loop_ends_its_connection(
    serving: Scheduler, file: Path, monkeypatch: pytest.MonkeyPatch, end: Callable[[Lease], Coroutine[Any, Any, None]]
) -> None:
    """An answer that is left as the last task of its event loop closes its connection, which ends it in the runner."""
    ended = threading.Event()

    def act(connection: socket.socket) -> None:
        stream(event("a"))(connection)
        connection.recv(1)
        ended.set()

    with Misbehaving(act) as server:
        client = "scheduler.engines.runner_client.RunnerClient"
        monkeypatch.setattr(client, lambda _, key: RunnerClient(server.url, key))
        with serving.acquire(file) as lease:
            asyncio.run(end(lease))
            assert ended.wait(LIMIT_S)
