"""Small things of the core that no other test would miss: each of these kills a mutant that had survived."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import pytest

from fsm.core import Core
from fsm.domain.devices import HOST, DeviceId, DeviceSample, Placement
from fsm.domain.model_info import Options
from fsm.eviction.policies import Candidate, KeepAliveOrder
from fsm.eviction.reuse_prediction import IdleTimeStatistics
from fsm.machine.request import Purpose, Request, RequestSpec
from fsm.machine.runner import Runner
from fsm.messages.commands import Claim, ReleaseClaim
from fsm.messages.decision_log import Decision, Transition
from fsm.messages.events import ClaimContended
from fsm.messages.reasons import (
    ClaimMissed,
    LoadStalled,
    NoAnswer,
    ProcessExited,
    Queued,
    RunnerReason,
    TransitionReason,
)
from fsm.messages.refusals import LoadFailedRefusal, ModelNotFoundRefusal
from fsm.placement.search import Gpu, Offload, PlacementDemand, find_placement
from fsm.planning.eviction_candidates import evictable_at
from fsm.sizing.footprint import Footprint
from fsm.state.memory_ledger import Account, Ledger
from tests.support.pool import (
    PoolUnderTest,
    a_pool,
    acquire,
    amount,
    cancel,
    close,
    exited,
    expire,
    layered,
    loaded,
    progress,
    release,
    unresponsive,
)

GPU = Gpu("gpu0", "gpu0")
PAIR = (GPU, Gpu("gpu1", "gpu1"))
LAYERS = Footprint((100,) * 4, (0,) * 4, output_bytes=100)  # with the output: five of 100 bytes


def layers(
    free: dict[str, int], footprint: Footprint = LAYERS, offload: Offload = Offload.whole, **how: Any
) -> dict[DeviceId, int] | None:
    """Return the layers by GPU, None where it does not go anywhere."""
    placement = find_placement(PlacementDemand(footprint, **how), offload, {HOST: 10**6, **free}, PAIR)
    return None if placement is None else dict(placement.gpu_layers)


# -- the ledger -------------------------------------------------------------------------------------------------------


def test_a_measurement_of_one_device_leaves_those_of_others() -> None:
    """Each device is read by itself; one that does not answer keeps its figure."""
    account = Account({HOST: 10, "gpu0": 20})
    account.measure({"gpu0": 15})
    account.measure({HOST: 5})
    assert account.resident == {HOST: 5, "gpu0": 15}


def test_what_is_not_measured_is_occupied_once_it_is_loaded() -> None:
    """As far as is known: nothing before, the promise afterwards, and nothing where none was made."""
    account = Account({HOST: 10})
    assert account.occupied_bytes(HOST) == 0
    account.loaded = True
    assert (account.occupied_bytes(HOST), account.occupied_bytes("gpu0")) == (10, 0)
    account.resident = {HOST: 7}
    assert account.occupied_bytes(HOST) == 7


def test_what_is_counted_on_one_device_stays_counted_when_another_is_read() -> None:
    """Promised or resident is enough to be counted."""
    account = Account({HOST: 10}, resident={"gpu0": 5}, loaded=True)
    account.count([HOST])
    account.count(["gpu0", "gpu1"])
    assert account.resident_at_last_sample == {HOST: 10, "gpu0": 5}


def test_what_the_next_life_is_promised_is_known_by_device() -> None:
    """What was settled counts as it was seen, the rest as it was promised, and a strange device for nothing."""
    account = Account({HOST: 10, "gpu0": 20})
    account.measure({HOST: 12, "gpu0": 15})
    account.observe_peak({HOST: 3})
    assert (account.expected_bytes(HOST), account.expected_bytes("gpu0")) == (15, 15)
    assert (account.expected_bytes("gpu1"), Account({}).expected_bytes(HOST)) == (0, 0)


def test_mapped_pages_are_page_cache_on_the_host_alone() -> None:
    """A GPU's memory is not given up because a file is mapped."""
    account = Account({HOST: 10, "gpu0": 10}, resident_at_last_sample={HOST: 10, "gpu0": 10}, mapped_bytes=4)
    assert (account.reserved_not_touched(HOST), account.reserved_not_touched("gpu0")) == (4, 0)


