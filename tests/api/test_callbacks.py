"""Callbacks that block: they delay no answer, and a program is told where all of their threads are taken."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any

import pytest

from scheduler import Lease, PythonModel, Scheduler, Settings
from scheduler.runtime.executor import _CALLERS
from tests.support.leaks import no_leaks
from tests.support.waiting import LIMIT_S, assert_soon


def a_model(name: str = "a", **fields: Any) -> PythonModel:
    return PythonModel(name, memory={"cpu": "100MiB"}, **{"load": object, **fields})


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    with no_leaks(), Scheduler(Settings(gpus=False, memory_limit="1000MiB", max_queue=9999)) as scheduler:
        yield scheduler


@pytest.fixture
def blocked(scheduler: Scheduler) -> Iterator[threading.Event]:
    """Block every thread for callbacks, with one callback more that waits for them."""
    go_on, entered = threading.Event(), threading.Semaphore(0)

    def block(future: Future[Lease]) -> None:
        future.result().release()
        entered.release()
        go_on.wait(2 * LIMIT_S)

    futures = [scheduler.submit(a_model()) for _ in range(_CALLERS + 1)]
    for future in futures:
        future.add_done_callback(block)
    for _ in range(_CALLERS):
        assert entered.acquire(timeout=LIMIT_S)
    yield go_on
    go_on.set()
    assert entered.acquire(timeout=LIMIT_S)


async def _await(scheduler: Scheduler) -> None:
    async with scheduler.acquire_async(a_model()):
        pass


def _wait(scheduler: Scheduler) -> None:
    future = scheduler.submit(a_model())
    assert wait([future], LIMIT_S).done
    asyncio.run(_wrap(future))
    future.result().release()


async def _wrap(future: Future[Lease]) -> None:
    await asyncio.wait_for(asyncio.wrap_future(future), LIMIT_S)


ASKS: dict[str, Callable[[Scheduler], object]] = {
    "acquire": lambda scheduler: scheduler.acquire(a_model(), timeout=LIMIT_S).release(),
    "submit": lambda scheduler: scheduler.submit(a_model()).result(LIMIT_S).release(),
    "a cold model": lambda scheduler: scheduler.submit(a_model("b")).result(LIMIT_S).release(),
    "wait": _wait,
    "preload": lambda scheduler: scheduler.preload(a_model("c")).result(LIMIT_S),
    "acquire_async": lambda scheduler: asyncio.run(asyncio.wait_for(_await(scheduler), LIMIT_S)),
}


@pytest.mark.parametrize("name", ASKS)
def test_u62_callbacks_that_block_delay_no_answer(name: str, scheduler: Scheduler, blocked: threading.Event) -> None:
    """A request is answered although every thread for callbacks is taken by callbacks that block."""
    ASKS[name](scheduler)
    assert not blocked.is_set()


def test_u62_a_program_is_told_that_its_callbacks_wait(
    scheduler: Scheduler, blocked: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning, once, and a problem of the status tell that callbacks wait for others, for as long as they do."""
    assert_soon(lambda: any("callbacks" in problem for problem in scheduler.status().problems))
    scheduler._executor.ensure_threads()
    blocked.set()
    assert_soon(lambda: not scheduler.status().problems)
    assert [each.levelname for each in caplog.records] == ["WARNING"]
    assert f"{_CALLERS} callbacks" in caplog.text


def test_u62_more_callbacks_than_threads_may_wait_for_futures(scheduler: Scheduler) -> None:
    """Callbacks that each wait for another future all end, also where there are more of them than threads."""
    done: list[None] = []

    def then(future: Future[Lease]) -> None:
        scheduler.submit(a_model("b")).result(LIMIT_S).release()
        future.result().release()
        done.append(None)

    for _ in range(_CALLERS + 20):
        scheduler.submit(a_model()).add_done_callback(then)
    assert_soon(lambda: len(done) == _CALLERS + 20)


def test_u62_callbacks_of_one_future_run_in_their_order(scheduler: Scheduler) -> None:
    """The callbacks of one future run in the order in which they were added, also one that raises or exits."""
    order: list[int] = []
    loaded = threading.Event()

    def call(number: int) -> None:
        order.append(number)
        if number % 3 == 0:
            raise SystemExit if number % 2 else ValueError

    future = scheduler.submit(a_model(load=lambda: loaded.wait(LIMIT_S)))
    for number in range(10):
        future.add_done_callback(lambda _, number=number: call(number))  # type: ignore[misc]  # binds now
    loaded.set()
    future.result(LIMIT_S).release()
    assert_soon(lambda: order == list(range(10)))
    future.add_done_callback(lambda _: order.append(threading.get_ident()))
    assert order[-1] == threading.get_ident()  # at once, as with any future that is done


def test_u62_a_cancelled_future_calls_its_callbacks(scheduler: Scheduler) -> None:
    """Cancelling a future takes its request out of the queue at once, and runs its callbacks."""
    told = threading.Event()
    with scheduler.acquire(PythonModel("holder", object, memory={"cpu": "950MiB"})):
        future = scheduler.submit(a_model())
        future.add_done_callback(lambda done: told.set() if done.cancelled() else None)
        assert future.cancel() and not scheduler.status().queue
        assert told.wait(LIMIT_S)
