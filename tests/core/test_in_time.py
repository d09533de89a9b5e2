"""A time limit shorter than the model's load: the request is refused at once with an estimate."""

from __future__ import annotations

from fsm.domain.devices import MIB
from fsm.machine.runner import RunnerState
from fsm.messages.commands import Grant, Reject, Stop
from fsm.messages.refusals import DeadlineInfeasible, TimedOut
from fsm.planning.deadline_admission import LOAD_TIME_TTL_S
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
    layered,
    loaded,
    memory,
    pin,
    refused,
    release,
    stopped,
    unpin,
)


def after_two_loads(model: str, load_s: float, **limits: float) -> PoolUnderTest:
    """Return a pool in which two loads of `model` took so long, and whose runners have gone."""
    pool = a_pool(min_residency_s=0.0, keep_alive_s=0.0, **limits)
    return load_and_go(load_and_go(pool, model, load_s), model, load_s)


def load_and_go(pool: PoolUnderTest, model: str, load_s: float) -> PoolUnderTest:
    """Load, use and unload a model; return the pool."""
    lease = pool.request_id()
    pool.feed(acquire(model, lease))
    pool.advance(load_s)
    runner = pool.runner(model)
    pool.feed(loaded(runner), release(lease))
    if pool.state(model) is not RunnerState.expiring:
        pool.feed(expire(model))
    pool.settle()
    return pool


def test_a_limit_that_the_load_exceeds_is_refused_at_once() -> None:
    """A request whose limit is shorter than earlier loads of its model is refused with the estimate."""
    pool = after_two_loads("a", 8.0)
    assert pool.feed(acquire("a", request=1, timeout="7s")) == [Reject(1, DeadlineInfeasible("a", 7.0, 8.0, 8.0, None))]
    assert pool.waiting() == []


def test_a_limit_that_just_suffices_is_tried() -> None:
    """A request whose limit is just long enough is tried and granted."""
    pool = after_two_loads("a", 8.0)
    assert launched(pool.feed(acquire("a", request=1, timeout="8s"))) == ["a"]
    pool.advance("7.9s")
    assert pool.feed(loaded(3)) == [Grant(1, 3)]


def test_nobody_is_evicted_for_whom_there_is_no_time() -> None:
    """No runner is evicted for a request whose limit is too short."""
    pool = after_two_loads("a", 8.0).idle("b", keep_alive="1h")
    assert refused(pool.feed(acquire("a", request=1, timeout="7s"))) == {1: DeadlineInfeasible}
    assert pool.feed(acquire("a", request=2, timeout="9s")) == [Stop(3)]


def test_a_load_that_was_never_measured_promises_nothing() -> None:
    """A model without a measured load is loaded, whatever the limit, and the limit ends the wait."""
    pool = a_pool()
    assert launched(pool.feed(acquire("a", request=1, timeout="0.001s"))) == ["a"]
    assert refused(pool.advance("1s")) == {1: TimedOut}


def test_one_load_alone_promises_nothing() -> None:
    """One measured load alone refuses no request, because it may have read the file from a cold disk."""
    pool = load_and_go(a_pool(min_residency_s=0.0, keep_alive_s=0.0), "a", 8.0)
    assert launched(pool.feed(acquire("a", request=1, timeout="1s"))) == ["a"]


def test_what_has_passed_of_a_load_counts() -> None:
    """For a request that waits for a load under way, the time that the load has taken already counts."""
    pool = after_two_loads("a", 8.0)
    pool.feed(acquire("a", request=1))
    pool.advance("3s")
    assert pool.feed(acquire("a", request=2, timeout="4s")) == [Reject(2, DeadlineInfeasible("a", 4.0, 5.0, 8.0, 3.0))]
    assert pool.feed(acquire("a", request=3, timeout="5s")) == []
    assert pool.feed(loaded(3)) == [Grant(1, 3), Grant(3, 3)]


