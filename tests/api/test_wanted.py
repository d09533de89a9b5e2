"""`Lease.wanted` as of now: whether other requests wait for the runner's memory at this moment."""

from __future__ import annotations

import threading
from contextlib import suppress

import pytest

from scheduler import AcquireTimeout, PythonModel, Scheduler
from scheduler.testing import FakeMachine
from tests.support.real import settings
from tests.support.waiting import assert_soon


def a_machine() -> FakeMachine:
    """Return a machine with room for one of its models."""
    fake = FakeMachine(memory="8GiB", auto_advance=False, max_wait="60s")
    for name in ("a", "b", "c"):
        fake.model(name, size="5GiB")
    return fake.model("small", size="1GiB")


def test_u73_a_lease_is_wanted_while_a_request_waits_and_no_longer() -> None:
    """A request that leaves makes the lease unwanted, and another one makes it wanted again."""
    with a_machine() as fake:
        first = fake.scheduler.submit("a")
        fake.advance("1s")
        with first.result(10) as lease:
            assert not lease.wanted
            for name in ("b", "c"):
                waiting = fake.scheduler.submit(name)
                fake.advance("1s")
                assert lease.wanted
                waiting.cancel()
                fake.advance("1s")
                assert not lease.wanted
        assert not lease.wanted


def test_u73_a_time_limit_that_passes_makes_it_unwanted() -> None:
    """A request whose time limit passes waits no more; a request that needs no memory of others wants none."""
    with a_machine() as fake:
        first = fake.scheduler.submit("a")
        fake.advance("1s")
        with first.result(10) as lease:
            waiting = fake.scheduler.submit("b", timeout="5s")
            fake.advance("1s")
            assert lease.wanted
            fake.advance("5s")
            with pytest.raises(AcquireTimeout):
                waiting.result(10)
            assert not lease.wanted
            small = fake.scheduler.submit("small")
            assert not lease.wanted
            fake.advance("1s")
            small.result(10).release()


def test_u73_a_runner_that_drains_for_a_request_is_wanted_until_that_leaves() -> None:
    """A lease on a runner that was evicted, and drains, is wanted by the request that it was evicted for."""
    with a_machine() as fake:
        first = fake.scheduler.submit("a")
        fake.advance("1s")
        with first.result(10) as lease:
            waiting = fake.scheduler.submit("b")
            fake.advance("120s")
            assert fake.scheduler.status().runners[0].state == "expiring" and lease.wanted
            waiting.cancel()
            fake.advance("1s")
            assert not lease.wanted


def test_u73_a_request_for_the_same_runner_wants_nothing() -> None:
    """A request that shares the runner, and the close of the scheduler, want no memory of it."""
    with a_machine() as fake:
        first = fake.scheduler.submit("a")
        fake.advance("1s")
        with first.result(10) as lease:
            waiting = fake.scheduler.submit("b")
            fake.advance("1s")
            waiting.cancel()
            with fake.scheduler.submit("a").result(10) as second:
                assert not lease.wanted and not second.wanted
        fake.scheduler.close()
        assert not lease.wanted


def test_u73_a_reservation_wants_it_while_it_waits() -> None:
    """A reservation of the program's own wants the memory until its time limit has passed."""
    model = PythonModel("a", load=object, memory={"cpu": "900MiB"})
    with (
        Scheduler(settings(memory_limit="1GiB", measurement_file=None)) as scheduler,
        scheduler.acquire(model) as lease,
    ):
        ended = threading.Event()

        def reserve() -> None:
            with suppress(AcquireTimeout):
                scheduler.reserve("cpu", "500MiB", timeout="3s")
            ended.set()

        threading.Thread(target=reserve).start()
        assert_soon(lambda: lease.wanted)
        assert ended.wait(60.0)
        assert not lease.wanted
