"""Every decision is logged with the runners and devices that were considered, and why each was taken or not."""

from __future__ import annotations

import math

from fsm.domain.devices import HOST, MIB, Placement
from fsm.eviction.policies import LeastRecentlyUsed
from fsm.machine.runner import RunnerState
from fsm.messages.decision_log import ConsideredDevice, ConsideredRunner, Decision
from fsm.messages.reasons import KeptReason, RunnerStep, WaitFor, WaitForRunners
from fsm.sizing.footprint import Footprint
from tests.support.models import a_model
from tests.support.pool import PoolUnderTest, a_pool, acquire, amount, cancel, exited, expire, loaded, pin, release

GIB = 1024 * MIB


def listened(pool: PoolUnderTest) -> PoolUnderTest:
    pool.core.decision_log = []
    return pool


def told(pool: PoolUnderTest, what: str) -> Decision:
    """Return the last decision of a kind."""
    assert pool.core.decision_log is not None
    return next(e for e in reversed(pool.core.decision_log) if isinstance(e, Decision) and e.what == what)


def reasons(decision: Decision) -> dict[str, KeptReason | None]:
    return {one.model: one.why for one in decision.runners}


def test_an_eviction_says_who_goes_and_why_the_others_stay() -> None:
    """An eviction logs what each runner holds, how long it was unused, and why it is evicted or stays."""
    pool = listened(a_pool(capacity="8GiB", each="2GiB", max_runners=9, policy=LeastRecentlyUsed()))
    pool.idle("old").ready("busy").idle("pinned")
    pool.feed(pin("pinned"))
    pool.idle("new")
    pool.advance("7s")
    pool.feed(acquire("other", request=50))
    decision = told(pool, "evicts")
    assert (decision.request, decision.model) == (50, "other")
    assert reasons(decision) == {
        "old": None,
        "busy": KeptReason.in_use,
        "pinned": KeptReason.pinned,
        "new": KeptReason.others_come_first,
    }
    old = next(one for one in decision.runners if one.model == "old")
    assert old == ConsideredRunner(1, "old", ((HOST, 2 * GIB),), RunnerState.idle, 0, 7.0, None, True, None, 0.0)
    assert decision.devices == (ConsideredDevice(HOST, 2 * GIB, 2 * GIB, True),)


def test_a_wait_says_until_when_and_for_whom() -> None:
    """A wait for a busy runner logs the time at which the runner drains, which is the bound on the wait."""
    pool = listened(a_pool(capacity="8GiB", max_wait_s=120.0, min_residency_s=0.0).ready("busy", lease=1))
    pool.feed(acquire("other", request=2))
    decision = told(pool, "waits")
    assert decision.why == WaitForRunners(("busy",), RunnerStep.idle)
    assert decision.until == pool.core._state.now + 120.0
    assert [(one.why, one.goes_in_s) for one in decision.runners] == [(KeptReason.goes_later, 120.0)]
    (view,) = pool.core.snapshot().queue
    assert (view.position, view.waits_for, view.until) == (0, decision.why, decision.until)


def test_a_wait_for_a_load_says_when_it_is_expected() -> None:
    """A wait for a load logs when it should end, by earlier loads of the model; a first load has no such time."""
    pool = listened(a_pool(capacity="8GiB", keep_alive_s=0.0))
    pool.feed(acquire("a", request=1))
    assert pool.core.snapshot().queue[0].until == math.inf
    pool.advance("8s")
    pool.feed(loaded(1), release(1), exited(1), acquire("a", request=2))
    assert pool.core.snapshot().queue[0].until == pool.core._state.now + 8.0


def test_a_placement_says_what_each_device_had() -> None:
    """A placement logs every device with what it takes there and what is free, and which devices were taken."""
    pool = listened(a_pool(capacity="32GiB", gpus=["8GiB"]).declare("a", Footprint(fixed=(("gpu0", 3 * GIB),))))
    pool.feed(acquire("a", request=1))
    decision = told(pool, "placed")
    assert decision.why == Placement((("gpu0", 3 * GIB),))
    assert decision.devices == (
        ConsideredDevice(HOST, 0, 32 * GIB, False),
        ConsideredDevice("gpu0", 3 * GIB, 8 * GIB, True),
    )


