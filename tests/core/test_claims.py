"""Device claims: a launch has its devices to itself among all programs, from its plan until its model is resident."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fsm.domain.devices import HOST, DeviceId
from fsm.machine.runner import RunnerState
from fsm.messages.commands import Claim, Command, Finished, Grant, Launch, Reject, ReleaseClaim, Stop
from fsm.messages.decision_log import Decision, Entry
from fsm.messages.events import ClaimContended, ClaimGranted, Progress, Tick
from fsm.messages.reasons import ClaimMissed, WaitFor
from fsm.messages.refusals import DoesNotFitRefusal, TimedOut
from fsm.verification.state_invariants import check_state
from tests.core.test_every_state_every_event import EVENTS
from tests.support.models import a_model
from tests.support.pool import (
    PoolUnderTest,
    a_pool,
    acquire,
    amount,
    cancel,
    close,
    exited,
    launched,
    layered,
    loaded,
    memory,
    refused,
    release,
    unresponsive,
)

GPU = DeviceId("gpu0")


def claiming(capacity: str = "8GiB", *, shares: bool = False, **how: object) -> PoolUnderTest:
    """Return a pool whose core claims devices; unless it `shares`, each Claim is answered by the test alone."""
    return a_pool(capacity, claims=True, shares=shares, **how)


def had(pool: PoolUnderTest, number: int) -> list[Command]:
    """Answer a Claim as the shell does: the devices are read first, then the claim is granted."""
    return pool.feed(pool.sample(), ClaimGranted(number))


def waits(pool: PoolUnderTest) -> list[Command]:
    """Make a request for "a" that waits for its claim."""
    return pool.feed(acquire("a", request=1))


# -- from plan to resident ---------------------------------------------------------------------------------------------


def test_a_launch_waits_for_its_claim() -> None:
    """Before a claim is granted, nothing is launched and no memory is reserved."""
    pool = claiming()
    assert waits(pool) == [Claim(1, ("cpu",))]
    assert pool.free() == amount("8GiB")
    assert had(pool, 1) == [pool.launch(1, "a")]


def test_without_claims_a_launch_waits_for_nothing() -> None:
    """A core without claims launches at once, so a program that embeds it need not answer a Claim."""
    pool = a_pool()
    assert waits(pool) == [pool.launch(1, "a")]


def test_what_another_program_took_meanwhile_is_seen() -> None:
    """The plan is made again from the reading after the claim, and a refusal shows the figures of that reading."""
    pool = claiming()
    waits(pool)
    pool.strangers = {"cpu": amount("6GiB")}
    assert [type(command) for command in had(pool, 1)] == [Reject, ReleaseClaim]
    refusal = pool.refusal(1)
    assert isinstance(refusal, DoesNotFitRefusal)
    assert refusal.available == (("cpu", amount("2GiB")),)


def test_a_claim_lasts_until_the_model_is_resident() -> None:
    """A claim is released when the model is resident, so that other programs see its memory as taken."""
    pool = claiming()
    waits(pool)
    had(pool, 1)
    assert pool.feed(pool.sample(), Progress(1)) == []
    assert pool.feed(loaded(1)) == [Grant(1, 1), ReleaseClaim(1)]


def test_a_claim_lasts_until_a_failed_load_is_gone() -> None:
    """A claim of a failed load is kept until the process has exited, because the process may still take memory."""
    pool = claiming()
    waits(pool)
    had(pool, 1)
    assert [type(command) for command in pool.feed(unresponsive(1))] == [Reject, Stop]
    assert ReleaseClaim(1) in pool.feed(exited(1))


def test_a_load_that_is_stopped_and_does_not_end_keeps_its_devices_no_longer_than_that_may_take() -> None:
    """A stopped load that does not exit loses its claim after the stop timeout, and another load keeps its claim."""
    pool = claiming(stop_timeout_s=15.0, each="1GiB", shares=True).loading("a").loading("b")
    pool.feed(unresponsive(1))
    assert pool.advance("14.9s") == []
    assert pool.advance("0.1s") == [ReleaseClaim(1)]
    assert ReleaseClaim(1) not in pool.feed(exited(1))
    assert list(pool.claims) == [2]


def test_every_device_that_it_takes_memory_on_is_claimed() -> None:
    """A launch claims every device that it takes memory on, in a fixed order, and no other device."""
    pool = claiming(gpus=("8GiB", "4GiB"))
    pool.declare("g", layered(4, "1GiB", host="100MiB"))
    assert pool.feed(acquire("g", request=1)) == [Claim(1, ("cpu", "gpu0"))]


def test_an_integrated_gpu_is_the_hosts_memory() -> None:
    """N03: a launch on an integrated GPU claims the host, so that a program that sees no such GPU agrees."""
    pool = claiming("16GiB", gpus=("16GiB",), integrated=True)
    pool.declare("d", a_model(layers_bytes=(2**28,) * 4))
    assert pool.feed(acquire("d", request=1)) == [Claim(1, ("cpu",))]


def test_what_takes_no_memory_claims_nothing() -> None:
    """A launch that takes no memory makes no claim."""
    pool = claiming(sizes={"a": "0B"})
    assert launched(waits(pool)) == ["a"]


def test_warm_requests_and_the_programs_own_memory_claim_nothing() -> None:
    """Warm requests and memory of the program's own make no claim, because nothing is loaded for them."""
    pool = claiming(shares=True, sizes={"a": "1GiB"}).idle("a")
    assert pool.feed(acquire("a", request=1), memory(2, cpu="1GiB")) == [Grant(1, 1), Grant(2, None)]


