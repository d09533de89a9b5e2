"""Which runners are evicted for other models, when, and which never are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from fsm.eviction.policies import POLICIES, Candidate, KeepAliveOrder, LeastRecentlyUsed
from fsm.eviction.reuse_prediction import IdleTimeStatistics
from fsm.eviction.victim_selection import smallest_prefix as choose
from fsm.machine.runner import RunnerState
from fsm.messages.commands import Grant, NotifyContention, Stop
from fsm.messages.reasons import RunnerStep, WaitFor, WaitForRunners
from fsm.planning.eviction_candidates import evictable_at
from tests.support.models import a_model
from tests.support.pool import (
    PoolUnderTest,
    a_pool,
    acquire,
    amount,
    cancel,
    exited,
    expire,
    launched,
    layered,
    loaded,
    preload,
    refused,
    release,
    stopped,
)

# -- which runners are evicted, and when ------------------------------------------------------------------------------


def test_an_idle_runner_goes_at_once_for_one_that_does_not_fit_beside_it() -> None:
    """S13: an idle runner is stopped at once for a model that does not fit beside it, which starts after the exit."""
    pool = a_pool().idle("a")
    assert pool.feed(acquire("b", request=1)) == [Stop(1)]
    assert pool.feed(exited(1)) == [pool.launch(2, "b")]


def test_s26_a_miss_is_a_signal_to_evict_not_an_error() -> None:
    """S26: a request whose memory a busy runner holds waits and does not fail."""
    pool = a_pool().ready("a", lease=1)
    assert refused(pool.feed(acquire("b", request=2))) == {}
    assert pool.waiting() == [2]


def test_a_victim_is_never_granted_again() -> None:
    """D01, rule 1: an expiring runner finishes its leases but takes no new ones."""
    pool = a_pool(capacity="8GiB").ready("a", lease=1)
    pool.feed(acquire("b", request=2))  # no room: "a" will be evicted
    pool.advance("120s")  # the bound on b's wait: "a" drains
    assert pool.feed(acquire("a", request=3)) == []
    assert pool.feed(release(lease=1)) == [Stop(runner=1)]


def test_d01_a_keep_alive_named_later_does_not_save_a_victim() -> None:
    """D01: a request with a long keep-alive does not save a draining victim, and the waiting request loads."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(acquire("b", request=2))
    pool.advance("120s")
    pool.feed(acquire("a", request=3, keep_alive="1h"), release(1))
    assert launched(pool.feed(exited(1))) == ["b"]


def test_d02_overlapping_requests_cannot_keep_a_victim_busy_for_ever() -> None:
    """D02: overlapping leases are served until the bound on the wait, and then the waiting request gets the memory."""
    pool = a_pool(max_wait_s=120.0).ready("a", lease=1)
    pool.feed(acquire("b", request=2))
    for lease in range(100, 220):
        pool.feed(acquire("a", request=lease), release(1 if lease == 100 else lease - 1))
        pool.advance("1s")
    assert pool.state("a") is RunnerState.expiring
    assert pool.feed(release(219)) == [Stop(1)]
    assert launched(pool.feed(exited(1))) == ["b"]


def test_a_busy_runner_is_left_alone_until_the_bound_on_the_wait() -> None:
    """A busy runner serves warm requests until the bound on the wait of another request is over (rule 5)."""
    pool = a_pool(max_wait_s=120.0).ready("a", lease=1)
    pool.feed(acquire("b", request=2))
    pool.advance("119s")
    assert pool.feed(acquire("a", request=3)) == [Grant(3, 1), NotifyContention(1, (3,))]
    assert pool.state("a") is RunnerState.ready


def test_a_victim_that_becomes_idle_before_the_bound_goes_then() -> None:
    """S14: a victim that becomes idle before the bound is stopped with its last release."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(acquire("b", request=2))
    pool.advance("10s")
    assert pool.feed(release(1)) == [Stop(1)]


def test_whatever_becomes_idle_first_serves_the_waiter() -> None:
    """A victim is only planned until it expires, so it stays when another runner becomes idle first."""
    pool = a_pool(each="4GiB").ready("a", lease=1).ready("b", lease=2)
    assert pool.feed(acquire("c", request=3)) == [NotifyContention(1, (1,))]
    assert pool.feed(release(2)) == [Stop(2)]
    pool.feed(exited(2))
    pool.advance("1h")
    assert pool.state("a") is RunnerState.ready


def test_d13_a_waiter_that_leaves_before_the_bound_costs_nobody_anything() -> None:
    """D13: a request that is cancelled while it waits causes no eviction afterwards."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(acquire("b", request=2), cancel(2))
    pool.advance("119s")
    assert pool.feed(release(1)) == []
    assert pool.state("a") is RunnerState.idle


