"""Plans that the next Tick makes, for all events before it: what is due, and what is decided without a plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fsm.core import Core
from fsm.messages.commands import Finished, Grant, Launch, Reject, Stop
from fsm.messages.events import ClaimGranted, Tick
from fsm.messages.reasons import WaitFor
from fsm.messages.refusals import TimedOut
from fsm.planning.plan import Plan
from fsm.preview import Outcome, preview
from tests.support.pool import PoolUnderTest, a_pool, acquire, close, granted, launched, loaded, memory, release

TICK = Tick()


def a_later_pool(**how: Any) -> PoolUnderTest:
    """Return a pool of 8 GiB that leaves its plans to ticks."""
    return a_pool(capacity="8GiB", plans_later=True, **how)


def test_one_tick_plans_for_all_events_before_it() -> None:
    """However many requests have come, the next Tick makes one plan for them, and it is due at once."""
    pool = a_later_pool(sizes={"a": "2GiB", "b": "2GiB"})
    plans: list[Plan] = []
    pool.core.plans = plans
    assert pool.feed(acquire("a", request=1), acquire("b", request=2)) == []
    assert not plans and pool.core.plan_due and pool.core.deadline() == pool.now
    assert [type(command) for command in pool.feed(TICK)] == [Launch, Launch]
    assert sum(len(plan.launches) for plan in plans) == len(plans[0].launches) == 2
    assert not pool.core.plan_due and pool.core.deadline() > pool.now


def test_a_warm_request_is_granted_while_a_plan_is_due() -> None:
    """A loaded runner is granted at once, and the plan that is due finds it in use."""
    pool = a_later_pool()
    pool.feed(acquire("a", request=1), TICK, loaded(1), release(1), acquire("b", request=2))
    assert pool.core.plan_due
    assert pool.feed(acquire("a", request=3)) == [Grant(3, 1)]
    assert not any(isinstance(command, Stop) for command in pool.feed(TICK))


def test_a_rest_that_no_request_waits_for_leaves_no_plan_due() -> None:
    """Where no request waits there is nothing to plan for, and no thread is woken for it."""
    pool = a_later_pool()
    pool.feed(acquire("a", request=1), TICK, loaded(1))
    assert pool.feed(release(1)) == [] and not pool.core.plan_due


def test_a_request_that_does_not_wait_is_planned_at_once() -> None:
    """A request with a time limit of 0 has what is free in its own step; one for which nothing is free is refused."""
    pool = a_later_pool(sizes={"busy": "5GiB"})
    pool.feed(acquire("busy", request=1), TICK, loaded(1))
    assert pool.feed(replace(memory(2, cpu="2GiB"), timeout_s=0.0)) == [Grant(2, None)]
    pool.feed(replace(memory(3, cpu="5GiB"), timeout_s=0.0))
    (refused,) = pool.feed(TICK)
    assert isinstance(refused, Reject) and isinstance(refused.refusal, TimedOut)
    assert refused.refusal.waiting_for is not WaitFor.plan


def test_no_runner_is_evicted_for_a_request_whose_time_is_up() -> None:
    """A Tick refuses the requests whose time is up before it makes the plan that is due."""
    pool = a_later_pool(sizes={"a": "5GiB", "b": "5GiB"})
    pool.feed(acquire("a", request=1), TICK, loaded(1), release(1))
    pool.feed(acquire("b", request=2, timeout=0.5))
    pool.now += 1.0
    assert [type(command) for command in pool.feed(TICK)] == [Reject]


def test_a_claim_that_is_granted_before_the_plan_is_not_missed() -> None:
    """A claim whose time is up while the plan for its grant is due was granted in time."""
    pool = a_later_pool(claims=True, shares=False)
    pool.feed(acquire("a", request=1), TICK)
    (number,) = pool.claims
    pool.feed(ClaimGranted(number))
    pool.now += pool.core._state.config.claim_timeout_s
    assert launched(pool.feed(TICK)) == ["a"]
    assert not pool.core.failures()


@pytest.mark.parametrize("again", [Core.copy, lambda core: Core.restore(core.checkpoint())])
def test_a_copy_makes_the_plan_that_is_due(again: Any) -> None:
    """A plan that is due is part of the state: a copy of the core makes the same plan."""
    pool = a_later_pool()
    pool.feed(acquire("a", request=1))
    twin = again(pool.core)
    assert twin.step(pool.now, TICK) == pool.core.step(pool.now, TICK) != []


def test_a_preview_is_planned_at_once() -> None:
    """What would become of a request is told with the plan that is due, and with a plan for the request."""
    pool = a_later_pool(sizes={"a": "5GiB", "b": "5GiB"})
    pool.feed(acquire("a", request=1))
    found = pool.inspection("b", ()).outcome
    assert preview(pool.now, pool.core, acquire("b", request=2).spec, found).outcome is Outcome.waits
    assert pool.core.plan_due


def test_a_close_ends_a_scheduler_whose_plan_is_due() -> None:
    """A close refuses the requests that a plan was due for, and finishes without it."""
    pool = a_later_pool()
    pool.feed(acquire("a", request=1))
    refused, finished = pool.feed(close())
    assert isinstance(refused, Reject) and finished == Finished() and not pool.core.plan_due


def test_requests_are_served_in_their_order_whenever_the_plan_comes() -> None:
    """Requests that came before one plan have their turns by age, as if each had been planned by itself."""
    pool = a_later_pool(sizes={"a": "5GiB", "b": "5GiB"})
    pool.feed(acquire("a", request=1), acquire("b", request=2), TICK)
    assert [launch.model for launch in pool.launches.values()] == ["a"]
    assert granted(pool.feed(loaded(1))) == [1]
