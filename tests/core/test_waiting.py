"""Waiting, scenario by scenario: which request waits for which runner, and for how long at most.

Each of the first six has a twin with real threads in `test_waiting_threads.py`.
"""

from __future__ import annotations

import pytest

from fsm.machine.runner import RunnerState
from fsm.messages.commands import Grant, NotifyContention, Stop
from fsm.messages.events import Progress
from fsm.messages.reasons import RunnerStep, WaitForRunners
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

# -- requests that do not wait ----------------------------------------------------------------------------------------


def test_a_cold_request_that_fits_does_not_wait_behind_one_that_does_not() -> None:
    """A cold request that fits is launched in its own step, although an older one waits for memory."""
    pool = a_pool(sizes={"busy": "4GiB", "large": "6GiB", "small": "1GiB"}).ready("busy", lease=1)
    pool.feed(acquire("large", request=2))
    assert launched(pool.feed(acquire("small", request=3))) == ["small"]
    assert granted(pool.feed(loaded(2))) == [3]
    assert pool.waiting() == [2]


def test_two_cold_requests_that_fit_are_loaded_at_the_same_time() -> None:
    """Two cold requests that fit load at the same time, and either may end first."""
    pool = a_pool(each="3GiB")
    assert launched(pool.feed(acquire("a", request=1), acquire("b", request=2))) == ["a", "b"]
    assert pool.feed(loaded(2)) == [Grant(2, 2)]
    assert pool.feed(loaded(1)) == [Grant(1, 1)]


def test_a_waiter_is_served_by_whatever_becomes_idle_first() -> None:
    """The runner that becomes idle first is evicted, although another one was the planned victim."""
    pool = a_pool(each="4GiB").ready("a", lease=1).ready("b", lease=2)
    assert pool.feed(acquire("c", request=3)) == [NotifyContention(1, (1,))]
    assert pool.feed(release(2)) == [Stop(2)]
    assert launched(pool.feed(exited(2))) == ["c"]
    assert pool.feed(acquire("a", request=4)) == [Grant(4, 1)]


def test_a_slow_stop_holds_up_no_warm_request() -> None:
    """Warm requests are granted in their own steps while another runner takes long to stop."""
    pool = a_pool(each="4GiB").idle("leaving").ready("warm", lease=1)
    assert pool.feed(acquire("new", request=2)) == [Stop(1)]
    for second in range(10):
        pool.advance("1s")
        assert pool.feed(acquire("warm", request=10 + second)) == [Grant(10 + second, 2)]


def test_overlapping_warm_clients_starve_nobody() -> None:
    """D02: overlapping warm requests are served until the bound of a waiting request, which then gets the memory."""
    pool = a_pool(max_wait_s=120.0, min_residency_s=0.0).ready("warm", lease=1)
    pool.feed(acquire("cold", request=2))
    served = 0
    for lease in range(100, 300):
        pool.advance("1s")
        served += granted(pool.feed(acquire("warm", request=lease))) == [lease]
        pool.feed(release(1 if lease == 100 else lease - 1))
        if pool.state("warm") is RunnerState.expiring:
            break
    assert served == 119  # until the bound the waiting request costs them nothing, and then no more are granted
    pool.feed(release(100 + served - 1))
    assert launched(pool.feed(exited(1))) == ["cold"]


def test_nothing_is_loaded_for_a_waiter_that_has_left() -> None:
    """Nothing is loaded for a request that was cancelled while it waited for a lease or for its victim's stop."""
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
    """A busy runner drains at the bound, although an idle one within its minimum residency could go later."""
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
    """An idle runner is evicted at the end of its minimum residency, before the bound drains a busy one."""
    pool = a_pool(each="4GiB", max_wait_s=20.0, min_residency_s=10.0).ready("busy", lease=1)
    pool.advance("600s")
    pool.ready("fresh", lease=2).feed(release(2), acquire("cold", request=3))
    assert stopped(pool.advance("9s")) == []
    assert stopped(pool.advance("1s")) == [2]
    assert pool.state("busy") is RunnerState.ready


def loaded_for(load: str, **limits: float) -> PoolUnderTest:
    """Return a pool whose one runner "a" took so long to load, while "b" waited for longer than the bound."""
    pool = a_pool(max_wait_s=120.0, **limits)
    pool.feed(acquire("a", request=1), acquire("b", request=2))
    pool.advance("120s")
    pool.feed(Progress(1))
    pool.advance(seconds(load) - 120.0)
    pool.feed(loaded(1))
    return pool


def test_a_runner_keeps_its_place_in_use_for_nine_times_its_load() -> None:
    """A busy runner is not drained for nine times its load time, so that a tenth of the time goes into loads."""
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
    """An idle runner is kept for a moment only while another request waits."""
    pool = a_pool(max_wait_s=120.0).loading("a", request=1)
    pool.advance("10s")
    pool.feed(loaded(1), release(1), acquire("b", request=2))
    assert stopped(pool.advance("0.4s")) == []
    assert stopped(pool.advance("0.1s")) == [1]


