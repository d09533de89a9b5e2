"""Backfilling: a younger request never takes memory that an older request will have at a later horizon."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fsm.domain.devices import MIB
from fsm.machine.runner import RunnerState
from fsm.messages.commands import Grant
from fsm.messages.reasons import RunnerStep, WaitFor, WaitForRunners
from fsm.sizing.footprint import Footprint
from tests.support.models import a_model
from tests.support.pool import (
    PoolUnderTest,
    a_pool,
    acquire,
    amount,
    expire,
    launched,
    loaded,
    memory,
    release,
    stopped,
)


def two_ahead() -> PoolUnderTest:
    """Return a pool in which "soon" waits for a runner that was stopped, and "late" waits for a busy one.

    2 GiB are free. "soon" will take them and the 1 GiB of "idle"; "late" will leave 2 of the 5 GiB of "busy".
    """
    sizes = {"busy": "5GiB", "idle": "1GiB", "soon": "3GiB", "late": "3GiB", "young": "2GiB"}
    pool = a_pool("8GiB", sizes=sizes, min_residency_s=0.0).ready("busy", lease=1).idle("idle")
    pool.advance("10s")
    assert stopped(pool.feed(acquire("soon", request=11))) == [pool.runner("idle")]
    pool.feed(acquire("late", request=12))
    assert pool.waits_for(12) == WaitForRunners(("busy",), RunnerStep.idle)
    return pool


def test_what_is_there_now_is_not_had_for_what_others_will_leave_later() -> None:
    """A younger request is not placed in 2 free GiB that "soon" needs, although "late" will leave as much later."""
    pool = two_ahead()
    assert launched(pool.feed(acquire("young", request=13))) == []
    assert pool.waits_for(13) == WaitFor.earlier_requests
    pool.settle()
    assert pool.state("soon") is RunnerState.loading


def test_memory_of_the_programs_own_is_not_granted_for_what_others_will_leave_later() -> None:
    """Memory of the program's own is not granted from what older requests need, because it could not be asked back."""
    pool = two_ahead()
    assert pool.feed(memory(13, cpu="2GiB")) == []
    pool.settle()
    assert pool.state("soon") is RunnerState.loading
    assert [lease for lease in pool.feed(release(1)) if isinstance(lease, Grant)] == []
    pool.settle()
    assert pool.answers[13] == Grant(13, None)


def test_a_place_for_a_process_is_not_had_for_one_that_others_will_leave_later() -> None:
    """A younger request does not take the process slot that an older one gets next, although more become free later."""
    pool = a_pool("20GiB", ["8GiB"], each="6GiB", sizes={"late": "16GiB", "young": "1GiB"}, max_runners=3)
    for model in ("leaves", "soon"):
        pool.declare(model, Footprint(fixed=(("gpu0", amount("6GiB")),)))
    pool.ready("a", lease=1).ready("b", lease=2).idle("leaves")
    pool.advance("100s")
    pool.samples = False
    pool.feed(acquire("soon", request=11), acquire("late", request=12), acquire("young", request=13))
    pool.settle()
    assert pool.waits_for(11) == WaitFor.memory  # the process has gone, and the GPU shows its memory as free later
    assert launched(pool.commands).count("young") == 0
    pool.samples = True
    assert launched(pool.feed(pool.sample())) == ["soon"]


def test_nobody_idle_leaves_for_room_of_which_others_leave_the_rest_later() -> None:
    """An idle runner stays and serves requests while a busy runner still holds the rest of the room that is needed."""
    sizes = {"busy": "5GiB", "idle": "1GiB", "late": "3GiB", "later": "3GiB"}
    pool = a_pool("6GiB", sizes=sizes, min_residency_s=0.0).ready("busy", lease=1).idle("idle")
    pool.advance("10s")
    pool.feed(acquire("late", request=11))
    assert stopped(pool.feed(acquire("later", request=12))) == []
    assert granted_at_once(pool, "idle")
    pool.feed(release(13))
    pool.advance("10s")
    assert stopped(pool.feed(release(1))) == [pool.runner("busy"), pool.runner("idle")]
    pool.settle()
    assert (pool.state("late"), pool.state("later")) == (RunnerState.loading, RunnerState.loading)


