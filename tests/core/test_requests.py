"""Requests: asked, granted, released, refused, cancelled, timed out."""

from __future__ import annotations

import math

from fsm.machine.runner import RunnerState
from fsm.messages.commands import Grant, Launch, NotifyContention, Reject, Stop
from fsm.messages.reasons import ProcessExited, RunnerStep, WaitFor, WaitForRunners
from fsm.messages.refusals import (
    Cancelled,
    InvalidModelRefusal,
    ModelNotFoundRefusal,
    QueueFullRefusal,
    SchedulerClosed,
    TimedOut,
)
from tests.support.pool import (
    START,
    a_pool,
    acquire,
    cancel,
    close,
    exited,
    expire,
    granted,
    loaded,
    pin,
    preload,
    refused,
    release,
)

# -- asked and answered -----------------------------------------------------------------------------------------------


def test_s02_a_request_is_answered_once_with_a_runner() -> None:
    """S02: a cold request causes one launch and has one answer."""
    pool = a_pool()
    assert pool.feed(acquire("a", request=1)) == [pool.launch(1, "a")]
    assert pool.feed(loaded(1)) == [Grant(1, 1)]


def test_s02_a_request_is_answered_once_with_an_error() -> None:
    """S02: a load that fails refuses the request that waited for it, with the reason."""
    pool = a_pool().loading("a", request=1)
    assert refused(pool.feed(exited(1, code=1, reason="no such tensor"))) != {}
    assert pool.refusal(1).reason == ProcessExited(1, "no such tensor", loaded=False)


def test_s02_cancelling_after_the_grant_releases_the_runner() -> None:
    """S02: a cancel after the grant releases the lease, so that a lease without a caller cannot leak."""
    pool = a_pool().ready("a", lease=1)
    assert pool.feed(cancel(request=1)) == []
    assert pool.state("a") is RunnerState.idle


def test_s03_a_loaded_runner_is_granted_at_once() -> None:
    """S03, D04, rule 2: a warm request is granted in its own step, and its lease is added in that step."""
    pool = a_pool().idle("a")
    assert pool.feed(acquire("a", request=1)) == [Grant(1, 1)]
    assert pool.life("a").leases == {1}


def test_s03_warm_requests_pass_the_queue_and_its_limit() -> None:
    """S03: a warm request is granted although the queue is full."""
    pool = a_pool(max_queue=1).ready("a", lease=1)
    pool.feed(acquire("b", request=2))
    assert pool.feed(acquire("a", request=3)) == [Grant(3, 1), NotifyContention(1, (3,))]


def test_s04_a_full_queue_refuses_at_once() -> None:
    """S04: a request beyond the queue's limit is refused with the limit and a time to ask again."""
    pool = a_pool(max_queue=2).loading("a", request=1)
    pool.feed(acquire("b", request=2))
    assert refused(pool.feed(acquire("c", request=3))) == {3: QueueFullRefusal}
    assert pool.refusal(3).limit == 2
    assert pool.refusal(3).retry_after_s >= 1.0


def test_s04_a_place_in_the_queue_is_free_again_after_an_answer() -> None:
    """S04: the limit of the queue counts waiting requests, so that an answer makes room."""
    pool = a_pool(max_queue=1).ready("a", lease=1)
    pool.feed(expire("a"), acquire("b", request=2), release(1), exited(1), loaded(2))
    assert 3 not in refused(pool.feed(acquire("c", request=3)))


def test_whoever_waits_can_see_what_for() -> None:
    """A waiting request shows what it waits for: metadata, a load, a runner, memory or earlier requests."""
    pool = a_pool(inspects=False, samples=False)
    pool.feed(acquire("a", request=1))
    assert pool.waits_for(1) == WaitFor.metadata
    pool.feed(pool.inspection("a"))
    assert pool.waits_for(1) == WaitFor.load
    pool.inspects = True
    pool.feed(loaded(1), acquire("b", request=2), acquire("c", request=3))
    assert (pool.waits_for(2), pool.waits_for(3)) == (WaitForRunners(("a",), RunnerStep.idle), WaitFor.earlier_requests)
    pool.feed(release(1), exited(1))
    assert pool.waits_for(2) == WaitFor.memory


def test_s05_a_request_cancelled_while_queued_is_answered_at_once() -> None:
    """S05: a cancelled request is answered at once and leaves the queue in the same step."""
    pool = a_pool(max_queue=1).ready("a", lease=1)
    pool.feed(acquire("b", request=2))
    assert pool.feed(cancel(request=2)) == [Reject(2, Cancelled("b"))]
    assert refused(pool.feed(acquire("c", request=3))) == {}
    assert pool.waiting() == [3]


