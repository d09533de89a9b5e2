"""The set of runners to give up: the first ones of an order that suffice, or the cheapest ones.

Whether a set suffices is asked of whoever plans, and takes a placement to answer. It depends on nothing but what the
set frees on each device, and more never makes it worse: so what has been answered answers for many other sets too.
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
    """What has to be found out: which victims make room."""

    suffices: Callable[[Sequence[Candidate]], bool]
    frees: Callable[[Candidate], Amount]
    least: int = 0  # so many of those there is a choice of have to go, whatever they free


@dataclass(frozen=True, slots=True)
class VictimSet:
    """Whom to give up, and what that is expected to cost."""

    victims: tuple[Candidate, ...]  # forced ones first
    cost_s: float | None = None  # the sum of what the chosen ones cost; None where the policy only orders


def in_words(error: BaseException) -> str:
    """Return what was raised in words, as far as it can tell itself: what a policy raises may be the user's own."""
    try:
        return repr(error)[:_LONGEST_WORDS]
    except BaseException:  # also what would end a program
        return type(error).__name__


def apply_policy(policy: EvictionPolicy, now: float, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates in a policy's order, with its costs; raises what it raises.

    Each of them once: one left out may be all that could make room, and who waits for it would for ever.
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
    now: float, ordered: Sequence[Candidate], forced: Sequence[Candidate], question: SelectionProblem
) -> VictimSet | None:
    """Return the victims: `forced` ones, and those of `ordered` that are to go with them; None if all do not suffice.

    Where all have a cost the cheapest set is taken, in tiers. Where they have none, as few as suffice, the first
    preferred.
    """
    if any(candidate.cost_s is None for candidate in ordered):
        victims = smallest_prefix(ordered, forced, question.suffices)
        return None if victims is None else VictimSet(tuple(victims))
    if question.suffices(forced):
        return VictimSet(tuple(forced), 0.0)
    if not question.suffices([*forced, *ordered]):
        return None
    return _cheapest(now, ordered, forced, question)


def smallest_prefix(
    ordered: Sequence[Candidate], forced: Sequence[Candidate], suffices: Callable[[Sequence[Candidate]], bool]
) -> Sequence[Candidate] | None:
    """Return `forced` ones, and as few of `ordered` as suffice, the first preferred; None if all do not.

    Taken one by one until they suffice, then those that turned out not to be needed are kept after all.
    """
    chosen = list(forced)
    for candidate in ordered:
        if suffices(chosen):
            break
        chosen.append(candidate)
    if not suffices(chosen):
        return None
    for candidate in chosen[len(forced) :]:
        without = [other for other in chosen if other is not candidate]
        if suffices(without):
            chosen = without
    return chosen


def eviction_tier(candidate: Candidate, now: float) -> tuple[bool, bool, bool]:
    """Return what counts before costs: who may not go yet goes last, then who is in use, then who is kept for ever."""
    return candidate.free_at > now, candidate.leases > 0, candidate.keep_alive_s == math.inf


def _cheapest(
    now: float, ordered: Sequence[Candidate], forced: Sequence[Candidate], problem: SelectionProblem
) -> VictimSet:
    """Return a cheap set that suffices, and touches no more tiers than have to be touched.

    Of the last of these tiers as cheap a part is taken as will do, then of the tier before it, beside that part, and so
    on down. Each part is the better of two greedy ones: the cheapest candidates first, and the cheapest by the byte.
    """
    groups = groupby(sorted(ordered, key=lambda one: eviction_tier(one, now)), lambda one: eviction_tier(one, now))
    tiers = [list(group) for _, group in groups]
    sets = SetOracle(problem, forced)
    last = next(count for count in range(1, len(tiers) + 1) if sets.suffice(_joined(tiers[:count])))
    chosen: list[Candidate] = []
    for place in range(last - 1, -1, -1):
        beside = [*chosen, *_joined(tiers[:place])]
        if not sets.suffice(beside):
            orders = [sorted(tiers[place], key=key) for key in (sets.cost_by_byte, _price)]
            found = [smallest_prefix(order, beside, sets.suffice) or () for order in orders]  # a whole tier suffices
            chosen += min((one[len(beside) :] for one in found), key=_cost)
    chosen.sort(key=_price)
    return VictimSet((*forced, *chosen), _cost(chosen))


def _joined(tiers: Iterable[Iterable[Candidate]]) -> list[Candidate]:
    return [candidate for tier in tiers for candidate in tier]


class SetOracle:
    """Tells whether a set of candidates suffices beside the forced ones; what one set frees answers for other sets."""

    def __init__(self, problem: SelectionProblem, forced: Sequence[Candidate]) -> None:
        self.problem = problem
        self.forced = forced
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
        suffices = self.problem.suffices([*self.forced, *chosen])
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
