"""The choice of victims: as cheap as any set that frees enough, by tiers, with a bound on the search."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fsm.eviction.policies import POLICIES, Candidate, ExpectedReloadCost, LeastRecentlyUsed
from fsm.eviction.victim_selection import (
    Amount,
    Suffices,
    VictimSet,
    apply_policy,
    choose_victims,
    eviction_tier,
    rank,
)
from fsm.machine.runner import RunnerState
from tests.support.pool import PoolUnderTest, a_pool, acquire, loaded, pin, release

NOW = 100.0


def a_candidate(runner: int, cost_s: float | None, held_bytes: int = 1, **fields: float) -> Candidate:
    known = {"keep_alive_s": 300.0, "used_at": 0.0, "load_s": 1.0, "leases": 0, "free_at": NOW}
    return Candidate(runner, f"model-{runner}", held_bytes, **(known | fields), cost_s=cost_s)


@dataclass(frozen=True)
class SelectionProblem:
    """What a set of victims has to achieve, and what each frees."""

    suffices: Suffices
    frees: Callable[[Candidate], Amount]
    least: int = 0

    def choose(self, candidates: Sequence[Candidate], mandatory: Sequence[Candidate] = ()) -> VictimSet | None:
        return choose_victims(rank(NOW, candidates, self.frees), mandatory, self.suffices, self.least)


def ask(needed: Sequence[int], amounts: dict[int, tuple[int, ...]], **how: int) -> SelectionProblem:
    """Return a problem: the bytes needed on each device, and the bytes that each runner frees there."""

    def suffices(victims: Sequence[Candidate]) -> bool:
        freed = [sum(amounts[victim.runner][device] for victim in victims) for device in range(len(needed))]
        return all(have >= need for have, need in zip(freed, needed, strict=True))

    return SelectionProblem(suffices, lambda candidate: amounts[candidate.runner], **how)


def one_device(candidates: Sequence[Candidate], needed: int, **how: int) -> SelectionProblem:
    return ask([needed], {one.runner: (one.held_bytes,) for one in candidates}, **how)


def models_of(choice: VictimSet | None) -> list[int]:
    assert choice is not None
    return [victim.runner for victim in choice.victims]


# -- against brute force ----------------------------------------------------------------------------------------------

AMOUNT = st.integers(0, 12)


@given(
    st.lists(st.tuples(st.integers(0, 40), AMOUNT, AMOUNT, st.booleans(), st.booleans()), min_size=1, max_size=7),
    st.tuples(st.integers(0, 30), st.integers(0, 30)),
    st.integers(1, 2),
)
@settings(max_examples=300, deadline=None)
def test_a_set_makes_room_touches_no_tier_in_vain_and_has_no_idle_member(
    drawn: list[tuple[int, int, int, bool, bool]], needed: tuple[int, int], devices: int
) -> None:
    """The set frees enough, touches no later tier than it must, and without any of its members frees too little."""
    candidates = [
        a_candidate(place, cost / 4, first + second, leases=int(busy), keep_alive_s=math.inf if kept else 300.0)
        for place, (cost, first, second, busy, kept) in enumerate(drawn)
    ]
    amounts = {place: one[1 : 1 + devices] for place, one in enumerate(drawn)}
    problem = ask(needed[:devices], amounts)
    chosen = problem.choose(candidates)
    every = [list(some) for count in range(len(drawn) + 1) for some in combinations(candidates, count)]
    enough = [some for some in every if problem.suffices(some)]
    if not enough:
        assert chosen is None
        return
    assert chosen is not None and problem.suffices(chosen.victims)
    assert chosen.cost_s == sum(one.cost_s or 0.0 for one in chosen.victims)
    assert not any(problem.suffices([one for one in chosen.victims if one is not kept]) for kept in chosen.victims)

    def last_tier(some: Sequence[Candidate]) -> tuple[bool, ...]:
        return max((eviction_tier(one, NOW) for one in some), default=())

    assert last_tier(chosen.victims) == min(map(last_tier, enough))


@given(
    st.lists(st.tuples(st.integers(1, 1000), st.integers(1, 100), st.integers(1, 100)), min_size=15, max_size=30),
    st.floats(0.05, 0.9),
)
@settings(max_examples=20, deadline=None)
def test_a_set_costs_no_more_than_either_plain_order(drawn: list[tuple[int, int, int]], part: float) -> None:
    """The set costs no more than the cheapest candidates, or the cheapest by the byte, with few placements tried."""
    candidates = [a_candidate(place, cost / 100, one + two) for place, (cost, one, two) in enumerate(drawn)]
    needed = [int(part * sum(one[device] for one in drawn)) for device in (1, 2)]
    problem = ask(needed, {place: one[1:] for place, one in enumerate(drawn)})
    planned = 0

    def suffices(victims: Sequence[Candidate]) -> bool:
        nonlocal planned
        planned += 1
        return problem.suffices(victims)

    chosen = replace(problem, suffices=suffices).choose(candidates)
    assert chosen is not None and chosen.cost_s is not None and problem.suffices(chosen.victims)
    known = {one.runner: one.cost_s or 0.0 for one in candidates}
    for key in (lambda one: known[one.runner], lambda one: known[one.runner] / one.held_bytes):
        in_turn = [replace(one, cost_s=None) for one in sorted(candidates, key=key)]
        plain = problem.choose(in_turn)
        assert plain is not None
        assert chosen.cost_s <= sum(known[victim.runner] for victim in plain.victims) + 1e-9
    assert planned <= 4 * len(candidates)


# -- what counts before costs -----------------------------------------------------------------------------------------


def test_several_cheap_ones_go_rather_than_a_dear_one() -> None:
    """Several cheap runners are evicted rather than one that costs more than all of them."""
    candidates = [a_candidate(1, 5.0, 10), a_candidate(2, 1.0, 5), a_candidate(3, 1.0, 5), a_candidate(4, 9.0, 5)]
    assert sorted(models_of(one_device(candidates, 10).choose(candidates))) == [2, 3]


def test_one_goes_rather_than_several_that_cost_more_together() -> None:
    """One runner is evicted rather than several that cost more together."""
    candidates = [a_candidate(1, 5.0, 10), a_candidate(2, 3.0, 5), a_candidate(3, 3.0, 5)]
    assert models_of(one_device(candidates, 10).choose(candidates)) == [1]


@pytest.mark.parametrize("later", [{"leases": 1}, {"free_at": NOW + 1}, {"keep_alive_s": math.inf}])
def test_idle_ones_that_suffice_go_before_cheaper_ones_of_a_later_tier(later: dict[str, float]) -> None:
    """Idle runners that free enough are evicted before a cheaper one that is busy, recent or kept for ever."""
    candidates = [a_candidate(1, 0.0, 10, **later), a_candidate(2, 50.0, 5), a_candidate(3, 50.0, 5)]
    assert sorted(models_of(one_device(candidates, 10).choose(candidates))) == [2, 3]


def test_beside_what_has_to_go_of_a_later_tier_no_more_than_needed_goes() -> None:
    """Where a busy runner has to be evicted and suffices, no idle one is evicted beside it."""
    candidates = [a_candidate(1, 5.0, 10, leases=1), a_candidate(2, 1.0, 5)]
    assert models_of(one_device(candidates, 10).choose(candidates)) == [1]


def test_as_many_processes_end_as_have_to() -> None:
    """As many runners are evicted as process slots are needed, even where memory suffices."""
    candidates = [a_candidate(1, 5.0, 10), a_candidate(2, 3.0, 0)]
    assert models_of(replace(one_device(candidates, 0), least=0).choose(candidates)) == []
    short = SelectionProblem(lambda victims: bool(victims), lambda one: (one.held_bytes,), least=1)
    assert models_of(short.choose(candidates)) == [2]


def test_what_is_forced_goes_first_and_costs_nothing_more() -> None:
    """Mandatory victims come first and add nothing to the cost."""
    forced, others = a_candidate(9, 7.0, 4), [a_candidate(1, 1.0, 6), a_candidate(2, 2.0, 6)]
    choice = one_device([forced, *others], 10).choose(others, [forced])
    assert choice is not None
    assert (models_of(choice), choice.cost_s) == ([9, 1], 1.0)


# -- what policies may return -----------------------------------------------------------------------------------------


class Own:
    """A policy of a user with given costs."""

    name = "own"

    def __init__(self, costs: dict[str, float | None]) -> None:
        self.costs = costs

    def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        return [replace(one, cost_s=self.costs[one.model], held_bytes=0) for one in candidates]


def test_a_policys_costs_are_taken_and_nothing_else_of_what_it_returns() -> None:
    """A policy's costs decide, and the bytes that its candidates claim to hold do not."""
    pool = a_pool(each="2GiB", policy=Own({"a": 3.0, "b": 2.0, "c": 2.0}), sizes={"a": "4GiB", "d": "4GiB"})
    pool.idle("a").idle("b").idle("c")
    pool.feed(acquire("d", request=1))
    assert pool.state("a") is RunnerState.expiring
    assert pool.state("b") is pool.state("c") is RunnerState.idle


