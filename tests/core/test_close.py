"""Closing the core: every request is answered, every runner is stopped, and the end is reported once."""

from __future__ import annotations

import math

from fsm.machine.runner import RunnerState
from fsm.messages.commands import Finished, Reject, RevokeLease, Stop
from fsm.messages.reasons import ProcessExited
from fsm.messages.refusals import SchedulerClosed
from tests.support.pool import (
    a_pool,
    acquire,
    cancel,
    close,
    exited,
    expire,
    granted,
    loaded,
    memory,
    pin,
    preload,
    progress,
    refused,
    release,
    stopped,
)


def test_an_empty_pool_closes_at_once() -> None:
    """A core without runners and requests closes at once."""
    assert a_pool().feed(close()) == [Finished()]


def test_s33_a_close_stops_what_is_idle_and_refuses_what_waits() -> None:
    """S33: a close refuses waiting requests and stops idle runners in one step."""
    pool = a_pool(each="3GiB", max_runners=2).idle("a").ready("b", lease=1)
    pool.feed(pin("a"), acquire("c", request=2), preload("d", request=3))
    assert pool.feed(close()) == [Reject(2, SchedulerClosed()), Reject(3, SchedulerClosed()), Stop(1)]


def test_s33_leases_may_finish() -> None:
    """S33: leases may finish during a close, their runners drain, and the end is reported once, after the last exit."""
    pool = a_pool().ready("a", lease=1)
    assert pool.feed(close("30s")) == []
    pool.advance("29s")
    assert pool.feed(release(1)) == [Stop(1)]
    assert pool.feed(exited(1)) == [Finished()]
    assert pool.advance("1h") == []


def test_s33_after_the_time_out_leases_are_broken() -> None:
    """S33: after the close's timeout, leases are revoked and their runners are stopped."""
    pool = a_pool().ready("a", lease=1).ready("a", lease=2)
    pool.feed(close("30s"))
    assert pool.advance("30s") == [RevokeLease(1, None), RevokeLease(2, None), Stop(1)]
    assert pool.feed(release(1)) == []
    assert pool.feed(exited(1)) == [Finished()]


def test_a_close_that_waits_for_nobody_breaks_leases_at_once() -> None:
    """A close with a timeout of 0 revokes leases at the next tick."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(close(0))
    assert stopped(pool.advance(0)) == [1]


def test_a_second_close_may_only_shorten_the_wait() -> None:
    """A second close may shorten the timeout of the first and never lengthens it."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(close("30s"), close("10s"), close("1h"))
    assert stopped(pool.advance("9s")) == []
    assert stopped(pool.advance("1s")) == [1]


def test_a_close_without_a_limit_waits_for_ever() -> None:
    """A close with an infinite timeout waits for leases without an end."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(close(math.inf))
    assert pool.advance("10000h") == []
    assert pool.feed(release(1)) == [Stop(1)]


def test_d20_after_a_close_every_request_is_answered() -> None:
    """D20: waiting requests and later ones are refused once the core closes."""
    pool = a_pool().loading("a", request=1)
    pool.feed(acquire("b", request=2))
    assert refused(pool.feed(close())) == {1: SchedulerClosed, 2: SchedulerClosed}
    assert refused(pool.feed(acquire("a", request=3), memory(4, cpu="1GiB"))) == {
        3: SchedulerClosed,
        4: SchedulerClosed,
    }
    pool.feed(exited(1))
    assert refused(pool.feed(acquire("a", request=5))) == {5: SchedulerClosed}


def test_d20_even_a_warm_request_is_refused() -> None:
    """D20: a warm request is refused while the leases of a closing core drain."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(close())
    assert refused(pool.feed(acquire("a", request=2))) == {2: SchedulerClosed}


def test_d09_a_close_during_a_load_stops_it() -> None:
    """D09: a close stops a load and refuses its requests, and late events of the load change nothing."""
    pool = a_pool().loading("a", request=1)
    assert stopped(pool.feed(close())) == [1]
    assert pool.feed(loaded(1), progress(1)) == []
    assert pool.feed(exited(1)) == [Finished()]


def test_a_close_gives_the_programs_memory_back() -> None:
    """A close takes the program's own memory out of the ledger, and its release afterwards is late."""
    pool = a_pool()
    pool.feed(memory(1, cpu="1GiB"))
    assert pool.feed(close()) == [Finished()]
    pool.feed(release(1))
    assert pool.core.late == 1


def test_a_close_waits_for_memory_to_come_back() -> None:
    """A close waits for the memory of a runner that was stopped before it."""
    pool = a_pool(samples=False).expiring("a")
    pool.feed(exited(1))
    assert Finished() not in pool.feed(close())
    assert pool.feed(pool.sample()) == [Finished()]


def test_a_close_waits_for_memory_no_longer_than_ever() -> None:
    """A close waits for memory no longer than the recovery timeout, although the device is never read again."""
    pool = a_pool(samples=False).expiring("a")
    pool.feed(exited(1), close())
    assert Finished() in pool.advance("5s")


def test_a_close_while_metadata_are_read_ends_at_once() -> None:
    """A close during an inspection ends at once, and the result of the inspection is late."""
    pool = a_pool(inspects=False)
    pool.feed(acquire("a", request=1))
    assert pool.feed(close()) == [Reject(1, SchedulerClosed()), Finished()]
    assert pool.feed(pool.inspection("a"), cancel(1), expire("a")) == []
    assert granted(pool.commands) == []


def test_a_crash_during_the_close_does_not_keep_it_open() -> None:
    """A crash during a close revokes the runner's leases, and the close finishes."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(close())
    assert pool.feed(exited(1, code=-9, reason="killed")) == [
        RevokeLease(1, ProcessExited(-9, "killed", loaded=True)),
        Finished(),
    ]
    assert pool.state("a") is RunnerState.unloaded
