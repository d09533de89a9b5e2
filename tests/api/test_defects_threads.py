"""Defects of the reference that live in threads and locks, on the real scheduler: many threads at once, and a watchdog.

Python switches threads some 10,000 times as often here as elsewhere, so that the moments in between are met.
"""

from __future__ import annotations

import gc
import itertools
import random
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from scheduler import (
    Lease,
    PythonModel,
    QueueFull,
    Scheduler,
    SchedulerClosed,
    Settings,
)
from scheduler.engines.python import PythonEngine, PythonProcess
from tests.support.leaks import no_leaks
from tests.support.waiting import LIMIT_S, assert_soon

PROMPT_S = LIMIT_S / 2  # for calls of less than a millisecond; a call that waits for a gate waits for LIMIT_S
SWITCH_S = 1e-6


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = sys.getswitchinterval()
    with no_leaks():
        sys.setswitchinterval(SWITCH_S)
        try:
            yield
        finally:
            sys.setswitchinterval(before)


class Thing:
    """An object that knows whether it is loaded."""

    def __init__(self) -> None:
        self.loaded = True

    def close(self) -> None:
        self.loaded = False


class Gate:
    """A call that returns when the gate is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()

    def __call__(self, *_: object) -> object:
        self.entered.set()
        assert self.open.wait(LIMIT_S)
        return Thing()


def a_model(name: str, size: str = "400MiB", **fields: Any) -> PythonModel:
    return PythonModel(name, memory={"cpu": size}, **{"load": Thing, "unload": Thing.close, **fields})


def a_scheduler(**settings: Any) -> Scheduler:
    """Return a scheduler with room for two objects of 400 MiB, without a minimum residency."""
    return Scheduler(Settings(**{"gpus": False, "memory_limit": "1000MiB", "min_residency": 0, **settings}))


def together(*actions: Callable[[], object]) -> list[Any]:
    """Run each action on a thread of its own, all at once; return their results. Raises if one raises or hangs."""
    start = threading.Barrier(len(actions))

    def run(action: Callable[[], object], future: Future[object]) -> None:
        try:
            start.wait(LIMIT_S)
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    futures: list[Future[object]] = [Future() for _ in actions]
    threads = [threading.Thread(target=run, args=each, daemon=True) for each in zip(actions, futures, strict=True)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + LIMIT_S
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return [future.result(0) for future in futures]


def took_s(action: Callable[[], object]) -> float:
    """Return how many seconds a call takes."""
    begin = time.monotonic()
    action()
    return time.monotonic() - begin


# -- grants ------------------------------------------------------------------------------------------------------------


def test_d04_nobody_is_handed_what_is_being_unloaded() -> None:
    """D04: in 900 grants during keep-alives of 0, expiries and evictions, no leased object is being unloaded."""
    served: list[bool] = []  # appending is atomic, counting is not

    def use(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(100):
            with scheduler.acquire(a_model(choose.choice("abc")), keep_alive=choose.choice((0, 0.001, 60))) as lease:
                thing = lease.value
                served.append(thing.loaded)
                time.sleep(0)
                assert thing.loaded, "the object was unloaded in use"

    def expire() -> None:
        for number in range(300):
            scheduler.expire(a_model("abc"[number % 3]))
            time.sleep(0)

    with a_scheduler(max_wait=0.01) as scheduler:
        together(*(lambda seed=seed: use(seed) for seed in range(9)), expire)  # type: ignore[misc]  # binds now
    assert served == [True] * 900


def test_d07_a_queue_of_one_place_never_blocks() -> None:
    """D07: eight threads that request four models where one fits are each served or refused."""
    answers: list[str] = []  # appending is atomic, counting is not

    def ask(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(25):
            try:
                with scheduler.acquire(a_model(choose.choice("abcd"), "800MiB")) as lease:
                    assert lease.value.loaded
                answers.append("served")
            except QueueFull as refused:
                assert refused.limit == 1
                answers.append("refused")

    with a_scheduler(max_queue=1, max_wait=0.01) as scheduler:
        together(*(lambda seed=seed: ask(seed) for seed in range(8)))  # type: ignore[misc]  # binds now
        with scheduler.acquire(a_model("e")) as lease:  # the queue has its place again
            assert lease.value.loaded
    assert len(answers) == 200 and set(answers) == {"served", "refused"}


# -- slow work ---------------------------------------------------------------------------------------------------------


def test_d06_a_load_holds_up_no_other_call() -> None:
    """D06: while one model loads, requests for others, cancels, expires and statuses do not wait for the load."""
    gate = Gate()
    with a_scheduler() as scheduler:
        scheduler.acquire(a_model("warm")).release()
        slow = a_model("slow", "100MiB", load=gate)
        waiting = [scheduler.submit(slow) for _ in range(4)]
        assert gate.entered.wait(LIMIT_S)

        def call() -> float:
            return max(
                took_s(lambda: scheduler.acquire(a_model("warm")).release()),
                took_s(lambda: scheduler.submit(slow).cancel()),
                took_s(lambda: scheduler.expire(a_model("none"))),
                took_s(scheduler.status),
                took_s(lambda: scheduler.acquire(a_model("cold", "1MiB"), keep_alive=0).release()),
            )

        slowest = max(itertools.chain.from_iterable(together(*[call] * 4) for _ in range(5)))
        assert slowest < PROMPT_S and not any(future.done() for future in waiting)
        gate.open.set()
        for future in waiting:
            future.result(LIMIT_S).release()


def test_d15_no_lock_is_held_over_a_start_a_stop_and_a_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """D15: while a load, an unload and a reading hang, warm requests and statuses are answered as usual."""
    starts, stops, reads = Gate(), Gate(), Gate()
    launch, stop = PythonEngine.launch, PythonProcess.stop
    with a_scheduler() as scheduler:
        scheduler.acquire(a_model("warm", "100MiB")).release()
        scheduler.acquire(a_model("leaving", "100MiB")).release()

        def slow(engine: PythonEngine, model: PythonModel, *rest: Any) -> Any:
            if model.name == "starting":
                starts()
            return launch(engine, model, *rest)

        def slow_to_stop(process: PythonProcess, grace_s: float) -> None:
            if process.model.name == "leaving":
                stops()
            stop(process, grace_s)

        monkeypatch.setattr(PythonEngine, "launch", slow)
        monkeypatch.setattr(PythonProcess, "stop", slow_to_stop)
        waiting = scheduler.submit(a_model("starting", "100MiB"))
        assert starts.entered.wait(LIMIT_S)
        sample = scheduler._devices.sample
        monkeypatch.setattr(scheduler._devices, "sample", lambda: (reads(), sample())[1])
        scheduler.expire(a_model("leaving"))
        assert stops.entered.wait(LIMIT_S) and reads.entered.wait(LIMIT_S)

        def call() -> float:
            return max(
                took_s(lambda: scheduler.acquire(a_model("warm")).release()),
                took_s(lambda: scheduler.submit(a_model("starting")).cancel()),
                took_s(scheduler.status),
            )

        assert max(itertools.chain.from_iterable(together(*[call] * 4) for _ in range(20))) < PROMPT_S
        assert {one.model: one.state for one in scheduler.status().runners} == {
            "warm": "idle",
            "leaving": "expiring",
            "starting": "loading",
        }
        for gate in (reads, stops, starts):
            gate.open.set()
        waiting.result(LIMIT_S).release()


# -- the end -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pause_s", [0, 0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01])
def test_d09_a_close_at_any_moment_of_a_load_ends_well(pause_s: float) -> None:
    """D09: closes and requests at any moment of a load all return."""
    scheduler = a_scheduler()
    loading = a_model("a", load=lambda: (time.sleep(0.005), Thing())[1])
    futures: list[Future[Lease]] = []

    def ask() -> None:
        futures.extend(scheduler.submit(loading, keep_alive=0) for _ in range(5))
        futures[0].cancel()

    def end() -> None:
        time.sleep(pause_s)
        scheduler.close(0)

    together(ask, ask, end, end)
    for future in futures:
        if not future.cancelled() and future.exception(LIMIT_S) is None:
            future.result().release()
        assert future.cancelled() or isinstance(future.exception(), SchedulerClosed | None)


def test_d17_threads_that_never_finish_keep_nothing() -> None:
    """D17: leases that are never released, listeners and waiting requests leave nothing after a close."""
    things: list[weakref.ref[Thing]] = []
    held, over = threading.Barrier(5), threading.Event()

    def load() -> Thing:
        thing = Thing()
        things.append(weakref.ref(thing))
        return thing

    def hold() -> None:
        lease = scheduler.acquire(a_model("a", load=load))
        held.wait(LIMIT_S)
        assert over.wait(LIMIT_S) and lease.lost

    def wait() -> None:
        with pytest.raises(SchedulerClosed):
            scheduler.acquire(a_model("b", "900MiB"))

    scheduler = a_scheduler()
    with ThreadPoolExecutor(12) as pool:
        listeners = [pool.submit(list, scheduler.events()) for _ in range(4)]
        others = [pool.submit(act) for act in (hold, wait) for _ in range(4)]
        held.wait(LIMIT_S)
        assert_soon(lambda: len(scheduler.status().queue) == 4)
        scheduler.close("20ms")
        over.set()
        entries = [future.result(LIMIT_S) for future in listeners]
        for future in others:
            future.result(LIMIT_S)
    assert entries[0] and entries == entries[:1] * 4, "the listeners heard different events"
    gc.collect()
    assert [thing() for thing in things] == [None] and not scheduler.debug_state().requests


ASKING: dict[str, Callable[[Scheduler], object]] = {
    "warm": lambda scheduler: scheduler.acquire(a_model("warm")).release(),
    "cold": lambda scheduler: scheduler.acquire(a_model("cold"), keep_alive=0).release(),
    "submit": lambda scheduler: scheduler.submit(a_model("cold")).result(LIMIT_S).release(),
    "preload": lambda scheduler: scheduler.preload(a_model("other")).result(LIMIT_S),
    "reserve": lambda scheduler: scheduler.reserve("cpu", "10MiB").release(),
    "queued": lambda scheduler: scheduler.acquire(a_model("large", "900MiB"), keep_alive=0).release(),
}


def test_d20_whoever_asks_around_the_close_is_answered() -> None:
    """D20: requests of six kinds during a close all return, and the last of each kind is refused."""
    answered: Counter[str] = Counter()
    ready = threading.Barrier(len(ASKING) + 1)

    def ask(way: str) -> None:
        ready.wait(LIMIT_S)
        with pytest.raises(SchedulerClosed):
            while True:
                ASKING[way](scheduler)
                answered[way] += 1

    def end() -> None:
        ready.wait(LIMIT_S)
        assert_soon(lambda: answered["warm"] > 20)
        scheduler.close("100ms")

    scheduler = a_scheduler(max_wait=0.01)
    together(*(lambda way=way: ask(way) for way in ASKING), end)  # type: ignore[misc]  # binds now
    for ask_again in ASKING.values():
        with pytest.raises(SchedulerClosed):
            ask_again(scheduler)
    assert took_s(scheduler.close) < LIMIT_S


def test_d20_a_future_that_is_asked_for_after_the_close_is_answered() -> None:
    """D20: futures that are requested after the close, also by their callbacks, are answered, and no thread is left."""
    again: list[BaseException | None] = []

    def once_more(_: object) -> None:
        again.append(scheduler.submit(a_model("a")).exception(LIMIT_S))

    scheduler = a_scheduler()
    scheduler.submit(a_model("a")).result(LIMIT_S).release()
    scheduler.close()
    assert isinstance(scheduler.submit(a_model("a")).exception(LIMIT_S), SchedulerClosed)
    futures = [scheduler.submit(a_model("a")) for _ in range(100)]
    for future in futures:
        future.add_done_callback(once_more)
    assert all(isinstance(future.exception(LIMIT_S), SchedulerClosed) for future in futures)
    assert_soon(lambda: len(again) == 100)
    assert all(isinstance(error, SchedulerClosed) for error in again)


def test_d17_a_callback_that_closes_leaves_no_thread() -> None:
    """D17: a callback that closes the scheduler leaves no thread, its own included."""
    closed = threading.Event()
    scheduler = a_scheduler()
    scheduler.preload(a_model("a")).add_done_callback(lambda _: (scheduler.close(), closed.set()))
    assert closed.wait(LIMIT_S)
