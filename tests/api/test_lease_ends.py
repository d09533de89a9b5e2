"""How the use of a lease ends: by its release, by a close from elsewhere, by a crash, and with the program."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from scheduler import (
    AnswerTimeout,
    EngineError,
    Lease,
    LeaseReleased,
    PythonModel,
    RunnerCrashed,
    Scheduler,
    UnsupportedOption,
)
from scheduler.engines.runner_client import RunnerClient
from tests.engines.test_runner_client import Act, Misbehaving, event, receive, stream
from tests.support.leaks import no_leaks
from tests.support.real import LONG, SHORT, send, settings, write_models
from tests.support.tiny_models import write_tiny_model
from tests.support.waiting import LIMIT_S, assert_soon

ENDLESS: dict[str, Any] = {"max_tokens": 8000, "ignore_eos": True}  # takes minutes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make tiny models, and one that answers slowly."""
    folder = write_models(tmp_path_factory.mktemp("models"), "abcdefgh")
    write_tiny_model(folder / "slow.gguf", context=8192, layers=8, width=256)
    return folder


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    """Yield a scheduler for files."""
    with no_leaks(), Scheduler(settings()) as scheduler:
        yield scheduler


def leases(scheduler: Scheduler) -> list[int]:
    """Return how many leases each runner has."""
    return [runner.leases for runner in scheduler.status().runners]


def of_server(monkeypatch: pytest.MonkeyPatch, server: Misbehaving) -> None:
    """Have leases talk to another server than their runner's."""
    client = "scheduler.engines.runner_client.RunnerClient"
    monkeypatch.setattr(client, lambda _, key: RunnerClient(server.url, key))


def silent(began: threading.Event) -> Act:
    """Take a request, and say nothing until the client has gone."""

    def act(connection: socket.socket) -> None:
        receive(connection)
        began.set()
        connection.settimeout(3 * LIMIT_S)  # longer than the test waits for it
        with suppress(OSError):
            connection.recv(1)

    return act


def after_one_piece(began: threading.Event) -> Act:
    """Answer with one piece, and say nothing more until the client has gone."""

    def act(connection: socket.socket) -> None:
        stream(event("a"))(connection)
        began.set()
        connection.settimeout(3 * LIMIT_S)  # longer than the test waits for it
        with suppress(OSError):
            connection.recv(1)

    return act


ACTS: dict[str, Callable[[threading.Event], Act]] = {"before it begins": silent, "in its middle": after_one_piece}


# -- streams that are closed from elsewhere ---------------------------------------------------------------------------