def test_after_its_expiry_a_victim_goes_even_if_the_waiter_leaves() -> None:
    """A victim that expired is stopped after its last lease, even if the request left that it was chosen for."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(acquire("b", request=2))
    pool.advance("120s")
    pool.feed(cancel(2))
    assert pool.feed(release(1)) == [Stop(1)]


def test_no_more_goes_than_is_needed() -> None:
    """Of three idle runners the one that frees enough memory is evicted, and the others stay."""
    sizes = {"a": "1GiB", "b": "4GiB", "c": "3GiB", "d": "4GiB"}
    pool = a_pool(capacity="8GiB", sizes=sizes, policy=LeastRecentlyUsed())
    pool.idle("a").idle("b").idle("c")
    assert pool.feed(acquire("d", request=1)) == [Stop(pool.runner("b"))]


def test_nobody_goes_where_enough_is_on_its_way_out() -> None:
    """A second request that fits into memory that is being freed chooses no further victim."""
    pool = a_pool(capacity="8GiB", sizes={"a": "4GiB", "b": "4GiB", "c": "2GiB", "d": "2GiB"}).idle("a").idle("b")
    assert stopped(pool.feed(acquire("c", request=1))) == [1]
    assert stopped(pool.feed(acquire("d", request=2))) == []
    assert pool.waits_for(2) == WaitFor.memory
    assert launched(pool.feed(exited(1))) == ["c", "d"]


def test_d12_each_waiter_waits_for_its_own_memory() -> None:
    """D12: the exit of a runner starts only requests that fit into the memory that it frees."""
    pool = a_pool(capacity="8GiB", sizes={"a": "2GiB", "b": "6GiB", "c": "6GiB"}).expiring("a").ready("b", lease=1)
    pool.feed(acquire("c", request=2))
    assert pool.feed(exited(1)) == []
    assert pool.feed(release(1)) == [Stop(2)]


def test_several_victims_go_together_or_not_at_all() -> None:
    """An idle runner is not evicted for room of which a busy runner still holds the rest."""
    pool = a_pool(each="4GiB", sizes={"c": "8GiB"}).idle("a").ready("b", lease=1)
    assert pool.feed(acquire("c", request=2)) == [NotifyContention(2, (1,))]
    assert pool.state("a") is RunnerState.idle
    assert stopped(pool.feed(release(1))) == [1, 2]


def test_a_request_waits_for_the_runners_that_were_evicted_for_it() -> None:
    """A request names the runners that were evicted for it until they are gone, and no other request names them."""
    pool = a_pool("8GiB", each="4GiB", sizes={"large": "8GiB", "small": "1GiB"}).idle("a").idle("b")
    assert stopped(pool.feed(acquire("large", request=1), acquire("small", request=2))) == [1, 2]
    assert pool.waits_for(1) == WaitForRunners(("a", "b"), RunnerStep.leave)
    assert pool.waits_for(2) == WaitFor.earlier_requests
    pool.feed(exited(2))
    assert pool.waits_for(1) == WaitForRunners(("a",), RunnerStep.leave)
    assert launched(pool.feed(exited(1))) == ["large"]


def test_a_runner_that_is_loaded_again_is_not_evicted_for_an_older_request_that_counts_on_it() -> None:
    """An older request that waits for two runners does not name the one that leaves to be loaded again elsewhere."""
    pool = a_pool("16GiB", ["8GiB"], min_residency_s=0.0, max_runners=9)
    pool.declare("b", a_model((2**29,) * 4)).declare("c", "8GiB").declare("large", "15GiB")
    pool.idle("b", num_gpu=0).ready("c", lease=9)
    assert pool.feed(acquire("large", request=1)) == [NotifyContention(2, (9,))]
    assert stopped(pool.feed(acquire("b", request=2, num_gpu=99))) == [1]
    evicted = {group.spec.model: group.evicted for group in pool.core._state.groups.values()}
    assert evicted == {"large": (), "b": (1,)}
    assert pool.waits_for(2) == WaitFor.load
    assert stopped(pool.feed(release(9))) == [2]
    assert pool.waits_for(1) == WaitForRunners(("c",), RunnerStep.leave)


def test_a_runner_that_leaves_for_its_own_reasons_is_not_said_to_leave_for_a_request() -> None:
    """Memory of a runner that was not evicted for a request is memory that is being freed."""
    pool = a_pool("8GiB").idle("a")
    pool.feed(expire("a"), acquire("b", request=1))
    assert pool.waits_for(1) == WaitFor.memory


def test_one_model_books_room_once() -> None:
    """A lease and a preload of the same model evict what one runner of it needs."""
    pool = a_pool(each="4GiB", inspects=False)
    pool.inspects = True
    pool.idle("a").idle("b")
    pool.inspects = False
    pool.feed(acquire("c", request=1), preload("c", request=2))
    assert stopped(pool.feed(pool.inspection("c"))) == [1]


def test_a_runner_is_given_up_once_for_two_who_need_it_gone() -> None:
    """A runner is evicted once for two requests: one needs its memory, the other needs its model with other options."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(acquire("b", request=2), acquire("a", request=3, num_thread=2))
    assert stopped(pool.feed(release(1))) == [1]
    assert launched(pool.feed(exited(1))) == ["b"]