def test_s06_a_model_has_one_runner_for_all_who_ask() -> None:
    """S06: requests that arrive while a model loads wait for that load and are granted together, in order."""
    pool = a_pool().loading("a", request=1)
    assert pool.feed(acquire("a", request=2), acquire("a", request=3)) == []
    assert pool.feed(loaded(1)) == [Grant(1, 1), Grant(2, 1), Grant(3, 1)]


def test_s06_those_who_want_the_same_in_different_ways_share_one_load() -> None:
    """S06: a lease, a preload and a request of another priority for one model share one launch."""
    pool = a_pool(capacity="32GiB", inspects=False)
    pool.feed(acquire("a", request=1), preload("a", request=2), acquire("a", request=3, priority=5))
    assert pool.feed(pool.inspection("a")) == [pool.launch(1, "a")]
    assert sorted(granted(pool.feed(loaded(1)))) == [1, 2, 3]


def test_s06_pending_requests_are_served_first_come_first_served() -> None:
    """S06: of two waiting requests, the older is launched first."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(acquire("b", request=2), acquire("c", request=3), expire("a"), release(1))
    assert pool.feed(exited(1)) == [pool.launch(2, "b")]
    assert pool.waiting() == [2, 3]


def test_s11_a_file_that_is_missing_is_its_requesters_error() -> None:
    """S11: metadata is read before anything is evicted or launched, and a missing file refuses the request."""
    pool = a_pool().idle("a").declare("b", ModelNotFoundRefusal("/models/b"))
    assert pool.feed(acquire("b", request=1)) == [Reject(1, ModelNotFoundRefusal("/models/b"))]
    assert pool.state("a") is RunnerState.idle


def test_s11_a_file_that_went_bad_refuses_only_those_who_need_it() -> None:
    """S11: a bad file refuses the next request, and a draining runner of the model ends in order."""
    pool = a_pool().expiring("a", lease=1).declare("a", InvalidModelRefusal("a", "cut short", 40))
    assert pool.feed(acquire("a", request=2)) == [Reject(2, InvalidModelRefusal("a", "cut short", 40))]
    assert pool.feed(release(1)) == [Stop(1)]
    pool.feed(exited(1))
    assert pool.state("a") is RunnerState.unloaded


def test_s11_a_file_that_went_bad_leaves_those_alone_whose_load_is_under_way() -> None:
    """S11: a bad file refuses a request that needs another load, and a load under way goes on."""
    pool = a_pool().loading("a", request=1).declare("a", InvalidModelRefusal("a", "cut short"))
    assert refused(pool.feed(acquire("a", request=2, num_thread=3))) == {2: InvalidModelRefusal}
    assert pool.feed(loaded(1)) == [Grant(1, 1)]


def test_s11_a_file_that_is_bad_does_not_lose_its_pin() -> None:
    """S11: a pin of a model with a bad file holds once the file is good."""
    pool = a_pool().declare("a", InvalidModelRefusal("a", "cut short"))
    pool.feed(pin("a"), acquire("a", request=1))
    pool.declare("a", "1GiB").idle("a")
    assert pool.core.snapshot().runners[0].pinned


def test_s11_a_model_is_read_again_before_each_load() -> None:
    """S11: metadata is read before each load, because the file may have changed."""
    pool = a_pool(inspects=False)
    for request in (1, 2):
        assert [type(command).__name__ for command in pool.feed(acquire("a", request))] == ["Inspect"]
        pool.feed(pool.inspection("a"), cancel(request), *([loaded(request)] if request == 2 else []))
        pool.feed(expire("a"))
        pool.settle()


def test_a_model_that_was_read_for_a_request_that_left_is_read_again() -> None:
    """Metadata that was read for a request that left is read again for the next request."""
    pool = a_pool().ready("a", lease=1)
    pool.inspects = False
    pool.feed(acquire("b", request=2), pool.inspection("b"), cancel(2))
    assert [type(command).__name__ for command in pool.feed(acquire("b", request=3))] == ["Inspect"]


# -- keep-alive -------------------------------------------------------------------------------------------------------


def test_s17_a_grant_stops_the_keep_alive_clock() -> None:
    """S17: a busy runner does not expire by its keep-alive."""
    pool = a_pool().idle("a", keep_alive="5m")
    pool.advance("299s")
    pool.feed(acquire("a", request=1))
    assert pool.advance("1h") == []
    assert pool.state("a") is RunnerState.ready


def test_s17_a_grant_overrides_the_keep_alive_if_it_names_one() -> None:
    """S17: the last request that names a keep-alive decides it."""
    pool = a_pool().idle("a", keep_alive="5m")
    pool.feed(acquire("a", request=1, keep_alive="10s"), acquire("a", request=2), release(1), release(2))
    assert pool.advance("9s") == []
    assert pool.advance("1s") == [Stop(1)]


def test_s17_a_grant_that_names_no_keep_alive_leaves_the_runners() -> None:
    """S17: a request without a keep-alive leaves the runner's keep-alive as it is."""
    pool = a_pool(keep_alive_s=300.0).idle("a", keep_alive="1h")
    pool.feed(acquire("a", request=1), release(1))
    assert pool.core.snapshot().runners[0].expires_at == pool.now + 3600.0