# -- room, and other loads ---------------------------------------------------------------------------------------------


def test_room_is_made_before_anything_is_claimed() -> None:
    """A launch claims its devices only after its victim has gone, so that other programs are not kept out meanwhile."""
    pool = claiming(shares=True, min_residency_s=0.0).idle("a")
    pool.shares = False
    assert pool.feed(acquire("b", request=2)) == [Stop(1)]
    assert Claim(2, ("cpu",)) in pool.feed(exited(1))


def test_the_loads_of_one_program_do_not_keep_each_other_out() -> None:
    """Two loads of one program have a claim each, and each claim is released by itself."""
    pool = claiming(shares=True, each="1GiB").loading("a").loading("b", 2)
    assert sorted(pool.claims) == [1, 2]
    assert pool.feed(loaded(2)) == [Grant(2, 2), ReleaseClaim(2)]


def test_claims_are_had_in_any_order() -> None:
    """A younger request's claim may be granted first, and it takes none of the older request's memory."""
    pool = claiming(gpus=("8GiB",), each="1GiB")
    pool.declare("g", layered(4, "1GiB", host="100MiB"))
    assert pool.feed(acquire("g", request=1), acquire("a", request=2)) == [
        Claim(1, ("cpu", "gpu0")),
        Claim(2, ("cpu",)),
    ]
    assert launched(had(pool, 2)) == ["a"]
    assert launched(had(pool, 1)) == ["g"]


def test_what_is_had_first_goes_to_the_one_who_waits_longest() -> None:
    """Of two claims of the same devices, the first that is granted goes to the oldest request."""
    pool = claiming(each="1GiB")
    pool.feed(acquire("a", request=1), acquire("b", request=2))
    assert launched(had(pool, 2)) == ["a"]
    assert launched(had(pool, 1)) == ["b"]


def test_a_claim_is_kept_for_the_launch_that_needs_all_of_it() -> None:
    """A request with a higher priority that needs fewer devices makes a claim of its own."""
    pool = claiming(gpus=("8GiB",), each="1GiB")
    pool.declare("g", layered(4, "1GiB", host="100MiB"))
    pool.feed(acquire("g", request=1))
    assert pool.feed(acquire("a", request=2, priority=1)) == [Claim(2, ("cpu",))]


