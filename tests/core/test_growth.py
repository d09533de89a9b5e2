"""The cost of a decision, counted in calls, does not grow with the queue, and requests far back are served too."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType

import pytest

from fsm.domain.devices import HOST, MIB
from fsm.domain.options import Options
from fsm.machine.runner import STOPPING
from fsm.messages.commands import Grant, Inspect
from fsm.messages.events import Event
from fsm.messages.reasons import WaitFor
from fsm.messages.refusals import DoesNotFitRefusal, InvalidModelRefusal
from fsm.planning.plan import Plan
from fsm.planning.planning_context import GROUPS_AHEAD
from fsm.sizing.footprint import Footprint
from fsm.sizing.load_history import MOST_KINDS
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
    memory,
    pin,
    preload,
    refused,
    release,
    unpin,
)
from tests.tools.bench.growth import ACTIONS, Crowd

FAR_BACK = GROUPS_AHEAD + 8


def calls_of(action: Callable[[], object]) -> int:
    """Return how many functions an action calls, functions of C included."""
    counted = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal counted
        counted += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(None)
    return counted


def a_crowd() -> PoolUnderTest:
    """Return a pool whose one busy runner fills it, and for which more models wait than are planned."""
    pool = a_pool(capacity="8GiB", max_queue=1000).ready("busy", lease=1)
    for number in range(FAR_BACK):
        pool.feed(acquire(f"model {number}", request=10 + number))
    return pool


def test_a_decision_costs_about_the_same_however_many_wait() -> None:
    """From 10 waiting requests to 500, a decision calls at most three times as many functions."""
    few, many = Crowd(20, 10), Crowd(20, 500)
    for name in ACTIONS:
        assert calls_of(getattr(many, name)) <= 3 * calls_of(getattr(few, name)), name


def test_a_plan_ranks_its_candidates_once() -> None:
    """Beside 100 runners, a plan for sixteen request groups calls at most 2.5 times as many functions as for one."""
    assert calls_of(Crowd(100, GROUPS_AHEAD).reading) <= 2.5 * calls_of(Crowd(100, 1).reading)


def plans_of(pool: PoolUnderTest, *events: Event) -> int:
    """Return how many plans events lead to."""
    plans: list[Plan] = []
    pool.core.plans = plans
    pool.feed(*events)
    return len(plans)


def test_a_reading_that_shows_nothing_new_plans_nothing() -> None:
    """A reading is planned with only where a request waits for memory, and figures have changed."""
    pool = a_pool(capacity="8GiB").ready("busy", lease=1)
    pool.feed(acquire("b", request=2))
    assert plans_of(pool, pool.sample()) == 0
    pool.strangers = {HOST: MIB}
    assert plans_of(pool, pool.sample()) == 1


def test_a_reading_plans_nothing_for_requests_that_wait_for_a_file_or_a_load() -> None:
    """Whatever a reading shows, it is not planned with for requests that wait for metadata or for their load."""
    pool = a_pool(capacity="8GiB", inspects=False)
    pool.feed(acquire("a", request=1))
    pool.strangers = {HOST: MIB}
    assert plans_of(pool, pool.sample()) == 0
    pool.feed(pool.inspection("a", ()))
    assert pool.waits_for(1) is WaitFor.load
    pool.strangers = {HOST: 2 * MIB}
    assert plans_of(pool, pool.sample()) == 0


def test_a_newcomer_is_planned_once_its_file_is_read() -> None:
    """A request for a model whose file has to be read has it read without a plan, and is planned after that."""
    pool = a_crowd()
    pool.inspects = False
    assert plans_of(pool, acquire("new", request=9)) == 0
    assert pool.commands[-1] == Inspect("new", (Options(),)) and pool.waits_for(9) is WaitFor.metadata
    assert plans_of(pool, pool.inspection("new", (Options(),))) == 1


def test_a_request_that_joins_others_is_planned_only_where_it_has_a_time_limit() -> None:
    """A request behind others like it changes no plan, unless it has a time limit, by which busy runners may drain."""
    pool = a_crowd()
    assert plans_of(pool, acquire("model 0", request=8)) == 0
    assert plans_of(pool, acquire("model 0", request=9, timeout=60.0)) == 1


class Unscanned(dict):  # type: ignore[type-arg]  # of the mapping that it stands for
    """A mapping that may be looked up and not iterated over."""

    def __iter__(self) -> Iterator[object]:
        raise AssertionError("it was scanned")

    items = keys = values = __iter__  # type: ignore[assignment]  # none of them is to be called


@pytest.mark.parametrize("max_runners", [20, 30])
def test_a_warm_request_looks_at_no_other_runner_and_no_other_request(max_runners: int) -> None:
    """A warm request and its release iterate over no runners, requests, request groups or models."""
    pool = a_pool(capacity="80GiB", max_runners=max_runners, each="1GiB")
    for number in range(20):
        pool.ready(f"model {number}")
    core = pool.core
    for name in ("runners", "requests", "groups", "models"):
        setattr(core._state, name, Unscanned(getattr(core._state, name)))
    for model in ("model 3", "model 4"):
        assert core.step(core._state.now, acquire(model, request=500)) == [Grant(500, pool.runner(model))]
        assert core.step(core._state.now, release(500)) == []


def test_the_last_release_scans_nothing_where_nobody_waits() -> None:
    """The last release of a runner iterates over nothing where no request waits."""
    pool = a_pool(capacity="80GiB", max_runners=30, each="1GiB").idle("a").ready("b")
    core = pool.core
    for name in ("runners", "requests", "groups", "models"):
        setattr(core._state, name, Unscanned(getattr(core._state, name)))
    assert core.step(core._state.now, acquire("a", request=500)) == [Grant(500, pool.runner("a"))]
    assert core.step(core._state.now, release(500)) == []


def test_who_comes_far_back_is_judged_at_once() -> None:
    """A request that can never fit is refused at once, however many requests wait before it."""
    pool = a_crowd().declare("huge", "9GiB")
    assert refused(pool.feed(acquire("huge", request=900))) == {900: DoesNotFitRefusal}
    assert pool.waits_for(10 + FAR_BACK - 1) == WaitFor.earlier_requests


def test_a_file_far_back_that_is_no_model_is_its_askers_error_at_once() -> None:
    """S11: the file of a request far back in the queue is inspected at once, and a bad file refuses the request."""
    pool = a_crowd().declare("bad", InvalidModelRefusal("bad", "cut short", 4))
    assert refused(pool.feed(acquire("bad", request=900))) == {900: InvalidModelRefusal}


def test_everybody_comes_to_the_front_in_order() -> None:
    """A request group far back in the queue moves up as earlier groups are served or leave."""
    pool = a_crowd()
    pool.feed(*(cancel(10 + number) for number in range(0, FAR_BACK, 2)))
    pool.feed(release(1), exited(1))
    order = []
    while pool.waiting():
        runner = max(pool.launches)
        order.append(pool.launches[runner].model)
        pool.feed(loaded(runner))
        lease = next(iter(pool.core._state.runners[runner].leases))
        pool.advance("1h")
        pool.feed(release(lease))
        pool.settle()
    assert order == [f"model {number}" for number in range(1, FAR_BACK, 2)][: len(order)]
    assert len(order) >= FAR_BACK // 2 - 1


def test_what_nobody_before_it_can_use_is_not_kept_from_a_line_far_back() -> None:
    """A request group far back starts on a free GPU that no earlier group can use."""
    pool = a_pool(capacity="8GiB", gpus=["8GiB"], max_queue=1000, max_runners=1000).ready("busy", lease=1)
    pool.declare("on the gpu", Footprint(fixed=(("gpu0", 4096 * MIB),)))
    for number in range(FAR_BACK):
        pool.feed(acquire(f"model {number}", request=10 + number))
    assert launched(pool.feed(acquire("on the gpu", request=900))) == ["on the gpu"]


def test_an_idle_runner_that_nobody_before_it_can_use_goes_for_a_line_far_back() -> None:
    """An idle runner that no earlier group needs is evicted for a request group far back in the queue."""
    pool = a_pool(capacity="8GiB", gpus=["8GiB"], max_queue=1000, max_runners=1000)
    pool.declare("resting", Footprint(fixed=(("gpu0", 6144 * MIB),)))
    pool.declare("on the gpu", Footprint(fixed=(("gpu0", 4096 * MIB),)))
    pool.idle("resting").ready("busy")
    for number in range(FAR_BACK):
        pool.feed(acquire(f"model {number}", request=100 + number))
    pool.feed(acquire("on the gpu", request=900))
    assert pool.core._state.runners[pool.runner("resting")].process_state is STOPPING


@pytest.mark.slow
def test_deadlines_that_were_cleared_are_not_kept() -> None:
    """A thousand requests with a limit of a year that are cancelled at once leave no timers behind."""
    pool = a_pool().ready("a", lease=1)
    for request in range(2, 1002):
        pool.feed(acquire("b", request, timeout="8760h"), cancel(request))
    assert len(pool.core._state.timers.copy()._heap) < 200


def test_options_that_come_to_the_same_are_not_kept_for_ever() -> None:
    """A runner remembers at most so many option sets that it serves, however many larger contexts are asked for."""
    pool = a_pool().declare("a", a_model(context_trained=4096)).ready("a", lease=1, num_ctx=4096)
    for request in range(2, 3 * MOST_KINDS):
        pool.feed(acquire("a", request, num_ctx=4096 + request), release(request))
    assert granted(pool.commands)[-1] == 3 * MOST_KINDS - 1
    assert len(pool.life("a").equivalent_requests) <= MOST_KINDS


def test_a_name_that_is_unpinned_and_was_never_pinned_is_not_kept() -> None:
    """An unpin of a model that was never pinned leaves no model record."""
    pool = a_pool()
    pool.feed(unpin("a"))
    assert not pool.core._state.models


def few_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a core keep the records of eight models that are not in use."""
    for module in ("fsm.state.core_state", "fsm.lifecycle.memory_recovery"):
        monkeypatch.setattr(f"{module}.MOST_MODELS", 8)


