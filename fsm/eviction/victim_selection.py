"""The set of runners to give up: the first ones of an order that suffice, or the cheapest ones.

Whether a set suffices is asked of whoever plans, and takes a placement to answer. It depends on nothing but what the
set frees on each device, and more never makes it worse: so what has been answered answers for many other sets too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

from fsm.eviction.policies import Candidate, EvictionPolicy

MOST_SETS = 500  # that are looked at for one plan; then the best so far is taken

NO_COST = "a cost that is not a finite number"
_LONGEST_WORDS = 2000  # characters of an exception

Amount = tuple[int, ...]  # bytes by device, in some order that stays the same


@dataclass(frozen=True, slots=True)
class SelectionProblem:
    """What has to be found out: which victims make room."""

    suffices: Callable[[Sequence[Candidate]], bool]
    frees: Callable[[Candidate], Amount]
    least: int = 0  # so many of those there is a choice of have to go, whatever they free
    most_sets: int = MOST_SETS


@dataclass(frozen=True, slots=True)
class VictimSet:
    """Whom to give up, and what that is expected to cost."""

    victims: tuple[Candidate, ...]  # forced ones first
    cost_s: float | None = None  # the sum of what the chosen ones cost; None where the policy only orders
    tried: int = 0  # sets that were looked at
    exact: bool = True  # none that may go before is cheaper; False: there were too many sets to know


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
        return VictimSet(tuple(forced), 0.0, 1)
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
    now: float, ordered: Sequence[Candidate], forced: Sequence[Candidate], question: SelectionProblem
) -> VictimSet:
    """Return the cheapest set. No more tiers are touched than have to be.

    Of the last of them as cheap a part as will do, then of the one before it, beside that part, and so on down.
    """
    groups = groupby(sorted(ordered, key=lambda one: eviction_tier(one, now)), lambda one: eviction_tier(one, now))
    tiers = [list(group) for _, group in groups]
    search = SetOracle(question, forced, len(ordered) and len(question.frees(ordered[0])))
    last = next(count for count in range(1, len(tiers) + 1) if search.enough(_joined(tiers[:count])))
    chosen: list[Candidate] = []
    for place in range(last - 1, -1, -1):
        beside = [*chosen, *_joined(tiers[:place])]
        if not search.enough(beside):
            chosen += BranchAndBound(search, tiers[place], beside).best
    chosen.sort(key=lambda one: (one.cost_s or 0.0, one.used_at, one.runner))
    return VictimSet((*forced, *chosen), _cost(chosen), search.tried, search.exact)


def _joined(tiers: Iterable[Iterable[Candidate]]) -> list[Candidate]:
    return [candidate for one in tiers for candidate in one]


class SetOracle:
    """What is known of sets, all of them beside the forced ones."""

    def __init__(self, question: SelectionProblem, forced: Sequence[Candidate], width: int) -> None:
        self.question = question
        self.forced = forced
        self.nothing = (0,) * width
        self.tried = 0
        self.exact = True
        self.too_little: list[Amount] = []  # what was freed by sets that did not suffice
        self.plenty: list[Amount] = []  # and by those that did

    def enough(self, chosen: Sequence[Candidate]) -> bool:
        """Tell whether a set suffices."""
        return self.judge(len(chosen), self.sum(map(self.question.frees, chosen)), lambda: chosen)

    def judge(self, count: int, freed: Amount, chosen: Callable[[], Sequence[Candidate]]) -> bool:
        """Tell whether a set of so many that frees so much suffices; planned only where no other set tells."""
        self.tried += 1
        if count < self.question.least or any(_within(freed, less) for less in self.too_little):
            return False
        if any(_within(more, freed) for more in self.plenty):
            return True
        suffices = self.question.suffices([*self.forced, *chosen()])
        (self.plenty if suffices else self.too_little).append(freed)
        return suffices

    def missing(self, freed: Amount) -> int:
        """Return how many more bytes have to be freed at least, where one amount alone decides; else 0."""
        return 1 + max(less for (less,) in self.too_little) - freed[0] if len(freed) == 1 and self.too_little else 0

    def sum(self, amounts: Iterable[Amount]) -> Amount:
        """Return what several free together."""
        return tuple(map(sum, zip(self.nothing, *amounts, strict=True)))


class BranchAndBound:
    """Branch and bound over the sets of one tier, all of which suffices: each in turn is taken, and left."""

    def __init__(self, search: SetOracle, tier: Sequence[Candidate], beside: Sequence[Candidate]) -> None:
        self.search = search
        self.beside = list(beside)
        self.order = sorted(tier, key=lambda one: _density(one, sum(search.question.frees(one))))
        self.costs = [one.cost_s or 0.0 for one in self.order]
        self.amounts = [search.question.frees(one) for one in self.order]
        backwards = accumulate(reversed(self.amounts), _plus, initial=search.nothing)
        self.left = list(backwards)[::-1]  # what all from a place on free together
        self.best = min((self._greedy(self.order), self._greedy(sorted(tier, key=_price))), key=_cost)
        self.best_cost = _cost(self.best)
        self._branch(0, [], search.sum(map(search.question.frees, beside)), 0.0)

    def _greedy(self, ordered: Sequence[Candidate]) -> list[Candidate]:
        """Return the first ones that suffice, without those that turn out not to be needed."""
        found = smallest_prefix(ordered, self.beside, self.search.enough)
        assert found is not None, "all of a tier suffices"
        return list(found[len(self.beside) :])

    def _branch(self, place: int, taken: list[Candidate], freed: Amount, cost: float) -> None:
        """Look at the sets of what is taken, which does not suffice, and any of those from `place` on."""
        search = self.search
        if place == len(self.order) or self._least(place, freed, cost) >= self.best_cost:
            return
        if search.tried >= search.question.most_sets:
            search.exact = False
            return
        count = len(self.beside) + len(taken)
        everything = _plus(freed, self.left[place])
        left = len(self.order) - place
        if not search.judge(count + left, everything, lambda: [*self.beside, *taken, *self.order[place:]]):
            return
        with_it, freed_with_it = [*taken, self.order[place]], _plus(freed, self.amounts[place])
        cost_with_it = cost + self.costs[place]
        if cost_with_it < self.best_cost:
            if search.judge(count + 1, freed_with_it, lambda: [*self.beside, *with_it]):
                self.best, self.best_cost = with_it, cost_with_it
            else:
                self._branch(place + 1, with_it, freed_with_it, cost_with_it)
        self._branch(place + 1, taken, freed, cost)

    def _least(self, place: int, freed: Amount, cost: float) -> float:
        """Return what any set that suffices costs at least: if parts could be given up, those cheapest by the byte."""
        missing = self.search.missing(freed)
        for each, amount in zip(self.costs[place:], self.amounts[place:], strict=True):
            if missing <= 0:
                return cost
            if amount[0] >= missing:
                return cost + each * missing / amount[0]
            missing -= amount[0]
            cost += each
        return cost if missing <= 0 else math.inf


def _density(one: Candidate, freed: int) -> tuple[float, float, int]:
    """Return an order by cost for each byte that is freed where it matters; who frees nothing there goes last."""
    return (one.cost_s or 0.0) / freed if freed else math.inf, one.used_at, one.runner


def _price(one: Candidate) -> tuple[float, float, int]:
    return one.cost_s or 0.0, one.used_at, one.runner


def _cost(candidates: Iterable[Candidate]) -> float:
    return sum(candidate.cost_s or 0.0 for candidate in candidates)


def _plus(one: Amount, other: Amount) -> Amount:
    return tuple(map(int.__add__, one, other))


def _within(one: Amount, other: Amount) -> bool:
    return all(map(int.__le__, one, other))
