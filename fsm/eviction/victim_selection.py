"""Victim selection: the set of runners to evict, either the first of an order that suffice, or the cheapest.

The planner says whether a set suffices, and has to find a placement for it. The answer depends only on the bytes that
the set frees on each device, and more bytes never make it worse: so an answer for one set holds for many other sets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from fsm.eviction.policies import Candidate, EvictionPolicy

NO_COST = "a cost that is not a finite number"
_LONGEST_WORDS = 2000  # characters of an exception

Amount = tuple[int, ...]  # bytes by device, in some order that stays the same


@dataclass(frozen=True, slots=True)
class SelectionProblem:
    """What a set of victims has to achieve."""

    suffices: Callable[[Sequence[Candidate]], bool]
    frees: Callable[[Candidate], Amount]
    least: int = 0  # victims beside the mandatory ones that have to leave, whatever they free


@dataclass(frozen=True, slots=True)
class VictimSet:
    """The victims to evict, and the expected cost of their eviction."""

    victims: tuple[Candidate, ...]  # mandatory victims first
    cost_s: float | None = None  # sum of the costs of the chosen victims; None where the policy only orders


def in_words(error: BaseException) -> str:
    """Return an exception in words, or the name of its type where its own `repr` raises: it may be the user's own."""
    try:
        return repr(error)[:_LONGEST_WORDS]
    except BaseException:  # also exceptions that would end a program
        return type(error).__name__


def apply_policy(policy: EvictionPolicy, now: float, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return every candidate once, in a policy's order and with its costs; raises the exceptions of the policy.

    A candidate that the policy leaves out comes last: it may be the only one that suffices, and the request group would
    wait for ever.
    """
    known = {one.runner: one for one in candidates}
    order = policy.order(now, list(candidates))
    preferred = {one.runner: one.cost_s for one in order if one.runner in known}
    costs = [None if cost_s is None else float(cost_s) for cost_s in preferred.values()]  # it may be a user's number
    if not all(cost_s is None or math.isfinite(cost_s) for cost_s in costs):
        raise ValueError(NO_COST)
    ordered = [known.pop(runner) for runner in preferred]
    ordered = [
        one if cost_s is None else replace(one, cost_s=max(0.0, cost_s))
        for one, cost_s in zip(ordered, costs, strict=True)
    ]
    return [*ordered, *known.values()]


def choose_victims(
    now: float, ordered: Sequence[Candidate], mandatory: Sequence[Candidate], problem: SelectionProblem
) -> VictimSet | None:
    """Return the victims: all of `mandatory`, and some of `ordered`; None if all of them together do not suffice.

    Where every candidate has a cost, the cheapest set is chosen, tier by tier. Else as few candidates are chosen as
    suffice, the first preferred.
    """
    if any(candidate.cost_s is None for candidate in ordered):
        victims = smallest_prefix(ordered, mandatory, problem.suffices)
        return None if victims is None else VictimSet(tuple(victims))
    if problem.suffices(mandatory):
        return VictimSet(tuple(mandatory), 0.0)
    if not problem.suffices([*mandatory, *ordered]):
        return None
    return _cheapest(now, ordered, mandatory, problem)


def smallest_prefix(
    ordered: Sequence[Candidate], mandatory: Sequence[Candidate], suffices: Callable[[Sequence[Candidate]], bool]
) -> Sequence[Candidate] | None:
    """Return all of `mandatory` and as few of `ordered` as suffice, the first preferred; None if all do not suffice.

    Candidates are added one by one until the set suffices. Then each candidate that the set does without is removed.
    """
    chosen = list(mandatory)
    for candidate in ordered:
        if suffices(chosen):
            break
        chosen.append(candidate)
    if not suffices(chosen):
        return None
    for candidate in chosen[len(mandatory) :]:
        without = [other for other in chosen if other is not candidate]
        if suffices(without):
            chosen = without
    return chosen


def eviction_tier(candidate: Candidate, now: float) -> tuple[bool, bool, bool]:
    """Return the tier of a candidate, which counts before its cost: the lower, the earlier it is evicted.

    Candidates that may not leave yet come last, then busy candidates, then candidates with an infinite keep-alive.
    """
    return candidate.free_at > now, candidate.leases > 0, candidate.keep_alive_s == math.inf


def _cheapest(
    now: float, ordered: Sequence[Candidate], mandatory: Sequence[Candidate], problem: SelectionProblem
) -> VictimSet:
    """Return a cheap set that suffices, and touches no more tiers than have to be touched.

    Of the last of these tiers as cheap a part is taken as will do, then of the tier before it, beside that part, and so
    on down. Each part is the better of two greedy ones: the cheapest candidates first, and the cheapest by the byte.
    """
    groups = groupby(sorted(ordered, key=lambda one: eviction_tier(one, now)), lambda one: eviction_tier(one, now))
    tiers = [list(group) for _, group in groups]
    sets = SetOracle(problem, mandatory)
    last = next(count for count in range(1, len(tiers) + 1) if sets.suffice(_joined(tiers[:count])))
    chosen: list[Candidate] = []
    for place in range(last - 1, -1, -1):
        beside = [*chosen, *_joined(tiers[:place])]
        if not sets.suffice(beside):
            orders = [sorted(tiers[place], key=key) for key in (sets.cost_by_byte, _price)]
            found = [smallest_prefix(order, beside, sets.suffice) or () for order in orders]  # a whole tier suffices
            chosen += min((one[len(beside) :] for one in found), key=_cost)
    chosen.sort(key=_price)
    return VictimSet((*mandatory, *chosen), _cost(chosen))


def _joined(tiers: Iterable[Iterable[Candidate]]) -> list[Candidate]:
    return [candidate for tier in tiers for candidate in tier]


class SetOracle:
    """Tells whether a set of candidates suffices beside the mandatory victims; what a set frees answers for others."""

    def __init__(self, problem: SelectionProblem, mandatory: Sequence[Candidate]) -> None:
        self.problem = problem
        self.mandatory = mandatory
        self.too_little: list[Amount] = []  # what was freed by sets that did not suffice
        self.plenty: list[Amount] = []  # and by sets that did

    def suffice(self, chosen: Sequence[Candidate]) -> bool:
        """Tell whether a set suffices, by a placement only where no other set tells; an empty set does not."""
        if not chosen or len(chosen) < self.problem.least:
            return False
        freed = tuple(map(sum, zip(*map(self.problem.frees, chosen), strict=True)))
        if any(_within(freed, less) for less in self.too_little):
            return False
        if any(_within(more, freed) for more in self.plenty):
            return True
        suffices = self.problem.suffices([*self.mandatory, *chosen])
        (self.plenty if suffices else self.too_little).append(freed)
        return suffices

    def cost_by_byte(self, one: Candidate) -> tuple[float, float, int]:
        """Return an order by cost for each byte that is freed; a candidate that frees nothing comes last."""
        freed = sum(self.problem.frees(one))
        return (one.cost_s or 0.0) / freed if freed else math.inf, one.used_at, one.runner


def _price(one: Candidate) -> tuple[float, float, int]:
    return one.cost_s or 0.0, one.used_at, one.runner


def _cost(candidates: Iterable[Candidate]) -> float:
    return sum(candidate.cost_s or 0.0 for candidate in candidates)


def _within(one: Amount, other: Amount) -> bool:
    return all(map(int.__le__, one, other))