def test_no_residency_is_longer_than_a_request_may_be_let_wait() -> None:
    """A minimum residency is never longer than the bound on a wait."""
    pool = loaded_for("200s")
    pool.advance("119s")
    assert pool.state("a") is RunnerState.ready
    pool.advance("1s")
    assert pool.state("a") is RunnerState.expiring


def test_a_residency_that_is_set_holds_in_use_and_out_of_use() -> None:
    """A minimum residency from the settings holds for busy and idle runners, and nothing is added to it."""
    pool = loaded_for("130s", min_residency_s=5.0)
    pool.advance("4s")
    assert pool.state("a") is RunnerState.ready
    pool.advance("1s")
    assert pool.state("a") is RunnerState.expiring


def test_all_who_wait_for_a_model_are_served_together() -> None:
    """One load serves every request of a request group, also those that arrive while the model loads."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(acquire("b", request=2), acquire("b", request=3), release(1), exited(1), acquire("b", request=4))
    assert granted(pool.feed(loaded(2))) == [2, 3, 4]


def test_a_runner_that_drains_takes_no_new_lease() -> None:
    """A draining runner takes no new lease, and a request for its model waits for the next runner."""
    pool = a_pool(max_wait_s=20.0, min_residency_s=0.0).ready("a", lease=1)
    pool.feed(acquire("b", request=2))
    pool.advance("20s")
    assert pool.feed(acquire("a", request=3)) == []
    assert launched(pool.feed(release(1), exited(1))) == ["b"]
    pool.feed(loaded(2), release(2))
    assert launched(pool.feed(exited(2))) == ["a"]


def test_a_request_of_low_priority_has_its_turn() -> None:
    """A stream of requests with a higher priority delays a request by the seconds that the difference is worth."""
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
    """With a bound of 0 one runner drains for a request, and not all of them."""
    pool = a_pool("18GiB", max_wait_s=0.0, min_residency_s=0.0, max_runners=9)
    pool.ready("a", lease=1).ready("b", lease=2).ready("c", lease=3)
    pool.feed(acquire("d", request=9))
    states = [pool.state(model) for model in "abc"]
    assert states == [RunnerState.expiring, RunnerState.ready, RunnerState.ready]


# -- telling lease holders --------------------------------------------------------------------------------------------


def test_whoever_came_since_others_left_is_told_that_somebody_waits() -> None:
    """A new lease holder is notified, although the earlier holders were notified of another request."""
    pool = a_pool().ready("a", lease=1)
    assert pool.feed(acquire("b", request=2)) == [NotifyContention(1, (1,))]
    pool.feed(cancel(2))
    assert pool.feed(acquire("a", request=3), release(1)) == [Grant(3, 1)]
    assert pool.feed(acquire("c", request=4)) == [NotifyContention(1, (3,))]


@pytest.mark.parametrize("limits", [{"min_residency_s": 60.0}, {"idle_grace_part": 0.5, "idle_grace_limit_s": 1.0}])
def test_who_takes_a_runner_that_is_to_go_in_a_moment_is_told_at_once(limits: dict[str, float]) -> None:
    """A new lease holder of a runner in its grace or residency is notified at once."""
    pool = a_pool(**limits)
    pool.feed(acquire("a", request=1))
    pool.advance("10s")
    pool.feed(loaded(1), acquire("b", request=2))
    pool.advance("2s")
    assert pool.feed(release(1)) == []
    assert pool.feed(acquire("a", request=3)) == [Grant(3, 1), NotifyContention(1, (3,))]


def test_nobody_is_told_twice() -> None:
    """A lease holder is notified once, whichever requests wait."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(acquire("b", request=2), cancel(2))
    assert NotifyContention(1, (1,)) in pool.commands
    assert pool.feed(acquire("c", request=3), pool.sample()) == []


def test_nobody_is_told_for_somebody_who_waits_for_their_own_load() -> None:
    """A lease holder is not notified for a request that waits for its own load."""
    pool = a_pool("16GiB", sizes={"a": "6GiB", "b": "12GiB", "c": "2GiB"}).ready("a", lease=1)
    pool.feed(acquire("b", request=2), cancel(2), acquire("c", request=3))
    assert pool.feed(acquire("a", request=4)) == [Grant(4, 1)]


def test_when_the_last_lease_of_what_drains_is_back_the_end_is_in_sight() -> None:
    """When a draining runner's last lease is released, the waiting request is shown the end of the stop."""
    pool = a_pool(max_wait_s=10.0, min_residency_s=0.0, stop_timeout_s=60.0).ready("a", lease=1)
    pool.feed(acquire("b", request=2))
    pool.advance("30s")
    assert pool.waits_for(2) == WaitForRunners(("a",), RunnerStep.drain)
    pool.feed(release(1))
    assert pool.waits_for(2) == WaitForRunners(("a",), RunnerStep.leave)
    assert pool.core.snapshot().queue[0].until == pool.now + 60.0