def test_a_launch_that_needs_less_than_was_claimed_goes_ahead() -> None:
    """A launch that the fresh figures move to the host goes ahead with the wider claim that it has."""
    pool = claiming(gpus=("4GiB",), require_gpu=False)
    pool.declare("g", layered(4, "512MiB", host="100MiB"))
    pool.feed(acquire("g", request=1))
    pool.strangers = {"gpu0": amount("4GiB")}
    (launch,) = had(pool, 1)
    assert isinstance(launch, Launch)
    assert dict(launch.placement.bytes).get(GPU, 0) == 0
    assert pool.feed(loaded(1)) == [Grant(1, 1), ReleaseClaim(1)]


# -- the wait, and its end ---------------------------------------------------------------------------------------------


def test_whoever_waits_is_told_that_another_program_loads() -> None:
    """A request waits for another program only after its claim was contended."""
    pool = claiming()
    waits(pool)
    assert pool.waits_for(1) != WaitFor.other_program
    assert pool.feed(ClaimContended(1)) == []
    assert pool.waits_for(1) == WaitFor.other_program


def test_u76_a_request_whose_claim_is_not_answered_says_that_it_waits_for_it() -> None:
    """U76: a request waits for its devices to be its own for as long as its claim is neither granted nor contended."""
    pool = claiming(claim_timeout_s=60.0)
    waits(pool)
    (line,) = pool.core.snapshot().queue
    assert (line.waits_for, line.until) == (WaitFor.claim, pool.now + 60.0)
    pool.advance("30s")
    assert pool.waits_for(1) == WaitFor.claim
    assert pool.advance("30s") == [ReleaseClaim(1), pool.launch(1, "a")]
    assert pool.waits_for(1) == WaitFor.load


def test_u76_a_request_that_comes_to_a_claimed_load_waits_for_the_same() -> None:
    """U76: a request that joins another's claim, and one whose claim comes later, wait for a claim too."""
    pool = claiming()
    waits(pool)
    pool.feed(acquire("a", request=2))
    assert pool.waits_for(2) == WaitFor.claim
    pool.feed(ClaimContended(1))
    assert pool.waits_for(2) == WaitFor.other_program


def test_after_the_limit_it_goes_ahead_without_and_says_so() -> None:
    """A launch goes ahead without its claim after the claim timeout, and the decision log says so."""
    pool = claiming(claim_timeout_s=60.0)
    waits(pool)
    log: list[Entry] = []
    pool.core.decision_log = log
    pool.feed(ClaimContended(1))
    assert pool.advance("59.9s") == []
    assert pool.advance("0.1s") == [ReleaseClaim(1), pool.launch(1, "a")]
    missed = ClaimMissed(("cpu",), 60.0)
    assert pool.core._context.claim_failure == missed
    assert [entry.why for entry in log if isinstance(entry, Decision) and entry.what == "launched"] == [missed]
    assert pool.feed(loaded(1)) == [Grant(1, 1)]


def test_the_next_claim_that_is_had_ends_the_complaint() -> None:
    """A claim that is granted clears the failure of an earlier claim."""
    pool = claiming(claim_timeout_s=60.0, each="1GiB")
    waits(pool)
    pool.advance("60s")
    pool.feed(acquire("b", request=2))
    had(pool, 2)
    assert pool.core._context.claim_failure is None


def test_a_plan_that_moves_to_other_devices_does_not_wait_anew() -> None:
    """A plan that moves to other devices keeps the claim's first deadline, however often the figures change."""
    pool = claiming(gpus=("8GiB", "8GiB"), claim_timeout_s=60.0)
    pool.declare("g", layered(4, "1GiB", host="100MiB"))
    pool.feed(acquire("g", request=1))
    for second in range(1, 60):
        pool.strangers = {f"gpu{second % 2}": 0, f"gpu{(second + 1) % 2}": amount("1GiB")}
        pool.advance("1s")
        moved = pool.feed(pool.sample())
        assert [type(command) for command in moved] == [ReleaseClaim, Claim]
    assert launched(pool.advance("1s")) == ["g"]
    assert pool.claims == {}


