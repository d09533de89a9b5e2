"""Defects of the reference that come from time and order: the moments at which they arose, told to the core."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields

import pytest

from fsm.domain.devices import HOST
from fsm.machine.runner import RunnerState
from fsm.messages.commands import Finished, Grant, RevokeLease, Stop
from fsm.messages.events import Configure, Event, Tick
from fsm.messages.refusals import Cancelled, QueueFullRefusal, SchedulerClosed
from fsm.verification.state_invariants import check_state
from tests.support.pool import (
    PoolUnderTest,
    a_pool,
    acquire,
    cancel,
    close,
    exited,
    expire,
    filled,
    granted,
    launched,
    loaded,
    memory,
    out_of_memory,
    pin,
    progress,
    refused,
    release,
    stopped,
    unpin,
    unresponsive,
)


def test_d03_a_tick_that_was_on_its_way_does_not_beat_a_renewal() -> None:
    """D03: a request that arrives before the tick of an expired keep-alive renews the keep-alive."""
    pool = a_pool().idle("a", keep_alive="10s")
    pool.now += 11.0
    assert pool.feed(acquire("a", request=1, keep_alive="1h")) == [Grant(1, 1)]
    assert pool.feed(Tick(), release(1), Tick()) == []
    assert pool.advance("59m") == []
    assert stopped(pool.advance("2m")) == [1]


def test_d04_no_order_of_events_parts_a_grant_from_its_lease() -> None:
    """D04: whatever events come at the same moment, a runner with a granted lease is not stopped."""
    reading = a_pool(each="4GiB").idle("a").idle("c").sample()
    others = [Tick(), expire("a"), acquire("b", request=3), reading, out_of_memory(2), close("1h")]
    served = refused_or_queued = 0
    for before in itertools.chain.from_iterable(itertools.permutations(others, count) for count in range(3)):
        pool = a_pool(each="4GiB", max_wait_s=0.0).idle("a", keep_alive="10s").idle("c")
        pool.now += 10.0
        pool.feed(*before)
        if pool.feed(acquire("a", request=2)) == [Grant(2, 1)]:
            served += 1
            assert 1 not in pool.stops, f"after {before} the runner was granted and is being stopped"
            pool.feed(*(each for each in others if each not in before))
            assert 1 not in pool.stops and pool.core._state.runners[1].leases == {2}, f"after {before}"
        else:
            refused_or_queued += 1
            assert pool.state("a") is RunnerState.expiring, f"after {before} the request was refused for nothing"
    assert served and refused_or_queued


def test_d04_who_comes_after_the_stop_waits_for_the_next_life() -> None:
    """D04: a request that comes after the stop of a runner is granted the next runner of the model."""
    pool = a_pool().idle("a", keep_alive="10s")
    assert stopped(pool.advance("10s")) == [1]
    assert granted(pool.feed(acquire("a", request=2))) == []
    assert launched(pool.feed(exited(1))) == ["a"]
    assert pool.feed(loaded(2)) == [Grant(2, 2)]


def test_d07_a_waiter_keeps_its_one_place_through_evictions_and_failures() -> None:
    """D07: a waiting request keeps its one place in the queue through evictions and failed loads."""
    pool = a_pool(max_queue=1).ready("a", lease=1)
    pool.feed(acquire("b", request=2))
    assert refused(pool.feed(acquire("c", request=3))) == {3: QueueFullRefusal}
    pool.feed(release(1))
    assert launched(pool.feed(exited(1))) == ["b"]
    assert launched(pool.feed(exited(2, code=-9, out_of_memory=True))) == ["b"]
    assert pool.waiting() == [2]
    assert granted(pool.feed(loaded(3))) == [2]
    assert launched(pool.feed(release(2), acquire("c", request=4), exited(3))) == ["c"]


def test_d13_whoever_leaves_while_it_waits_is_answered_at_once() -> None:
    """D13: a cancelled request is answered at once in each of the three places where it may wait."""
    pool = a_pool(inspects=False)
    pool.feed(acquire("a", request=1))
    assert refused(pool.feed(cancel(1))) == {1: Cancelled}
    assert launched(pool.feed(pool.inspection("a"))) == []
    pool = a_pool().expiring("a")
    pool.feed(acquire("b", request=2))
    assert refused(pool.feed(cancel(2))) == {2: Cancelled}
    assert launched(pool.feed(exited(1))) == []
    pool = a_pool().loading("a", request=3)
    assert refused(pool.feed(cancel(3))) == {3: Cancelled}
    assert granted(pool.feed(loaded(1))) == []
    assert (pool.waiting(), pool.state("a")) == ([], RunnerState.idle)


def test_d15_nothing_that_is_slow_is_waited_for() -> None:
    """D15: warm requests are answered while an inspection, a launch, a stop and a reading are under way."""
    pool = a_pool(each="1GiB").idle("warm").idle("leaving").idle("gone")
    pool.samples = pool.inspects = False
    pool.feed(expire("leaving"), expire("gone"), exited(3), acquire("new", request=1), acquire("read", request=2))
    pool.feed(pool.inspection("new"))
    for request in range(10, 20):
        assert pool.feed(acquire("warm", request), release(request)) == [Grant(request, 1)]
    assert refused(pool.feed(cancel(2))) == {2: Cancelled}
    assert [(one.id, one.state.value, one.process) for one in pool.core.snapshot().runners[1:]] == [
        (2, "expiring", True),
        (3, "expiring", False),
        (4, "loading", True),
    ]


def test_d17_a_close_leaves_nothing_of_callers_that_never_finish() -> None:
    """D17: a close ends leases that are never released, memory of the program's own, and waits without a limit."""
    pool = a_pool("16GiB").ready("a", lease=1).ready("b", lease=2)
    pool.feed(memory(3, cpu="1GiB"), acquire("c", request=4))
    assert refused(pool.feed(close("30s"))) == {4: SchedulerClosed}
    commands = pool.advance("30s")
    assert {command.request for command in commands if isinstance(command, RevokeLease)} == {1, 2}
    assert stopped(commands) == [1, 2]
    commands = pool.feed(exited(1), exited(2))
    assert commands[-1] == Finished()
    state = pool.core._state
    assert not (state.runners or state.requests or state.groups or state.claims or state.ledger.accounts)
    assert [key for _, key in state.timers.items() if key[0] != "plan"] == []