def test_a_load_that_nobody_waits_for_goes_before_anything_else() -> None:
    """Rule 4: a load that no request waits for is aborted before idle runners are evicted."""
    pool = a_pool(each="4GiB").idle("a").loading("b", request=1)
    pool.feed(cancel(1))
    assert pool.feed(acquire("c", request=2)) == [Stop(2)]


def test_a_load_that_somebody_waits_for_is_not_a_victim() -> None:
    """A load that a request waits for is not evicted, and a newer request waits until it has served."""
    pool = a_pool().loading("a", request=1)
    assert pool.feed(acquire("b", request=2)) == []
    pool.advance("200s")
    assert pool.state("a") is RunnerState.loading


# -- telling lease holders about waiting requests ---------------------------------------------------------------------


def test_holders_are_asked_once_when_others_want_their_memory() -> None:
    """A NotifyContention names a runner's leases, and a second request for the same memory sends none."""
    pool = a_pool().ready("a", lease=1).ready("a", lease=2)
    assert pool.feed(acquire("b", request=3)) == [NotifyContention(1, (1, 2))]
    assert pool.feed(acquire("c", request=4)) == []


def test_holders_are_asked_again_in_the_next_use() -> None:
    """A runner that was idle in between gets a new NotifyContention in its next use."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(acquire("b", request=2), cancel(2), release(1), acquire("a", request=3))
    assert pool.feed(acquire("b", request=4)) == [NotifyContention(1, (3,))]


def test_nobody_is_asked_for_an_idle_runner() -> None:
    """No NotifyContention is sent for an idle runner, because it has no lease holder."""
    pool = a_pool().idle("a")
    assert pool.feed(acquire("b", request=1)) == [Stop(1)]


# -- minimum residency ------------------------------------------------------------------------------------------------


def test_a_runner_that_was_just_loaded_keeps_its_place_for_a_while() -> None:
    """A runner that was just loaded is kept for its minimum residency, although the bound on a wait is over."""
    pool = a_pool(max_wait_s=6.0).loading("a", request=1)
    pool.advance("5s")
    pool.feed(acquire("b", request=2))
    pool.advance("2s")
    pool.feed(loaded(1))
    pool.advance("5.9s")  # the bound on the wait was over after 4 s
    assert pool.feed(acquire("a", request=3)) == [Grant(3, 1), NotifyContention(1, (3,))]
    pool.advance("0.1s")
    assert pool.feed(acquire("a", request=4)) == []  # the runner drains


def test_a_residency_that_was_set_holds_for_an_idle_runner_too() -> None:
    """A minimum residency from the settings keeps an idle runner too."""
    pool = a_pool(min_residency_s=7.0).ready("a", lease=1)
    pool.feed(release(1))
    assert pool.feed(acquire("b", request=2)) == []
    assert pool.advance("6.9s") == []
    assert pool.advance("0.1s") == [Stop(1)]


def rested(load: str, **limits: float) -> PoolUnderTest:
    """Return a pool with a runner whose load took so long and whose only lease has just been released."""
    pool = a_pool(**limits).loading("a", request=1)
    pool.advance(load)
    pool.feed(loaded(1), release(1))
    return pool


def test_a_runner_that_came_to_rest_is_kept_for_a_twentieth_of_its_load() -> None:
    """An idle runner is kept for a twentieth of its load time after its last release, and not for its residency."""
    pool = rested("4s")
    assert pool.feed(acquire("b", request=2)) == []
    assert pool.advance("0.19s") == []
    assert pool.advance("0.01s") == [Stop(1)]


def test_every_use_begins_the_rest_anew() -> None:
    """The grace after last use counts from the last release."""
    pool = rested("4s")
    pool.feed(acquire("b", request=2))
    for request in (3, 4, 5):
        pool.advance("0.15s")
        assert pool.feed(acquire("a", request)) == [Grant(request, 1), NotifyContention(1, (request,))]
        assert pool.feed(release(request)) == []
    assert pool.advance("0.2s") == [Stop(1)]


def test_a_rest_is_no_longer_than_a_second() -> None:
    """The grace after last use is 1 s at most."""
    pool = rested("100s")
    pool.feed(acquire("b", request=2))
    assert pool.advance("1s") == [Stop(1)]


def test_a_rest_ends_with_the_bound_on_the_wait() -> None:
    """The grace after last use ends with the bound on a request's wait."""
    pool = rested("100s", max_wait_s=0.5)
    pool.feed(acquire("b", request=2))
    assert pool.advance("0.5s") == [Stop(1)]


