"""The life of a scheduler: its blocks, its close on an event loop, and its end with the program."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from scheduler import PythonModel, RunnerCrashed, Scheduler, SchedulerClosed, Settings
from tests.support.leaks import no_leaks
from tests.support.waiting import LIMIT_S, assert_soon


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    with no_leaks():
        yield


def a_scheduler(**settings: Any) -> Scheduler:
    return Scheduler(Settings(**{"gpus": False, "memory_limit": "1000MiB", "close_timeout": 4 * LIMIT_S, **settings}))


def a_model(name: str = "a", **fields: Any) -> PythonModel:
    return PythonModel(name, memory={"cpu": "100MiB"}, **{"load": object, **fields})


def took_s(action: Callable[[], object]) -> float:
    begin = time.monotonic()
    action()
    return time.monotonic() - begin


# -- on an event loop --------------------------------------------------------------------------------------------------


def test_u43_a_task_releases_its_lease_while_an_async_block_is_left() -> None:
    """A task that was just cancelled releases its lease, and the block is left long before `close_timeout`."""

    async def hold(scheduler: Scheduler, held: asyncio.Event) -> None:
        async with scheduler.acquire_async(a_model()) as lease:
            held.set()
            try:
                await asyncio.sleep(10 * LIMIT_S)
            finally:
                assert not lease.lost

    async def main() -> float:
        async with a_scheduler() as scheduler:
            held = asyncio.Event()
            task = asyncio.create_task(hold(scheduler, held))
            await held.wait()
            task.cancel()
            begin = time.monotonic()
        assert task.cancelled()
        return time.monotonic() - begin

    assert asyncio.run(main()) < LIMIT_S


def test_u43_tasks_go_on_during_aclose() -> None:
    """`aclose` waits for a lease that another task uses and then releases."""

    async def main() -> None:
        scheduler = a_scheduler()
        lease = await scheduler.acquire_async(a_model())

        async def finish() -> None:
            while not scheduler.status().closing:
                await asyncio.sleep(0.001)
            assert not lease.lost
            lease.release()

        task = asyncio.create_task(finish())
        await scheduler.aclose()
        await task
        assert scheduler.debug_state().ended
        await scheduler.aclose()  # twice is harmless

    asyncio.run(main())


def test_u43_aclose_needs_no_thread_of_the_loops_executor() -> None:
    """`aclose` answers blocking calls that take up all threads of the loop's own executor."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(2))
        async with a_scheduler() as scheduler:
            loaded = threading.Event()
            model = a_model(load=lambda: loaded.wait(LIMIT_S))
            waiting = [asyncio.ensure_future(asyncio.to_thread(scheduler.acquire, model)) for _ in range(2)]
            while len(scheduler.debug_state().requests) < 2:
                await asyncio.sleep(0.001)
            closing = asyncio.ensure_future(scheduler.aclose())
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)
            loaded.set()
            await closing
        assert [type(outcome) for outcome in outcomes] == [SchedulerClosed] * 2

    asyncio.run(main())


def test_u43_an_aclose_that_is_cancelled_goes_on() -> None:
    """The close goes on when the task is cancelled that awaits `aclose`."""

    async def main() -> Scheduler:
        scheduler = a_scheduler()
        lease = await scheduler.acquire_async(a_model())
        closing = asyncio.create_task(scheduler.aclose())
        while not scheduler.status().closing:
            await asyncio.sleep(0.001)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        lease.release()
        return scheduler

    scheduler = asyncio.run(main())
    assert_soon(lambda: scheduler.debug_state().ended)


def test_u43_an_error_of_aclose_is_raised() -> None:
    """`aclose` raises what `close` raises for a wrong timeout."""

    async def main() -> None:
        async with a_scheduler() as scheduler:
            with pytest.raises(ValueError, match="timeout"):
                await scheduler.aclose("soon")

    asyncio.run(main())


def _leave_a_block(scheduler: Scheduler) -> None:
    with scheduler:
        pass