def test_d18_what_was_read_never_changes_afterwards() -> None:
    """D18: a snapshot shares nothing with the core's state and cannot be written to."""
    pool = a_pool("20GiB", gpus=("8GiB",)).ready("a", lease=1).loading("b", request=2)
    pool.feed(acquire("a", request=3))
    seen, copy = pool.core.snapshot(), pool.core.copy()
    before = pickle.dumps(seen)
    hash(seen)  # raises where anything in it could change
    pool.feed(loaded(2), release(1), release(3), expire("a"), exited(1, code=-9), acquire("c", request=4), close("1s"))
    pool.advance("10s")
    assert pickle.dumps(seen) == before
    assert [runner.state.value for runner in copy.snapshot().runners] == ["ready", "loading"]
    check_state(copy)
    for value in (seen, *seen.runners, *seen.queue, *seen.devices):
        with pytest.raises(FrozenInstanceError):
            setattr(value, fields(value)[0].name, None)


def test_d18_what_is_read_is_whole_after_every_step() -> None:
    """D18: a runner, its leases, its memory and its device's account agree after every step."""
    pool = a_pool("8GiB", each="3GiB", max_wait_s=1.0)
    script = [
        acquire("a", request=1), loaded(1), acquire("a", request=2), acquire("b", request=3), release(1), loaded(2),
        acquire("c", request=4), release(2), exited(1), release(3), loaded(3), unresponsive(3), exited(3), close("1s"),
    ]  # fmt: skip
    for event in script:
        pool.feed(event)
        assert_consistent(pool)
        pool.advance("0.5s")
        assert_consistent(pool)


def assert_consistent(pool: PoolUnderTest) -> None:
    """Compare the parts of a snapshot with each other and with nothing else."""
    seen = pool.core.snapshot()
    for runner in seen.runners:
        if runner.leases:
            assert runner.state in (RunnerState.ready, RunnerState.expiring)
        assert (runner.state is not RunnerState.ready) or runner.leases
        assert runner.loaded_at is not None or runner.state in (RunnerState.loading, RunnerState.expiring)
    (host,) = seen.devices
    assert host.held_bytes == sum(dict(runner.held)[HOST] for runner in seen.runners)
    assert [wait.position for wait in seen.queue] == list(range(len(seen.queue)))