def test_models_that_nobody_uses_any_more_are_forgotten_beyond_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a number of models the least recently used are forgotten, and models in use or pinned stay."""
    few_models(monkeypatch)
    pool = a_pool(each="1GiB", max_runners=20).ready("in use", lease=1)
    pool.feed(pin("pinned"))
    for number in range(50):
        pool.idle(f"model {number:02}").feed(expire(f"model {number:02}"))
        pool.settle()
        pool.advance("1s")
    models = set(pool.core._state.models)
    assert {"in use", "pinned", "model 48", "model 49"} < models
    assert len(models) <= 8 + 1


def test_u65_models_that_are_refused_are_forgotten_beyond_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that never load, since there is no room for them, are bounded like models that were loaded."""
    few_models(monkeypatch)
    pool = a_pool(each="9GiB", sizes={"in use": "1GiB"}).ready("in use", lease=1)
    for number in range(50):
        pool.feed(acquire(f"model {number:02}", 10 + number))
        assert isinstance(pool.refusal(10 + number), DoesNotFitRefusal)
        pool.advance("1s")
    models = set(pool.core._state.models)
    assert {"in use", "model 49"} < models
    assert len(models) <= 8


def test_u65_models_that_fail_to_load_are_forgotten_when_their_back_off_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A load that fails leaves a back-off, and not a record for ever."""
    few_models(monkeypatch)
    pool = a_pool(each="1GiB")
    for number in range(50):
        pool.feed(acquire(f"model {number:02}", 10 + number))
        pool.feed(exited(pool.runner(f"model {number:02}"), 1, "broken"))
        pool.advance("11s")
    assert len(pool.core._state.models) <= 8


def test_u65_models_that_are_backed_off_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of models that all fail at one time, those are kept whose back-off lasts longest; models without one go first."""
    few_models(monkeypatch)
    pool = a_pool(each="1GiB", back_off_s=1e6, back_off_limit_s=1e6)
    for number in range(50):
        pool.idle(f"good {number:02}").feed(expire(f"good {number:02}"))
        pool.settle()
        pool.feed(acquire(f"model {number:02}", 10 + number))
        pool.feed(exited(pool.runner(f"model {number:02}"), 1, "broken"))
        pool.advance("1s")
    models = set(pool.core._state.models)
    assert {"model 49", "model 48", "model 47", "model 46"} < models
    assert len(models) <= 8