def test_a_device_that_shrank_to_what_is_held_has_shrunk_no_more() -> None:
    """Nothing is too much on it."""
    ledger = Ledger()
    ledger.sample([DeviceSample(HOST, "cpu", HOST, 100, 100)])
    ledger.reserve(("runner", 1), ((HOST, 50),))
    ledger.sample([DeviceSample(HOST, "cpu", HOST, 49, 49)])
    assert ledger.overcommitted == {HOST}
    ledger.sample([DeviceSample(HOST, "cpu", HOST, 50, 50)])
    assert ledger.overcommitted == set()


def test_a_device_that_is_gone_counts_as_shrunk_while_a_byte_is_promised_on_it() -> None:
    """One byte is too much of nothing."""
    ledger = Ledger()
    ledger.sample([DeviceSample("gpu0", "gpu", "gpu0", 100, 100)])
    ledger.reserve(("runner", 1), (("gpu0", 1),))
    ledger.sample([])
    assert ledger.overcommitted == {"gpu0"}


def test_what_is_not_known_is_booked_where_it_was_asked_for() -> None:
    """A device that has been lost has a name all the same; and one that promises nothing adds nothing."""
    ledger = Ledger()
    ledger.reserve(("runner", 1), ((HOST, 10),))
    assert ledger.by_memory([("gpu7", 5), ("gpu7", 1)]) == {"gpu7": 6}
    assert ledger.reserved_bytes("gpu7") == 0


# -- placement --------------------------------------------------------------------------------------------------------


def test_in_part_goes_all_but_one_at_most_and_one_at_least() -> None:
    """The output counts as a layer; as many go as there is room for, headroom of a quarter included."""
    assert layers({"gpu0": 10_000}, offload=Offload.partial) == {"gpu0": 4}
    assert layers({"gpu0": 250}, offload=Offload.partial) == {"gpu0": 2}
    assert layers({"gpu0": 125}, offload=Offload.partial) == {"gpu0": 1}
    assert layers({"gpu0": 124}, offload=Offload.partial) is None


def test_one_layer_is_one_layer() -> None:
    """What a request names is what it gets."""
    assert layers({"gpu0": 10_000}, offload=Offload.partial, num_gpu=1) == {"gpu0": 1}


def test_a_gpu_of_which_nothing_is_known_has_no_room() -> None:
    """Not a byte of it, on either GPU or on the host."""
    assert layers({}) is None
    assert layers({"gpu1": 625}) == {"gpu1": 5}
    tiny = Footprint(fixed=(("gpu0", 1),))
    assert find_placement(PlacementDemand(tiny), Offload.none, {}, PAIR) is None
    assert layers({}, Footprint((0,) * 4, (0,) * 4, output_bytes=1), spread=False) is None


def test_the_output_and_its_copy_both_want_room() -> None:
    """Input embeddings that are the output matrix are on a GPU twice."""
    copied = replace(LAYERS, output_copy_bytes=100)
    assert layers({"gpu0": 750}, copied) == {"gpu0": 5}
    assert layers({"gpu0": 400, "gpu1": 374}, copied) is None
    assert layers({"gpu0": 375, "gpu1": 375}, copied) == {"gpu0": 3, "gpu1": 2}


def test_compute_buffers_and_projectors_take_their_part_of_a_split() -> None:
    """Buffers on each GPU, projectors on the first one with layers: so much less room for layers there."""
    buffered = replace(LAYERS, compute_bytes=100)
    assert layers({"gpu0": 500, "gpu1": 375}, buffered) == {"gpu0": 3, "gpu1": 2}
    assert layers({"gpu0": 499, "gpu1": 375}, buffered) is None
    seeing = replace(LAYERS, projectors_bytes=100)
    assert layers({"gpu0": 500, "gpu1": 250}, seeing) == {"gpu0": 3, "gpu1": 2}
    assert layers({"gpu0": 499, "gpu1": 250}, seeing) is None


# -- runners and cores ------------------------------------------------------------------------------------------------


RUNNER = Runner(1, "a", Options(num_ctx=1), Placement(((HOST, 1),)), 2.0, 3.0)
REQUEST = Request(1, RequestSpec("a", Options(), Purpose.lease, 0), 2.0, 3.0)