def test_s18_the_last_release_starts_the_clock_anew() -> None:
    """S18: the keep-alive starts with the last release, and not with an earlier one."""
    pool = a_pool().ready("a", lease=1).ready("a", lease=2)
    pool.feed(release(1))
    assert pool.core.snapshot().runners[0].expires_at == math.inf
    pool.advance("10s")
    pool.feed(release(2))
    assert pool.core.snapshot().runners[0].expires_at == START + 10.0 + 300.0


def test_s18_a_keep_alive_of_0_unloads_at_the_last_release() -> None:
    """S18: a runner with a keep-alive of 0 is stopped in the step of its last release."""
    pool = a_pool().ready("a", lease=1, keep_alive=0).ready("a", lease=2)
    assert pool.feed(release(1)) == []
    assert pool.feed(release(2)) == [Stop(1)]


def test_s23_the_keep_alive_is_the_requests_else_the_setting() -> None:
    """S23: the keep-alive is the request's, or else the setting's five minutes."""
    pool = a_pool(capacity="16GiB").idle("a").idle("b", keep_alive="1m")
    assert [view.expires_at - pool.now for view in pool.core.snapshot().runners] == [300.0, 60.0]


def test_d14_a_keep_alive_for_ever_never_runs_out() -> None:
    """D14, S23: an infinite keep-alive never ends."""
    pool = a_pool().idle("a", keep_alive="forever")
    assert pool.advance("10000h") == []
    assert pool.state("a") is RunnerState.idle


def test_d03_a_renewal_beats_an_expiry_that_was_under_way() -> None:
    """D03: a renewed keep-alive replaces the one that was about to end."""
    pool = a_pool().idle("a", keep_alive="10s")
    pool.advance("9.999s")
    pool.feed(acquire("a", request=1, keep_alive="1h"), release(1))
    assert pool.advance("59m") == []
    assert pool.state("a") is RunnerState.idle


def test_s19_an_expiry_in_use_is_never_polled_for() -> None:
    """S19: a draining runner has no deadline and is stopped with its last release."""
    pool = a_pool().expiring("a", lease=1)
    pool.advance("5m")  # a timer that was set before may come up once more
    assert pool.core.deadline() == math.inf
    assert pool.feed(release(1)) == [Stop(1)]


def test_s20_an_expiry_happens_once() -> None:
    """S20: a runner that has expired is not expired again, by its keep-alive or by an event."""
    pool = a_pool().idle("a", keep_alive="10s")
    assert pool.advance("10s") == [Stop(1)]
    assert pool.feed(expire("a")) == []
    assert pool.core.late == 1


# -- preloads ---------------------------------------------------------------------------------------------------------


def test_a_preload_loads_and_leaves_the_model_idle() -> None:
    """A preload is answered when its model is loaded and idle, and has no lease to release."""
    pool = a_pool()
    pool.feed(preload("a", request=1))
    assert pool.feed(loaded(1)) == [Grant(1, 1)]
    assert pool.state("a") is RunnerState.idle
    pool.feed(release(1))
    assert pool.core.late == 1


def test_a_preload_of_a_loaded_model_renews_its_keep_alive() -> None:
    """A preload of a loaded model is answered at once and renews its keep-alive."""
    pool = a_pool().idle("a", keep_alive="10s")
    pool.advance("9s")
    assert pool.feed(preload("a", request=1, keep_alive="1m")) == [Grant(1, 1)]
    assert pool.advance("59s") == []
    assert pool.advance("1s") == [Stop(1)]


