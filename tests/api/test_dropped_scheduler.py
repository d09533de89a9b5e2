"""A scheduler that is dropped: the garbage collector closes it, as soon as nothing is asked of it any more."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import warnings
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from scheduler import DoesNotFit, PythonModel, Scheduler, Settings
from scheduler.testing import FakeMachine
from tests.support.waiting import LIMIT_S, assert_soon


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """Fail if a thread is left; `no_leaks` would keep each scheduler from being dropped."""
    before = set(threading.enumerate())
    yield
    assert_soon(lambda: set(threading.enumerate()) <= before)


def a_scheduler(**settings: Any) -> Scheduler:
    return Scheduler(Settings(**{"gpus": False, "memory_limit": "1000MiB", **settings}))


def a_model(name: str = "a", **fields: Any) -> PythonModel:
    return PythonModel(name, memory={"cpu": "100MiB"}, **{"load": object, **fields})


def test_u45_a_dropped_scheduler_is_closed_with_a_warning() -> None:
    """A scheduler that nothing refers to any more is closed: its models are unloaded and its threads end."""
    unloaded = threading.Event()
    scheduler = a_scheduler(keep_alive="forever")
    scheduler.acquire(a_model(unload=lambda _: unloaded.set())).release()
    before = threading.active_count()
    with pytest.warns(ResourceWarning, match="a scheduler was never closed"):
        del scheduler
        gc.collect()
    assert unloaded.wait(LIMIT_S)
    assert_soon(lambda: threading.active_count() < before)


def _raise(scheduler: Scheduler) -> None:
    with pytest.raises(DoesNotFit):
        scheduler.acquire(PythonModel("large", load=object, memory={"cpu": "1PiB"}))


USES: dict[str, Callable[[Scheduler], object]] = {
    "nothing": lambda scheduler: None,
    "a refusal": _raise,
    "a preload": lambda scheduler: scheduler.preload(a_model()).result(LIMIT_S),
    "a future": lambda scheduler: scheduler.submit(a_model()).result(LIMIT_S).release(),
    "a cancelled future": lambda scheduler: scheduler.submit(a_model()).cancel(),
    "a task": lambda scheduler: asyncio.run(_acquire(scheduler)),
    "a reservation": lambda scheduler: scheduler.reserve("cpu", "1MiB").release(),
    "events": lambda scheduler: scheduler.events().take(0),
    "fit": lambda scheduler: scheduler.fit(a_model()),
    "a recording": lambda scheduler: scheduler.configure(max_queue=9),
}


async def _acquire(scheduler: Scheduler) -> None:
    async with scheduler.acquire_async(a_model()):
        pass


@pytest.mark.parametrize("name", USES)
def test_u45_no_use_of_a_scheduler_keeps_it(name: str, tmp_path: Any) -> None:
    """Whatever a scheduler was used for, it is closed when it is dropped."""
    more = {"recording_file": tmp_path / "recording.jsonl"} if name == "a recording" else {}
    scheduler = a_scheduler(**more)
    USES[name](scheduler)
    gone = weakref.ref(scheduler)
    with pytest.warns(ResourceWarning, match="a scheduler was never closed"):
        del scheduler
        assert_soon(lambda: gc.collect() >= 0 and not _drivers())

    def is_gone() -> bool:
        gc.collect()
        return gone() is None

    assert_soon(is_gone)


def _drivers() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "loadmaster-driver"]


def test_u45_a_scheduler_in_a_cycle_is_closed_too() -> None:
    """A scheduler in a cycle of references is closed by the garbage collector."""
    unloaded = threading.Event()

    class Service:
        def __init__(self) -> None:
            self.scheduler = a_scheduler(keep_alive="forever")
            self.scheduler.acquire(a_model(unload=lambda _: unloaded.set())).release()
            self.own = self

    with pytest.warns(ResourceWarning, match="a scheduler was never closed"):
        Service()
        gc.collect()
    assert unloaded.wait(LIMIT_S)


HELD: dict[str, Callable[[Scheduler], Any]] = {
    "lease": lambda scheduler: scheduler.acquire(a_model()),
    "reservation": lambda scheduler: scheduler.reserve("cpu", "1MiB"),
    "future": lambda scheduler: scheduler.submit(a_model(load=lambda: time.sleep(0.2))),
    "awaitable": lambda scheduler: scheduler.acquire_async(a_model()),
}


@pytest.mark.parametrize("name", HELD)
def test_u45_a_scheduler_stays_open_for_what_was_asked_of_it(name: str) -> None:
    """A lease, a reservation, and a request that waits keep their scheduler open."""

    async def wait(awaitable: Awaitable[Any]) -> Any:
        return await awaitable

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        held = HELD[name](a_scheduler())
        gc.collect()
        if name == "future":
            held = held.result(LIMIT_S)
        elif name == "awaitable":
            held = asyncio.run(wait(held))
        if name != "reservation":
            assert not held.lost and held.runner == 1
        held.release()
    with pytest.warns(ResourceWarning, match="a scheduler was never closed"):
        del held
        gc.collect()


def test_u45_a_callback_is_called_although_its_scheduler_is_dropped() -> None:
    """A request whose future nobody keeps is answered, and the scheduler is closed after it."""
    called = threading.Event()

    def call(future: Any) -> None:
        future.result().release()
        called.set()

    with pytest.warns(ResourceWarning, match="a scheduler was never closed"):
        a_scheduler().submit(a_model(load=lambda: time.sleep(0.2))).add_done_callback(call)
        assert called.wait(LIMIT_S)
        gc.collect()
        assert_soon(lambda: not _drivers())


def test_u45_a_reader_of_events_ends_when_its_scheduler_is_dropped() -> None:
    """A stream of events ends, since nothing can happen any more when the scheduler is dropped."""
    scheduler = a_scheduler()
    reader = threading.Thread(target=list, args=(scheduler.events(),))
    reader.start()
    with pytest.warns(ResourceWarning, match="a scheduler was never closed"):
        del scheduler
        gc.collect()
        reader.join(LIMIT_S)
    assert not reader.is_alive()


def test_u45_a_closed_scheduler_is_dropped_without_a_word() -> None:
    """A scheduler that was closed, or never came to be, is dropped without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = a_scheduler()
        scheduler.close()
        del scheduler
        with pytest.raises(ValueError):
            a_scheduler(max_queue=-1)
        gc.collect()


def test_u45_a_dropped_fake_machine_is_closed() -> None:
    """A fake machine that nothing refers to any more ends its threads."""
    fake = FakeMachine()
    fake.model("chat", load="3s")
    fake.scheduler.acquire("chat").release()
    with pytest.warns(ResourceWarning, match="a scheduler was never closed"):
        del fake
        gc.collect()
    assert_soon(lambda: not any(each.name == "loadmaster-virtual-time" for each in threading.enumerate()))