@pytest.mark.parametrize("act", ACTS)
def test_u63_a_stream_that_another_thread_closes_ends_for_its_reader(
    scheduler: Scheduler, folder: Path, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    """U63: the reader of a stream that another thread closes sees it end, and the lease is held until then."""
    began, read = threading.Event(), list[object]()
    with Misbehaving(ACTS[act](began)) as server:
        of_server(monkeypatch, server)
        with scheduler.acquire(folder / "a.gguf") as lease:
            pieces = lease.stream("hello")

        def reading() -> None:
            try:
                read.extend(pieces)
            except BaseException as error:
                read.append(error)

        reader = threading.Thread(target=reading)
        reader.start()
        assert began.wait(LIMIT_S) and leases(scheduler) == [1]
        pieces.close()
        pieces.close()
        reader.join(LIMIT_S)
        assert not reader.is_alive() and read in ([], ["a"]) and leases(scheduler) == [0]
        assert list(pieces) == []


@pytest.mark.parametrize("act", ACTS)
def test_u63_an_async_stream_that_another_task_closes_ends_for_its_reader(
    scheduler: Scheduler, folder: Path, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    """U63: the close of a stream from another task returns when the reader has seen its end and the lease is back."""
    began = threading.Event()

    async def main() -> list[str]:
        async with scheduler.acquire_async(folder / "a.gguf") as lease:
            pieces = lease.astream("hello")

        async def reading() -> list[str]:
            return [piece async for piece in pieces]

        reader = asyncio.create_task(reading())
        assert await asyncio.to_thread(began.wait, LIMIT_S) and leases(scheduler) == [1]
        await asyncio.wait_for(pieces.aclose(), LIMIT_S)
        assert leases(scheduler) == [0]
        return await asyncio.wait_for(reader, LIMIT_S)

    with Misbehaving(ACTS[act](began)) as server:
        of_server(monkeypatch, server)
        assert asyncio.run(main()) in ([], ["a"])


@pytest.mark.parametrize("kind", ["stream", "astream"])
def test_u63_a_stream_that_is_closed_during_a_read_yields_nothing_more(
    scheduler: Scheduler, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """U63: a close ends a stream for a reader that waits for its turn, although more of the answer has arrived."""

    async def main(lease: Lease) -> None:
        pieces = lease.astream("hello")
        assert await anext(pieces) == "a"
        async with pieces._turn:  # as another reader
            waiting = asyncio.ensure_future(anext(pieces))
            await asyncio.sleep(0)
            closing = asyncio.ensure_future(pieces.aclose())
            await asyncio.sleep(0)
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(waiting, LIMIT_S)
        await asyncio.wait_for(closing, LIMIT_S)

    with Misbehaving(stream(event("a") + event("b"))) as server:
        of_server(monkeypatch, server)
        with scheduler.acquire(folder / "a.gguf") as lease:
            if kind == "astream":
                asyncio.run(main(lease))
            else:
                pieces = lease.stream("hello")
                assert next(pieces) == "a"
                with pieces._turn:  # as another reader
                    pieces.close()
                assert next(pieces, None) is None
        assert leases(scheduler) == [0]


@pytest.mark.parametrize("kind", ["stream", "astream"])
def test_u63_a_stream_whose_time_has_passed_can_be_closed_unread(scheduler: Scheduler, folder: Path, kind: str) -> None:
    """U63: a stream whose time passes while nobody reads it gives the lease back at its close."""

    async def main() -> None:
        async with scheduler.acquire_async(folder / "slow.gguf", num_ctx=8192) as lease:
            pieces = lease.astream("hello", total_timeout=0.3, **ENDLESS)
        await anext(pieces)
        await asyncio.sleep(1.0)
        await pieces.aclose()

    if kind == "astream":
        asyncio.run(main())
    else:
        with scheduler.acquire(folder / "slow.gguf", num_ctx=8192) as lease:
            pieces = lease.stream("hello", total_timeout=0.3, **ENDLESS)
        next(pieces)
        threading.Event().wait(1.0)
        pieces.close()
        assert list(pieces) == []
    assert leases(scheduler) == [0]


def test_u63_a_stream_may_be_closed_at_any_moment(scheduler: Scheduler, folder: Path) -> None:
    """U63: whenever another thread closes a stream, its reader ends without an error and the lease comes back."""
    for _ in range(40):
        with scheduler.acquire(folder / "a.gguf") as lease:
            pieces = lease.stream("hello", **LONG)
        failures: list[BaseException] = []

        def reading(pieces: Any = pieces, failures: list[BaseException] = failures) -> None:
            try:
                for _ in pieces:
                    continue
            except BaseException as error:
                failures.append(error)

        reader = threading.Thread(target=reading)
        reader.start()
        threading.Event().wait(random.uniform(0.0, 0.01))
        pieces.close()
        reader.join(LIMIT_S)
        assert not reader.is_alive() and not failures
        assert_soon(lambda: leases(scheduler) == [0])


@pytest.mark.parametrize("kind", ["stream", "astream"])
def test_u63_a_stream_that_comes_after_the_release_is_refused_and_counts_nothing(
    scheduler: Scheduler, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """U63: a lease that is released while a stream is made refuses the stream, and counts none less than none."""
    lease = scheduler.acquire(folder / "a.gguf")
    original = RunnerClient.chat_call

    def released_meanwhile(*arguments: Any, **asked: Any) -> Any:
        lease.release()
        return original(*arguments, **asked)

    monkeypatch.setattr(RunnerClient, "chat_call", released_meanwhile)
    with pytest.raises(LeaseReleased):
        getattr(lease, kind)("hello")
    gc.collect()
    assert leases(scheduler) == [0]
    for use in (lambda: lease.chat("hello"), lambda: lease.url, lambda: lease.stream("hello")):
        with pytest.raises(LeaseReleased):
            use()


def test_u63_a_released_lease_with_an_open_stream_begins_nothing_new(scheduler: Scheduler, folder: Path) -> None:
    """U63: an open stream goes on past the release, and nothing else is begun."""
    lease = scheduler.acquire(folder / "a.gguf")
    with lease.stream("hello", **LONG) as pieces:
        lease.release()
        assert next(pieces) and leases(scheduler) == [1]
        with pytest.raises(LeaseReleased):
            lease.chat("hello")
    assert leases(scheduler) == [0]


@pytest.mark.parametrize("kind", ["chat", "achat"])
def test_u63_an_answer_under_way_holds_the_runner_past_the_release(
    scheduler: Scheduler, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """U63: a lease that is released while another thread waits for an answer comes back when that has ended."""
    began = threading.Event()
    with Misbehaving(silent(began)) as server:
        of_server(monkeypatch, server)
        lease, failures = scheduler.acquire(folder / "a.gguf"), list[BaseException]()

        def asking() -> None:
            try:
                if kind == "chat":
                    lease.chat("hello", total_timeout=2)
                else:
                    asyncio.run(lease.achat("hello", total_timeout=2))
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=asking)
        thread.start()
        assert began.wait(LIMIT_S)
        lease.release()
        held = leases(scheduler)
        thread.join(LIMIT_S)
        assert (held, leases(scheduler), [type(each) for each in failures]) == ([1], [0], [AnswerTimeout])


# -- crashes ----------------------------------------------------------------------------------------------------------


def talking(lease: Lease, kind: int) -> None:
    """Talk to a runner until it is gone."""
    while True:
        match kind % 4:
            case 0:
                lease.chat("hello", max_tokens=3)
            case 1:
                list(lease.stream("hello", max_tokens=5))
            case 2:
                lease.tokenize("hello")
            case _:
                asyncio.run(lease.achat("hello", max_tokens=3))


def test_u71_all_callers_of_a_killed_runner_are_told_that_it_crashed(scheduler: Scheduler, folder: Path) -> None:
    """U71: callers of a runner that is killed get RunnerCrashed, whatever they were doing, in one traceback."""
    for name in "abcdefgh":  # another each time: a model that crashes twice is backed off
        seen: list[BaseException] = []
        with scheduler.acquire(folder / f"{name}.gguf", num_ctx=256, num_parallel=4) as lease:

            def caller(kind: int, lease: Lease = lease, seen: list[BaseException] = seen) -> None:
                try:
                    talking(lease, kind)
                except BaseException as told:
                    seen.append(told)

            threads = [threading.Thread(target=caller, args=(kind,)) for kind in range(8)]
            for thread in threads:
                thread.start()
            threading.Event().wait(random.uniform(0.0, 0.2))
            send(lease.pid, signal.SIGKILL)
            for thread in threads:
                thread.join(LIMIT_S)
        assert [type(error) for error in seen] == [RunnerCrashed] * 8
        assert all("httpx2" not in "".join(traceback.format_exception(error)) for error in seen)


# -- the program's end ------------------------------------------------------------------------------------------------

PROGRAM = """
import asyncio, sys
from scheduler import PythonModel, Scheduler, Settings
one = Scheduler(Settings(measurement_file=None, lock_folder=None, gpus=False, cpu_threads=1))
{}
print("end")
"""
ASYNC = """
async def main():
    global stream, lease
    lease = await one.acquire_async(sys.argv[1])
    stream = lease.astream("go", max_tokens=900, ignore_eos=True)
    {}
asyncio.run(main())
"""
LEFT = {
    "an async stream": ASYNC.format("await anext(stream)"),
    "an async stream that was not begun": ASYNC.format("pass"),
    "an async stream without its lease": ASYNC.format("await anext(stream); lease.release()"),
    "an async stream that is read": ASYNC.format("global task; task = asyncio.create_task(anext(stream))"),
    "a stream": "lease = one.acquire(sys.argv[1]); stream = lease.stream('go', max_tokens=900); next(stream)",
    "a stream in a list": "kept = [one.acquire(sys.argv[1]).stream('go', max_tokens=900)]; next(kept[0])",
    "a lease": "lease = one.acquire(sys.argv[1])",
    "a reservation": "reservation = one.reserve('cpu', 1)",
    "a future": "future = one.submit(sys.argv[1])",
    "events": "events = one.events()",
}


@pytest.mark.parametrize("left", LEFT)
def test_u76_what_a_program_leaves_open_ends_without_a_word(folder: Path, left: str) -> None:
    """U76: whatever a program's globals still hold at its end, nothing is written to standard error."""
    command = [sys.executable, "-c", PROGRAM.format(LEFT[left]), str(folder / "a.gguf")]
    done = subprocess.run(command, timeout=60, capture_output=True, text=True, env=os.environ)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


# -- answers that nobody reads any more -------------------------------------------------------------------------------


def computing(lease: Lease) -> bool:
    """Return whether the runner computes an answer."""
    told = httpx2.get(
        f"{lease.url}/metrics", headers={"Authorization": f"Bearer {lease.api_key}"}, timeout=LIMIT_S
    ).text
    (line,) = [line for line in told.splitlines() if line.startswith("llamacpp:requests_processing ")]
    return float(line.split()[1]) > 0


def leave_the_loop(lease: Lease) -> None:
    for _ in lease.stream("hello", **ENDLESS):
        break


def leave_by_an_exception(lease: Lease) -> None:
    with suppress(LookupError):
        for _ in lease.stream("hello", **ENDLESS):
            raise LookupError


def close_it(lease: Lease) -> None:
    pieces = lease.stream("hello", **ENDLESS)
    next(pieces)
    pieces.close()


def close_a_generator_over_it(lease: Lease) -> None:
    """Do as a web framework does with a response whose client has left."""

    def body() -> Iterator[bytes]:
        for piece in lease.stream("hello", **ENDLESS):
            yield piece.encode()

    response = body()
    next(response)
    response.close()


def close_it_while_it_is_read(lease: Lease) -> None:
    pieces = lease.stream("hello", **ENDLESS)
    next(pieces)
    reader = threading.Thread(target=lambda: list(pieces))
    reader.start()
    pieces.close()
    reader.join(LIMIT_S)
    assert not reader.is_alive()


def let_its_time_pass(lease: Lease) -> None:
    with pytest.raises(AnswerTimeout):
        lease.chat("hello", total_timeout=0.3, **ENDLESS)


def cancel_its_task(lease: Lease) -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(lease.achat("hello", **ENDLESS), 0.3)

    asyncio.run(main())


def leave_the_async_loop(lease: Lease) -> None:
    async def main() -> None:
        async with lease.astream("hello", **ENDLESS) as pieces:
            async for _ in pieces:
                break

    asyncio.run(main())


def leave_a_long_prompt(lease: Lease) -> None:
    with pytest.raises(AnswerTimeout):
        lease.chat("x" * 8000, total_timeout=0.2)


@pytest.mark.parametrize(
    "leave",
    [
        leave_the_loop,
        leave_by_an_exception,
        close_it,
        close_a_generator_over_it,
        close_it_while_it_is_read,
        let_its_time_pass,
        cancel_its_task,
        leave_the_async_loop,
        leave_a_long_prompt,
    ],
)
def test_u52_an_answer_that_is_left_is_computed_no_further(
    scheduler: Scheduler, folder: Path, leave: Callable[[Lease], None]
) -> None:
    """U52: the runner stops the work on an answer that its reader has left, and the lease can go on."""
    with scheduler.acquire(folder / "slow.gguf", num_ctx=8192) as lease:
        leave(lease)
        assert_soon(lambda: not computing(lease))
        assert lease.chat("hello", **SHORT)
    assert leases(scheduler) == [0]


# -- rerankers --------------------------------------------------------------------------------------------------------


def test_u35_a_reranker_scores_documents(scheduler: Scheduler, tmp_path: Path) -> None:
    """U35: a model whose file says that it ranks gives each document one score, alone as among others."""
    model = write_tiny_model(tmp_path / "reranker.gguf", reranker=True)
    with scheduler.acquire(model, embedding=True) as lease:
        scores = lease.rerank("which harbour?", ["a harbour", "a bird", "a harbour"])
        assert (len(scores), scores[0], scores[0] != scores[1]) == (3, pytest.approx(scores[2], abs=1e-4), True)
        assert lease.rerank("which harbour?", ["a bird"]) == [pytest.approx(scores[1], abs=1e-4)]
        assert asyncio.run(lease.arerank("which harbour?", ["a bird"])) == [pytest.approx(scores[1], abs=1e-4)]
        for ask in (lambda: lease.embed("a"), lambda: asyncio.run(lease.aembed(["a"]))):
            with pytest.raises(UnsupportedOption, match="which has no vectors: use rerank") as refused:
                ask()
            assert refused.value.status == 400


def test_u35_a_reranker_that_is_loaded_for_text_says_what_to_load(scheduler: Scheduler, tmp_path: Path) -> None:
    """U35: a reranker that was not asked for with `embedding=True` says so."""
    model = write_tiny_model(tmp_path / "reranker.gguf", reranker=True)
    with scheduler.acquire(model) as lease, pytest.raises(EngineError, match="embedding=True"):
        lease.rerank("a", ["b"])


def test_u35_a_model_that_is_no_reranker_embeds_and_does_not_rank(scheduler: Scheduler, folder: Path) -> None:
    """U35: an embedder has vectors, and says what to load for scores."""
    with scheduler.acquire(folder / "a.gguf", embedding=True) as lease:
        assert len(lease.embed("a")) == 64
        with pytest.raises(EngineError, match="Acquire a reranker"):
            lease.rerank("a", ["b"])


def test_u35_a_python_object_is_no_server(scheduler: Scheduler) -> None:
    """U35: an object is used by its value, and its lease ranks and counts nothing."""
    with scheduler.acquire(PythonModel("a", load=object)) as lease:
        for ask in (lambda: lease.rerank("a", ["b"]), lambda: lease.tokenize("a"), lambda: lease.chat("a")):
            with pytest.raises(UnsupportedOption, match="use the value of the lease"):
                ask()