BLOCKING: dict[str, Callable[[Scheduler], object]] = {
    "acquire": lambda scheduler: scheduler.acquire(a_model()).release(),
    "reserve": lambda scheduler: scheduler.reserve("cpu", "1MiB").release(),
    "fit": lambda scheduler: scheduler.fit(a_model()),
    "reading events": lambda scheduler: scheduler.events().take(0.001),
    "close": Scheduler.close,
    "close of a block": _leave_a_block,
}


@pytest.mark.parametrize("name", BLOCKING)
def test_u43_a_blocking_call_on_the_thread_of_a_running_loop_warns(name: str) -> None:
    """A blocking call on a loop's thread warns, at the program's line, of what is blocked and what to use instead."""

    async def main() -> None:
        BLOCKING[name](scheduler)

    with a_scheduler() as scheduler:
        with pytest.warns(RuntimeWarning, match="blocks the event loop of this thread") as told:
            asyncio.run(main())
        assert [warning.filename for warning in told] == [__file__]
        assert str(told[0].message).startswith(name.removesuffix(" of a block"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if name.partition(" ")[0] != "close":
                BLOCKING[name](scheduler)  # no loop runs


@pytest.mark.parametrize(
    "call",
    [
        Scheduler.status,
        lambda scheduler: scheduler.submit(a_model()).cancel(),
        lambda scheduler: scheduler.pin(a_model()),
        lambda scheduler: scheduler.events().take(0),
        lambda scheduler: scheduler.configure(memory_limit="900MiB"),
    ],
    ids=["status", "submit", "pin", "take", "configure"],
)
def test_u43_a_call_that_waits_for_nothing_slow_does_not_warn(call: Callable[[Scheduler], object]) -> None:
    """A call that waits for nothing slow may be made on a loop's thread."""

    async def main() -> None:
        async with a_scheduler() as scheduler:
            call(scheduler)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asyncio.run(main())


def test_u43_a_cell_of_a_notebook_does_not_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop of a notebook's kernel waits for each cell anyway."""
    monkeypatch.setitem(sys.modules, "ipykernel", sys)

    async def cell() -> None:
        with a_scheduler() as scheduler:
            scheduler.acquire(a_model()).release()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asyncio.run(cell())


# -- a lease that is not released --------------------------------------------------------------------------------------


def test_u50_a_close_that_waits_for_leases_names_them_once(caplog: pytest.LogCaptureFixture) -> None:
    """One warning names the models whose leases a close waits for."""
    with a_scheduler(close_timeout="2s") as scheduler:
        leases = [scheduler.acquire(a_model(name)) for name in ("chat", "search", "chat")]
        memory = scheduler.reserve("cpu", "1MiB")
    (told,) = caplog.records
    assert told.levelname == "WARNING"
    assert told.getMessage().endswith("for the release of 1MiB on cpu, chat, search")
    assert all(lease.lost for lease in leases)
    del memory


def test_u50_a_lease_that_is_released_soon_is_not_named(caplog: pytest.LogCaptureFixture) -> None:
    """A close says nothing of a lease that is released within a second."""
    scheduler = a_scheduler()
    lease = scheduler.acquire(a_model())
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    assert_soon(lambda: scheduler.status().closing)
    lease.release()
    closing.join(LIMIT_S)
    assert not caplog.records


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_u50_an_exception_leaves_the_block_at_once(error: type[BaseException]) -> None:
    """A block that an exception leaves waits for no lease."""

    def leave() -> None:
        with pytest.raises(error), a_scheduler() as scheduler:
            leases.append(scheduler.acquire(a_model()))
            raise error

    leases: list[Any] = []
    assert took_s(leave) < LIMIT_S
    with pytest.raises(RunnerCrashed):
        _ = leases[0].value


def test_u50_an_exception_leaves_an_async_block_at_once() -> None:
    """An `async with` block that an exception leaves waits for no lease, and no more does one that is cancelled."""

    async def hold(held: asyncio.Event) -> None:
        async with a_scheduler() as scheduler:
            leases.append(await scheduler.acquire_async(a_model()))
            held.set()
            await asyncio.sleep(10 * LIMIT_S)

    async def main() -> None:
        held = asyncio.Event()
        task = asyncio.create_task(hold(held))
        await held.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    leases: list[Any] = []
    assert took_s(lambda: asyncio.run(main())) < LIMIT_S
    assert leases[0].lost


# -- the end of the program --------------------------------------------------------------------------------------------

BEGIN = """
import os, signal, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from scheduler import PythonModel, Scheduler, SchedulerError, Settings

signal.signal(signal.SIGINT, signal.default_int_handler)
scheduler = Scheduler(Settings(gpus=False, memory_limit="1000MiB"))
model = PythonModel("a", load=object, memory={"cpu": "100MiB"})
large = PythonModel("large", load=object, memory={"cpu": "950MiB"})
lease = scheduler.acquire(model)  # "large" has to wait for it

def say(action):
    try:
        action()
    except SchedulerError as error:
        os.write(1, f"{type(error).__name__}\\n".encode())  # whole, beside other threads
    else:
        os.write(1, b"the end\\n")
"""
ENDS = {
    "acquire": ("threading.Thread(target=say, args=(lambda: scheduler.acquire(large),)).start()", ["SchedulerClosed"]),
    "events": ("threading.Thread(target=say, args=(lambda: list(scheduler.events()),)).start()", ["the end"]),
    "a future": (
        "threading.Thread(target=say, args=(scheduler.submit(large).result,)).start()",
        ["SchedulerClosed"],
    ),
    "reserve": (
        'threading.Thread(target=say, args=(lambda: scheduler.reserve("cpu", "950MiB"),)).start()',
        ["SchedulerClosed"],
    ),
    "workers": (
        "pool = ThreadPoolExecutor(3)\nfor _ in range(5): pool.submit(say, lambda: scheduler.acquire(large))",
        ["SchedulerClosed"] * 5,
    ),
}


def run(program: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-c", BEGIN + textwrap.dedent(program)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("end", ["", "\nsys.exit(0)"], ids=["falls off", "exits"])
@pytest.mark.parametrize("name", ENDS)
def test_u51_a_waiting_thread_does_not_hold_up_the_end_of_the_interpreter(name: str, end: str) -> None:
    """The end of the main thread closes a scheduler before the threads are joined that wait for it."""
    program, said = ENDS[name]
    out, error = run(program + "\ntime.sleep(0.5)" + end).communicate(timeout=3 * LIMIT_S)
    assert (out.splitlines(), error) == (said, "")


@pytest.mark.skipif(
    sys.version_info[:2] == (3, 12), reason="Python 3.12 starts no thread once the main thread has ended"
)
def test_u51_a_scheduler_that_is_made_after_the_main_thread_is_closed_too() -> None:
    """A scheduler that another thread makes after the end of the main thread is closed when that thread has ended."""
    program = """
        def make():
            threading.main_thread().join()
            time.sleep(0.5)
            say(lambda: setattr(sys, "late", Scheduler(Settings(gpus=False))))
        threading.Thread(target=make).start()
    """
    out, error = run(program).communicate(timeout=3 * LIMIT_S)
    assert (out, error) == ("the end\n", "")


@pytest.mark.parametrize(
    "wait",
    [
        "time.sleep(60)",
        "scheduler.acquire(large)",
        "for each in scheduler.events(): pass",
        "with scheduler: pool.submit(scheduler.acquire, large).result()",
    ],
    ids=["sleeps", "acquires", "reads", "waits in a block"],
)
def test_u51_ctrl_c_ends_a_program_whose_pool_waits(wait: str) -> None:
    """Ctrl-C ends a program soon whose pool of threads waits in `acquire`."""
    process = run(
        f"""
        pool = ThreadPoolExecutor(4)
        for _ in range(8): pool.submit(scheduler.acquire, large)
        time.sleep(0.5)
        print("ready", flush=True)
        {wait}
        """
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=3 * LIMIT_S)
    assert error.splitlines()[-1] == "KeyboardInterrupt"