def test_a_loaded_model_is_granted_whatever_the_limit() -> None:
    """A warm request is granted whatever its limit."""
    pool = load_and_go(a_pool(min_residency_s=0.0), "a", 8.0)
    assert pool.feed(acquire("a", request=1)) == [pool.launch(2, "a")]
    pool.feed(loaded(2))
    assert pool.feed(acquire("a", request=2, timeout="0s")) == [Grant(2, 2)]


def test_the_shortest_load_counts() -> None:
    """The shortest measured load decides, because a long one may have read from a cold disk."""
    pool = after_two_loads("a", 8.0)
    load_and_go(load_and_go(pool, "a", 2.0), "a", 30.0)
    assert refused(pool.feed(acquire("a", request=1, timeout="1.9s"))) == {1: DeadlineInfeasible}
    assert launched(pool.feed(acquire("a", request=2, timeout="2s"))) == ["a"]


def test_a_replaced_file_is_measured_anew() -> None:
    """Loads of a replaced file refuse no request, because the file is inspected first."""
    pool = after_two_loads("a", 8.0)
    pool.declare("a", "1GiB")
    assert launched(pool.feed(acquire("a", request=1, timeout="1s"))) == ["a"]


def test_a_measured_load_is_not_believed_for_ever() -> None:
    """Measured load times are believed for a limited time, so that a slow load does not refuse requests for ever."""
    pool = after_two_loads("a", 8.0)
    pool.advance(LOAD_TIME_TTL_S)
    assert refused(pool.feed(acquire("a", request=1, timeout="7s"))) == {1: DeadlineInfeasible}
    pool.advance("1s")
    assert launched(pool.feed(acquire("a", request=2, timeout="7s"))) == ["a"]


def test_those_with_time_wait_on() -> None:
    """Each request is judged by its own limit, and requests with enough time or without a limit wait on."""
    pool = after_two_loads("a", 8.0)
    commands = pool.feed(acquire("a", 1, timeout="1s"), acquire("a", 2), acquire("a", 3, timeout="1m"))
    assert (refused(commands), launched(commands)) == ({1: DeadlineInfeasible}, ["a"])
    assert granted(pool.feed(loaded(pool.runner("a")))) == [2, 3]


def test_what_other_options_took_to_load_says_nothing() -> None:
    """Load times of other options refuse no request, because such loads may be faster."""
    pool = a_pool(capacity="32GiB", min_residency_s=0.0)
    pool.feed(acquire("a", request=1))
    pool.advance("8s")
    pool.feed(loaded(1), release(1))
    pool.feed(acquire("a", request=2, timeout="1s", num_thread=3))
    assert stopped(pool.advance("0.4s")) == [1]
    pool.feed(exited(1))
    pool.advance("0.5s")
    assert pool.feed(loaded(2)) == [Grant(2, 2)]
    assert refused(pool.feed(acquire("a", request=3, timeout="1s", num_thread=2))) == {}
    pool.advance("1s")
    pool.feed(release(2), exited(2), acquire("a", request=5, num_thread=3))
    pool.advance("0.5s")
    pool.feed(loaded(3), release(5), expire("a"), exited(3))
    assert refused(pool.feed(acquire("a", request=4, timeout="0.4s", num_thread=3))) == {4: DeadlineInfeasible}


def test_the_programs_memory_is_never_too_late() -> None:
    """A request for memory of the program's own is never refused for its limit, as nothing is loaded."""
    pool = after_two_loads("a", 8.0)
    assert pool.feed(memory(1, cpu="3GiB")) == [Grant(1, None)]


def test_it_is_judged_when_the_file_has_been_looked_at() -> None:
    """A request is judged after the inspection of its file, because another file may be there."""
    pool = after_two_loads("a", 8.0)
    pool.inspects = False
    assert refused(pool.feed(acquire("a", request=1, timeout="1s"))) == {}
    assert refused(pool.feed(pool.sample(), pool.inspection("a"))) == {1: DeadlineInfeasible}