def test_a_plan_that_moves_when_the_wait_is_over_leaves_nothing_due() -> None:
    """After a gap, a plan that moves off devices that were claimed in time waits no longer than for the next step."""
    pool = claiming(gpus=("8GiB", "8GiB"), claim_timeout_s=5.0, plans_later=True)
    pool.declare("g", layered(4, "1GiB", host="100MiB"))
    pool.feed(acquire("g", request=1), Tick())
    assert pool.feed(pool.sample(), ClaimGranted(1)) == []
    pool.now += 10.0
    pool.strangers = {GPU: amount("7GiB")}
    moved = pool.feed(pool.sample(), Tick())
    assert [type(command) for command in moved] == [ReleaseClaim, Claim]
    pool.now = pool.core.deadline()
    assert launched(pool.feed(Tick())) == ["g"]


def test_a_wait_that_is_over_is_over_for_whatever_the_plan_then_says() -> None:
    """A launch whose claim timed out goes ahead at once on whatever devices the plan then chooses."""
    pool = claiming("32GiB", gpus=("16GiB", "8GiB"), shares=True, claim_timeout_s=60.0)
    for model in "gh":
        pool.declare(model, layered(4, "1GiB", host="100MiB"))
    pool.ready("g")
    pool.shares = False
    older = memory(2, gpu0="14GiB")
    assert pool.feed(replace(older, timeout_s=60.0), acquire("h", request=3))[-1] == Claim(2, ("cpu", "gpu1"))
    (launch,) = [command for command in pool.advance("60s") if isinstance(command, Launch)]
    assert [gpu for gpu, _ in launch.placement.gpu_layers] == [GPU]


def test_a_claim_whose_waiter_leaves_is_given_up() -> None:
    """A claim is released when its last request is cancelled, and a later grant of the claim is a late event."""
    pool = claiming()
    waits(pool)
    assert pool.feed(cancel(1))[-1] == ReleaseClaim(1)
    assert had(pool, 1) == []
    assert pool.core.late == 1


def test_a_claim_whose_waiter_runs_out_of_time_is_given_up() -> None:
    """A claim is released when its request times out."""
    pool = claiming()
    pool.feed(acquire("a", request=1, timeout="5s"))
    pool.feed(ClaimContended(1))
    commands = pool.advance("5s")
    assert refused(commands) == {1: TimedOut}
    assert commands[-1] == ReleaseClaim(1)
    refusal = pool.refusal(1)
    assert isinstance(refusal, TimedOut)
    assert refusal.waiting_for == WaitFor.other_program


def test_a_claim_is_given_up_when_the_room_is_gone() -> None:
    """A claim is released when its launch no longer has room, and the launch claims again when there is room."""
    pool = claiming(sizes={"a": "6GiB", "b": "3GiB"}, shares=True).ready("b", lease=2)
    pool.feed(release(2))
    pool.shares = False
    pool.feed(acquire("c", request=3))  # 6 GiB: "b" is evicted
    pool.feed(exited(1))
    assert list(pool.claims) == [2]
    pool.strangers = {"cpu": amount("5GiB")}
    assert refused(pool.feed(pool.sample())) == {3: DoesNotFitRefusal}
    assert pool.claims == {}


def test_close_gives_a_claim_up_before_it_finishes() -> None:
    """A close releases every claim before it finishes."""
    pool = claiming()
    waits(pool)
    assert [type(command) for command in pool.feed(close())] == [Reject, ReleaseClaim, Finished]


def test_a_copy_has_claims_of_its_own() -> None:
    """A copy of the core has claims of its own."""
    pool = claiming()
    waits(pool)
    copy = pool.core.copy()
    had(pool, 1)
    check_state(copy)
    assert copy._state.claims[1].had is False
    assert copy.step(pool.now, ClaimGranted(1)) == [pool.launch(1, "a")]


