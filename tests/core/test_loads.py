"""Loads that succeed, fail, stall, run out of memory or are no longer needed, and the back-off after failures."""

from __future__ import annotations

import pytest

from fsm.domain.options import Options
from fsm.machine.runner import RunnerState
from fsm.messages.commands import Command, Grant, Reject, Stop
from fsm.messages.events import Progress
from fsm.messages.reasons import NoAnswer, ProcessExited
from fsm.messages.refusals import LoadFailedRefusal, LoadTimeoutRefusal, ModelNotFoundRefusal
from tests.support.models import a_model
from tests.support.pool import (
    PoolUnderTest,
    a_pool,
    acquire,
    cancel,
    exited,
    expire,
    granted,
    launched,
    loaded,
    out_of_memory,
    pin,
    preload,
    progress,
    refused,
    release,
    stopped,
    unresponsive,
)

# -- a load belongs to its model --------------------------------------------------------------------------------------


def test_s28_a_loading_runner_is_listed_before_it_is_ready() -> None:
    """S28: a runner is listed as loading from its launch on, and as ready with its first lease."""
    pool = a_pool().loading("a", request=1)
    assert [view.state for view in pool.core.snapshot().runners] == [RunnerState.loading]
    pool.feed(loaded(1))
    assert [view.state for view in pool.core.snapshot().runners] == [RunnerState.ready]


def test_a_load_that_nobody_waits_for_goes_on_and_rests_idle() -> None:
    """Rule 4: a load goes on when its only request leaves, because it belongs to the model."""
    pool = a_pool().loading("a", request=1)
    assert stopped(pool.feed(cancel(1))) == []
    pool.feed(loaded(1))
    assert pool.state("a") is RunnerState.idle


def test_a_load_with_a_keep_alive_of_0_that_nobody_waits_for_is_aborted() -> None:
    """Rule 4: a load with a keep-alive of 0 is aborted when its only request leaves."""
    pool = a_pool().loading("a", request=1, keep_alive=0)
    assert stopped(pool.feed(cancel(1))) == [1]


def test_a_load_keeps_the_keep_alive_of_who_began_it() -> None:
    """Rule 4: a load keeps the keep-alive of the request that began it, although that request has left."""
    pool = a_pool().loading("a", request=1, keep_alive="10s")
    pool.feed(cancel(1), loaded(1))
    assert stopped(pool.advance("9s")) == []
    assert stopped(pool.advance("1s")) == [1]


def test_a_load_that_was_begun_with_a_keep_alive_of_0_is_aborted_whoever_leaves_last() -> None:
    """Rule 4: a later request without a keep-alive does not change the keep-alive of 0 that a load began with."""
    pool = a_pool().loading("a", request=1, keep_alive=0)
    pool.feed(acquire("a", request=2), cancel(1))
    assert stopped(pool.feed(cancel(2))) == [1]


def test_a_load_is_aborted_only_when_the_last_waiter_has_left() -> None:
    """Rule 4: a load with a keep-alive of 0 goes on while any request waits for it."""
    pool = a_pool().loading("a", request=1, keep_alive=0)
    pool.feed(acquire("a", request=2))
    assert stopped(pool.feed(cancel(1))) == []
    assert granted(pool.feed(loaded(1))) == [2]


def test_s24_s28_one_load_serves_all_who_came_meanwhile() -> None:
    """S24, S28: one load of a model serves all requests that arrived meanwhile."""
    pool = a_pool(each="1GiB").loading("a", request=1)
    assert launched(pool.feed(*(acquire("a", request) for request in range(2, 50)))) == []
    assert granted(pool.feed(loaded(1))) == list(range(1, 50))


def test_d06_a_load_holds_nobody_else_up() -> None:
    """D06: while a model loads, other requests are granted and cancelled and other models are expired and loaded."""
    pool = a_pool(each="1GiB", max_runners=9).idle("a").idle("b").loading("c", request=1)
    assert pool.feed(acquire("a", request=2)) == [Grant(2, 1)]
    assert stopped(pool.feed(expire("b"))) == [2]
    assert launched(pool.feed(acquire("d", request=3))) == ["d"]
    assert refused(pool.feed(cancel(3))).keys() == {3}