def test_u65_models_that_requests_gave_up_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preload and a request that were cancelled before anything was loaded leave no record for ever."""
    few_models(monkeypatch)
    pool = a_pool(sizes={"in use": "6GiB"}, each="4GiB").ready("in use", lease=1)
    for number in range(2, 50, 2):
        pool.feed(acquire(f"a {number}", number), preload(f"b {number}", number + 1))
        pool.feed(cancel(number), cancel(number + 1))
    assert len(pool.core._state.models) <= 8


def in_line(count: int, *, of: int) -> PoolUnderTest:
    """Return a pool whose runner fills the host, with requests for memory that wait, of so many sizes in turns."""
    pool = a_pool(samples=False, max_queue=10_000, keep_alive_s=0.0).declare("all", "8GiB").ready("all", lease=1)
    for number in range(count):
        pool.core.step(pool.now, memory(2 + number, cpu=f"{1 + number % of}KiB"))
    return pool


@pytest.mark.parametrize("of", [1, 2, 1000], ids=["one size", "two in turns", "each its own"])
def test_u66_letting_reservations_in_costs_in_proportion_to_their_number(of: int) -> None:
    """The step that grants eight times as many requests for memory costs at most twelve times as much."""

    def cost(count: int) -> int:
        pool = in_line(count, of=of)
        pool.core.step(pool.now, release(1))
        pool.core.step(pool.now, exited(1))
        reading = pool.sample()
        del reading
        before = pool.core.copy()
        calls = calls_of(lambda: pool.core.step(pool.now, pool.sample()))
        assert before._state.queued == count and not pool.core._state.queued, "all are let in"
        return calls

    assert cost(160) < 12 * cost(20)


@pytest.mark.parametrize("of", [1, 2, 1000], ids=["one size", "two in turns", "each its own"])
def test_u66_an_event_costs_about_the_same_however_many_reservations_wait(of: int) -> None:
    """Whether 40 requests for memory wait or 400: a request that comes costs at most three times as much."""

    def cost(count: int) -> int:
        pool = in_line(count, of=of)
        return calls_of(lambda: pool.core.step(pool.now, acquire("new", 9000)))

    assert cost(400) <= 3 * cost(40)


@pytest.mark.parametrize("known", [False, True], ids=["never read", "read before"])
def test_u66_a_request_costs_about_the_same_however_many_models_are_still_to_be_read(known: bool) -> None:
    """Whether the files of 40 models are still to be read or of 400: a request costs at most three times as much."""

    def cost(count: int) -> int:
        pool = a_pool(each="1GiB", max_queue=10_000)
        models = [f"model {number}" for number in range(count)]
        for model in models if known else ():
            record = pool.core._state.model(model)
            record.apply_inspection(pool.outcome(model), 1)
            record.inspected_since_launch = False
        for number, model in enumerate(models):
            pool.core.step(pool.now, acquire(model, 10 + number))
        calls = calls_of(lambda: pool.core.step(pool.now, acquire("new", 9000)))
        assert len(pool.core._state.groups) == count + 1
        return calls

    assert cost(400) <= 3 * cost(40)


def test_u66_the_order_is_that_of_the_requests_and_not_of_the_inspections() -> None:
    """Of two models whose files are read in the other order, the one that was asked for first is loaded first."""
    pool = a_pool(inspects=False)
    pool.feed(acquire("a", 1), acquire("b", 2), acquire("c", 3, priority=1))
    assert pool.waiting() == [3, 1, 2]
    assert launched(pool.feed(pool.inspection("b"))) == ["b"]
    assert launched(pool.feed(pool.inspection("c"), pool.inspection("a"))) == []
    assert pool.waiting() == [3, 1, 2]