def test_a_runner_within_its_residency_still_serves() -> None:
    """A runner within its minimum residency serves warm requests while another request waits."""
    pool = a_pool(min_residency_s=30.0).ready("a", lease=1)
    pool.feed(release(1), acquire("b", request=2))
    assert pool.feed(acquire("a", request=3)) == [Grant(3, 1), NotifyContention(1, (3,))]


def test_those_beyond_their_residency_go_before_those_within_it() -> None:
    """A runner beyond its minimum residency is evicted before one within it that was used less recently."""
    pool = a_pool(each="4GiB", min_residency_s=30.0).ready("a", lease=1)
    pool.feed(release(1), preload("b", request=2), loaded(2))  # a preload has no residency
    assert stopped(pool.feed(acquire("c", request=3))) == [2]


def test_residency_does_not_keep_what_its_own_users_let_go() -> None:
    """A minimum residency keeps a runner neither from a keep-alive of 0 nor from an expire."""
    pool = a_pool(min_residency_s=30.0, capacity="16GiB").ready("a", lease=1, keep_alive=0).idle("b")
    assert pool.feed(release(1), expire("b")) == [Stop(1), Stop(2)]


def test_the_bound_on_a_wait_begins_with_the_wait() -> None:
    """The bound on a wait counts from the arrival of the oldest request of a request group."""
    pool = a_pool(max_wait_s=100.0).ready("a", lease=1)
    pool.feed(acquire("b", request=2))
    pool.advance("50s")
    pool.feed(acquire("b", request=3), acquire("c", request=4))
    assert pool.state("a") is RunnerState.ready
    pool.advance("50s")
    assert pool.state("a") is RunnerState.expiring


# -- the order of victims ---------------------------------------------------------------------------------------------


def a_candidate(runner: int, model: str, **fields: float) -> Candidate:
    known = {"held_bytes": 1, "keep_alive_s": 300.0, "used_at": 0.0, "load_s": 1.0, "leases": 0, "free_at": 0.0}
    return Candidate(runner, model, **(known | fields))


def test_s16_the_references_order_is_by_keep_alive_then_by_path() -> None:
    """S16, D14: the policy "keep-alive" orders by keep-alive, an infinite one last, and by path among equals."""
    candidates = [
        a_candidate(1, "d", keep_alive_s=math.inf),
        a_candidate(2, "c", keep_alive_s=60.0),
        a_candidate(3, "b", keep_alive_s=60.0),
        a_candidate(4, "a", keep_alive_s=300.0),
    ]
    assert [one.model for one in KeepAliveOrder().order(0.0, candidates)] == ["b", "c", "a", "d"]


def test_s16_lru_orders_by_last_use() -> None:
    """S16: the policy "lru" orders by last use, and runners with an infinite keep-alive come last."""
    candidates = [
        a_candidate(1, "a", used_at=1.0, keep_alive_s=math.inf),
        a_candidate(2, "b", used_at=3.0, keep_alive_s=1.0),
        a_candidate(3, "c", used_at=2.0, keep_alive_s=3600.0),
    ]
    assert [one.model for one in LeastRecentlyUsed().order(5.0, candidates)] == ["c", "b", "a"]


@pytest.mark.parametrize(("policy", "victim"), [("keep-alive", "b"), ("lru", "a")])
def test_s14_s16_the_victim_is_the_policys_first_choice(policy: str, victim: str) -> None:
    """S14: where one idle runner has to be evicted, the policy's order decides."""
    pool = a_pool(each="4GiB", policy=POLICIES[policy])
    pool.idle("a", keep_alive="10m")
    pool.advance("1s")
    pool.idle("b", keep_alive="1m")
    pool.feed(acquire("c", request=1))
    assert pool.state(victim) is RunnerState.expiring


