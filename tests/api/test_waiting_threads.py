"""Waiting with real threads: the scenarios of `core/test_waiting.py`, with objects that are slow to load and unload.

What blocks is held by an event until the one who is not to wait for it has been served, so a test that passes has
shown that it did not; nothing depends on how fast the machine is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from scheduler import AcquireTimeout, PythonModel, Scheduler, Settings, TimeoutTooShort
from tests.support.leaks import no_leaks
from tests.support.waiting import LIMIT_S, assert_soon

LOAD_S = 1.0  # of an object that takes its time: a request is judged sooner, even on a machine that is busy


class Gate:
    """A load or an unload that returns when it is let through, and counts how often it was begun."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()
        self.calls = 0

    def __call__(self, *_: object) -> object:
        self.calls += 1
        self.entered.set()
        assert self.open.wait(LIMIT_S)
        return object()


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    with no_leaks():
        yield


def a_model(name: str, size: str = "400MiB", **fields: Any) -> PythonModel:
    return PythonModel(name, memory={"cpu": size}, **{"load": object, **fields})


def a_scheduler(**settings: Any) -> Scheduler:
    """Room for two objects of 400 MiB; nobody waits for another to have been of use, and the oldest goes first."""
    usual = {"gpus": False, "memory_limit": "1000MiB", "min_residency": 0, "eviction": "lru"}
    return Scheduler(Settings(**{**usual, **settings}))


def states(scheduler: Scheduler) -> dict[str, str]:
    return {runner.model: runner.state for runner in scheduler.status().runners}


def test_a_cold_request_that_fits_does_not_wait_behind_one_that_does_not() -> None:
    """The lease that the large one waits for ends only after the small one has been served."""
    with a_scheduler() as scheduler:
        busy = scheduler.acquire(a_model("busy"))
        large = scheduler.submit(a_model("large", "900MiB"))
        with scheduler.acquire(a_model("small", "100MiB"), timeout=LIMIT_S):
            assert not large.done()
            assert states(scheduler)["busy"] == "ready"
        busy.release()
        large.result(LIMIT_S).release()


def test_two_cold_requests_that_fit_are_loaded_at_the_same_time() -> None:
    """Each load ends only when the other has begun."""
    meeting = threading.Barrier(2)

    def load() -> object:
        return meeting.wait(LIMIT_S)

    with a_scheduler() as scheduler:
        waiting = [scheduler.submit(a_model(name, load=load)) for name in "ab"]
        for future in waiting:
            future.result(LIMIT_S).release()


def test_a_waiter_is_served_by_whatever_becomes_idle_first() -> None:
    """The one that would have gone stays in use for as long as the test lasts."""
    with a_scheduler() as scheduler:
        first, second = scheduler.acquire(a_model("first")), scheduler.acquire(a_model("second"))
        waiting = scheduler.submit(a_model("third"))
        assert_soon(lambda: [wait.waits_for for wait in scheduler.status().queue] == ["first to become idle"])
        second.release()
        waiting.result(LIMIT_S).release()
        assert states(scheduler)["first"] == "ready"
        first.release()


def test_a_slow_stop_holds_up_no_warm_request() -> None:
    """Fifty warm requests are served while one object is being unloaded, which ends after that."""
    unload = Gate()
    with a_scheduler(max_wait=0) as scheduler:  # however long the first took to load, it is given no rest
        scheduler.acquire(a_model("leaving", unload=unload)).release()
        scheduler.acquire(a_model("warm")).release()
        waiting = scheduler.submit(a_model("new"))
        assert unload.entered.wait(LIMIT_S)
        for _ in range(50):
            scheduler.acquire(a_model("warm"), timeout=LIMIT_S).release()
        assert not waiting.done()
        unload.open.set()
        waiting.result(LIMIT_S).release()


def test_overlapping_warm_clients_starve_nobody() -> None:
    """D02: a lease is given back only when the next is granted, until the waiter's bound has come; then none is."""
    with a_scheduler(memory_limit="500MiB", max_wait="2s") as scheduler:  # for the first overlap
        warm, held = a_model("warm"), scheduler.acquire(a_model("warm"))
        cold = scheduler.submit(a_model("cold"))
        end, overlaps = time.monotonic() + LIMIT_S, 0
        following = None
        while states(scheduler)["warm"] == "ready":
            assert time.monotonic() < end, "the waiter starves"
            following = scheduler.submit(warm)
            assert_soon(lambda asked=following: asked.done() or states(scheduler)["warm"] != "ready")
            if following.done():
                held.release()
                held, following = following.result(), None
                overlaps += 1
        if following is not None:  # granted just before the bound, or else in the next life
            following.add_done_callback(lambda granted: granted.result().release())
        held.release()
        cold.result(LIMIT_S).release()
        assert overlaps
        assert_soon(lambda: following is None or following.done())


def test_nothing_is_loaded_for_a_waiter_that_has_left() -> None:
    """It leaves while it waits for a lease to end; and another while its victim is being unloaded."""
    unload, load = Gate(), Gate()
    load.open.set()
    with a_scheduler(memory_limit="500MiB") as scheduler:
        busy = scheduler.acquire(a_model("busy", unload=unload))
        waiting = scheduler.submit(a_model("cold", load=load))
        assert waiting.cancel()
        busy.release()
        assert states(scheduler)["busy"] == "idle"
        waiting = scheduler.submit(a_model("cold", load=load))
        assert unload.entered.wait(LIMIT_S)
        assert waiting.cancel()
        unload.open.set()
        assert_soon(lambda: not states(scheduler))
    assert load.calls == 0


def test_a_time_limit_that_the_load_exceeds_is_refused_at_once() -> None:
    """It does not wait until the limit that it names has passed, and the loaded object stays where it is."""

    def load() -> object:
        return threading.Event().wait(LOAD_S)

    slow = a_model("slow", load=load)
    with a_scheduler(memory_limit="500MiB") as scheduler:
        for _ in range(2):  # one load alone may have been slow by chance
            scheduler.acquire(slow).release()
            scheduler.acquire(a_model("other")).release()
        with pytest.raises(TimeoutTooShort) as refused:
            scheduler.acquire(slow, timeout=LOAD_S * 0.9)
        assert refused.value.load_s >= LOAD_S and refused.value.least_s == refused.value.load_s
        assert isinstance(refused.value, AcquireTimeout) and refused.value.status == 503
        assert states(scheduler) == {"other": "idle"}
        scheduler.acquire(slow, timeout=LIMIT_S).release()