def test_s32_expiring_a_load_serves_its_waiters_first() -> None:
    """S32: an expired load serves the requests that wait for it, and its runner is stopped after the last release."""
    pool = a_pool().loading("a", request=1)
    assert pool.feed(expire("a")) == []
    assert pool.feed(loaded(1)) == [Grant(1, 1)]
    assert pool.feed(release(1)) == [Stop(1)]


def test_s32_expiring_a_load_that_nobody_waits_for_stops_it() -> None:
    """S32: an expired load is stopped at once where no request waits for it."""
    pool = a_pool().loading("a", request=1)
    pool.feed(cancel(1))
    assert pool.feed(expire("a")) == [Stop(1)]


def test_s32_a_load_that_was_to_expire_stops_when_its_last_waiter_leaves() -> None:
    """S32: an expired load is stopped when the last request that waits for it leaves."""
    pool = a_pool().loading("a", request=1)
    pool.feed(expire("a"))
    assert stopped(pool.feed(cancel(1))) == [1]


def test_s32_an_idle_model_expires_at_once_and_a_busy_one_drains() -> None:
    """S32: expire by name stops an idle runner at once and drains a busy one, whatever its keep-alive."""
    pool = a_pool(each="1GiB").idle("a", keep_alive="forever").ready("b", lease=1)
    assert pool.feed(expire("a"), expire("b")) == [Stop(1)]
    assert pool.feed(release(1)) == [Stop(2)]


def test_s32_expiring_an_unknown_model_is_a_no_op() -> None:
    """S32: an expire of an unknown model is counted as late and does nothing."""
    pool = a_pool()
    assert pool.feed(expire("unknown")) == []
    assert pool.core.late == 1


def test_a_loaded_event_of_a_load_that_was_cancelled_is_late() -> None:
    """A Loaded of a load that is being stopped is late."""
    pool = a_pool().loading("a", request=1, keep_alive=0)
    pool.feed(cancel(1), loaded(1))
    assert (pool.core.late, pool.state("a")) == (1, RunnerState.expiring)


def test_d08_a_load_after_an_eviction_that_fails_leaves_nothing_taken() -> None:
    """D08: a load that fails after an eviction leaves no load slot, memory or options behind."""
    pool = a_pool(max_host_loads=1).idle("a")
    pool.feed(acquire("b", request=1, num_thread=2), exited(1), exited(2, code=1, reason="broken"))
    assert refused(pool.commands) == {1: LoadFailedRefusal}
    pool.ready("c", lease=2)
    pool.feed(release(2))
    pool.advance("10s")
    pool.feed(acquire("b", request=3, num_thread=5), exited(3))
    assert pool.launches[4].options.num_thread == 5
    assert granted(pool.feed(loaded(4))) == [3]


# -- loads that fail --------------------------------------------------------------------------------------------------


def test_a_load_that_fails_is_the_answer_of_all_who_wait_for_it() -> None:
    """A load that fails refuses every request that waits for it, with the reason and the back-off."""
    pool = a_pool().loading("a", request=1)
    pool.feed(acquire("a", request=2))
    failure = LoadFailedRefusal("a", ProcessExited(1, "no such tensor", loaded=False), 10.0)
    assert pool.feed(exited(1, code=1, reason="no such tensor")) == [Reject(1, failure), Reject(2, failure)]


def test_a_model_that_is_backed_off_refuses_at_once() -> None:
    """Rule 8: a request for a model in back-off is refused with the failure and the seconds that are left."""
    pool = a_pool().loading("a", request=1)
    pool.feed(exited(1, code=1, reason="no such tensor"))
    pool.advance("4s")
    failure = ProcessExited(1, "no such tensor", loaded=False)
    assert pool.feed(acquire("a", request=2)) == [Reject(2, LoadFailedRefusal("a", failure, 6.0))]
    pool.advance("6s")
    assert launched(pool.feed(acquire("a", request=3))) == ["a"]