@pytest.mark.parametrize("original", [RUNNER, REQUEST], ids=lambda original: type(original).__name__)
def test_a_copy_is_like_the_original_in_every_field(original: Runner | Request) -> None:
    """Nothing is left out, and no set or dictionary is shared."""
    for number, each in enumerate(fields(original)):
        value = getattr(original, each.name)
        match value:
            case bool():
                setattr(original, each.name, not value)
            case int() | float() | None:
                setattr(original, each.name, 100 + number)
            case set():
                value.add(number)
            case dict():
                value[HOST] = number
            case _:
                pass
    copy = original.copy()
    for each in fields(original):
        value, copied = getattr(original, each.name), getattr(copy, each.name)
        assert copied == value, each.name
        assert copied is not value or not isinstance(value, set | dict), each.name


def test_a_copy_of_a_core_has_its_policy_and_its_failures() -> None:
    """What went wrong, and by what order runners go."""
    core, missed = Core(policy=KeepAliveOrder()), ClaimMissed((HOST,), 60.0)
    core.policy_failure, core._context.claim_failure, core.late = "ValueError()", missed, 3
    copy = core.copy()
    assert copy.policy is core.policy and copy._state.config == core._state.config
    assert (copy.policy_failure, copy._context.claim_failure, copy.late) == ("ValueError()", missed, 3)


def test_failures_are_told() -> None:
    """None at first; of a policy what it raised."""
    core, missed = Core(), ClaimMissed((HOST,), 60.0)
    assert core.failures() == ()
    core._context.claim_failure = missed
    assert core.failures() == (missed,)
    core.policy_failure = "ValueError()"
    assert core.failures() == ("ValueError()", missed)


def test_every_late_event_is_counted() -> None:
    """One each, whatever it is."""
    pool = a_pool().idle("a")
    late = pool.core.late
    pool.feed(progress(pool.runner("a")), release(999), loaded(999), exited(999), release(998))
    assert pool.core.late == late + 5


def reasons(pool: PoolUnderTest) -> list[TransitionReason]:
    """Why runners moved, since the journal was begun."""
    return [entry.why for entry in pool.core.decision_log or () if isinstance(entry, Transition)]


def told(pool: PoolUnderTest) -> PoolUnderTest:
    """Have a journal kept from now on."""
    pool.core.decision_log = []
    return pool


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("keep-alive", RunnerReason.keep_alive_over),
        ("close", RunnerReason.closing),
        ("stall", LoadStalled(300.0)),
    ],
)
def test_a_transition_tells_its_reason(what: str, reason: TransitionReason) -> None:
    """With the time that a load was given."""
    pool = told(a_pool().loading("a") if what == "stall" else a_pool().idle("a"))
    if what == "close":
        pool.feed(close(0))
    else:
        pool.advance("301s")
    assert reason in reasons(pool)


def test_a_queued_request_is_told_with_its_model_and_its_place() -> None:
    """The journal says who waits, and for whom."""
    pool = told(a_pool())
    pool.feed(acquire("a", request=7))
    entries = [
        entry for entry in pool.core.decision_log or () if isinstance(entry, Decision) and entry.what == "queued"
    ]
    assert [(entry.model, entry.why, entry.request) for entry in entries] == [("a", Queued(1), 7)]


def test_nothing_is_due_once_everything_has_gone() -> None:
    """No timer of a runner, a claim or a request is left behind."""
    pool = a_pool(claims=True).idle("a")
    runner = pool.runner("a")
    pool.feed(expire("a"), exited(runner))
    pool.advance("600s")
    assert pool.core.deadline() == math.inf


def test_the_last_moment_of_a_back_off_is_told_as_it_is() -> None:
    """Whoever asks then is told to wait for less than a second."""
    pool = a_pool().loading("a")
    pool.feed(exited(pool.runner("a"), 1, "no such layer"))
    pool.advance("9.5s")
    pool.feed(acquire("a", request=7))
    refusal = pool.refusal(7)
    assert isinstance(refusal, LoadFailedRefusal) and refusal.retry_after_s == pytest.approx(0.5)


