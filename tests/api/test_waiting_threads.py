"""Waiting with real threads: the scenarios of `core/test_waiting.py`, with objects that are slow to load and unload.

A gate holds what blocks until the request that is not to wait for it has been served. A test that passes has shown
that the request did not wait, however fast the machine is.
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

LOAD_S = 1.0  # an object's load; a request is judged sooner, even on a busy machine


class Gate:
    """A load or an unload that returns when the gate is opened, and counts how often it was begun."""

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
    """Return a scheduler with room for two objects of 400 MiB, without a minimum residency, that evicts by last use."""
    usual = {"gpus": False, "memory_limit": "1000MiB", "min_residency": 0, "eviction": "lru"}
    return Scheduler(Settings(**{**usual, **settings}))


def states(scheduler: Scheduler) -> dict[str, str]:
    return {runner.model: runner.state for runner in scheduler.status().runners}


def test_a_cold_request_that_fits_does_not_wait_behind_one_that_does_not() -> None:
    """A small cold request is served while a lease that an older, large request waits for is held."""
    with a_scheduler() as scheduler:
        busy = scheduler.acquire(a_model("busy"))
        large = scheduler.submit(a_model("large", "900MiB"))
        with scheduler.acquire(a_model("small", "100MiB"), timeout=LIMIT_S):
            assert not large.done()
            assert states(scheduler)["busy"] == "ready"
        busy.release()
        large.result(LIMIT_S).release()


def test_two_cold_requests_that_fit_are_loaded_at_the_same_time() -> None:
    """Each of two loads ends only when the other has begun."""
    meeting = threading.Barrier(2)

    def load() -> object:
        return meeting.wait(LIMIT_S)

    with a_scheduler() as scheduler:
        waiting = [scheduler.submit(a_model(name, load=load)) for name in "ab"]
        for future in waiting:
            future.result(LIMIT_S).release()


def test_a_waiter_is_served_by_whatever_becomes_idle_first() -> None:
    """A waiting request is served when any runner becomes idle, although another was the planned victim."""
    with a_scheduler() as scheduler:
        first, second = scheduler.acquire(a_model("first")), scheduler.acquire(a_model("second"))
        waiting = scheduler.submit(a_model("third"))
        assert_soon(lambda: [wait.waits_for for wait in scheduler.status().queue] == ["first to become idle"])
        second.release()
        waiting.result(LIMIT_S).release()
        assert states(scheduler)["first"] == "ready"
        first.release()


def test_a_slow_stop_holds_up_no_warm_request() -> None:
    """Fifty warm requests are served while one object is being unloaded."""
    unload = Gate()
    with a_scheduler(max_wait=0) as scheduler:  # the first runner has no grace, however long it took to load
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
    """D02: leases that always overlap are granted until the bound of a waiting request, and then none is."""
    with a_scheduler(memory_limit="500MiB", max_wait="2s") as scheduler:  # no room beside the first
        warm, held = a_model("warm"), scheduler.acquire(a_model("warm"))
        cold = scheduler.submit(a_model("cold"))
        end, overlaps = time.monotonic() + LIMIT_S, 0
        following = None
        while states(scheduler)["warm"] == "ready":
            assert time.monotonic() < end, "the waiting request starves"
            following = scheduler.submit(warm)
            assert_soon(lambda asked=following: asked.done() or states(scheduler)["warm"] != "ready")
            if following.done():
                held.release()
                held, following = following.result(), None
                overlaps += 1
        if following is not None:  # granted just before the bound, or else by the next runner
            following.add_done_callback(lambda granted: granted.result().release())
        held.release()
        cold.result(LIMIT_S).release()
        assert overlaps
        assert_soon(lambda: following is None or following.done())


def test_nothing_is_loaded_for_a_waiter_that_has_left() -> None:
    """Nothing is loaded for a request that is cancelled while it waits for a lease, or while its victim unloads."""
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
    """A request whose limit is shorter than the load is refused at once, and the loaded object stays."""

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
