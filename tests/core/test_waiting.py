"""Waiting, scenario by scenario: who waits for whom, and for how long at most.

Each of the first six has a twin with real threads in `test_waiting_threads.py`.
"""

from __future__ import annotations

import pytest

from fsm.machine.runner import RunnerState
from fsm.messages.commands import Grant, NotifyContention, Stop
from fsm.messages.events import Progress
from fsm.messages.reasons import RunnerStep, WaitFor, WaitForRunners
from tests.support.pool import (
    PoolUnderTest,
    a_pool,
    acquire,
    cancel,
    exited,
    granted,
    launched,
    loaded,
    refused,
    release,
    seconds,
    stopped,
)

# -- what nobody waits for --------------------------------------------------------------------------------------------


def test_a_cold_request_that_fits_does_not_wait_behind_one_that_does_not() -> None:
    """Its launch comes in the step in which it asks."""
    pool = a_pool(sizes={"busy": "4GiB", "large": "6GiB", "small": "1GiB"}).ready("busy", lease=1)
    pool.feed(acquire("large", request=2))
    assert launched(pool.feed(acquire("small", request=3))) == ["small"]
    assert granted(pool.feed(loaded(2))) == [3]
    assert pool.waiting() == [2]


def test_two_cold_requests_that_fit_are_loaded_at_the_same_time() -> None:
    """Neither load waits for the other; the second may well be the first to end."""
    pool = a_pool(each="3GiB")
    assert launched(pool.feed(acquire("a", request=1), acquire("b", request=2))) == ["a", "b"]
    assert pool.feed(loaded(2)) == [Grant(2, 2)]
    assert pool.feed(loaded(1)) == [Grant(1, 1)]


def test_a_waiter_is_served_by_whatever_becomes_idle_first() -> None:
    """The one that was to go is still in use, and stays: no victim is fixed before it expires."""
    pool = a_pool(each="4GiB").ready("a", lease=1).ready("b", lease=2)
    assert pool.feed(acquire("c", request=3)) == [NotifyContention(1, (1,))]
    assert pool.feed(release(2)) == [Stop(2)]
    assert launched(pool.feed(exited(2))) == ["c"]
    assert pool.feed(acquire("a", request=4)) == [Grant(4, 1)]


def test_a_slow_stop_holds_up_no_warm_request() -> None:
    """While one runner takes its time to end, the others are granted in the step in which they are asked for."""
    pool = a_pool(each="4GiB").idle("leaving").ready("warm", lease=1)
    assert pool.feed(acquire("new", request=2)) == [Stop(1)]
    for second in range(10):
        pool.advance("1s")
        assert pool.feed(acquire("warm", request=10 + second)) == [Grant(10 + second, 2)]


def test_overlapping_warm_clients_starve_nobody() -> None:
    """D02: two clients whose leases always overlap are served until the waiter's bound; then it is its turn."""
    pool = a_pool(max_wait_s=120.0, min_residency_s=0.0).ready("warm", lease=1)
    pool.feed(acquire("cold", request=2))
    served = 0
    for lease in range(100, 300):
        pool.advance("1s")
        served += granted(pool.feed(acquire("warm", request=lease))) == [lease]
        pool.feed(release(1 if lease == 100 else lease - 1))
        if pool.state("warm") is RunnerState.expiring:
            break
    assert served == 119  # until its bound the waiter costs them nothing, and then no more are let in
    pool.feed(release(100 + served - 1))
    assert launched(pool.feed(exited(1))) == ["cold"]


def test_nothing_is_loaded_for_a_waiter_that_has_left() -> None:
    """Whether it leaves while it waits for a lease to end or while its victim stops."""
    for leaves_late in (False, True):
        pool = a_pool().ready("a", lease=1)
        pool.feed(acquire("b", request=2))
        if leaves_late:
            assert stopped(pool.feed(release(1))) == [1]
            commands = pool.feed(cancel(2), exited(1))
        else:
            commands = pool.feed(cancel(2), release(1))
        assert (launched(commands), stopped(commands)) == ([], [])
        assert launched(pool.advance("1h")) == []


# -- bounds -----------------------------------------------------------------------------------------------------------