def test_a_claim_that_is_given_up_is_no_longer_timed() -> None:
    """Nothing is due once the only one who waited for it has left."""
    pool = a_pool(claims=True, shares=False)
    assert pool.feed(acquire("a", request=1)) == [Claim(1, (HOST,))]
    assert pool.feed(cancel(1))[-1] == ReleaseClaim(1)
    assert ("claim", 1) not in [key for _, key in pool.core._state.timers.items()]


def test_a_claim_of_just_these_devices_is_enough() -> None:
    """However often it is planned again, one launch makes one claim."""
    pool = a_pool(claims=True, shares=False)
    pool.feed(acquire("a", request=1))
    assert pool.feed(acquire("a", request=2), pool.sample()) == []
    assert (sorted(pool.core._state.claims), pool.core._state.next_claim) == ([1], 2)


def test_of_crashes_a_good_life_apart_each_is_the_first() -> None:
    """Two such, and then a third soon after, which is the second in a row."""
    pool = a_pool(good_life_s=60.0).ready("a", lease=1)
    for runner in (1, 2):
        pool.advance("60s")
        pool.feed(exited(runner, code=-9, reason=f"crash {runner}"))
        pool.ready("a", lease=runner + 1)
    assert pool.core._state.models["a"].failure == ProcessExited(-9, "crash 2", loaded=True)
    pool.feed(exited(3, code=-9, reason="crash 3"))
    pool.feed(acquire("a", request=9))
    assert pool.refusal(9) == LoadFailedRefusal("a", ProcessExited(-9, "crash 3", loaded=True), 20.0)


def test_a_reading_of_a_runner_that_is_gone_hides_no_others() -> None:
    """It began before that one went."""
    pool = a_pool(each="2GiB").idle("a").idle("b")
    gone, kept = pool.runner("a"), pool.runner("b")
    reading = pool.sample()
    pool.feed(expire("a"), exited(gone), pool.sample())
    grown = tuple((runner, ((HOST, 2**31 + runner),)) for runner in (gone, kept))
    pool.core.step(pool.now, replace(reading, resident=grown))
    assert pool.core._state.ledger.accounts["runner", kept].resident == {HOST: 2**31 + kept}


def test_a_model_that_failed_is_remembered_although_its_file_is_gone() -> None:
    """Nothing was ever measured of it; its back-off holds all the same."""
    pool = a_pool().loading("a")
    pool.feed(exited(pool.runner("a"), 1, "no such layer"), pool.sample())
    pool.advance("11s")
    pool.declare("a", ModelNotFoundRefusal("a"))
    pool.feed(acquire("a", request=7))
    assert isinstance(pool.refusal(7), ModelNotFoundRefusal)
    assert pool.core._state.models["a"].failures == 1


# -- what a policy is told --------------------------------------------------------------------------------------------


class Listening:
    """A policy that orders by last use and keeps what it was told."""

    name = "listening"

    def __init__(self) -> None:
        self.told: dict[str, Candidate] = {}
        self.asked_at = 0.0

    def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        self.asked_at = now
        self.told = {one.model: one for one in candidates}
        self.outlooks = {one.model: (one.outlook(), one.outlook()) for one in candidates}
        return sorted(candidates, key=lambda one: one.used_at)


def test_an_outlook_is_of_the_rest_so_far_and_of_none_while_in_use() -> None:
    """Asked for twice it is the same; the time that a policy is told is the plan's."""
    policy = Listening()
    pool = a_pool(capacity="12GiB", policy=policy).idle("a").ready("b", lease=7)
    pool.advance("40s")
    pool.idle("a")
    pool.advance("30s")
    pool.feed(acquire("c", request=8))
    core, experience = pool.core._state, IdleTimeStatistics(pool.core._state.idle_intervals)
    assert policy.asked_at == pool.now
    assert policy.outlooks["a"] == (experience.forecast(core.models["a"].idle_intervals, 30.0),) * 2
    assert policy.outlooks["b"] == (experience.forecast(core.models["b"].idle_intervals, 0.0),) * 2