def test_a_cost_that_is_not_a_number_is_a_fault_of_the_policy() -> None:
    """A cost that is not finite is a failure of the policy, and a negative one counts as 0."""
    pool = a_pool(policy=Own({"a": math.nan})).idle("a")
    pool.feed(acquire("b", request=1))
    assert pool.state("a") is RunnerState.expiring
    assert "not a finite number" in pool.core.policy_failure
    assert [one.cost_s for one in apply_policy(Own({"model-1": -1.0}), NOW, [a_candidate(1, None)])] == [0.0]


@pytest.mark.parametrize("how", [RuntimeError, SystemExit])
def test_a_policy_may_raise_what_cannot_tell_itself(how: type[BaseException]) -> None:
    """A policy may raise an exception whose repr raises too; its type is told then."""

    class Mute(Exception):
        def __repr__(self) -> str:
            raise how

    class Raising(LeastRecentlyUsed):
        def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
            raise Mute

    pool = a_pool(policy=Raising()).idle("a")
    pool.feed(acquire("b", request=1))
    assert pool.state("a") is RunnerState.expiring
    assert pool.core.policy_failure == "Mute"


def test_with_a_cost_for_some_only_the_order_decides() -> None:
    """Where only some candidates have a cost, the order decides."""
    candidates = [a_candidate(1, 5.0, 10), a_candidate(2, None, 10)]
    choice = one_device(candidates, 10).choose(candidates)
    assert choice is not None
    assert (models_of(choice), choice.cost_s) == ([1], None)