def test_an_idle_runner_in_its_residency_does_not_extend_the_bound() -> None:
    """The waiter's time has come and one that is busy may go, so nobody waits until the idle one may go too."""
    pool = a_pool(each="4GiB", max_wait_s=20.0, min_residency_s=600.0).ready("busy", lease=1)
    pool.advance("600s")
    pool.ready("fresh", lease=2).feed(release(2))
    pool.feed(acquire("cold", request=3))
    pool.advance("19s")
    assert (pool.state("busy"), pool.state("fresh")) == (RunnerState.ready, RunnerState.idle)
    pool.advance("1s")
    assert (pool.state("busy"), pool.state("fresh")) == (RunnerState.expiring, RunnerState.idle)
    pool.feed(release(1))
    assert launched(pool.feed(exited(1))) == ["cold"]


def test_until_the_bound_an_idle_runner_goes_when_its_residency_is_over() -> None:
    """It is given up before anybody in use has to drain."""
    pool = a_pool(each="4GiB", max_wait_s=20.0, min_residency_s=10.0).ready("busy", lease=1)
    pool.advance("600s")
    pool.ready("fresh", lease=2).feed(release(2), acquire("cold", request=3))
    assert stopped(pool.advance("9s")) == []
    assert stopped(pool.advance("1s")) == [2]
    assert pool.state("busy") is RunnerState.ready


def loaded_for(load: str, **limits: float) -> PoolUnderTest:
    """Return a pool in whose one place a load of "a" took so long, while somebody waited too long for "b" already."""
    pool = a_pool(max_wait_s=120.0, **limits)
    pool.feed(acquire("a", request=1), acquire("b", request=2))
    pool.advance("120s")
    pool.feed(Progress(1))
    pool.advance(seconds(load) - 120.0)
    pool.feed(loaded(1))
    return pool


def test_a_runner_keeps_its_place_in_use_for_nine_times_its_load() -> None:
    """At most a tenth of the time goes into loads, however long others have waited."""
    pool = a_pool(max_wait_s=120.0).ready("old", lease=9)
    pool.feed(acquire("a", request=1), acquire("b", request=2))
    pool.advance("120s")
    pool.feed(release(9), exited(1))
    pool.advance("10s")
    pool.feed(loaded(2))
    pool.advance("89s")
    assert pool.state("a") is RunnerState.ready
    pool.advance("1s")
    assert pool.state("a") is RunnerState.expiring


def test_a_runner_that_nobody_uses_keeps_its_place_for_a_moment_only() -> None:
    """Its users may be about to ask again; longer it would be of no use to keep it, with somebody else waiting."""
    pool = a_pool(max_wait_s=120.0).loading("a", request=1)
    pool.advance("10s")
    pool.feed(loaded(1), release(1), acquire("b", request=2))
    assert stopped(pool.advance("0.4s")) == []
    assert stopped(pool.advance("0.1s")) == [1]


def test_no_residency_is_longer_than_a_request_may_be_let_wait() -> None:
    """A load of many minutes does not shut everybody else out for an hour."""
    pool = loaded_for("200s")
    pool.advance("119s")
    assert pool.state("a") is RunnerState.ready
    pool.advance("1s")
    assert pool.state("a") is RunnerState.expiring


def test_a_residency_that_is_set_holds_in_use_and_out_of_use() -> None:
    """Nothing is added to it."""
    pool = loaded_for("130s", min_residency_s=5.0)
    pool.advance("4s")
    assert pool.state("a") is RunnerState.ready
    pool.advance("1s")
    assert pool.state("a") is RunnerState.expiring


