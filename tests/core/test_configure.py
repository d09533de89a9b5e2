"""Limits that change while the core runs: which requests wait on, and which runners are evicted and when."""

from __future__ import annotations

import math

from fsm.domain.devices import HOST
from fsm.eviction.policies import EvictionPolicy, KeepAliveOrder, LeastRecentlyUsed
from fsm.machine.runner import RunnerState
from fsm.messages.commands import Grant, NotifyContention, Stop
from fsm.messages.decision_log import Entry, Transition
from fsm.messages.events import Close, Configure
from fsm.messages.reasons import RunnerLimit
from fsm.messages.refusals import QueueFullRefusal
from fsm.verification.state_invariants import check_state
from tests.support.pool import (
    PoolUnderTest,
    a_pool,
    acquire,
    amount,
    cancel,
    exited,
    expire,
    granted,
    launched,
    loaded,
    memory,
    pin,
    preload,
    refused,
    release,
    unpin,
)


def expires_in(pool: PoolUnderTest, model: str) -> float:
    """Return the seconds until an idle runner's keep-alive is over."""
    view = next(view for view in pool.core.snapshot().runners if view.id == pool.runner(model))
    return view.expires_at - pool.now


def idle(*models: str, policy: EvictionPolicy | None = None, **limits: float) -> PoolUnderTest:
    """Return a pool of idle models of 1 GiB, the least recently used first."""
    pool = a_pool(each="1GiB", policy=policy, **limits)
    for model in models:
        pool.idle(model).advance("1s")
    return pool


# -- max_queue --------------------------------------------------------------------------------------------------------