def test_the_back_off_doubles_up_to_its_limit() -> None:
    """The back-off is 10 s, 20 s, 40 s and so on, and 300 s at most."""
    pool, waits = a_pool(), []
    for request in range(1, 9):
        pool.loading("a", request).feed(exited(request, code=1))
        waits.append(pool.refusal(request).retry_after_s)
        pool.advance(waits[-1])
    assert waits == [10.0, 20.0, 40.0, 80.0, 160.0, 300.0, 300.0, 300.0]


def test_the_back_off_begins_anew_after_a_good_life() -> None:
    """A runner that served and ended in order resets the back-off."""
    pool = a_pool()
    pool.loading("a", request=1).feed(exited(1, code=1))
    pool.advance("10s")
    pool.idle("a").feed(expire("a"), exited(2))
    pool.loading("a", request=2).feed(exited(3, code=1))
    assert pool.refusal(2).retry_after_s == 10.0


def test_one_models_failures_are_not_anothers() -> None:
    """A failed load puts only its own model into back-off."""
    pool = a_pool().loading("a", request=1)
    pool.feed(exited(1, code=1))
    assert launched(pool.feed(acquire("b", request=2))) == ["b"]


def test_a_failed_load_refuses_those_with_other_options_too() -> None:
    """A failed load refuses requests for its model with other options too."""
    pool = a_pool().loading("a", request=1)
    pool.feed(acquire("a", request=2, num_thread=3))
    assert refused(pool.feed(exited(1, code=1))) == {1: LoadFailedRefusal, 2: LoadFailedRefusal}


def test_a_load_that_shows_no_progress_is_stopped() -> None:
    """N12: a load without progress is stopped after the load timeout, and its requests are refused with that time."""
    pool = a_pool(load_timeout_s=300.0).loading("a", request=1)
    assert pool.advance("299s") == []
    assert pool.advance("1s") == [Reject(1, LoadTimeoutRefusal("a", 300.0)), Stop(1)]
    assert launched(pool.feed(exited(1, code=-9), acquire("a", request=2))) == []


def test_a_load_that_shows_progress_may_take_long() -> None:
    """N12: a load that reports progress may take longer than the load timeout."""
    pool = a_pool(load_timeout_s=300.0).loading("a", request=1)
    for _ in range(10):
        assert pool.advance("299s") == []
        pool.feed(progress(1))
    assert granted(pool.feed(loaded(1))) == [1]


def test_a_load_that_grows_shows_progress() -> None:
    """N12: memory that grows counts as progress of a load."""
    pool = a_pool(load_timeout_s=300.0).loading("a", request=1)
    for size in range(1, 6):
        pool.advance("299s")
        pool.occupied[1] = {"cpu": size}
        pool.feed(pool.sample())
    pool.advance("200s")
    pool.feed(pool.sample())  # no new growth
    assert refused(pool.advance("99s")) == {}
    assert refused(pool.advance("1s")) == {1: LoadTimeoutRefusal}


def test_a_load_whose_memory_goes_up_and_down_shows_no_progress() -> None:
    """N12: memory that shrinks and grows again without a new peak is no progress."""
    pool = a_pool(load_timeout_s=300.0).loading("a", request=1)
    for size in (9, 5, 8):
        pool.advance("99s")
        pool.occupied[1] = {"cpu": size}
        pool.feed(pool.sample())
    assert refused(pool.advance("101s")) == {}
    assert refused(pool.advance("1s")) == {1: LoadTimeoutRefusal}


def test_a_load_that_answers_no_probe_has_failed() -> None:
    """A load that answers no probe has failed: its requests are refused and it is stopped."""
    pool = a_pool().loading("a", request=1)
    commands = pool.feed(unresponsive(1))
    assert (refused(commands), stopped(commands)) == ({1: LoadFailedRefusal}, [1])


def test_the_load_of_a_preload_that_fails_is_its_answer() -> None:
    """A preload whose load fails is refused."""
    pool = a_pool()
    pool.feed(preload("a", request=1))
    assert refused(pool.feed(exited(1, code=1))) == {1: LoadFailedRefusal}