def test_it_is_judged_at_once_where_the_file_was_looked_at_for_another() -> None:
    """A request is judged at once where the file was inspected for another request since the last launch."""
    pool = after_two_loads("a", 8.0).ready("b", lease=1)
    pool.feed(acquire("a", request=2))
    pool.inspects = False
    assert refused(pool.feed(acquire("a", request=3, timeout="1s"))) == {3: DeadlineInfeasible}


def test_a_load_with_fewer_layers_on_gpus_says_nothing() -> None:
    """Load times with fewer layers on GPUs refuse no request, because a whole load may be faster."""
    pool = a_pool(capacity="64GiB", gpus=["16GiB"]).declare("m", layered(4, "1GiB"))
    pool.declare("p", layered(1, "12GiB")).feed(pin("p"))
    pool.idle("p")
    load_and_go(load_and_go(pool, "m", 60.0), "m", 60.0)
    pool.feed(unpin("p"), expire("p"))
    pool.settle()
    assert launched(pool.feed(acquire("m", request=1, timeout="30s"))) == ["m"]


def test_what_its_runner_serves_after_all_is_not_refused() -> None:
    """A request is not refused for load times of a named batch where the runner with an automatic one serves it."""
    pool = a_pool(capacity="64GiB", gpus=["40GiB"], min_residency_s=0.0)
    pool.declare("m", a_model((500 * MIB,) * 4, context_trained=8192))
    for _ in range(2):
        lease = pool.request_id()
        pool.feed(acquire("m", lease, num_ctx=8192, num_batch=512))
        pool.advance("60s")
        pool.feed(loaded(pool.runner("m")), release(lease), expire("m"))
        pool.settle()
    pool.ready("m", lease=1, num_ctx=8192)
    assert pool.life("m").effective_options.num_batch == 1024
    assert granted(pool.feed(acquire("m", request=2, num_ctx=10**6, timeout="30s"))) == [2]


def test_a_load_from_long_ago_does_not_make_one_of_now_two() -> None:
    """A load from long ago and one from now do not make the two loads that an estimate needs."""
    pool = load_and_go(a_pool(min_residency_s=0.0, keep_alive_s=0.0), "a", 30.0)
    pool.advance(LOAD_TIME_TTL_S + 1.0)
    load_and_go(pool, "a", 30.0)
    assert launched(pool.feed(acquire("a", request=9, timeout=20))) == ["a"]


# -- a limit of its own shortens the wait for busy runners -------------------------------------------------------------


def test_u41_a_busy_runner_drains_in_time_for_a_limit_of_ones_own() -> None:
    """Half of a limit that is shorter than `max_wait` is for others; then a busy runner drains, and a load follows."""
    pool = a_pool(max_wait_s=120.0).ready("a", lease=1)
    pool.feed(acquire("b", request=2, timeout="60s"))
    (wait,) = pool.core.snapshot().queue
    assert wait.until == pool.now + 30.0 < wait.gives_up_at
    pool.advance("29s")
    assert pool.state("a") is RunnerState.ready
    pool.advance("2s")
    assert pool.state("a") is RunnerState.expiring
    assert launched(pool.feed(release(1), exited(1))) == ["b"]
    assert granted(pool.feed(loaded(2))) == [2]


def test_u41_the_load_is_left_its_time() -> None:
    """The time that loads of the model usually take is no part of what is divided."""
    pool = after_two_loads("b", 20.0).ready("a", lease=1)
    pool.feed(acquire("b", request=2, timeout="40s"))
    pool.advance("11s")
    assert pool.state("a") is RunnerState.expiring


def test_u41_a_limit_beyond_the_bound_changes_nothing() -> None:
    """A limit of more than twice `max_wait` hurries nothing, and neither does one that is shorter than a load."""
    for timeout, until in (("5m", 120.0), ("7s", 120.0)):
        pool = load_and_go(a_pool(max_wait_s=120.0), "b", 8.0).ready("a", lease=1)
        pool.feed(acquire("b", request=2, timeout=timeout))
        (wait,) = pool.core.snapshot().queue
        assert wait.until == pool.now + until