def test_a_refusal_says_what_would_be_needed_and_who_stands_in_the_way() -> None:
    """A refusal logs what is needed on each device, and the pinned runners that hold it."""
    pool = listened(a_pool(capacity="8GiB").idle("kept"))
    pool.feed(pin("kept"), acquire("other", request=2))
    decision = told(pool, "rejected")
    assert reasons(decision) == {"kept": KeptReason.pinned}
    assert decision.devices == (ConsideredDevice(HOST, 6 * GIB, 2 * GIB, False),)


def test_nothing_is_made_up_where_nobody_listens() -> None:
    """Without a decision log no explanation is made, and the commands are the same."""
    quiet, loud = (a_pool(capacity="8GiB", policy=LeastRecentlyUsed()).idle("a") for _ in range(2))
    listened(loud)
    assert quiet.feed(acquire("b", request=50)) == loud.feed(acquire("b", request=50))
    assert quiet.core.decision_log is None and reasons(told(loud, "evicts")) == {"a": None}


def test_what_drains_for_long_is_not_said_to_be_stopped() -> None:
    """A runner that drains for long is logged as expiring, because it was not told to stop yet."""
    pool = listened(a_pool(max_wait_s=10.0, min_residency_s=0.0).ready("a", lease=1))
    pool.feed(acquire("b", request=2))
    pool.advance("30s")
    pool.feed(acquire("c", request=3))
    assert reasons(told(pool, "waits"))["a"] is KeptReason.expiring


def test_a_runner_that_was_evicted_for_a_request_is_said_to_be() -> None:
    """While a request waits for the runners that were evicted for it, the log says so; other runners just expire."""
    pool = listened(a_pool("8GiB", each="2GiB", sizes={"large": "8GiB"}).idle("a").idle("b").idle("c"))
    pool.feed(expire("c"), acquire("large", request=11))
    assert reasons(told(pool, "waits")) == {"a": None, "b": None, "c": KeptReason.expiring}
    pool.feed(exited(2))
    assert reasons(told(pool, "waits")) == {"a": KeptReason.evicted, "b": KeptReason.evicted, "c": KeptReason.expiring}


def test_a_load_that_no_request_waits_for_is_not_said_to_be_waited_for() -> None:
    """A load whose requests have left is kept because no runner has to be evicted."""
    pool = listened(a_pool("9GiB", each="2GiB").loading("left", 1))
    pool.feed(cancel(1), acquire("new", request=2))
    assert reasons(told(pool, "waits")) == {"left": KeptReason.not_needed, "new": KeptReason.awaited}


def test_a_runner_that_leaves_for_a_device_and_is_loaded_again_leaves_for_its_request() -> None:
    """A runner that is evicted from a shrunk device, and loaded again for a request, is evicted for that request."""
    pool = listened(a_pool("16GiB", ["8GiB"]).declare("a", a_model((2**30,) * 4)).ready("a", lease=1))
    pool.capacities |= {"gpu0": amount("2GiB")}
    pool.feed(pool.sample(), acquire("a", request=2, num_gpu=0), release(1))
    assert reasons(told(pool, "evicts")) == {"a": None}
    assert pool.waits_for(2) == WaitFor.load


def launched_model(pool: PoolUnderTest) -> str:
    return pool.launches[max(pool.launches)].model


def test_a_request_that_needs_no_victim_is_told_what_becomes_of_each_runner() -> None:
    """Where a model is launched beside others, runners that cannot be evicted are logged with why, and loads too."""
    pool = listened(a_pool("9GiB", each="2GiB", sizes={"new": "3GiB"}).idle("pinned").idle("leaves").idle("idle"))
    pool.feed(pin("pinned"), expire("leaves"), acquire("new", request=11))
    assert launched_model(pool) == "new"
    assert reasons(told(pool, "waits")) == {
        "pinned": KeptReason.pinned, "leaves": KeptReason.expiring, "idle": KeptReason.not_needed,
        "new": KeptReason.awaited,
    }  # fmt: skip


def test_an_idle_one_that_stays_until_the_rest_is_there_is_said_to() -> None:
    """An idle runner that could leave now is logged as leaving last, after the runner that drains."""
    pool = listened(a_pool("6GiB", sizes={"busy": "5GiB", "idle": "1GiB", "all": "6GiB"}, min_residency_s=0.0))
    pool.ready("busy", lease=1).idle("idle").feed(expire("busy"))
    pool.advance("10s")
    pool.feed(acquire("all", request=11))
    assert reasons(told(pool, "waits"))["idle"] is KeptReason.goes_last