def test_all_who_wait_for_a_model_are_served_together() -> None:
    """One swap serves the whole line, however late its last member came; those who come while it loads too."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(acquire("b", request=2), acquire("b", request=3), release(1), exited(1), acquire("b", request=4))
    assert granted(pool.feed(loaded(2))) == [2, 3, 4]


def test_a_runner_that_drains_takes_no_new_lease() -> None:
    """Those who come for it meanwhile wait for its next life, behind the one it drains for."""
    pool = a_pool(max_wait_s=20.0, min_residency_s=0.0).ready("a", lease=1)
    pool.feed(acquire("b", request=2))
    pool.advance("20s")
    assert pool.feed(acquire("a", request=3)) == []
    assert launched(pool.feed(release(1), exited(1))) == ["b"]
    pool.feed(loaded(2), release(2))
    assert launched(pool.feed(exited(2))) == ["a"]


def test_a_request_of_low_priority_has_its_turn() -> None:
    """Ageing: a steady stream of a higher priority holds it up for the worth of the difference, and no longer."""
    pool = a_pool(priority_s=60.0, max_wait_s=10.0, min_residency_s=0.0).ready("a", lease=1)
    pool.feed(acquire("low", request=2))
    for request in range(10, 100):
        if launched(pool.commands)[-1] == "low":
            break
        pool.feed(acquire(f"high{request}", request=request, priority=2))
        pool.advance("10s")
        for runner in list(pool.core._state.runners.values()):
            pool.feed(*(release(lease) for lease in sorted(runner.leases)))
        pool.settle()
        pool.feed(loaded(max(pool.launches)))
    assert pool.now - 1000.0 <= 2 * 60.0 + 20.0
    assert refused(pool.commands) == {}


def test_who_would_not_wait_at_all_has_one_runner_drained_and_not_all_of_them() -> None:
    """What was told to drain is given time to do so, as a stop is."""
    pool = a_pool("18GiB", max_wait_s=0.0, min_residency_s=0.0, max_runners=9)
    pool.ready("a", lease=1).ready("b", lease=2).ready("c", lease=3)
    pool.feed(acquire("d", request=9))
    states = [pool.state(model) for model in "abc"]
    assert states == [RunnerState.expiring, RunnerState.ready, RunnerState.ready]


# -- who is asked to give a lease back --------------------------------------------------------------------------------


def test_whoever_came_since_others_left_is_told_that_somebody_waits() -> None:
    """The one who was told for them has given back; the new holder would keep the runner until the bound."""
    pool = a_pool().ready("a", lease=1)
    assert pool.feed(acquire("b", request=2)) == [NotifyContention(1, (1,))]
    pool.feed(cancel(2))
    assert pool.feed(acquire("a", request=3), release(1)) == [Grant(3, 1)]
    assert pool.feed(acquire("c", request=4)) == [NotifyContention(1, (3,))]


@pytest.mark.parametrize("limits", [{"min_residency_s": 60.0}, {"idle_grace_part": 0.5, "idle_grace_limit_s": 1.0}])
def test_who_takes_a_runner_that_is_to_go_in_a_moment_is_told_at_once(limits: dict[str, float]) -> None:
    """It rests, and may not go yet; its next holder is not told only when it might."""
    pool = a_pool(**limits)
    pool.feed(acquire("a", request=1))
    pool.advance("10s")
    pool.feed(loaded(1), acquire("b", request=2))
    pool.advance("2s")
    assert pool.feed(release(1)) == []
    assert pool.feed(acquire("a", request=3)) == [Grant(3, 1), NotifyContention(1, (3,))]


def test_nobody_is_told_twice() -> None:
    """Neither by one who waits longer, nor by another one."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(acquire("b", request=2), cancel(2))
    assert NotifyContention(1, (1,)) in pool.commands
    assert pool.feed(acquire("c", request=3), pool.sample()) == []


def test_nobody_is_told_for_somebody_who_waits_for_their_own_load() -> None:
    """What somebody wanted who has left is wanted by nobody."""
    pool = a_pool("16GiB", sizes={"a": "6GiB", "b": "12GiB", "c": "2GiB"}).ready("a", lease=1)
    pool.feed(acquire("b", request=2), cancel(2), acquire("c", request=3))
    assert pool.feed(acquire("a", request=4)) == [Grant(4, 1)]


def test_when_the_last_lease_of_what_drains_is_back_the_end_is_in_sight() -> None:
    """Whoever waits is told so at once, and not with the next reading."""
    pool = a_pool(max_wait_s=10.0, min_residency_s=0.0, stop_timeout_s=60.0).ready("a", lease=1)
    pool.feed(acquire("b", request=2))
    pool.advance("30s")
    assert pool.waits_for(2) == WaitForRunners(("a",), RunnerStep.drain)
    pool.feed(release(1))
    assert pool.waits_for(2) == WaitFor.memory
    assert pool.core.snapshot().queue[0].until == pool.now + 60.0