def test_a_preload_does_not_end_the_use_of_a_ready_model() -> None:
    """A preload's keep-alive holds for a busy runner from its last release on."""
    pool = a_pool().ready("a", lease=1)
    assert pool.feed(preload("a", request=2, keep_alive=0)) == [Grant(2, 1)]
    assert pool.feed(release(1)) == [Stop(1)]


# -- leases and runners -----------------------------------------------------------------------------------------------


def test_d05_a_late_release_of_an_earlier_life_changes_nothing() -> None:
    """D05: a late release of an earlier runner's lease leaves the next runner's leases."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(exited(1, code=-9))
    pool.ready("a", lease=2)
    assert pool.feed(release(1)) == []
    assert (pool.core.late, pool.life("a").leases) == (1, {2})


def test_releasing_twice_is_harmless() -> None:
    """Rule 3: a second release of a lease is late and takes no other lease."""
    pool = a_pool().ready("a", lease=1).ready("a", lease=2)
    pool.feed(release(1), release(1))
    assert (pool.core.late, pool.life("a").leases) == (1, {2})


def test_a_release_of_what_was_never_granted_is_late() -> None:
    """A release of a request that waits is late, because only a cancel ends it."""
    pool = a_pool().loading("a", request=1)
    assert pool.feed(release(1)) == []
    assert (pool.core.late, pool.waiting()) == (1, [1])


def test_a_cancel_after_the_answer_is_late() -> None:
    """A cancel after the answer and the release is late."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(release(1), cancel(1))
    assert pool.core.late == 1


def test_d11_a_late_event_of_one_life_leaves_the_next_alone() -> None:
    """D11: late events of an earlier runner leave the next runner alone, because ids are never used again."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(exited(1, code=-9))
    pool.ready("a", lease=2)
    assert pool.runner("a") == 2
    assert pool.feed(exited(1, code=-9), loaded(1)) == []
    assert (pool.core.late, pool.state("a")) == (2, RunnerState.ready)


def test_a_request_id_that_is_known_already_is_late() -> None:
    """A request with an id that is waiting or granted is late."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(acquire("b", request=1), acquire("b", request=2), acquire("b", request=2))
    assert (pool.core.late, pool.waiting()) == (2, [2])


def test_a_duplicate_request_is_not_answered_again_by_a_closing_pool() -> None:
    """A duplicate of a granted request is not answered by a closing core."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(close())
    assert pool.feed(acquire("a", request=1)) == []
    assert refused(pool.feed(acquire("a", request=2))) == {2: SchedulerClosed}


def test_d07_a_queue_of_one_place_or_none_never_blocks() -> None:
    """D07: a queue with one place or none refuses further requests at once."""
    for places in (0, 1):
        pool = a_pool(max_queue=places)
        commands = pool.feed(*(acquire("a", request) for request in (1, 2, 3)))
        assert list(refused(commands)) == [1, 2, 3][places:]


# -- time limits ------------------------------------------------------------------------------------------------------


def test_a_request_times_out_by_its_own_limit() -> None:
    """A request times out by its own limit, with how long it waited and for what."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(acquire("b", request=2, timeout="10s"))
    assert pool.advance("9s") == []
    assert pool.advance("1s") == [Reject(2, TimedOut("b", 10.0, WaitForRunners(("a",), RunnerStep.drain)))]
    assert pool.waiting() == []


def test_a_request_that_was_granted_in_time_does_not_time_out() -> None:
    """A request's time limit counts until its grant."""
    pool = a_pool().loading("a", request=1, timeout="10s")
    pool.feed(loaded(1))
    assert pool.advance("1h") == []


def test_the_load_goes_on_when_its_only_waiter_times_out() -> None:
    """Rule 4: a load goes on when its only request times out, and the next request is served by it."""
    pool = a_pool().loading("a", request=1, timeout="10s")
    pool.advance("10s")
    pool.feed(acquire("a", request=2))
    assert pool.feed(loaded(1)) == [Grant(2, 1)]


def test_an_expired_model_starts_a_new_life_for_the_next_request() -> None:
    """S29, rule 1: an expired runner is never used again, and the next request gets a new runner with a new id."""
    pool = a_pool(capacity="16GiB").expiring("a", lease=1)
    assert [type(command) for command in pool.feed(acquire("a", request=2))] == [Launch]
    assert pool.feed(loaded(2)) == [Grant(2, 2)]
    assert pool.feed(release(1)) == [Stop(1)]