def test_a_policy_is_told_what_a_load_takes_where_a_runner_is() -> None:
    """One with fewer layers on GPUs may load faster or slower; one that still loads has no figure."""
    policy = Listening()
    pool = a_pool(capacity="64GiB", gpus=("8GiB",), policy=policy, min_residency_s=0.0, max_loads_per_gpu=2)
    pool.declare("m", layered(4, "512MiB")).declare("n", layered(4, "512MiB")).declare("x", layered(4, "1500MiB"))
    for duration, taken in (("2s", "6500MiB"), ("8s", "0B")):  # by others: the first goes there in part
        pool.strangers = {"gpu0": amount(taken)}
        pool.feed(pool.sample(), acquire("m", request := pool.request_id()))
        pool.advance(duration)
        pool.feed(loaded(pool.runner("m")), release(request))
        if duration == "2s":
            pool.feed(expire("m"))
            pool.settle()
    pool.loading("n", request=70)
    pool.feed(cancel(70))
    pool.advance("10s")
    pool.feed(acquire("x", request=71))
    assert (policy.told["m"].load_s, policy.told["n"].load_s) == (8.0, None)


def test_nobody_may_go_before_now() -> None:
    """What has passed of a bound, a residency or a rest is no time of its own."""
    pool = a_pool(min_residency_s=5.0).ready("a", lease=1)
    pool.advance("60s")
    pool.feed(cancel(99))
    core, runner = pool.core._state, pool.life("a")
    core.now = pool.now
    assert evictable_at(core, runner, bound=pool.now - 9) == pool.now
    pool.feed(release(1))
    pool.advance("60s")
    core.now = pool.now
    assert evictable_at(core, runner, bound=pool.now - 9) == pool.now


def test_two_idle_runners_go_in_the_policys_order_and_busy_ones_after_them() -> None:
    """However many leases a busy one holds."""
    pool = a_pool(capacity="14GiB", each="6GiB", max_wait_s=0.0, min_residency_s=0.0, policy=Listening())
    pool.ready("busy", lease=1)
    pool.advance("1s")
    pool.idle("idle")
    pool.feed(acquire("new", request=3))
    assert (pool.state("busy").value, pool.state("idle").value) == ("ready", "expiring")


# -- claims -----------------------------------------------------------------------------------------------------------


def test_a_claim_of_a_load_that_was_stopped_is_timed_no_longer_than_its_process_lives() -> None:
    """Its time is up for nobody then."""
    pool = a_pool(claims=True, stop_timeout_s=15.0).loading("a", request=1)
    pool.feed(unresponsive(1))
    assert ("claim", 1) in [key for _, key in pool.core._state.timers.items()]
    pool.feed(exited(1))
    assert ("claim", 1) not in [key for _, key in pool.core._state.timers.items()]


def test_the_journal_says_which_launch_went_ahead_without_its_devices() -> None:
    """With the model, the request and all devices by name."""
    pool = told(a_pool(claims=True, shares=False, gpus=("8GiB",), claim_timeout_s=60.0))
    pool.declare("g", layered(4, "1GiB", host="100MiB"))
    pool.feed(acquire("g", request=7))
    late = pool.core.late
    pool.feed(ClaimContended(1))
    assert pool.core.late == late
    pool.advance("60s")
    decisions = [entry for entry in pool.core.decision_log or () if isinstance(entry, Decision)]
    entry = next(entry for entry in decisions if entry.what == "launched")
    assert (entry.model, entry.request, entry.why) == ("g", 7, ClaimMissed((HOST, "gpu0"), 60.0))


def test_a_second_crash_in_a_row_is_no_lack_of_memory() -> None:
    """Those who wait for the next life are told the reason of this one."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(unresponsive(1), exited(1))
    pool.ready("a", lease=2)
    pool.feed(acquire("a", request=3, num_thread=5), unresponsive(2))
    refusal = pool.refusal(3)
    assert isinstance(refusal, LoadFailedRefusal)
    assert (refusal.reason, refusal.out_of_memory) == (NoAnswer(10.0), False)


def test_a_load_that_hangs_is_told_with_its_reason() -> None:
    """To everybody who waits for it."""
    pool = a_pool().loading("a", request=1)
    pool.feed(unresponsive(1))
    refusal = pool.refusal(1)
    assert isinstance(refusal, LoadFailedRefusal) and refusal.reason == NoAnswer(10.0)
