"""Defects of the reference where threads read what others change: torn reads (D18) and locks in two orders (D19)."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, ClassVar

import pytest

from fsm.machine.runner import RUNNER_TABLE
from fsm.messages.decision_log import Transition
from scheduler import Gap, PythonModel, Scheduler, SchedulerClosed, SchedulerError, Settings
from scheduler.api.status import Status
from tests.support.leaks import no_leaks
from tests.support.waiting import LIMIT_S

SWITCH_S = 1e-6
STEPS = {(row.source, row.trigger): row.destination for row in RUNNER_TABLE.rows}


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = sys.getswitchinterval()
    with no_leaks():
        sys.setswitchinterval(SWITCH_S)
        try:
            yield
        finally:
            sys.setswitchinterval(before)


def a_model(name: str, size: str = "400MiB") -> PythonModel:
    return PythonModel(name, memory={"cpu": size}, load=object)


def a_scheduler() -> Scheduler:
    """Return a scheduler with room for two objects of 400 MiB."""
    return Scheduler(Settings(gpus=False, memory_limit="1000MiB", min_residency=0, max_wait=0.01, event_buffer=100_000))


# -- D18: reading ------------------------------------------------------------------------------------------------------


def assert_whole(status: Status) -> None:
    """Fail where parts of a status are of different moments."""
    for runner in status.runners:
        assert (runner.state == "ready") <= (runner.leases > 0), runner
        assert (runner.leases > 0) <= (runner.state in ("ready", "expiring")), runner
        assert (runner.state == "loading") <= (runner.load_s is None), runner
        assert (runner.state in ("ready", "idle")) <= (runner.load_s is not None), runner
        assert (runner.expires_in_s < math.inf) <= (runner.state == "idle"), runner
        assert runner.held_bytes == runner.promised_bytes == {"cpu": 400 << 20}, runner
    ids = [runner.id for runner in status.runners]
    assert ids == sorted(set(ids))
    (host,) = status.devices
    assert host.held_bytes == sum(runner.held_bytes["cpu"] for runner in status.runners) <= host.capacity_bytes
    assert host.free_bytes <= host.capacity_bytes - host.held_bytes
    assert [wait.position for wait in status.queue] == list(range(len(status.queue)))
    current = [runner.model for runner in status.runners if runner.state != "expiring"]
    assert len(current) == len(set(current)), "a model has two current runners"


def test_d18_whoever_looks_sees_one_moment() -> None:
    """D18: a status that three threads read while four load and unload models never contradicts itself."""
    over = threading.Event()
    looks = itertools.count()

    def come_and_go(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(80):
            with scheduler.acquire(a_model(choose.choice("abcd")), keep_alive=choose.choice((0, 0.001, 60))):
                time.sleep(0)
            if choose.random() < 0.2:
                scheduler.expire(a_model(choose.choice("abcd")))

    def look() -> None:
        while not over.is_set():
            assert_whole(scheduler.status())
            next(looks)

    def preview() -> None:
        while not over.is_set():
            fit = scheduler.fit(a_model("a"))
            assert fit.verdict in ("warm", "fits", "evicts", "waits"), fit
            assert (fit.verdict == "evicts") == bool(fit.victims), fit
            next(looks)

    with a_scheduler() as scheduler, ThreadPoolExecutor(7) as pool:
        lookers = [pool.submit(look), pool.submit(look), pool.submit(preview)]
        workers = [pool.submit(come_and_go, seed) for seed in range(4)]
        try:
            for future in workers:
                future.result(LIMIT_S)
        finally:
            over.set()
        for future in lookers:
            future.result(LIMIT_S)
    assert next(looks) > 20


def test_d18_whoever_listens_hears_whole_lives() -> None:
    """D18: listeners that begin while runners come and go hear each runner's transitions in order and once."""

    def come_and_go(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(60):
            scheduler.acquire(a_model(choose.choice("abcd")), keep_alive=choose.choice((0, 60))).release()

    def listen() -> list[list[Any]]:
        heard = [scheduler.events()]
        for _ in range(5):
            time.sleep(0.001)
            heard.append(scheduler.events())
        return heard  # type: ignore[return-value]  # streams, read to their end below

    with a_scheduler() as scheduler, ThreadPoolExecutor(6) as pool:
        listeners = [pool.submit(listen) for _ in range(2)]
        for future in [pool.submit(come_and_go, seed) for seed in range(4)]:
            future.result(LIMIT_S)
        streams = [stream for future in listeners for stream in future.result(LIMIT_S)]
    for stream in streams:
        lives: dict[int, list[Transition]] = defaultdict(list)
        for entry in stream:
            assert not isinstance(entry, Gap)
            if isinstance(entry, Transition):
                lives[entry.runner].append(entry)
        assert lives
        for life in lives.values():
            for before, after in itertools.pairwise(life):
                assert before.destination is after.source and before.at <= after.at
            for step in life:
                assert step.source is None or STEPS[step.source, step.trigger] is step.destination
            assert life[-1].trigger == "unload" and life[-1].leases == 0


# -- D19: locks --------------------------------------------------------------------------------------------------------


async def _await(scheduler: Scheduler) -> None:
    async with scheduler.acquire_async(a_model("a"), timeout=1):
        pass


def _events(scheduler: Scheduler) -> None:
    with scheduler.events() as events:
        events.take(0)


def _reserve(scheduler: Scheduler) -> None:
    with suppress(SchedulerError):
        scheduler.reserve("cpu", "10MiB", timeout=1).release()


CALLS: dict[str, Callable[[Scheduler], object]] = {
    "acquire": lambda scheduler: scheduler.acquire(a_model("a")).release(),
    "acquire another": lambda scheduler: scheduler.acquire(a_model("b"), keep_alive=0).release(),
    "submit": lambda scheduler: scheduler.submit(a_model("c")).result(LIMIT_S).release(),
    "cancel": lambda scheduler: scheduler.submit(a_model("b")).cancel(),
    "acquire_async": lambda scheduler: asyncio.run(_await(scheduler)),
    "preload": lambda scheduler: scheduler.preload(a_model("a")).result(LIMIT_S),
    "expire": lambda scheduler: scheduler.expire(a_model("a")),
    "pin": lambda scheduler: (scheduler.pin(a_model("a")), scheduler.unpin(a_model("a"))),
    "reserve": _reserve,
    "configure": lambda scheduler: scheduler.configure(keep_alive=60, max_runners=2),
    "limit": lambda scheduler: scheduler.configure(memory_limit="1000MiB"),
    "fit": lambda scheduler: scheduler.fit(a_model("b")),
    "status": lambda scheduler: scheduler.status(),
    "events": _events,
    "wanted": lambda scheduler: _told(scheduler),
}


def _told(scheduler: Scheduler) -> None:
    with scheduler.acquire(a_model("a")) as lease:
        lease.on_wanted(scheduler.status)
        lease.on_lost(scheduler.status)


def both(scheduler: Scheduler, first: str, second: str, times: int = 1) -> None:
    """Make two calls at once, each on a thread of its own; fail if they do not return."""
    start = threading.Barrier(2)

    def call(name: str) -> None:
        start.wait(LIMIT_S)
        for _ in range(times):
            with suppress(SchedulerClosed):
                CALLS[name](scheduler) if name != "close" else scheduler.close("50ms")

    threads = [threading.Thread(target=call, args=(name,), daemon=True) for name in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
        assert not thread.is_alive(), f"{first} and {second} wait for each other"


def test_d19_no_two_calls_wait_for_each_other() -> None:
    """D19: every pair of public calls returns at the same time, also of one call with itself."""
    with a_scheduler() as scheduler:
        for first, second in itertools.combinations_with_replacement(CALLS, 2):
            both(scheduler, first, second)


def test_d19_no_call_and_a_close_wait_for_each_other() -> None:
    """D19: every public call returns while another thread closes."""
    for name in (*CALLS, "close"):
        both(a_scheduler(), name, "close", times=2)


class Locked:
    """A lock that notes which others its thread holds when it waits for it, by where they were made."""

    order: ClassVar[set[tuple[str, str]]] = set()  # (held, waited for)
    held = threading.local()

    def __init__(self, make: Callable[[], Any]) -> None:
        frame = sys._getframe(2)
        self.where = f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
        self.lock = make()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        stack = self.held.__dict__.setdefault("stack", [])
        if blocking and self not in stack:
            Locked.order |= {(other.where, self.where) for other in stack}
        got: bool = self.lock.acquire(blocking, timeout)
        if got:
            stack.append(self)
        return got

    def release(self) -> None:
        stack = self.held.__dict__.setdefault("stack", [])
        if self in stack:  # a plain lock may be released by another thread
            stack.remove(self)
        self.lock.release()

    __enter__ = acquire

    def __exit__(self, *_: object) -> None:
        self.release()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lock, name)


def in_circles(order: set[tuple[str, str]]) -> set[str]:
    """Return the locks that can be waited for under themselves, by way of others."""
    inner = {first: {second for held, second in order if held == first} for first, _ in order}
    while last := [name for name, others in inner.items() if not others & inner.keys()]:
        for name in last:
            del inner[name]
    return set(inner)


def test_d19_locks_are_taken_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """D19: no lock of the scheduler is waited for under another one that is elsewhere waited for under it."""
    make_lock, make_reentrant = threading.Lock, threading.RLock
    Locked.order.clear()
    monkeypatch.setattr(threading, "Lock", lambda: Locked(make_lock))
    monkeypatch.setattr(threading, "RLock", lambda: Locked(make_reentrant))
    with a_scheduler() as scheduler:
        for first, second in itertools.combinations(CALLS, 2):
            both(scheduler, first, second)
    assert in_circles({("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")}) == {"a", "b", "c"}
    assert len(Locked.order) > 3 and in_circles(Locked.order) == set()