def test_a_shorter_queue_drops_nobody() -> None:
    """A shorter queue keeps the requests that wait, and refuses new cold requests until it has room again."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(acquire("b", request=2), acquire("c", request=3))
    assert pool.feed(Configure(max_queue=1)) == []
    assert pool.waiting() == [2, 3]
    assert refused(pool.feed(acquire("d", request=4))) == {4: QueueFullRefusal}
    assert pool.feed(acquire("a", request=5)) == [Grant(5, 1), NotifyContention(1, (5,))]


def test_a_longer_queue_lets_in_who_comes_next() -> None:
    """A longer queue takes the next request, and an earlier refusal names the earlier limit."""
    pool = a_pool(max_queue=1).ready("a", lease=1)
    pool.feed(acquire("b", request=2), acquire("c", request=3))
    assert pool.refusal(3).limit == 1
    pool.feed(Configure(max_queue=2), acquire("c", request=4))
    assert pool.waiting() == [2, 4]


# -- max_runners ------------------------------------------------------------------------------------------------------


def test_idle_runners_beyond_a_lower_limit_go_at_once_in_the_order_of_the_policy() -> None:
    """A lower limit evicts as few idle runners as exceed it, the least recently used first."""
    pool = idle("a", "b", "c", policy=LeastRecentlyUsed())
    assert pool.feed(Configure(max_runners=2)) == [Stop(1)]
    assert pool.feed(Configure(max_runners=1)) == [Stop(2)]


def test_the_policy_that_was_chosen_says_who_is_beyond_a_lower_limit() -> None:
    """With the policy "keep-alive", a lower limit evicts the runner with the shortest keep-alive first."""
    pool = idle("a", policy=KeepAliveOrder()).idle("b", keep_alive="1m")
    assert pool.feed(Configure(max_runners=1)) == [Stop(2)]


def test_a_minimum_residency_is_no_shield_against_a_lower_limit() -> None:
    """A minimum residency does not keep a runner from a lower limit, because the user set that limit."""
    pool = idle("a", "b", min_residency_s=3600.0)
    assert pool.feed(Configure(max_runners=1)) == [Stop(1)]


def test_a_busy_runner_beyond_a_lower_limit_goes_when_it_rests() -> None:
    """A busy runner beyond a lower limit serves new requests too until it is idle, and is stopped then."""
    pool = a_pool(each="1GiB").ready("a", lease=1).ready("b", lease=2)
    assert pool.feed(Configure(max_runners=1)) == []
    assert pool.feed(acquire("a", request=3), release(1)) == [Grant(3, 1)]
    assert pool.feed(release(3)) == [Stop(1)]
    assert pool.feed(release(2), exited(1)) == []
    assert pool.state("b") is RunnerState.idle


def test_who_waits_for_a_place_gets_it_from_a_busy_runner_after_the_bound_under_a_lower_limit_too() -> None:
    """A request that waits under a lower limit gets the slot of a busy runner when its bound on waiting is over."""
    pool = a_pool(each="1GiB", max_wait_s=120.0).ready("a", lease=1).ready("b", lease=2)
    pool.feed(Configure(max_runners=1), acquire("c", request=3))
    pool.advance("121s")
    assert [pool.state(model) for model in "ab"] == [RunnerState.expiring] * 2


def test_a_pinned_runner_is_not_beyond_any_limit_until_it_is_unpinned() -> None:
    """A pinned runner is not evicted for a lower limit before it is unpinned."""
    pool = idle("a")
    pool.feed(pin("a"))
    pool.ready("b", lease=1)
    assert pool.feed(Configure(max_runners=1)) == []
    assert pool.feed(unpin("a")) == [Stop(1)]


def test_runners_that_are_on_their_way_out_count_as_gone_for_a_lower_limit() -> None:
    """Runners that drain or are being stopped count as gone for a lower limit, so no other runner is evicted."""
    pool = idle("a", "b", max_runners=9).expiring("c").expiring("d", lease=1)
    assert pool.feed(Configure(max_runners=2)) == []
    assert pool.feed(Configure(max_runners=1)) == [Stop(1)]


def test_what_was_stopped_and_does_not_end_does_not_count_as_gone() -> None:
    """A runner that was stopped and does not exit in time counts again, and another runner is evicted in its place."""
    pool = idle("a", "b").expiring("c")
    assert pool.feed(Configure(max_runners=2)) == []
    assert pool.advance("16s") == [Stop(1)]


def test_a_load_that_nobody_waits_for_counts_as_idle() -> None:
    """A load that no request waits for counts as idle for a lower limit."""
    pool = a_pool(each="1GiB").loading("a", request=1)
    pool.feed(cancel(1))
    pool.idle("b")
    assert pool.feed(Configure(max_runners=1)) == [Stop(1)]


def test_a_load_that_is_waited_for_serves_first() -> None:
    """A load that a request waits for serves it, and is stopped when it becomes idle beyond a lower limit."""
    pool = a_pool(each="1GiB").ready("a", lease=1)
    pool.feed(preload("b", request=2))
    assert pool.feed(Configure(max_runners=1)) == []
    assert pool.feed(loaded(2)) == [Grant(2, 2), Stop(2)]


def test_a_higher_limit_lets_those_who_wait_start_at_once() -> None:
    """A higher limit starts as many waiting requests as it allows, the oldest first, and 0 is no limit."""
    pool = a_pool(each="1GiB", max_runners=1, max_host_loads=9).ready("a", lease=1)
    pool.feed(acquire("b", request=2), acquire("c", request=3), acquire("d", request=4))
    assert launched(pool.feed(Configure(max_runners=2))) == ["b"]
    assert launched(pool.feed(Configure(max_runners=0))) == ["c", "d"]


def test_gpus_that_are_not_read_stop_nobody() -> None:
    """GPUs that were not read in a moment stop no runner, since they may be back at once."""
    pool = a_pool(gpus=("8GiB", "8GiB"), each="1GiB")
    for model in "abcd":
        pool.idle(model)
    del pool.capacities["gpu0"], pool.capacities["gpu1"]
    assert pool.feed(pool.sample()) == []
    assert pool.feed(memory(1, cpu="1GiB")) == [Grant(1, None)]


def test_why_a_runner_went_for_a_lower_limit_is_noted() -> None:
    """The decision log gives the lower limit as the reason of an eviction."""
    pool = idle("a", "b")
    pool.core.decision_log = list[Entry]()
    pool.feed(Configure(max_runners=1))
    (entry,) = pool.core.decision_log
    assert isinstance(entry, Transition)
    assert (entry.runner, entry.trigger, entry.why) == (1, "expire", RunnerLimit(1))


# -- keep_alive -------------------------------------------------------------------------------------------------------


def test_s23_a_changed_keep_alive_holds_for_the_next_load() -> None:
    """S23: a changed keep-alive holds for the next load, unless the request names one."""
    pool = a_pool(each="1GiB")
    pool.feed(Configure(keep_alive_s=7.0))
    pool.idle("a").idle("b", keep_alive="9s")
    assert (expires_in(pool, "a"), expires_in(pool, "b")) == (7.0, 9.0)


def test_a_changed_keep_alive_holds_for_an_idle_runner_that_has_the_setting_since_it_rests() -> None:
    """A changed keep-alive counts from the last use of an idle runner, whether it is shorter or longer."""
    pool = a_pool().idle("a")
    pool.advance("100s")
    pool.feed(Configure(keep_alive_s=150.0))
    assert expires_in(pool, "a") == 50.0
    pool.feed(Configure(keep_alive_s=600.0))
    assert expires_in(pool, "a") == 500.0


def test_an_idle_runner_that_has_rested_longer_than_a_changed_keep_alive_goes_at_once() -> None:
    """An idle runner is stopped at once if its idle time exceeds the changed keep-alive, and 0 stops all of them."""
    pool = idle("a", "b")
    pool.advance("100s")
    pool.idle("c")
    assert pool.feed(Configure(keep_alive_s=60.0)) == [Stop(1), Stop(2)]
    assert pool.feed(Configure(keep_alive_s=0.0)) == [Stop(3)]


def test_a_keep_alive_may_become_infinite_and_finite_again() -> None:
    """A keep-alive may become infinite, and when it becomes finite again it counts from the last use."""
    pool = a_pool().idle("a")
    pool.feed(Configure(keep_alive_s=math.inf))
    assert expires_in(pool, "a") == math.inf
    pool.advance("100s")
    pool.feed(Configure(keep_alive_s=150.0))
    assert expires_in(pool, "a") == 50.0


def test_a_changed_keep_alive_leaves_alone_what_a_request_has_named() -> None:
    """A changed keep-alive leaves runners alone whose load, later request or preload named a keep-alive."""
    pool = a_pool(each="1GiB").idle("a", keep_alive="30s").idle("b")
    pool.feed(acquire("b", request=1, keep_alive="40s"), release(1))
    pool.feed(preload("c", request=2, keep_alive="50s"), loaded(3))
    pool.feed(Configure(keep_alive_s=7.0))
    assert [expires_in(pool, model) for model in "abc"] == [30.0, 40.0, 50.0]


def test_a_changed_keep_alive_holds_for_who_is_loading_or_busy_when_it_rests() -> None:
    """A changed keep-alive holds for loading and busy runners from the moment they become idle."""
    pool = a_pool(each="1GiB").loading("a", request=1).ready("b", lease=2)
    pool.feed(Configure(keep_alive_s=7.0), loaded(1), release(1), release(2))
    assert (expires_in(pool, "a"), expires_in(pool, "b")) == (7.0, 7.0)


def test_a_changed_keep_alive_starts_no_clock_of_a_pinned_runner() -> None:
    """A changed keep-alive holds for a pinned runner once it is unpinned."""
    pool = a_pool().idle("a")
    pool.feed(pin("a"))
    assert pool.feed(Configure(keep_alive_s=0.0)) == []
    assert expires_in(pool, "a") == math.inf
    pool.feed(Configure(keep_alive_s=7.0), unpin("a"))
    assert expires_in(pool, "a") == 7.0


def test_a_keep_alive_that_did_not_change_moves_no_clock() -> None:
    """A keep-alive that is set to its present value leaves the deadline of an unpinned runner as it is."""
    pool = a_pool().idle("a")
    pool.feed(pin("a"))
    pool.advance("100s")
    pool.feed(unpin("a"), Configure(keep_alive_s=300.0))
    assert expires_in(pool, "a") == 300.0


def test_a_runner_that_is_on_its_way_out_gets_no_clock() -> None:
    """A draining runner gets no keep-alive and is stopped after its last lease."""
    pool = a_pool().expiring("a", lease=1)
    assert pool.feed(Configure(keep_alive_s=7.0), release(1)) == [Stop(1)]
    assert pool.advance("1m") == []


def test_what_is_not_named_stays_as_it_was() -> None:
    """A change of one limit leaves the others as they were."""
    pool = a_pool(max_queue=7, max_runners=3, keep_alive_s=9.0)
    pool.feed(Configure(max_queue=8))
    limits = pool.core._state.config
    assert (limits.max_queue, limits.max_runners, limits.keep_alive_s) == (8, 3, 9.0)


def test_a_copy_has_limits_of_its_own() -> None:
    """A copy of the core has its own limits, runners with the default keep-alive, and overdrawn devices."""
    pool = a_pool(sizes={"a": "6GiB", "b": "1GiB"}).ready("a", lease=1).idle("b", keep_alive="9s")
    pool.feed(pin("b"))
    pool.capacities |= {HOST: amount("4GiB")}
    pool.feed(pool.sample())
    copy = pool.core.copy()
    copy.step(pool.now, Configure(keep_alive_s=7.0))
    check_state(copy)
    assert [view.keep_alive_s for view in copy.snapshot().runners] == [7.0, 9.0]
    assert [view.keep_alive_s for view in pool.core.snapshot().runners] == [300.0, 9.0]
    assert copy.step(pool.now, release(1)) == pool.feed(release(1)) == [Stop(1)]
    assert granted(pool.commands) == [1, 1001]


def test_a_closing_pool_takes_limits_without_a_word() -> None:
    """A closing core takes new limits and stops its runners as before."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(Close(30.0))
    assert pool.feed(Configure(1, 1, 1.0)) == []
    assert pool.feed(release(1), expire("a")) == [Stop(1)]