def test_the_last_moment_of_a_back_off_is_told_as_it_is() -> None:
    """A request at the end of a back-off is told the half second that is left."""
    pool = a_pool().loading("a")
    pool.feed(exited(pool.runner("a"), 1, "no such layer"))
    pool.advance("9.5s")
    pool.feed(acquire("a", request=7))
    refusal = pool.refusal(7)
    assert isinstance(refusal, LoadFailedRefusal) and refusal.retry_after_s == pytest.approx(0.5)


def test_a_model_that_failed_is_remembered_although_its_file_is_gone() -> None:
    """A model whose file has gone keeps its failures, although nothing was measured of it."""
    pool = a_pool().loading("a")
    pool.feed(exited(pool.runner("a"), 1, "no such layer"), pool.sample())
    pool.advance("11s")
    pool.declare("a", ModelNotFoundRefusal("a"))
    pool.feed(acquire("a", request=7))
    assert isinstance(pool.refusal(7), ModelNotFoundRefusal)
    assert pool.core._state.models["a"].failures == 1


def test_a_load_that_hangs_is_told_with_its_reason() -> None:
    """A load that answers no probe refuses its requests with that reason."""
    pool = a_pool().loading("a", request=1)
    pool.feed(unresponsive(1))
    refusal = pool.refusal(1)
    assert isinstance(refusal, LoadFailedRefusal) and refusal.reason == NoAnswer(10.0)


# -- out of memory ----------------------------------------------------------------------------------------------------


def fails_for_memory(pool: PoolUnderTest, runner: int) -> list[Command]:
    """End a load for lack of memory."""
    return pool.feed(out_of_memory(runner), exited(runner, code=-9, reason="out of memory"))


def test_n07_a_request_survives_one_load_that_ran_out_of_memory() -> None:
    """N07: after a lack of memory a request is loaded once more, when everything else has been evicted."""
    pool = a_pool(each="2GiB").idle("a").loading("b", request=1)
    commands = fails_for_memory(pool, 2)
    assert (refused(commands), stopped(commands)) == ({}, [1])
    assert launched(pool.feed(exited(1))) == ["b"]
    assert granted(pool.feed(loaded(3))) == [1]


def test_n07_it_never_survives_two() -> None:
    """N07: a request whose second load ran out of memory is refused, and the refusal says that it was memory."""
    pool = a_pool(each="2GiB").loading("a", request=1)
    fails_for_memory(pool, 1)
    fails_for_memory(pool, 2)
    failure = ProcessExited(-9, "out of memory", loaded=False)
    assert pool.refusal(1) == LoadFailedRefusal("a", failure, 10.0, out_of_memory=True)


def test_n07_an_automatic_context_is_stepped_down_before_others_have_to_go() -> None:
    """N07: an automatic context is lowered to 32768 and to 4096, before other runners are evicted."""
    pool = (
        a_pool(defaults=Options(num_ctx=65536))
        .declare("a", a_model(context_trained=131072))
        .declare("b", "1GiB")
        .idle("b")
    )
    pool.loading("a", request=1)
    assert pool.launches[2].options.num_ctx == 65536
    assert (stopped(fails_for_memory(pool, 2)), pool.launches[3].options.num_ctx) == ([], 32768)
    pool.feed(acquire("a", request=2))
    assert refused(fails_for_memory(pool, 3)) == {1: LoadFailedRefusal}
    assert pool.launches[4].options.num_ctx == 4096
    pool.feed(loaded(4), release(2), expire("a"), exited(4))
    pool.loading("a", request=3)
    assert pool.launches[5].options.num_ctx == 65536


def test_n07_a_context_that_was_named_stays() -> None:
    """N07: a context that a request names is kept, and other runners are evicted for the second try."""
    pool = (
        a_pool(defaults=Options(num_ctx=65536))
        .declare("a", a_model(context_trained=131072))
        .declare("b", "1GiB")
        .idle("b")
    )
    pool.loading("a", request=1, num_ctx=65536)
    assert stopped(fails_for_memory(pool, 2)) == [1]
    pool.feed(exited(1))
    assert pool.launches[3].options.num_ctx == 65536