# -- the timers of a claim --------------------------------------------------------------------------------------------


def test_a_claim_that_is_given_up_is_no_longer_timed() -> None:
    """A claim that is released because its only request left has no timer any more."""
    pool = a_pool(claims=True, shares=False)
    assert pool.feed(acquire("a", request=1)) == [Claim(1, (HOST,))]
    assert pool.feed(cancel(1))[-1] == ReleaseClaim(1)
    assert ("claim", 1) not in [key for _, key in pool.core._state.timers.items()]


def test_a_claim_of_just_these_devices_is_enough() -> None:
    """One launch makes one claim, however often it is planned again."""
    pool = a_pool(claims=True, shares=False)
    pool.feed(acquire("a", request=1))
    assert pool.feed(acquire("a", request=2), pool.sample()) == []
    assert (sorted(pool.core._state.claims), pool.core._state.next_claim) == ([1], 2)


def test_a_claim_of_a_load_that_was_stopped_is_timed_no_longer_than_its_process_lives() -> None:
    """The timer of a stopped load's claim ends with its process."""
    pool = a_pool(claims=True, stop_timeout_s=15.0).loading("a", request=1)
    pool.feed(unresponsive(1))
    assert ("claim", 1) in [key for _, key in pool.core._state.timers.items()]
    pool.feed(exited(1))
    assert ("claim", 1) not in [key for _, key in pool.core._state.timers.items()]


def test_the_journal_says_which_launch_went_ahead_without_its_devices() -> None:
    """The decision log names the model, the request and the devices of a launch that went ahead without its claim."""
    pool = a_pool(claims=True, shares=False, gpus=("8GiB",), claim_timeout_s=60.0)
    pool.core.decision_log = []
    pool.declare("g", layered(4, "1GiB", host="100MiB"))
    pool.feed(acquire("g", request=7))
    late = pool.core.late
    pool.feed(ClaimContended(1))
    assert pool.core.late == late
    pool.advance("60s")
    decisions = [entry for entry in pool.core.decision_log or () if isinstance(entry, Decision)]
    entry = next(entry for entry in decisions if entry.what == "launched")
    assert (entry.model, entry.request, entry.why) == ("g", 7, ClaimMissed((HOST, "gpu0"), 60.0))


# -- every state of a claim, every event -------------------------------------------------------------------------------


def loading(pool: PoolUnderTest) -> None:
    waits(pool)
    had(pool, 1)


def stopped(pool: PoolUnderTest) -> None:
    loading(pool)
    pool.feed(unresponsive(1))


def contended(pool: PoolUnderTest) -> None:
    waits(pool)
    pool.feed(ClaimContended(1))


def missed(pool: PoolUnderTest) -> None:
    waits(pool)
    pool.advance("60s")


STATES = {"open": waits, "contended": contended, "loading": loading, "stopped": stopped, "missed": missed}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("event", EVENTS)
def test_whatever_happens_every_claim_is_given_back_once(state: str, event: str) -> None:
    """After any event in any state of a claim, no claim outlives its load and the core closes in order."""
    pool = claiming("64GiB", each="1GiB", stop_timeout_s=15.0)
    pool.declare("giant", "65GiB")
    STATES[state](pool)
    if (what := EVENTS[event](pool)) is not None:
        pool.feed(what)
    pool.shares = True
    pool.feed(*(answer for number in list(pool.claims) for answer in (pool.sample(), ClaimGranted(number))))
    for runner in [runner for runner in pool.core._state.runners.values() if runner.state is RunnerState.loading]:
        pool.feed(loaded(runner.id))
    pool.advance("90s")
    assert pool.claims == {}, "a claim is kept although nothing loads"
    pool.feed(close("0s"))
    pool.advance("0s")  # a runner that is still leased is stopped
    pool.settle()
    assert Finished() in pool.commands
    assert pool.asked == pool.answers.keys()