Make = Callable[[], Event]
PAIRS: list[tuple[str, Make]] = [
    ("acquire a", lambda: acquire("a", request=21)),
    ("acquire b", lambda: acquire("b", request=22)),
    ("acquire what needs the room of both", lambda: acquire("both", request=23)),
    ("reload a", lambda: acquire("a", request=24, num_ctx=1024)),
    ("reserve", lambda: memory(25, cpu="2GiB")),
    ("release a", lambda: release(1)),
    ("cancel a waiter", lambda: cancel(3)),
    ("expire a", lambda: expire("a")),
    ("expire b", lambda: expire("b")),
    ("pin a", lambda: pin("a")),
    ("unpin b", lambda: unpin("b")),
    ("configure", lambda: Configure(max_runners=1, max_queue=2, keep_alive_s=0.0)),
    ("progress", lambda: progress(3)),
    ("loaded", lambda: loaded(3)),
    ("filled", lambda: filled(1)),
    ("a runs out of memory", lambda: out_of_memory(1)),
    ("b does not answer", lambda: unresponsive(2)),
    ("a exits", lambda: exited(1, code=-9)),
    ("a load exits", lambda: exited(3, code=1)),
    ("tick", Tick),
    ("close", lambda: close("10s")),
]


@pytest.mark.slow
def test_d19_any_two_events_end_well_in_both_orders() -> None:
    """D19: after any two events in both orders, every request is answered and the core can close."""
    for (first, one), (second, other) in itertools.permutations(PAIRS, 2):
        pool = a_pool(each="3GiB", sizes={"both": "6GiB"}, max_wait_s=5.0).ready("a", lease=1).idle("b")
        pool.feed(acquire("c", request=3), memory(4, cpu="1GiB"))
        pool.feed(one(), other())
        ends(pool, f"{first}, then {second}")


def ends(pool: PoolUnderTest, what: str) -> None:
    """Let processes obey, release every lease, close the core, and assert that all requests are answered."""
    for _ in range(3):
        pool.feed(*(release(id) for id in list(pool.core._state.requests) if id not in pool.waiting()))
        pool.settle()
        loading = [id for id, one in pool.core._state.runners.items() if one.state is RunnerState.loading]
        pool.feed(*map(loaded, loading))
        pool.advance("10s")
    pool.feed(close(0.0))
    pool.advance("1s")
    pool.settle().advance("10s")
    assert pool.asked == pool.answers.keys(), what
    assert Finished() in pool.commands and not pool.core._state.runners, what
    assert not pool.core._state.ledger.accounts, what


def test_d20_who_comes_while_it_ends_or_after_its_end_is_answered() -> None:
    """D20: requests are refused when a close comes, while it drains, and after it has ended."""
    pool = a_pool("13GiB").ready("a", lease=1).loading("b", request=2)
    pool.feed(acquire("c", request=3))
    assert refused(pool.feed(close("30s"))) == {2: SchedulerClosed, 3: SchedulerClosed}
    assert refused(pool.feed(acquire("a", request=4))) == {4: SchedulerClosed}
    assert pool.feed(release(1), exited(1), exited(2))[-1] == Finished()
    assert refused(pool.feed(acquire("a", request=5), memory(6, cpu="1B"))) == {5: SchedulerClosed, 6: SchedulerClosed}
    assert pool.asked == pool.answers.keys()


def test_d20_a_stop_of_the_close_comes_once_for_each_life() -> None:
    """D09, D20: a close stops every launched runner exactly once, whatever its state."""
    pool = a_pool("40GiB", max_host_loads=9, max_runners=9).idle("a").ready("b", lease=1).loading("c", request=2)
    pool.feed(expire("a"), close("1s"))
    pool.advance("1s")
    assert pool.stops == {1, 2, 3} == set(pool.launches)
    assert pool.commands.count(Stop(1)) == 1
    assert pool.settle().commands[-1] == Finished()