def test_n07_any_other_failure_is_the_answer_at_once() -> None:
    """N07: a second try that fails for another reason refuses the request."""
    pool = a_pool(each="2GiB").loading("a", request=1)
    fails_for_memory(pool, 1)
    assert refused(pool.feed(exited(2, code=1))) == {1: LoadFailedRefusal}


def test_n07_after_the_answer_nobody_has_to_make_way_any_more() -> None:
    """N07: after the refusal, the next request for the model evicts no other runners."""
    pool = a_pool(each="2GiB").loading("a", request=1)
    fails_for_memory(pool, 1)
    fails_for_memory(pool, 2)
    pool.idle("b")
    pool.advance("10s")
    commands = pool.feed(acquire("a", request=2))
    assert (stopped(commands), launched(commands)) == ([], ["a"])


def test_n07_those_with_other_options_wait_on() -> None:
    """N07: requests with other options wait on when a load runs out of memory."""
    pool = a_pool(each="2GiB").loading("a", request=1)
    pool.feed(acquire("a", request=2, num_thread=3))
    assert refused(fails_for_memory(pool, 1)) == {}
    assert pool.waiting() == [1, 2]


def test_n07_the_exit_alone_tells_of_the_lack_of_memory() -> None:
    """N07: an exit alone may report the lack of memory, because a killed process reports nothing before."""
    pool = a_pool(each="2GiB").loading("a", request=1)
    assert launched(pool.feed(exited(1, code=-9, out_of_memory=True))) == ["a"]


def test_n07_each_request_survives_one_and_is_answered_with_the_reason() -> None:
    """N07: a request that joined the second try survives it, and the first request is refused with the reason."""
    pool = a_pool(each="2GiB").loading("a", request=1)
    fails_for_memory(pool, 1)
    pool.feed(acquire("a", request=2))
    commands = fails_for_memory(pool, 2)
    assert (refused(commands), launched(commands)) == ({1: LoadFailedRefusal}, ["a"])
    assert pool.refusal(1).reason == ProcessExited(-9, "out of memory", loaded=False)
    assert granted(pool.feed(loaded(3))) == [2]


def test_n07_the_second_try_waits_until_everything_else_is_gone() -> None:
    """N07: the second try waits until all other runners have gone, because it would run out of memory beside them."""
    pool = a_pool(each="2GiB").ready("a", lease=1).idle("b").loading("c", request=2)
    assert stopped(fails_for_memory(pool, 3)) == []  # a busy runner drains at the bound and no sooner
    commands = pool.feed(release(1))
    assert (sorted(stopped(commands)), launched(commands)) == ([1, 2], [])
    assert launched(pool.feed(exited(1))) == []
    assert launched(pool.feed(exited(2))) == ["c"]


def test_n07_pins_stay_for_the_second_try_too() -> None:
    """N07: pinned runners are not evicted for the second try."""
    pool = a_pool(each="2GiB").idle("a").idle("b").loading("c", request=1)
    pool.feed(pin("a"))
    assert stopped(fails_for_memory(pool, 3)) == [2]
    assert launched(pool.feed(exited(2))) == ["c"]


def test_n08_running_out_of_memory_while_serving_expires_every_runner() -> None:
    """N08: a runner that runs out of memory while it serves expires all: idle ones stop, busy ones drain."""
    pool = a_pool(each="2GiB").ready("a", lease=1).idle("b")
    assert pool.feed(out_of_memory(1)) == [Stop(2)]
    assert pool.feed(release(1)) == [Stop(1)]


def test_n08_an_end_for_lack_of_memory_while_serving_expires_every_runner() -> None:
    """N08: an exit for lack of memory while serving expires every runner too."""
    pool = a_pool(each="2GiB").ready("a", lease=1).idle("b").ready("c", lease=3)
    assert stopped(pool.feed(exited(1, code=-6, reason="out of memory", out_of_memory=True))) == [2]
    assert stopped(pool.feed(release(3))) == [3]