@pytest.mark.parametrize("policy", ["keep-alive", "lru"])
def test_s16_idle_ones_go_before_busy_ones(policy: str) -> None:
    """S16: an idle runner is evicted before a busy one under both policies."""
    pool = a_pool(each="4GiB", policy=POLICIES[policy])
    pool.ready("a", keep_alive="1s").idle("b", keep_alive="1h")
    pool.feed(acquire("c", request=1))
    assert pool.state("b") is RunnerState.expiring


@pytest.mark.parametrize(("policy", "asked"), [("keep-alive", 2), ("lru", 1)])
def test_s16_of_busy_ones_the_policys_first_choice_is_drained(policy: str, asked: int) -> None:
    """S16: where every runner is busy, the policy's first choice is asked, and drained after the bound on the wait."""
    pool = a_pool(each="4GiB", policy=POLICIES[policy]).ready("a", lease=1, keep_alive="1h")
    pool.advance("1s")
    pool.ready("b", lease=2, keep_alive="1m")
    assert pool.feed(acquire("c", request=3)) == [NotifyContention(asked, (asked,))]
    pool.advance("120s")
    assert pool.life("ab"[asked - 1]).state is RunnerState.expiring


def test_a_policy_is_told_what_it_may_go_by() -> None:
    """A candidate has sizes, times and load seconds; runners that a request waits for are no candidates."""
    seen: list[Candidate] = []

    class Spy(LeastRecentlyUsed):
        def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
            seen.extend(candidates)
            return candidates

    pool = a_pool(policy=Spy(), each="2GiB", sizes={"c": "3GiB", "d": "5GiB"}).loading("a", request=1, keep_alive="1m")
    pool.advance("3s")
    pool.feed(loaded(1), release(1))
    pool.advance("4s")
    pool.loading("b", request=2).loading("c", request=3).feed(cancel(3), acquire("d", request=4))
    first, second = seen[:2]
    assert first == Candidate(1, "a", amount("2GiB"), 60.0, pool.now - 4.0, 3.0, 0, pool.now)
    assert (second.model, second.load_s, second.free_at) == ("c", None, pool.now)


def test_choose_takes_what_is_forced_whatever_suffices() -> None:
    """Mandatory victims are chosen even where there is room without them."""
    sibling, other = a_candidate(1, "a"), a_candidate(2, "b")
    assert choose([other], [sibling], lambda victims: True) == [sibling]


def test_choose_gives_none_where_all_do_not_suffice() -> None:
    """No victim is chosen where all candidates together do not free enough."""
    assert choose([a_candidate(1, "a")], [], lambda victims: len(victims) > 1) is None


def test_choose_drops_only_what_the_others_make_superfluous() -> None:
    """Of three candidates the two are chosen that free enough only together."""
    one, two, three = (a_candidate(runner, "abc"[runner], held_bytes=runner + 1) for runner in range(3))
    chosen = choose([one, two, three], [], lambda victims: sum(victim.held_bytes for victim in victims) >= 5)
    assert chosen == [two, three]


def test_choose_keeps_what_turned_out_not_to_be_needed() -> None:
    """Candidates are taken in order until they free enough, and those that later ones make superfluous are dropped."""
    small, large = a_candidate(1, "a", held_bytes=1), a_candidate(2, "b", held_bytes=4)
    chosen = choose([small, large], [], lambda victims: sum(one.held_bytes for one in victims) >= 4)
    assert chosen == [large]


# -- what a policy is told --------------------------------------------------------------------------------------------


class Listening:
    """A policy that orders by last use and keeps the candidates that it was given."""

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
    """A forecast starts at a runner's idle time so far, at 0 while it is busy, and is the same when asked twice."""
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
    """The load seconds of a candidate are those of its placement, and a runner that still loads has none."""
    policy = Listening()
    pool = a_pool(capacity="64GiB", gpus=("8GiB",), policy=policy, min_residency_s=0.0, max_loads_per_gpu=2)
    pool.declare("m", layered(4, "512MiB")).declare("n", layered(4, "512MiB")).declare("x", layered(4, "1500MiB"))
    for duration, taken in (("2s", "6500MiB"), ("8s", "0B")):  # other programs hold it: the first load is in part
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
    """A runner is never evictable before the present, whatever bound, residency or grace has passed."""
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
    """Idle runners are evicted in the policy's order before a busy one, however many leases that one has."""
    pool = a_pool(capacity="14GiB", each="6GiB", max_wait_s=0.0, min_residency_s=0.0, policy=Listening())
    pool.ready("busy", lease=1)
    pool.advance("1s")
    pool.idle("idle")
    pool.feed(acquire("new", request=3))
    assert (pool.state("busy").value, pool.state("idle").value) == ("ready", "expiring")
