"""The limit of leases of a runner: requests beyond it wait in the queue, by priority, and are told so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fsm.machine.runner import RunnerState
from fsm.messages.commands import Grant, Stop
from fsm.messages.events import Acquire, Configure
from fsm.messages.reasons import WaitFor
from fsm.messages.refusals import QueueFullRefusal, TimedOut
from tests.support.models import a_model
from tests.support.pool import (
    a_pool,
    acquire,
    cancel,
    exited,
    expire,
    granted,
    launched,
    loaded,
    preload,
    refused,
    release,
    stopped,
)


def named(most: int | None, model: str, request: int, **how: Any) -> Acquire:
    """Return a request that names a limit of leases for its model."""
    return replace(acquire(model, request, **how), max_leases=most)


def test_u42_no_limit_is_set_unless_asked_for() -> None:
    """Without a limit a warm runner takes any number of leases at once."""
    pool = a_pool().ready("a", lease=1)
    assert granted(pool.feed(*(acquire("a", request) for request in range(2, 42)))) == [*range(2, 42)]


@pytest.mark.parametrize("most", [1, 2, 5])
def test_u42_one_lease_more_than_may_be_waits_and_is_seen(most: int) -> None:
    """A request beyond the limit waits in the queue for a lease, and the next release grants it."""
    pool = a_pool(max_leases=most).ready("a", lease=1)
    assert granted(pool.feed(*(acquire("a", request) for request in range(2, 9)))) == [*range(2, most + 1)]
    assert pool.waiting() == [*range(most + 1, 9)]
    assert {pool.waits_for(request) for request in pool.waiting()} == {WaitFor.lease}
    assert pool.feed(release(1)) == [Grant(most + 1, pool.runner("a"))]
    assert pool.state("a") is RunnerState.ready


def test_u42_those_who_waited_for_a_load_are_granted_as_far_as_the_limit_goes() -> None:
    """After a load as many requests are granted as may be; the others wait for a lease, and not for another load."""
    pool = a_pool(max_leases=2).loading("a", 1)
    pool.feed(*(acquire("a", request) for request in (2, 3, 4)))
    assert granted(pool.feed(loaded(pool.runner("a")))) == [1, 2]
    assert [pool.waits_for(request) for request in (3, 4)] == [WaitFor.lease] * 2
    assert granted(pool.feed(release(2), release(1))) == [3, 4]


def test_u42_a_lease_is_granted_by_priority() -> None:
    """The request of the highest priority has the next lease, whatever came first."""
    pool = a_pool(max_leases=1).ready("a", lease=1)
    pool.feed(acquire("a", 2), acquire("a", 3, priority=2), acquire("a", 4, priority=1))
    assert [granted(pool.feed(release(held))) for held in (1, 3, 4)] == [[3], [4], [2]]


def test_u42_a_full_queue_refuses_at_once() -> None:
    """`max_queue` counts the requests that wait for a lease."""
    pool = a_pool(max_leases=1, max_queue=2).ready("a", lease=1)
    assert refused(pool.feed(*(acquire("a", request) for request in (2, 3, 4)))) == {4: QueueFullRefusal}


def test_u42_a_request_for_a_lease_times_out_and_may_leave() -> None:
    """A wait for a lease ends with the request's own time limit, or with its caller."""
    pool = a_pool(max_leases=1).ready("a", lease=1)
    pool.feed(acquire("a", 2, timeout="3s"), acquire("a", 3), cancel(3))
    assert refused(pool.advance("4s")) == {2: TimedOut}
    assert pool.refusal(2).waiting_for is WaitFor.lease
    assert pool.feed(release(1)) == []


def test_u42_a_preload_takes_no_lease() -> None:
    """A preload is answered although the runner holds as many leases as it may."""
    pool = a_pool(max_leases=1).ready("a", lease=1)
    assert granted(pool.feed(preload("a", 2))) == [2]


def test_u42_the_limit_that_was_named_last_holds_for_the_model() -> None:
    """A model's own limit holds for requests that name none, and instead of the limit for all models."""
    pool = a_pool(max_leases=3)
    pool.feed(named(1, "a", 1), loaded(1))
    assert granted(pool.feed(acquire("a", 2))) == []
    assert granted(pool.feed(named(2, "a", 3))) == [2]  # the limit rises, and the older request has the lease
    assert granted(pool.feed(named(0, "a", 4))) == [3, 4]  # 0: no limit
    assert granted(pool.feed(named(None, "a", 5))) == [5]
    assert granted(pool.feed(named(1, "a", 6))) == []