def test_a_decision_shows_whom_it_considered_and_what_each_would_cost() -> None:
    """A plan has every candidate that was considered, with its cost, and the victims."""
    pool = a_pool(policy=ExpectedReloadCost(), each="4GiB").idle("a").idle("b")
    pool.core.plans = []
    pool.feed(acquire("c", request=1))
    room = next(room for plan in pool.core.plans for room in plan.placements.values() if room.victims)
    assert {one.model for one in room.considered} == {"a", "b"}
    assert all(one.cost_s is not None for one in room.considered)
    assert set(room.victims) <= set(room.considered)


# -- the policy "reuse" -----------------------------------------------------------------------------------------------


def load(pool: PoolUnderTest, model: str, duration: str) -> None:
    """Load, use and release a model."""
    lease = pool.request_id()
    pool.loading(model, lease)
    pool.advance(duration)
    pool.feed(loaded(pool.runner(model)), release(lease))


def test_who_is_expected_back_soon_stays_though_it_was_used_less_recently() -> None:
    """A runner whose model is expected soon stays, although another was used more recently."""
    victims = {}
    for policy in (ExpectedReloadCost(), LeastRecentlyUsed()):
        pool = a_pool(each="4GiB", policy=policy, keep_alive_s=3600.0, min_residency_s=0.0)
        load(pool, "a", "5s")
        load(pool, "b", "5s")
        for minute in range(1, 41):
            pool.advance("60s")
            pool.idle("a")
            if minute % 10 == 0:
                pool.idle("b")
        pool.advance("30s")
        pool.feed(acquire("c", request=1))
        victims[policy.name] = [model for model in "ab" if pool.state(model) is RunnerState.expiring]
    assert victims == {"reuse": ["b"], "lru": ["a"]}


def test_of_two_that_are_used_alike_the_one_that_loads_faster_goes() -> None:
    """Of two models that are used alike, the one that loads faster is evicted."""
    pool = a_pool(each="4GiB", policy=ExpectedReloadCost(), min_residency_s=0.0)
    load(pool, "a", "50s")
    load(pool, "b", "5s")
    pool.advance("10s")
    pool.feed(acquire("c", request=1))
    assert pool.state("a") is RunnerState.idle
    assert pool.state("b") is RunnerState.expiring


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_pinned_is_never_given_up(policy: str) -> None:
    """A pinned runner is evicted under no policy."""
    pool = a_pool(each="4GiB", policy=POLICIES[policy]).idle("a").idle("b")
    pool.feed(pin("a"))
    pool.feed(acquire("c", request=1))
    assert pool.state("a") is RunnerState.idle
    assert pool.state("b") is RunnerState.expiring


@pytest.mark.parametrize("policy", ["reuse", "lru"])
def test_what_is_kept_for_ever_goes_last_of_the_idle(policy: str) -> None:
    """A runner that is kept for ever is evicted after other idle ones and before busy ones."""
    pool = a_pool(each="4GiB", policy=POLICIES[policy]).idle("a", keep_alive="forever").idle("b", keep_alive="1h")
    pool.advance("1s")
    pool.idle("b")
    pool.feed(acquire("c", request=1))
    assert pool.state("b") is RunnerState.expiring
    pool = a_pool(each="4GiB", policy=POLICIES[policy]).idle("a", keep_alive="forever").ready("b", lease=7)
    pool.feed(acquire("c", request=8))
    assert pool.state("a") is RunnerState.expiring


def test_the_same_is_chosen_from_the_same() -> None:
    """Two cores with the same events choose the same victims, and so does a copied core."""
    said = []
    for copies in (False, True):
        pool = a_pool(capacity="16GiB", each="4GiB", policy=ExpectedReloadCost(), max_runners=8, keep_alive_s=9e9)
        for place in range(12):
            pool.idle("abcd"[place % 4] if place % 3 else "a")
            pool.advance(f"{7 * place + 1}s")
            if copies:
                pool.core = pool.core.copy()
        said.append([*pool.feed(acquire("e", request=1)), *pool.feed(acquire("f", request=2))])
    assert said[0] == said[1]