def test_a_model_that_always_runs_out_of_memory_is_backed_off_although_others_ask_for_it_meanwhile() -> None:
    """Rule 8: a model that always runs out of memory is in back-off, although new requests for it keep arriving."""
    pool = a_pool(each="1GiB", max_wait_s=0, min_residency_s=0, idle_grace_part=0).loading("bad", request=1)
    for request in range(2, 10):
        pool.feed(preload("b", 100 + request))  # it begins when no load needs to be alone
        if pool.state("b") is RunnerState.loading:
            pool.feed(loaded(pool.runner("b")))
        pool.settle()
        if Reject in map(type, pool.feed(acquire("bad", request))):
            break
        pool.feed(exited(pool.runner("bad"), out_of_memory=True))
        pool.settle()
    assert pool.refusal(request).retry_after_s > 0
    assert len([launch for launch in pool.launches.values() if launch.model == "bad"]) == 3


def test_n07_others_are_out_of_the_way_for_those_who_survived_and_for_nobody_after_them() -> None:
    """N07: a request that arrives after the surviving requests have left evicts no other runners."""
    pool = a_pool("64GiB", each="1GiB").loading("bad", request=1)
    pool.feed(exited(1, out_of_memory=True))
    pool.feed(cancel(1), expire("bad"))
    pool.settle()
    pool.idle("b")
    assert (stopped(pool.feed(acquire("bad", request=2))), pool.state("b")) == ([], RunnerState.idle)


def test_a_load_is_not_called_off_by_one_who_never_waited_for_it() -> None:
    """Rule 4: a request that waits for other options does not abort a load when it leaves."""
    pool = a_pool(each="1GiB").loading("a", request=1, num_ctx=4096)
    pool.inspects = False
    pool.feed(cancel(1), acquire("a", request=2, num_ctx=8192, keep_alive=0))
    assert stopped(pool.feed(cancel(2))) == []


def test_a_load_that_was_cancelled_and_runs_out_of_memory_disturbs_nobody() -> None:
    """A load that was cancelled and runs out of memory expires no other runner."""
    pool = a_pool(each="2GiB").idle("a").loading("b", request=1, keep_alive=0)
    pool.feed(cancel(1))
    assert pool.feed(out_of_memory(2)) == []
    assert pool.state("a") is RunnerState.idle


def test_out_of_memory_is_forgotten_with_its_life() -> None:
    """A lack of memory counts for its own runner, and the next runner's failure is a plain one."""
    pool = a_pool(each="2GiB").loading("a", request=1)
    pool.feed(out_of_memory(1), Progress(1), loaded(1), release(1), expire("a"), exited(1))
    pool.loading("a", request=2)
    assert refused(pool.feed(exited(2, code=1))) == {2: LoadFailedRefusal}


def test_a_pinned_models_load_goes_on_whoever_leaves() -> None:
    """A load of a pinned model goes on when its request leaves, whatever its keep-alive."""
    pool = a_pool()
    pool.feed(pin("a"))
    pool.loading("a", request=1, keep_alive=0)
    assert stopped(pool.feed(cancel(1))) == []
    pool.feed(loaded(1))
    assert pool.state("a") is RunnerState.idle


def test_who_named_a_context_has_another_try_where_only_automatic_ones_were_made_smaller() -> None:
    """A request that names its context evicts other runners for its second try; automatic contexts are lowered."""
    pool = a_pool("32GiB", sizes={"b": "4GiB"}, defaults=Options(num_ctx=65536)).idle("b")
    pool.declare("a", a_model(context_trained=1 << 18))
    pool.feed(acquire("a", request=1), acquire("a", request=2, num_ctx=65536))
    pool.feed(out_of_memory(2), exited(2, code=1))
    assert pool.life("a").launch_options.num_ctx == 32768
    pool.feed(loaded(pool.runner("a")), release(1))
    pool.advance("10s")
    pool.settle()
    assert (pool.life("a").launch_options.num_ctx, pool.state("b")) == (65536, RunnerState.idle)
    pool.feed(out_of_memory(pool.runner("a")), exited(pool.runner("a"), code=1))
    pool.settle()
    assert (pool.state("b"), pool.state("a")) == (RunnerState.unloaded, RunnerState.loading)
    assert refused(pool.feed(out_of_memory(pool.runner("a")), exited(pool.runner("a"), code=1))) == {
        2: LoadFailedRefusal
    }