def test_nobody_idle_leaves_for_room_of_which_somebody_who_drains_still_has_the_rest() -> None:
    """An idle runner is evicted for a request only when the draining runner that holds the rest is stopped too."""
    pool = a_pool("6GiB", sizes={"busy": "5GiB", "idle": "1GiB", "all": "6GiB"}).ready("busy", lease=1).idle("idle")
    pool.feed(expire("busy"))
    pool.advance("10s")
    assert stopped(pool.feed(acquire("all", request=11))) == []
    assert pool.waits_for(11) == WaitForRunners(("busy",), RunnerStep.drain)
    assert stopped(pool.feed(release(1))) == [pool.runner("busy"), pool.runner("idle")]


def test_rather_an_idle_one_leaves_now_than_that_somebody_waits_for_what_others_leave() -> None:
    """An idle runner is evicted at once where a request would otherwise wait for memory that a busy runner leaves."""
    sizes = {"busy": "5GiB", "idle": "2GiB", "late": "3GiB", "young": "2GiB"}
    pool = a_pool("7GiB", sizes=sizes, min_residency_s=0.0).ready("busy", lease=1).idle("idle")
    pool.advance("10s")
    pool.feed(acquire("late", request=11))
    assert stopped(pool.feed(acquire("young", request=12))) == [pool.runner("idle")]


def granted_at_once(pool: PoolUnderTest, model: str) -> bool:
    return Grant(13, pool.runner(model)) in pool.feed(acquire(model, request=13))


# -- behind another request group of the same model -------------------------------------------------------------------

SMALL, LARGE = {"num_ctx": 2048}, {"num_ctx": 16384}  # 1 GiB, and 5 GiB


def waiting_with_two_contexts() -> PoolUnderTest:
    """Return a pool in which one request waits for a model with a small context, and another with a large one."""
    pool = a_pool("8GiB", sizes={"all": "7900MiB", "other": "4GiB"}).ready("all", lease=1)
    info = replace(
        a_model((64 * MIB,) * 4, context_trained=32768), heads_kv=(32,) * 4, key_length=512, value_length=512
    )
    pool.declare("a", info)
    pool.feed(acquire("a", request=2, **SMALL), acquire("a", request=3, **LARGE))
    return pool


def test_what_the_next_runner_of_a_model_will_need_is_not_had_by_younger_ones() -> None:
    """A younger request does not take the memory that the next runner of an older request's model needs."""
    pool = waiting_with_two_contexts()
    pool.feed(acquire("other", request=4), release(1))
    pool.settle()
    pool.feed(loaded(pool.runner("a")))
    assert (pool.waits_for(3), pool.waits_for(4)) == (WaitForRunners(("a",), RunnerStep.idle), WaitFor.earlier_requests)
    pool.feed(release(2))
    pool.advance("10s")
    pool.settle()
    assert pool.state("a") is RunnerState.loading


def test_nobody_is_refused_because_a_younger_one_reserved_what_they_wait_for() -> None:
    """An older request is not refused because a younger one reserved memory for the program, which is never evicted."""
    pool = waiting_with_two_contexts()
    pool.feed(memory(4, cpu="4GiB"), release(1))
    pool.settle()
    pool.feed(loaded(pool.runner("a")), release(2))
    pool.advance("10s")
    pool.settle()
    assert 3 not in pool.answers
    assert pool.state("a") is RunnerState.loading


def test_while_a_file_is_read_again_nobody_younger_has_what_it_took_before() -> None:
    """While a model's file is inspected again, its last known size is kept from younger requests."""
    pool = a_pool("8GiB", sizes={"a": "6GiB", "b": "6GiB"}).idle("a")
    pool.feed(expire("a"))
    pool.settle()
    pool.inspects = False
    pool.feed(acquire("a", request=2), acquire("b", request=3))
    assert launched(pool.feed(pool.inspection("b"))) == []
    assert launched(pool.feed(pool.inspection("a"))) == ["a"]


@pytest.mark.parametrize("lines", [3, 40])
def test_however_many_wait_for_other_options_of_a_model_others_are_served_behind_them(lines: int) -> None:
    """Request groups of one model with other options are served in turn and reserve what the largest one needs."""
    pool = a_pool("16GiB", max_queue=100).declare("a", a_model((64 * MIB,) * 4)).declare("other", "1GiB")
    for number in range(lines):
        pool.feed(acquire("a", request=10 + number, num_ctx=1024 + number))
    assert launched(pool.feed(acquire("other", request=2))) == ["other"]