def test_u42_a_higher_limit_serves_those_who_wait() -> None:
    """A limit that is raised while running grants at once; a lower one ends no lease."""
    pool = a_pool(max_leases=1).ready("a", lease=1)
    pool.feed(acquire("a", 2), acquire("a", 3), acquire("a", 4))
    assert granted(pool.feed(Configure(max_leases=3))) == [2, 3]
    assert pool.feed(Configure(max_leases=1)) == []
    assert granted(pool.feed(release(1), release(2))) == []
    assert granted(pool.feed(release(3))) == [4]


def test_u42_requests_with_other_words_for_the_same_wait_too() -> None:
    """Requests for more than the model can have wait for a lease too, and are served in the order of the queue."""
    pool = a_pool(max_leases=1).declare("a", a_model(context_trained=8192)).ready("a", lease=1, num_ctx=8192)
    pool.feed(acquire("a", 2, num_ctx=10**6), acquire("a", 3, num_ctx=8192))
    assert [granted(pool.feed(release(held))) for held in (1, 2)] == [[2], [3]]


def test_u42_a_crash_does_not_lose_who_waits() -> None:
    """After a crash the model is loaded again for the requests that waited for a lease."""
    pool = a_pool(max_leases=1).ready("a", lease=1)
    pool.feed(acquire("a", 2))
    assert launched(pool.feed(exited(1, code=-11))) == ["a"]
    assert granted(pool.feed(loaded(2))) == [2]


def test_u42_a_model_that_is_expired_is_loaded_anew_for_those_who_wait() -> None:
    """A runner that its user has asked to leave takes no lease more; who waits is served by the next runner."""
    pool = a_pool(max_leases=1, each="2GiB").ready("a", lease=1)
    assert launched(pool.feed(acquire("a", 2), expire("a"))) == ["a"]
    assert granted(pool.feed(release(1), loaded(2))) == [2]


def test_u42_a_runner_without_a_keep_alive_serves_all_who_wait() -> None:
    """A runner that is not to rest is stopped after the last request that waits for it, and not reloaded between."""
    pool = a_pool(max_leases=1, keep_alive_s=0.0).ready("a", lease=1)
    pool.feed(acquire("a", 2), acquire("a", 3))
    assert [pool.feed(release(held)) for held in (1, 2)] == [[Grant(2, 1)], [Grant(3, 1)]]
    assert pool.feed(release(3)) == [Stop(1)]


# -- beside other models ----------------------------------------------------------------------------------------------


def test_u42_a_model_waits_no_longer_because_of_a_limit() -> None:
    """Requests that come later and wait for a lease do not keep a runner beyond the bound of an earlier request."""
    pool = a_pool(max_leases=1, max_wait_s=20.0, min_residency_s=0.0).ready("a", lease=1)
    pool.feed(acquire("b", 2))
    pool.advance("1s")
    pool.feed(acquire("a", 3), acquire("a", 4))
    pool.advance("20s")
    assert pool.state("a") is RunnerState.expiring
    assert granted(pool.feed(release(1), exited(1), loaded(2))) == [2]


def test_u42_a_runner_stays_for_those_who_asked_for_it_before() -> None:
    """A runner is not evicted for a request behind those that wait for its leases: they would have it loaded again."""
    pool = a_pool(max_leases=1, max_wait_s=20.0, min_residency_s=0.0).ready("a", lease=1)
    pool.feed(acquire("a", 2))
    pool.advance("1s")
    pool.feed(acquire("b", 3))
    pool.advance("30s")
    assert pool.state("a") is RunnerState.ready
    assert granted(pool.feed(release(1))) == [2]
    assert pool.state("a") is RunnerState.expiring  # the bound of the other model's request has passed
    assert stopped(pool.feed(release(2))) == [1]


def test_u42_another_load_of_the_model_waits_for_those_before() -> None:
    """A request for other options leaves the runner to the requests before it that wait for a lease."""
    pool = a_pool("64GiB", max_leases=1, max_wait_s=20.0, min_residency_s=0.0).declare("a", "1GiB")
    pool.ready("a", lease=1, num_ctx=2048)
    pool.feed(acquire("a", 2, num_ctx=2048))
    pool.advance("1s")
    pool.feed(acquire("a", 3, num_ctx=8192))
    pool.advance("30s")
    assert (pool.state("a"), granted(pool.feed(release(1)))) == (RunnerState.ready, [2])