def test_u41_residency_in_use_is_shorter_for_a_limit_of_ones_own() -> None:
    """A runner in use stays for as long as its load took at least, and for nine times as long only without a limit."""
    kept, drains = RunnerState.ready, RunnerState.expiring
    for timeout, then_s, state in (("5m", 22.0, kept), ("60s", 22.0, drains), ("12s", 2.0, drains)):
        pool = a_pool(max_wait_s=120.0).loading("a", 1)
        pool.advance("10s")
        pool.feed(loaded(1), acquire("b", request=2, timeout=timeout))
        pool.advance("9s")  # half of the shortest limit has passed, and the residency of 10 s has not
        assert pool.state("a") is RunnerState.ready
        pool.advance(then_s)
        assert pool.state("a") is state


def test_u41_a_residency_that_was_set_holds() -> None:
    """A minimum residency that was set by hand holds whatever limits requests have."""
    pool = a_pool(max_wait_s=120.0, min_residency_s=50.0).ready("a", lease=1)
    pool.feed(acquire("b", request=2, timeout="60s"))
    pool.advance("49s")
    assert pool.state("a") is RunnerState.ready
    pool.advance("2s")
    assert pool.state("a") is RunnerState.expiring


def test_u41_a_younger_request_hurries_its_group() -> None:
    """Requests that are served together leave the queue together: the shortest limit counts, while it is there."""
    for leaves in (False, True):
        pool = a_pool(max_wait_s=120.0, min_residency_s=0.0).ready("a", lease=1)
        pool.feed(acquire("b", request=2))
        pool.advance("10s")
        pool.feed(acquire("b", request=3, timeout="20s"))
        if leaves:
            pool.feed(cancel(3))
        pool.advance("11s")
        assert pool.state("a") is (RunnerState.ready if leaves else RunnerState.expiring)


def test_u41_a_limit_within_a_residency_that_was_set_is_told_at_once() -> None:
    """Where runners keep a residency that was set, and there is no room beside them, a short limit is refused."""
    pool = a_pool(max_wait_s=120.0, min_residency_s=50.0).ready("a", lease=1)
    pool.advance("10s")
    refusal = DeadlineInfeasible("b", 39.0, 40.0, 0.0, None, 40.0)
    assert pool.feed(acquire("b", request=2, timeout="39s")) == [Reject(2, refusal)]
    assert refused(pool.feed(acquire("b", request=3, timeout="41s"))) == {}
    pool.feed(release(1))  # an idle runner keeps it too
    assert refused(pool.feed(acquire("b", request=4, timeout="39s"))) == {4: DeadlineInfeasible}
    for residency in (None, 0.0):
        pool = a_pool(max_wait_s=120.0, min_residency_s=residency).ready("a", lease=1)
        assert refused(pool.feed(acquire("b", request=2, timeout="1s"))) == {}


def test_u41_only_runners_that_are_in_the_way_keep_a_request_waiting() -> None:
    """The first of the runners that leave room counts, and the model's own runner with other options."""
    pool = a_pool("8GiB", min_residency_s=50.0, sizes={"a": "4GiB", "b": "3GiB", "c": "4GiB"}).ready("a", lease=1)
    pool.advance("10s")
    pool.ready("b", lease=2)
    assert pool.feed(acquire("c", request=3, timeout="30s")) == [
        Reject(3, DeadlineInfeasible("c", 30.0, 40.0, 0.0, None, 40.0))
    ]
    assert refused(pool.feed(acquire("a", request=4, timeout="30s", num_thread=3))) == {4: DeadlineInfeasible}
    assert granted(pool.feed(acquire("a", request=5, timeout="30s"))) == [5]
